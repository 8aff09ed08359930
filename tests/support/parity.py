"""Batches of pictures laid out as in training, and the comparison of a step with a model of `transformers`."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.support.tiny_models import assert_close, text_stream
from tests.support.videos import video
from vlm_train.contracts.batch import Batch, MediaBatch
from vlm_train.contracts.layout import PLACEHOLDER_ID, MediaSize
from vlm_train.contracts.objective import StepContext
from vlm_train.data.collate import join_views
from vlm_train.data.media_layout import make_layout
from vlm_train.objectives.lm import LanguageModeling

Media = tuple[int, int] | str
"""Width and height of a picture; or "video"."""


def encode(pixels: np.ndarray) -> bytes:
    """A PNG file of pixels `[H, W, 3]`."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def noise(width: int, height: int) -> np.ndarray:
    """Random pixels `[height, width, 3]`, the same for the same size."""
    return np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def lay_out(model: Any, plan: Any, rows: Sequence[Sequence[Media]], *, left: bool = False) -> Batch:
    """Text with the media of every row in it, cut and laid out as in training."""
    layout = make_layout(model, {"vision": plan})
    texts, items = [], []
    for row in rows:
        ids = [5, 6]
        for medium in row:
            data = video(10, (64, 48)) if isinstance(medium, str) else encode(noise(*medium))
            size = MediaSize(64, 48, frames=10, seconds=1.0) if isinstance(medium, str) else MediaSize(*medium)
            ((slot,),) = layout([size])
            assert not isinstance(slot, str)
            ids += [PLACEHOLDER_ID] * slot.count + [7]
            items.append((plan(data), slot.count, len(texts)))
        texts.append([*ids, 8, 9, 10])
    media = MediaBatch(
        inputs={"vision": join_views([views for views, _, _ in items], plan)},
        slot_counts=tuple(count for _, count, _ in items),
        row=torch.tensor([row for _, _, row in items], dtype=torch.long),
        keys=tuple(f"sample{row}" for _, _, row in items),
    )
    return Batch(text={"llm": text_stream(texts, learn_from=1, left=left)}, media=media)


def assert_same_step(
    model: Any, batch: Batch, logits: torch.Tensor, modules: Mapping[str, Any], *, left_out: tuple[str, ...] = ()
) -> None:
    """Logits, loss and the gradients of all weights are those of a reference.

    Args:
        logits: of the reference, for the same batch, with its graph.
        modules: prefix of our names -> module of the reference with the rest of them; or name -> parameter.
        left_out: prefixes of our names that are not compared.
    """
    stream, seen = batch.text["llm"], batch.text["llm"].segment_ids != 0
    assert_close(model.logits(model(batch))[seen], logits[seen], "logits")
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), stream.labels.flatten(), ignore_index=-100)
    expected.backward()
    loss = LanguageModeling()(model, batch, StepContext())["lm"]
    (loss.sum / loss.count).backward()
    assert_close(loss.sum / loss.count, expected, "loss")

    ours, theirs = dict(model.named_parameters()), dict[str, Any]()
    for prefix, module in modules.items():
        named = {"": module} if isinstance(module, torch.nn.Parameter) else dict(module.named_parameters())
        theirs |= {prefix + key: one for key, one in named.items()}
    assert set(theirs) == {key for key in ours if not key.startswith(left_out)}
    for key, parameter in theirs.items():
        got, wanted = ours[key].grad, parameter.grad
        if wanted is None:
            assert got is None or not got.any(), key
            continue
        assert got is not None, key
        if key.startswith("vision.") and key.endswith("k_proj.bias"):  # shifts all scores of a query alike: no gradient
            assert got.abs().max() < 1e-6 and wanted.abs().max() < 1e-6, key
        else:
            assert_close(got, wanted, key)
