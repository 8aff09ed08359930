"""PrefixVLM with AnyRes tiles against LLaVA-NeXT and LLaVA-OneVision of `transformers`: same weights, same pictures,
same counts, logits, loss, gradients and answers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)

from tests.support.parity import Media, assert_same_step, encode, lay_out, noise
from tests.support.tiny_models import clip_config, siglip_config, tiny_llm, tiny_vision
from vlm_train.contracts.batch import Batch
from vlm_train.contracts.layout import PLACEHOLDER_ID, MediaSize
from vlm_train.contracts.media import Grid3
from vlm_train.data.collate import join_views
from vlm_train.data.images.anyres import AnyRes
from vlm_train.data.media_layout import make_layout
from vlm_train.models.connectors.mlp import MLP
from vlm_train.models.families.prefix_vlm import PrefixVLM
from vlm_train.models.stitchers.unpad_newline import UnpadNewline, count_tokens
from vlm_train.models.vision.hf import fixed_grid

IMAGE_TOKEN, VIDEO_TOKEN = 96, 95
NEXT = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
FRAMES = 3

ROWS: dict[str, list[list[Media]]] = {
    "one image": [[(90, 60)]],
    "high image": [[(61, 97)]],
    "as large as a tile": [[(32, 32)]],
    "a thin line": [[(300, 2)]],
    "one column": [[(1, 40)]],
    "huge": [[(1033, 777)]],
    "several images": [[(64, 32), (33, 90)]],
    "text only": [[]],
    "mixed": [[(90, 60)], [(20, 70), (64, 64)], []],
}


def tiny_anyres(family: str) -> PrefixVLM:
    """A random model whose weights are large enough for images to matter: CLIP with its class token dropped, or SigLIP,
    whose last layer is read."""
    torch.manual_seed(0)
    patch = {"patch_size": 8}
    vision = tiny_vision(clip_config(**patch)) if family == "next" else tiny_vision(siglip_config(**patch), layer=-1)
    llm = tiny_llm()
    stitcher = UnpadNewline(out_dim=llm.dim, **({} if family == "next" else {"max_tiles": 2, "video_pool": 2}))
    connector = MLP(in_dim=vision.out_dim, out_dim=llm.dim)
    model = PrefixVLM(vision=vision, connector=connector, llm=llm, stitcher=stitcher)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
    return model


def make_plan(model: Any, family: str) -> AnyRes:
    grids: Any = NEXT if family == "next" else 3
    return AnyRes(size=model.vision.image_size, patch_grid=model.vision.patch_grid, grids=grids, frames=FRAMES)


def make_batch(model: Any, family: str, rows: Sequence[Sequence[Media]], *, left: bool = False) -> Batch:
    return lay_out(model, make_plan(model, family), rows, left=left)


def make_reference(model: Any, family: str) -> Any:
    next_ = family == "next"
    grids = NEXT if next_ else [(rows, columns) for rows in range(1, 4) for columns in range(1, 4)]
    config: Any = (LlavaNextConfig if next_ else LlavaOnevisionConfig)(
        vision_config=model.vision.model.config.to_dict(),
        text_config=model.llm.model.config.to_dict(),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-2 if next_ else -1,
        vision_feature_select_strategy="default" if next_ else "full",
        image_grid_pinpoints=[[32 * rows, 32 * columns] for rows, columns in grids],
        **({} if next_ else {"video_token_index": VIDEO_TOKEN, "vision_aspect_ratio": "anyres_max_2"}),
    )
    kind: Any = LlavaNextForConditionalGeneration if next_ else LlavaOnevisionForConditionalGeneration
    reference = kind(config)
    inner = reference.model
    inner.vision_tower.load_state_dict(model.vision.model.state_dict())
    inner.multi_modal_projector.linear_1.load_state_dict(model.connector.layers[0].state_dict())
    inner.multi_modal_projector.linear_2.load_state_dict(model.connector.layers[2].state_dict())
    inner.language_model.load_state_dict(model.llm.model.model.state_dict())
    reference.lm_head.load_state_dict(model.llm.model.lm_head.state_dict())
    inner.image_newline.data.copy_(model.stitcher.newline)
    return reference


def reference_inputs(model: Any, batch: Batch, rows: Sequence[Sequence[Media]]) -> dict[str, Any]:
    stream, shown = batch.text["llm"], batch.media.inputs["vision"]
    media = [medium for row in rows for medium in row]
    pixels = (shown.values.float() / 255 - model.vision.get_buffer("mean")) / model.vision.get_buffer("std")
    views = list(pixels[: shown.views_total].split(list(shown.view_counts)))
    images = [one for one, medium in zip(views, media, strict=True) if medium != "video"]
    videos = [one for one, medium in zip(views, media, strict=True) if medium == "video"]
    inputs: dict[str, Any] = {}
    if images:
        most = max(map(len, images))
        padded = [torch.cat([one, one.new_zeros(most - len(one), *one.shape[1:])]) for one in images]
        inputs["pixel_values"] = torch.stack(padded)
        inputs["image_sizes"] = torch.tensor([medium[::-1] for medium in media if medium != "video"])
    if videos:
        inputs["pixel_values_videos"] = torch.stack(videos)
    tokens = [VIDEO_TOKEN if medium == "video" else IMAGE_TOKEN for medium in media]
    placed = torch.cat(
        [torch.full((count,), token) for count, token in zip(batch.media.slot_counts, tokens)] or [torch.zeros(0)]
    )
    ids = stream.ids.masked_scatter(stream.ids == PLACEHOLDER_ID, placed.long())
    return {"input_ids": ids, "attention_mask": (stream.segment_ids != 0).long(), **inputs}


CASES = [(family, name) for family in ("next", "onevision") for name in ROWS]


@pytest.mark.parametrize(("family", "name"), CASES, ids=[" ".join(case) for case in CASES])
def test_logits_loss_and_gradients_equal_transformers(family: str, name: str) -> None:
    compare(family, ROWS[name])


def test_videos_beside_images_equal_onevision() -> None:
    compare("onevision", [["video"], [(90, 60)], [], [(40, 40), "video"]])


def compare(family: str, rows: Sequence[Sequence[Media]]) -> None:
    model = tiny_anyres(family)
    reference = make_reference(model, family)
    batch = make_batch(model, family, rows)
    inner = reference.model
    modules = {
        "vision.model.": inner.vision_tower,
        "connector.layers.0.": inner.multi_modal_projector.linear_1,
        "connector.layers.2.": inner.multi_modal_projector.linear_2,
        "stitcher.newline": inner.image_newline,
        "llm.model.model.": inner.language_model,
        "llm.model.lm_head.": reference.lm_head,
    }
    assert_same_step(model, batch, reference(**reference_inputs(model, batch, rows)).logits, modules)


@pytest.mark.parametrize("family", ["next", "onevision"])
def test_generation_equals_transformers(family: str) -> None:
    rows = ROWS["mixed"]
    model = tiny_anyres(family).eval()
    reference = make_reference(model, family).eval()
    batch = make_batch(model, family, rows, left=True)
    expected = reference.generate(
        **reference_inputs(model, batch, rows), max_new_tokens=6, do_sample=False, eos_token_id=[], pad_token_id=0
    )[:, -6:]
    assert torch.equal(model.generate(batch, max_new_tokens=6, eos_ids=[]), expected)


@pytest.mark.parametrize("family", ["next", "onevision"])
def test_counts_that_data_knows_are_those_that_the_model_makes(family: str) -> None:
    model = tiny_anyres(family)
    plan = make_plan(model, family)
    layout = make_layout(model, {"vision": plan})
    sizes = np.random.default_rng(0).integers(1, 400, (60, 2))
    items = [plan(encode(noise(int(width), int(height)))) for width, height in sizes]
    shown = join_views(items, plan)
    with torch.no_grad():
        features = model.stitcher(model.connector(model.vision.encode(shown)), shown)
    laid = layout([MediaSize(int(width), int(height)) for width, height in sizes])
    assert features.lengths == [*(slot.count for (slot,) in laid), 1]


def test_2880_tokens_before_unpadding_and_newlines() -> None:
    """5 x 576 tokens for 672 x 672 pixels, and as nothing is margin there, 48 newlines."""
    plan = AnyRes(size=(336, 336), patch_grid=partial(fixed_grid, grid=Grid3(1, 24, 24)))
    size = MediaSize(672, 672)
    assert sum(grid.size for grid in plan.grids(size)) == 2880
    assert count_tokens(plan.shape(size), plan.grids(size)) == 2880 + 48
