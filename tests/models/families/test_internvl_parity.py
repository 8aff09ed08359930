"""PrefixVLM with tiles and pixel shuffle against InternVL of `transformers`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration
from transformers.models.internvl.modeling_internvl import InternVLModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger

from tests.support.parity import Media, assert_same_step, lay_out
from tests.support.tiny_models import assert_close, llama_config, tiny_llm, tiny_vision
from vlm_train.contracts.batch import Batch
from vlm_train.contracts.layout import PLACEHOLDER_ID
from vlm_train.contracts.media import Features, Grid3
from vlm_train.data.images.tiles import Tiles
from vlm_train.errors import ConfigError
from vlm_train.models.connectors.pixel_shuffle import PixelShuffleMLP
from vlm_train.models.families.prefix_vlm import PrefixVLM

IMAGE_TOKEN = 96
ROWS: dict[str, list[list[Media]]] = {
    "one tile": [[(32, 32)]],
    "many tiles": [[(300, 200)]],
    "several images": [[(64, 32), (33, 90)]],
    "text only": [[]],
    "mixed": [[(90, 60)], [(20, 170), (64, 64)], []],
}
INTERN_VIT = {
    "model_type": "internvl_vision",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": [32, 32],
    "patch_size": [8, 8],
    "use_qk_norm": True,
    "attention_bias": False,
}


def tiny_internvl() -> PrefixVLM:
    torch.manual_seed(0)
    vision = tiny_vision(INTERN_VIT, layer=-1)
    llm = tiny_llm(llama_config(model_type="qwen2"))
    model = PrefixVLM(vision=vision, connector=PixelShuffleMLP(in_dim=vision.out_dim, out_dim=llm.dim), llm=llm)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
            elif "lambda" in name or "position" in name:
                parameter.normal_()
        model.vision.tower.embeddings.position_embeddings.normal_()
    return model


def make_batch(model: Any, rows: Sequence[Sequence[Media]], *, left: bool = False) -> Batch:
    plan = Tiles(size=model.vision.image_size, patch_grid=model.vision.patch_grid, max_tiles=6)
    return lay_out(model, plan, rows, left=left)


def make_reference(model: Any) -> InternVLForConditionalGeneration:
    config = InternVLConfig(
        vision_config=model.vision.model.config.to_dict(),
        text_config=model.llm.model.config.to_dict(),
        image_token_id=IMAGE_TOKEN,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    reference = InternVLForConditionalGeneration(config)
    inner = reference.model
    inner.vision_tower.load_state_dict(model.vision.model.state_dict())
    projector, connector = inner.multi_modal_projector, model.connector
    projector.layer_norm.load_state_dict(connector.norm.state_dict())
    projector.linear_1.load_state_dict(connector.layers[0].state_dict())
    projector.linear_2.load_state_dict(connector.layers[2].state_dict())
    inner.language_model.load_state_dict(model.llm.model.model.state_dict())
    reference.lm_head.load_state_dict(model.llm.model.lm_head.state_dict())
    return reference


def reference_inputs(model: Any, batch: Batch) -> dict[str, Any]:
    stream, shown = batch.text["llm"], batch.media.inputs["vision"]
    pixels = (shown.values.float() / 255 - model.vision.get_buffer("mean")) / model.vision.get_buffer("std")
    ids = torch.where(stream.ids == PLACEHOLDER_ID, IMAGE_TOKEN, stream.ids)
    images = {"pixel_values": pixels[: shown.views_total]} if shown.views_total else {}
    return {"input_ids": ids, "attention_mask": (stream.segment_ids != 0).long(), **images}


@pytest.mark.parametrize("name", ROWS)
def test_logits_loss_and_gradients_equal_transformers(name: str) -> None:
    model = tiny_internvl()
    reference, batch = make_reference(model), make_batch(model, ROWS[name])
    inner = reference.model
    modules = {
        "vision.model.": inner.vision_tower,
        "connector.norm.": inner.multi_modal_projector.layer_norm,
        "connector.layers.0.": inner.multi_modal_projector.linear_1,
        "connector.layers.2.": inner.multi_modal_projector.linear_2,
        "llm.model.model.": inner.language_model,
        "llm.model.lm_head.": reference.lm_head,
    }
    assert_same_step(model, batch, reference(**reference_inputs(model, batch)).logits, modules)


def test_generation_equals_transformers() -> None:
    model = tiny_internvl().eval()
    reference, batch = make_reference(model).eval(), make_batch(model, ROWS["mixed"], left=True)
    inputs = reference_inputs(model, batch)
    expected = reference.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=[], pad_token_id=0)[:, -6:]
    assert torch.equal(model.generate(batch, max_new_tokens=6, eos_ids=[]), expected)


def test_256_tokens_a_tile() -> None:
    connector = PixelShuffleMLP(in_dim=8, out_dim=4)
    assert connector.token_grid(Grid3(1, 32, 32)).size == 256
    assert PixelShuffleMLP(in_dim=8, out_dim=4, factor=4).token_grid(Grid3(1, 32, 32)).size == 64  # nanoVLM


def test_neighbors_are_joined_as_by_internvl() -> None:
    values = torch.randn(3 * 6 * 4, 8)
    grid = Grid3(1, 6, 4)
    joined = PixelShuffleMLP(in_dim=8, out_dim=4)._join_neighbors(values.unflatten(0, (3, 24)), grid)
    square = torch.randn(2, 16, 8)
    ours = PixelShuffleMLP(in_dim=8, out_dim=4)._join_neighbors(square, Grid3(1, 4, 4))
    theirs = InternVLModel.pixel_shuffle(None, square.view(2, 4, 4, 8)).flatten(1, 2)  # type: ignore[arg-type]
    assert torch.equal(ours, theirs) and joined.shape == (3, 6, 32)


def test_the_wide_form_is_qwen2_vl_s_merger() -> None:
    torch.manual_seed(0)
    merger = PatchMerger(dim=12, context_dim=8)
    ours = PixelShuffleMLP(in_dim=8, out_dim=12, norm="patch", wide=True, eps=1e-6)
    ours.patch_norm.load_state_dict(merger.ln_q.state_dict())
    ours.layers.load_state_dict(merger.mlp.state_dict())
    patches = torch.randn(2 * 4 * 6, 8)
    features = ours(Features(patches, (Grid3(1, 4, 6), Grid3(1, 4, 6))))
    blocks = patches.view(2, 2, 2, 3, 2, 8).transpose(2, 3).reshape(-1, 8)  # Qwen orders patches by token
    assert_close(features.values, merger(blocks), "merger")
    assert features.grids == (Grid3(1, 2, 3), Grid3(1, 2, 3))


def test_a_grid_that_the_factor_does_not_divide_is_refused() -> None:
    connector = PixelShuffleMLP(in_dim=8, out_dim=4)
    with pytest.raises(ConfigError, match=r"connector\.factor: 2 does not divide the patch grid 27 x 27"):
        connector.token_grid(Grid3(1, 27, 27))
