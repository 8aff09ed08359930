"""RiceVision against MLCD of `transformers`, whose checkpoint LLaVA-OneVision-1.5 starts from (ds/merge_model.py)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import MLCDVisionConfig, MLCDVisionModel

from tests.models.test_counts import build, count
from tests.support.tiny_models import MEAN, STD, assert_close
from vlm_train.contracts.media import Grid3, MediaInput
from vlm_train.errors import AssetError, ConfigError
from vlm_train.models.vision.qwen import name_theirs
from vlm_train.models.vision.rice import RiceVision, place_class_tokens

PATCH, DIM = 4, 32
GRIDS = (Grid3(1, 4, 6), Grid3(1, 2, 2), Grid3(3, 6, 4), Grid3(1, 4, 4))
RENAMES = (
    (r"^patch_embed\.", "embeddings.patch_embedding."),
    (r"^class_embedding", "embeddings.class_embedding"),
    (r"^pre_layernorm", "pre_layrnorm"),
    (r"^layers\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.proj\.", ".self_attn.out_proj."),
)


def ours(**options: Any) -> RiceVision:
    torch.manual_seed(0)
    given: dict[str, Any] = {"dim": DIM, "depth": 3, "heads": 2, "mlp_dim": 64, "patch_size": PATCH} | options
    encoder = RiceVision(**given, image_mean=MEAN, image_std=STD)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return encoder


def to_mlcd(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our tensors under the library's names."""
    found = {}
    for name, value in state.items():
        for pattern, theirs in RENAMES:
            name = re.sub(pattern, theirs, name)
        if ".qkv." in name:
            for kind, part in zip("qkv", value.chunk(3), strict=True):
                found[name.replace(".qkv.", f".self_attn.{kind}_proj.")] = part
        else:
            found[name] = value.view(DIM, 3, PATCH, PATCH) if "patch_embedding" in name else value
    return found


def mlcd(encoder: RiceVision, side: int) -> tuple[Any, Any]:
    """The library's model for images of `side` patches squared, and the module that holds its parameters."""
    model: Any = MLCDVisionModel(
        MLCDVisionConfig(
            hidden_size=DIM, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, patch_size=PATCH,
            image_size=PATCH * side,
        )
    )  # fmt: skip
    inner = getattr(model, "vision_model", model)
    missing, unexpected = inner.load_state_dict(to_mlcd(encoder.state_dict()), strict=False)
    assert not unexpected and all(name.startswith("post_layernorm") for name in missing)
    return model, inner


def media(grids: tuple[Grid3, ...] = GRIDS) -> MediaInput:
    generator = torch.Generator().manual_seed(1)
    shape = (sum(grid.size for grid in grids), 3 * PATCH**2)
    values = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return MediaInput(values, grids, (1,) * len(grids))


def to_images(values: torch.Tensor, side: int) -> torch.Tensor:
    """Flat patches of square images -> normalized pixels `[N, 3, H, W]`."""
    pixels = (values.unflatten(1, (3, -1)) / 255 - torch.tensor(MEAN)[:, None]) / torch.tensor(STD)[:, None]
    patches = pixels.view(-1, side, side, 3, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, side * PATCH, side * PATCH)


def test_features_and_gradients_equal_transformers() -> None:
    encoder, shown = ours(), media((Grid3(1, 4, 4), Grid3(2, 4, 4)))  # an image, and a video of two frames
    model, inner = mlcd(encoder, 4)
    got = encoder.encode(shown).values
    expected = model(to_images(shown.values, 4)).last_hidden_state[:, 1:].flatten(0, 1)
    assert_close(got, expected, "features")
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(2))
    (got * weight).sum().backward()
    (expected * weight).sum().backward()
    gradients = to_mlcd({name: one.grad for name, one in encoder.named_parameters() if one.grad is not None})
    for name, parameter in inner.named_parameters():
        if not name.startswith("post_layernorm"):
            assert_close(gradients[name], parameter.grad, name, 3e-5 if name.endswith("k_proj.bias") else 1e-5)
    assert len(gradients) == sum(not name.startswith("post_layernorm") for name, _ in inner.named_parameters())


def test_views_together_are_those_alone() -> None:
    encoder, shown = ours(), media()
    together, first = encoder.encode(shown), 0
    assert together.grids == GRIDS
    for grid in GRIDS:
        frame = Grid3(1, grid.h, grid.w)
        for _ in range(grid.t):  # a frame sees no other one
            alone = encoder.encode(MediaInput(shown.values[first : first + frame.size], (frame,)))
            assert_close(together.values[first : first + frame.size], alone.values)
            first += frame.size


def test_class_tokens_stand_before_every_frame() -> None:
    index, kept = place_class_tokens([2, 3])
    assert index.tolist() == [0, 1, 2, 0, 3, 4, 5] and kept.tolist() == [1, 2, 4, 5, 6]


def test_it_is_traced_without_memory() -> None:
    with torch.device("meta"):
        features = ours().encode(MediaInput(torch.empty(media().values.shape, dtype=torch.uint8), GRIDS))
    assert features.values.is_meta and features.values.shape == (sum(grid.size for grid in GRIDS), DIM)


@pytest.mark.parametrize("prefix", ["model.visual.", "visual."])
def test_weights_are_read_from_a_whole_model(prefix: str, tmp_path: Path) -> None:
    """Names of ds/llavaonevision1_5/modeling_llavaonevision1_5.py."""
    encoder = ours()
    state = {prefix + name_theirs(key): value.clone() for key, value in encoder.state_dict().items()}
    assert {prefix + name for name in ("class_pos_emb", "blocks.2.attn.qkv.bias", "pre_layernorm.bias")} < set(state)
    kernel = f"{prefix}patch_embed.proj.weight"
    state[kernel] = state[kernel].view(DIM, 3, PATCH, PATCH)
    beside = {f"{prefix}merger.ln_q.weight": torch.ones(2), "lm_head.weight": torch.ones(3)}
    save_file(state | beside, tmp_path / "model.safetensors")
    other = ours(weights=str(tmp_path))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_weights()
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), encoder.parameters(), strict=True))
    with pytest.raises(AssetError, match=r"vision\.weights: .* does not fit the encoder"):
        ours(depth=2, weights=str(tmp_path)).load_weights()


def test_a_wrong_width_is_refused() -> None:
    with pytest.raises(ConfigError, match="vision.dim: got 32; allowed: a multiple of 4 times the 3 heads"):
        ours(heads=3)


def test_counts() -> None:
    """24 layers, embedding, class token and its angles, first norm; the merger; Qwen3-4B."""
    layers = 24 * (12 * 1024**2 + 13 * 1024)
    assert count(build("vision", "rice_vit_l14")) == layers + 3 * 14**2 * 1024 + 1024 + 32 + 2 * 1024
    merger = 2 * 1024 + 4096 * 4096 + 4096 + 4096 * 2560 + 2560
    assert count(build("connector", "rice_merger", in_dim=1024, out_dim=2560)) == merger
    assert count(build("llm", "qwen3_4b_2507")) == 4_022_468_096
