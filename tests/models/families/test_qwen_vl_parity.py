"""PrefixVLM of native resolution and three position axes against Qwen2-VL and Qwen2.5-VL of `transformers`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.models.vision.test_qwen import in_blocks, ours, theirs
from tests.support.parity import Media, assert_same_step, encode, lay_out, noise
from tests.support.tiny_models import MEAN, STD, llama_config, tiny_llm
from vlm_train.contracts.batch import Batch
from vlm_train.contracts.layout import PLACEHOLDER_ID, MediaSize, Slot
from vlm_train.contracts.media import Grid3
from vlm_train.data.images.native import NativeResolution
from vlm_train.data.media_layout import make_layout
from vlm_train.data.text.mrope import MRopeLayout
from vlm_train.data.text.streams import PlacedSlot
from vlm_train.models.connectors.pixel_shuffle import PixelShuffleMLP
from vlm_train.models.families.prefix_vlm import PrefixVLM
from vlm_train.models.vision.qwen import count_patches

IMAGE_TOKEN, VIDEO_TOKEN = 96, 95
TOKENS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": VIDEO_TOKEN,
    "vision_start_token_id": 93,
    "vision_end_token_id": 94,
}
FPS = 6
ROWS: dict[str, list[list[Media]]] = {
    "one image": [[(40, 24)]],
    "a thin line": [[(300, 2)]],
    "several images": [[(64, 32), (33, 90)]],
    "text only": [[]],
    "a video": [["video"]],
    "mixed": [[(90, 60)], [(20, 70), "video", (16, 16)], []],
}


def tiny_qwen(kind: str) -> PrefixVLM:
    vision = ours(kind)
    model_type = "qwen2_vl_text" if kind == "qwen2" else "qwen2_5_vl_text"
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
    numbers = llama_config(model_type=model_type, rope_parameters=rope, tie_word_embeddings=False)
    llm = tiny_llm(numbers, tokens_per_second=None if kind == "qwen2" else 4)
    norm: Any = "patch" if kind == "qwen2" else "patch_rms"
    connector = PixelShuffleMLP(in_dim=vision.out_dim, out_dim=llm.dim, norm=norm, wide=True, eps=1e-6)
    model = PrefixVLM(vision=vision, connector=connector, llm=llm)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not name.startswith("vision."):
                parameter.mul_(3.0)
    return model


def make_plan(model: Any) -> NativeResolution:
    return NativeResolution(
        patch_size=model.vision.patch_size,
        patch_grid=model.vision.patch_grid,
        frames_per_patch=2,
        min_pixels=64,
        max_pixels=2048,
        fps=FPS,
        frames=8,
        frame_max_pixels=512,
    )


def make_reference(kind: str, model: Any) -> Any:
    encoder = theirs(kind, model.vision)
    whole: Any = Qwen2VLConfig if kind == "qwen2" else Qwen2_5_VLConfig
    vision = encoder.config.to_dict() | {"hidden_size": model.llm.dim} if kind == "qwen2" else encoder.config.to_dict()
    if kind != "qwen2":
        vision |= {"out_hidden_size": model.llm.dim, "tokens_per_second": 4}
    text = model.llm.model.config.to_dict()
    config = whole(text_config=text, vision_config=vision, tie_word_embeddings=False, **TOKENS)
    made: Any = Qwen2VLForConditionalGeneration if kind == "qwen2" else Qwen2_5_VLForConditionalGeneration
    reference = made(config)
    inner = reference.model
    state = {key: value for key, value in encoder.state_dict().items() if not key.startswith("merger.")}
    inner.visual.load_state_dict(state, strict=False)
    inner.visual.merger.ln_q.load_state_dict(model.connector.patch_norm.state_dict())
    inner.visual.merger.mlp.load_state_dict(model.connector.layers.state_dict())
    inner.language_model.load_state_dict(model.llm.model.model.state_dict())
    reference.lm_head.load_state_dict(model.llm.model.lm_head.state_dict())
    return reference


def reference_inputs(model: Any, batch: Batch, rows: Sequence[Sequence[Media]]) -> dict[str, Any]:
    """What the library takes: patches in squares of four, one grid an item, kinds of tokens."""
    stream, shown = batch.text["llm"], batch.media.inputs["vision"]
    media = [medium for row in rows for medium in row]
    pixels = (shown.values.unflatten(1, (3, -1)) / 255 - torch.tensor(MEAN)[:, None]) / torch.tensor(STD)[:, None]
    pixels, first, number = pixels.flatten(1), 0, 0
    found: dict[str, list[torch.Tensor]] = {"image": [], "video": []}
    grids: dict[str, list[Grid3]] = {"image": [], "video": []}
    for medium, count in zip(media, shown.view_counts, strict=True):
        kind = "video" if isinstance(medium, str) else "image"
        grid = shown.grids[number]._replace(t=count)
        found[kind].append(in_blocks(pixels[first : first + grid.size], (grid,)))
        grids[kind].append(grid)
        first, number = first + grid.size, number + count
    tokens = [VIDEO_TOKEN if isinstance(medium, str) else IMAGE_TOKEN for medium in media]
    placed = [torch.full((count,), token) for count, token in zip(batch.media.slot_counts, tokens, strict=True)]
    ids = stream.ids.masked_scatter(stream.ids == PLACEHOLDER_ID, torch.cat([*placed, torch.zeros(0)]).long())
    kinds = (ids == IMAGE_TOKEN).int() + 2 * (ids == VIDEO_TOKEN).int()
    inputs = {"input_ids": ids, "attention_mask": (stream.segment_ids != 0).long(), "mm_token_type_ids": kinds}
    if found["image"]:
        inputs |= {"pixel_values": torch.cat(found["image"]), "image_grid_thw": torch.tensor(grids["image"])}
    if found["video"]:
        inputs |= {"pixel_values_videos": torch.cat(found["video"]), "video_grid_thw": torch.tensor(grids["video"])}
        if model.llm.tokens_per_second:
            inputs["second_per_grid_ts"] = torch.tensor([1.0 / grid.t for grid in grids["video"]])
    return inputs


def modules_of(reference: Any) -> dict[str, Any]:
    inner = reference.model
    return {
        "connector.patch_norm.": inner.visual.merger.ln_q,
        "connector.layers.": inner.visual.merger.mlp,
        "llm.model.model.": inner.language_model,
        "llm.model.lm_head.": reference.lm_head,
    }


CASES = [(kind, name) for kind in ("qwen2", "qwen2.5") for name in ROWS]


def with_positions(
    model: Any, batch: Batch, rows: Sequence[Sequence[Media]], inputs: dict[str, Any], reference: Any
) -> Batch:
    """The batch with the positions of its layout, which are those of the library."""
    stream = batch.text["llm"]
    plan = make_plan(model)
    layout: Any = make_layout(model, {"vision": plan})
    positions = torch.zeros(3, *stream.ids.shape, dtype=torch.long)
    for number, row in enumerate(rows):
        real = (stream.segment_ids[number] != 0).nonzero().squeeze(1)
        slots, start = [], 2
        for medium in row:
            size = MediaSize(64, 48, frames=10, seconds=1.0) if isinstance(medium, str) else MediaSize(*medium)
            ((slot,),) = layout([size])
            slots.append(PlacedSlot(start, slot))
            start += slot.count + 1
        positions[:, number, real] = torch.from_numpy(layout.positions(len(real), slots))
    wanted = {key: inputs.get(key) for key in ("image_grid_thw", "video_grid_thw")}
    if "second_per_grid_ts" in inputs:
        wanted["second_per_grid_ts"] = inputs["second_per_grid_ts"]
    expected, _ = reference.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], attention_mask=inputs["attention_mask"], **wanted
    )
    seen = stream.segment_ids != 0
    assert torch.equal(positions[:, seen], expected[:, seen])
    return replace(batch, text={"llm": replace(stream, positions=positions)})


@pytest.mark.parametrize(("kind", "name"), CASES, ids=[" ".join(case) for case in CASES])
def test_logits_loss_and_gradients_equal_transformers(kind: str, name: str) -> None:
    model, rows = tiny_qwen(kind), ROWS[name]
    reference = make_reference(kind, model)
    batch = lay_out(model, make_plan(model), rows)
    inputs = reference_inputs(model, batch, rows)
    batch = with_positions(model, batch, rows, inputs, reference)
    for parameter in (*model.vision.parameters(), *reference.model.visual.parameters()):
        parameter.requires_grad_(False)  # tests/models/vision/test_qwen.py compares them
    for parameter in (*model.connector.parameters(), *reference.model.visual.merger.parameters()):
        parameter.requires_grad_(True)
    assert_same_step(model, batch, reference(**inputs).logits, modules_of(reference), left_out=("vision.",))


@pytest.mark.parametrize("kind", ["qwen2", "qwen2.5"])
def test_generation_equals_transformers(kind: str) -> None:
    model, rows = tiny_qwen(kind).eval(), ROWS["mixed"]
    reference = make_reference(kind, model).eval()
    batch = lay_out(model, make_plan(model), rows, left=True)
    inputs = reference_inputs(model, batch, rows)
    batch = with_positions(model, batch, rows, inputs, reference)
    expected = reference.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=[], pad_token_id=0)[:, -6:]
    assert torch.equal(model.generate(batch, max_new_tokens=6, eos_ids=[]), expected)


@pytest.mark.parametrize("size", [(40, 24), (300, 2), (333, 77), (8, 8), (1033, 777)])
def test_pixels_are_those_of_the_processor(size: tuple[int, int]) -> None:
    model = tiny_qwen("qwen2")
    processor = Qwen2VLImageProcessorPil(
        patch_size=4, size={"shortest_edge": 64, "longest_edge": 2048}, do_rescale=False, do_normalize=False
    )
    pixels = noise(*size)
    plan = make_plan(model)
    views = plan(encode(pixels))
    expected = processor(Image.fromarray(pixels), return_tensors="np")
    assert views.grids == (Grid3(*expected["image_grid_thw"][0].tolist()),) == plan.grids(MediaSize(*size))
    got = in_blocks(torch.from_numpy(views.values), views.grids)
    assert np.array_equal(got.numpy(), expected["pixel_values"].astype(np.uint8))


def test_64_tokens_for_224_pixels() -> None:
    """And two that stand around them, which the template writes: 66."""
    grid = partial(count_patches, patch_size=14, frames_per_patch=2)
    plan = NativeResolution(patch_size=14, patch_grid=grid, frames_per_patch=2)
    (patches,) = plan.grids(MediaSize(224, 224))
    assert PixelShuffleMLP(in_dim=8, out_dim=4).token_grid(patches).size == 64


def test_text_goes_on_behind_the_largest_position() -> None:
    layout = MRopeLayout(lambda sizes: [], tokens_per_second=2)
    clip = PlacedSlot(2, Slot(0, 12, Grid3(6, 1, 2), seconds=6.0))
    positions = layout.positions(16, [clip])
    assert positions[0].tolist() == [0, 1, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 13, 14]
    assert positions[:, 14].tolist() == [13, 13, 13]
    assert positions[1, 2:14].tolist() == [2] * 12 and positions[2, 2:14].tolist() == [2, 3] * 6
