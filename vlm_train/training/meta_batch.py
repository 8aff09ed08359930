"""A batch of shapes on the meta device: what a model is given when it is traced.

Legend: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vlm_train.contracts.batch import IGNORE, Batch, MediaBatch, Slots, TokenStream, TopTokenBatch
from vlm_train.contracts.layout import MediaSize, Slot
from vlm_train.contracts.model_parts import find_encoders
from vlm_train.data.media_layout import make_layout
from vlm_train.models.vision.example import (
    NATIVE_SIZE,
    OneView,
    blank_images,
    count_typical_patches,
    typical_size,
)


@dataclass(frozen=True)
class ExampleImage:
    """The image that stands for all: its size, and the plan that makes views of it for every encoder."""

    size: MediaSize
    plans: Mapping[str, Any]


def one_view(model: Any) -> ExampleImage:
    """An image of the tower's own size as one view."""
    encoders = find_encoders(model)
    sizes = [typical_size(encoder) for encoder in encoders.values()] or [NATIVE_SIZE]
    return ExampleImage(sizes[0], {name: OneView(encoder) for name, encoder in encoders.items()})


def visual_tokens(model: Any, image: ExampleImage | None = None) -> int:
    """Placeholder tokens that an image (None: one view) takes in the text; 0 where images stay out of it."""
    image = image or one_view(model)
    sizes = [image.size] if image.plans else []
    pieces = make_layout(model, image.plans)(sizes)
    return sum(piece.count for laid in pieces for piece in laid if isinstance(piece, Slot))


def count_patches(model: Any) -> int:
    """Patches of one image in all vision encoders, in each of its own size; 0 without one."""
    return sum(count_typical_patches(encoder) for encoder in find_encoders(model).values())


def meta_batch(
    model: Any,
    *,
    streams: Iterable[str],
    rows: int,
    text_tokens: int,
    supervised: int,
    images: int = 1,
    image: ExampleImage | None = None,
    columns: Iterable[str] = (),
    top_tokens: Iterable[str] = (),
) -> Batch:
    """A batch of shapes: `images` (if the model sees any) and `text_tokens` a row, the last `supervised` learned. Every
    image is like `image`; None: one view.

    `streams`, `columns` and `top_tokens` are those of the objectives; what else the model reads is added. A decoder's
    stream holds what is learned, and a stream that is only read the rest.
    """
    image = image or one_view(model)
    slots, encoders = visual_tokens(model, image), find_encoders(model)
    aligned = dict.fromkeys(streams, "causal") | dict(model.streams)
    asked = max(text_tokens - supervised, 1)
    text = {}
    with torch.device("meta"):
        for name, alignment in aligned.items():
            length = {"causal": text_tokens, "seq2seq": supervised, "none": asked}[alignment]
            shown = slots if alignment == "causal" or name == "llm" else 0
            text[name] = _meta_stream(rows, length, shown * images, 0 if alignment == "none" else supervised)
        media = MediaBatch(
            inputs={
                name: blank_images(encoder, image.plans[name], image.size, rows * images)
                for name, encoder in encoders.items()
            },
            slot_counts=(slots,) * (rows * images),
            row=torch.arange(rows).repeat_interleave(images),
            keys=("meta",) * (rows * images),
        )
        numbers = {name: torch.zeros(rows) for name in columns}
        ids = torch.zeros(rows * supervised, 1, dtype=torch.int64)
        told = {name: TopTokenBatch(ids=ids, logps=torch.zeros(rows * supervised, 1)) for name in top_tokens}
    return Batch(text=text, media=media, columns=numbers, top_tokens=told)


def _meta_stream(rows: int, text_tokens: int, slots: int, supervised: int) -> TokenStream:
    ids = torch.zeros(rows, slots + text_tokens, dtype=torch.int64)
    ones = torch.ones_like(ids, dtype=torch.int32)
    return TokenStream(
        ids=ids,
        labels=torch.full_like(ids, IGNORE),
        weights=torch.zeros_like(ids, dtype=torch.float32),
        positions=ids[None],
        segment_ids=ones,
        attention_group=torch.zeros_like(ones),
        slots=Slots(index=torch.zeros(rows * slots, dtype=torch.int64), placeholders=rows * slots),
        supervised=torch.zeros(rows * supervised, dtype=torch.int64),
        media_of_token=torch.zeros_like(ids),
    )
