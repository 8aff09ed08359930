"""A batch as the arguments of a whole model of `transformers`.

Legend: B rows, T tokens, N media items.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlm_train.contracts.batch import IGNORE, Batch, MediaBatch, TokenStream
from vlm_train.errors import BatchError
from vlm_train.models.hf_vlm.blank_row import add_row
from vlm_train.models.hf_vlm.row_images import CROSS_MASK, spread_over_rows

ANSWERS = ("paligemma",)
"""`model_type` whose `token_type_ids` tell the answer, which is causal, from what all tokens see (arXiv 2407.07726)."""


@dataclass(frozen=True)
class Wants:
    """What a model's forward pass takes.

    Attributes:
        names: of its arguments.
        image_id: the token that stands for a feature.
        type_ids: tokens that count as those of an image.
        answers: whether token types tell answers, see `ANSWERS`.
        rope: finds positions on several axes, the library's own `get_rope_index`; None: the model has one axis.
        rope_names: its arguments.
    """

    names: frozenset[str]
    image_id: int
    type_ids: tuple[int, ...]
    answers: bool
    rope: Any
    rope_names: frozenset[str]


def find_wants(whole: Any, image_id: int, type_ids: Collection[int]) -> Wants:
    """What the library's model takes."""
    modules = [whole, *whole.children()]
    rope = next((one.get_rope_index for one in modules if hasattr(one, "get_rope_index")), None)
    names = {name for one in (whole, whole.base_model) for name in inspect.signature(one.forward).parameters}
    return Wants(
        names=frozenset(names),
        image_id=image_id,
        type_ids=tuple(type_ids),
        answers=whole.config.model_type in ANSWERS,
        rope=rope,
        rope_names=frozenset(inspect.signature(rope).parameters if rope is not None else ()),
    )


def make_inputs(batch: Batch, stream: TokenStream, wants: Wants, *, blank: bool) -> dict[str, Any]:
    """The arguments for a stream's rows.

    Args:
        blank: a batch without images gets one more row, which shows the blank image: every rank then makes the same
            calls in the same order, and what comes before the language model gets gradients of zero.
    """
    shown = batch.media.inputs["vision"]
    check_order(stream, batch.media)
    ids = stream.ids.masked_fill(stream.ids < 0, wants.image_id)
    segments, answers = stream.segment_ids, _mark_answers(stream)
    adds, shows = blank and not shown.views_total, blank or bool(shown.views_total)
    if adds:
        row = torch.full((max(shown.grids[0].size, 1),), wants.image_id, device=ids.device)
        width = max(ids.shape[1], len(row))
        ids = add_row(ids, row, width)
        segments, answers = add_row(segments, torch.ones_like(row), width), add_row(answers, row < 0, width)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": (segments != 0).long()}
    fields = {name: one for name, one in shown.fields.items() if name in wants.names} if shows else {}
    if CROSS_MASK in wants.names and shows:
        inputs |= spread_over_rows(shown, batch.media.row.tolist() or [len(ids) - 1], ids, wants.image_id)
    else:
        inputs |= fields
    types = torch.isin(ids, torch.tensor(wants.type_ids, device=ids.device)).long()
    if "mm_token_type_ids" in wants.names:
        inputs["mm_token_type_ids"] = types
    if "token_type_ids" in wants.names:
        inputs["token_type_ids"] = answers.long() if wants.answers else types
    if wants.rope is not None and shows:
        given = {name: one for name, one in fields.items() if name in wants.rope_names}
        inputs["position_ids"] = find_rope_positions(wants.rope, ids, types, segments, given)
    elif wants.rope is None and shares_rows(stream):
        positions = stream.positions[0]
        inputs["position_ids"] = add_row(positions, torch.arange(len(row)), ids.shape[1]) if adds else positions
    return inputs


def find_rope_positions(rope: Any, ids: Tensor, types: Tensor, segments: Tensor, given: dict[str, Tensor]) -> Tensor:
    """`[A, B, T]`: positions of every sample as the library counts them for it alone.

    The library has to be asked sample by sample; ids and grids come to the host for it, once.
    """
    ids_, types_, segments_ = (one.cpu() for one in (ids, types, segments))
    spans = []
    for row in range(len(ids_)):
        for segment in range(1, int(segments_[row].max()) + 1 if segments_.shape[1] else 0):
            places = (segments_[row] == segment).nonzero().flatten()
            if len(places):
                spans.append((row, int(places[0]), len(places)))
    longest = max((length for _, _, length in spans), default=1)
    alone, kinds, real = (torch.zeros(len(spans), longest, dtype=torch.int64) for _ in range(3))
    for number, (row, start, length) in enumerate(spans):
        alone[number, :length] = ids_[row, start : start + length]
        kinds[number, :length] = types_[row, start : start + length]
        real[number, :length] = 1
    given = {name: one.cpu() for name, one in given.items()}
    found, _ = rope(input_ids=alone, mm_token_type_ids=kinds, attention_mask=real, **given)
    positions = found.new_zeros(found.shape[0], *ids.shape)
    for number, (row, start, length) in enumerate(spans):
        positions[:, row, start : start + length] = found[:, number, :length]
    return positions.to(ids.device)


def shares_rows(stream: TokenStream) -> bool:
    """Whether samples share rows, or branch, so that positions are not those of padded rows."""
    packed = any(len(row) > 1 for row in stream.sample_lengths or ())
    return not stream.plain_causal and (packed or stream.masked is not None)


def check_order(stream: TokenStream, media: MediaBatch) -> None:
    """Raises `BatchError` where images do not stand in the text in the order in which the model is given them."""
    if stream.slots.feature_index is not None:
        raise BatchError(
            f"model: the images of {', '.join(dict.fromkeys(media.keys))} stand in their text in another order than "
            "they are listed, or twice; a whole model of transformers takes each once, in order"
        )


def _mark_answers(stream: TokenStream) -> Tensor:
    """`[B, T]`, True at tokens that are learned: those whose predecessor has them as its label."""
    learned = stream.labels != IGNORE
    return F.pad(learned[:, :-1], (1, 0))
