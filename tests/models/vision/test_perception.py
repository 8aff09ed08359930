"""PerceptionVision against the encoder's arithmetic written out view by view, rotations as complex numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from tests.models.test_counts import build, count
from tests.support.tiny_models import MEAN, STD, assert_close
from vlm_train.contracts.media import Grid3, MediaInput
from vlm_train.errors import AssetError, ConfigError
from vlm_train.models.vision.perception import PerceptionVision, resize_positions

PATCH, DIM, SIDE = 4, 24, 12
THEIRS = {
    "patch_embed.": "patch_embed.proj.",
    "class_token": "cls_token",
    "positions": "pos_embed",
    "layers.": "blocks.",
}


def ours(**options: Any) -> PerceptionVision:
    torch.manual_seed(0)
    given: dict[str, Any] = {"dim": DIM, "depth": 2, "heads": 2, "mlp_dim": 40, "patch_size": PATCH, "image_size": SIDE}
    encoder = PerceptionVision(**given | options, image_mean=MEAN, image_std=STD)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return encoder


def media() -> MediaInput:
    generator = torch.Generator().manual_seed(1)
    return MediaInput(torch.randint(0, 256, (3, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator))


def encode_view(state: dict[str, torch.Tensor], view: torch.Tensor, heads: int) -> torch.Tensor:
    """Features `[P, D]` of one view, as core/vision_encoder/{pe,rope}.py of facebookresearch/perception_models have."""
    pixels = (view / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    kernel = state["patch_embed.weight"].view(-1, 3, PATCH, PATCH)
    hidden, classes = F.conv2d(pixels[None], kernel, stride=PATCH)[0].flatten(1).T, int("class_token" in state)
    if classes:
        hidden = torch.cat([state["class_token"][None], hidden])
    hidden = hidden + state["positions"]
    channels, side = DIM // heads, SIDE // PATCH
    places = [(0, 0)] * classes + [(x + classes, y + classes) for y in range(side) for x in range(side)]
    powers = 10000.0 ** -(torch.arange(channels // 4) / (channels // 4))
    turns = torch.polar(torch.ones(()), torch.tensor(places)[:, :, None] * powers).flatten(1)  # [L, C / 2]

    def norm(values: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(values, (DIM,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def linear(values: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(values, state[f"{name}.weight"], state[f"{name}.bias"])

    def turn(values: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.view_as_complex(values.reshape(len(values), -1, 2)) * turns).flatten(1)

    hidden = norm(hidden, "norm_pre")
    for number in range(2):
        layer = f"layers.{number}"
        query, key, value = linear(norm(hidden, f"{layer}.norm1"), f"{layer}.attn.qkv").chunk(3, dim=-1)
        found = []
        for head in range(heads):
            q, k, v = (one[:, head * channels : (head + 1) * channels] for one in (query, key, value))
            found.append((turn(q) @ turn(k).T / channels**0.5).softmax(-1) @ v)
        branch = linear(torch.cat(found, dim=-1), f"{layer}.attn.proj")
        hidden = hidden + branch * state.get(f"{layer}.gamma_1", torch.ones(DIM))
        branch = linear(F.gelu(linear(norm(hidden, f"{layer}.norm2"), f"{layer}.mlp.fc1")), f"{layer}.mlp.fc2")
        hidden = hidden + branch * state.get(f"{layer}.gamma_2", torch.ones(DIM))
    return hidden[classes:]


@pytest.mark.parametrize(("class_token", "layer_scale"), [(True, None), (True, 0.1), (False, 0.1)])
def test_features_and_gradients_are_those_written_out(class_token: bool, layer_scale: float | None) -> None:
    encoder, shown = ours(class_token=class_token, layer_scale=layer_scale), media()
    features = encoder.encode(shown)
    assert features.grids == (Grid3(1, 3, 3),) * 3
    state = {name: one.detach().clone().requires_grad_() for name, one in encoder.named_parameters()}
    expected = torch.cat([encode_view(state, view, 2) for view in shown.values])
    assert_close(features.values, expected, "features")
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (features.values * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert_close(parameter.grad, state[name].grad, name)


def test_drop_path_is_the_same_in_every_layer_and_off_in_evaluation() -> None:
    encoder, shown = ours(drop_path=0.5), media()
    plain = ours().encode(shown).values
    assert_close(encoder.eval().encode(shown).values, plain)
    kept, layer = [], encoder.train().layers[0]
    layer.attn.register_forward_hook(lambda module, args, output: kept.append(output.flatten(1).abs().sum(1) > 0))
    for _ in range(40):
        encoder.encode(shown)
    assert 0.3 < torch.cat(kept).float().mean() < 0.7


def to_timm(encoder: PerceptionVision) -> dict[str, torch.Tensor]:
    """Names and shapes of timm's Eva, with what only whole images need, and one layer more."""
    state = {}
    for name, value in encoder.state_dict().items():
        for one, theirs in THEIRS.items():
            name = theirs + name.removeprefix(one) if name.startswith(one) else name
        value = value.view(DIM, 3, PATCH, PATCH) if name.startswith("patch_embed") else value
        state[name] = value[None, None] if name == "cls_token" else value[None] if name == "pos_embed" else value
    state |= {name.replace("blocks.1", "blocks.2"): value + 1 for name, value in state.items() if "blocks.1" in name}
    return {name: value.clone() for name, value in state.items()} | {
        name: torch.ones(2) for name in ("norm.weight", "attn_pool.latent", "head.weight")
    }


@pytest.mark.parametrize("prefix", ["", "model.vision_tower.timm_model.", "vision_tower."])
def test_weights_are_read_under_timm_s_names(prefix: str, tmp_path: Path) -> None:
    encoder = ours()
    beside = {"model.language_model.norm.weight": torch.ones(2), "lm_head.weight": torch.ones(2)} if prefix else {}
    save_file(
        {prefix + name: value for name, value in to_timm(encoder).items()} | beside, tmp_path / "model.safetensors"
    )
    other = ours(weights=str(tmp_path), layer_scale=0.1)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.fill_(0.1 if "gamma" in name else 7.0)
    other.load_weights()
    loaded = other.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in encoder.state_dict().items())
    assert all((value == 0.1).all() for name, value in loaded.items() if "gamma" in name), "the plain encoder has none"


@pytest.mark.parametrize(
    ("options", "change", "match"),
    [
        ({}, {"blocks.0.attn.q_norm.weight": torch.ones(4)}, "Unexpected key.*q_norm"),
        ({}, {"blocks.0.gamma_1": torch.ones(DIM)}, "Unexpected key.*gamma_1"),
        ({"depth": 4}, {}, "Missing key.*layers.3"),
        ({"mlp_dim": 48}, {}, "size mismatch"),
        ({"class_token": False}, {}, "Unexpected key.*class_token"),
    ],
)
def test_other_weights_are_refused(options: Any, change: Any, match: str, tmp_path: Path) -> None:
    save_file(to_timm(ours()) | change, tmp_path / "model.safetensors")
    with pytest.raises(AssetError, match=r"vision\.weights: .* does not fit the encoder: (?s:.*)" + match):
        ours(weights=str(tmp_path), **options).load_weights()


def test_positions_of_another_size_are_interpolated(tmp_path: Path) -> None:
    small = ours(image_size=8)
    save_file(to_timm(small), tmp_path / "model.safetensors")
    large = ours(weights=str(tmp_path))
    large.load_weights()
    first, grid = small.positions[0], small.positions[1:].view(2, 2, DIM)
    assert torch.equal(large.positions[0], first)
    found = large.positions[1:].view(3, 3, DIM)
    assert_close(found[1, 1], grid.mean((0, 1)))  # the middle lies between all four
    assert_close(found[0, 0], grid[0, 0])
    assert torch.equal(resize_positions(small.positions, 5, True), small.positions)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"heads": 5}, "vision.dim: got 24; allowed: a multiple of 4 times the 5 heads"),
        ({"image_size": 13}, "vision.image_size: got 13; allowed: a multiple of patch_size=4"),
        ({"drop_path": 1.0}, r"vision\.drop_path: got 1\.0"),
    ],
)
def test_wrong_numbers_are_refused(options: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        ours(**options)


def test_counts() -> None:
    """Layers, patch embedding, positions, class token, first norm."""
    layers = 23 * (12 * 1024**2 + 13 * 1024)
    assert count(build("vision", "pe_core_l14_448")) == layers + (3 * 14**2 + 1025 + 1 + 2) * 1024
    layers = 47 * (4 * 1536**2 + 2 * 1536 * 8960 + 9 * 1536 + 8960)
    assert count(build("vision", "pe_core_g14_448")) == layers + (3 * 14**2 + 1024 + 2) * 1536
