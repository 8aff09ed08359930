"""Two towers behind a gate: the formula, unlike grids and resolutions, weights, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.tiny_models import MEAN, STD, assert_close, clip_config
from vlm_train.contracts.layout import MediaSize
from vlm_train.contracts.media import MediaInput
from vlm_train.errors import ConfigError
from vlm_train.models.vision.gated import GatedVision
from vlm_train.models.vision.hf import HFVision


def tower(**changes: Any) -> HFVision:
    numbers = {name: changes.pop(name) for name in tuple(changes) if name in clip_config()}
    options = {"config": clip_config(**numbers), "layer": -1, "image_mean": MEAN, "image_std": STD} | changes
    return HFVision(**options)


def gated(**second: Any) -> GatedVision:
    torch.manual_seed(0)
    vision = GatedVision(first=tower(), second=tower(**({"hidden_size": 24} | second)))
    with torch.no_grad():
        vision.gate.weight.normal_()
    return vision


def pixels(size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def encode(vision: Any, size: int = 32) -> torch.Tensor:
    return vision.encode(MediaInput(pixels(size))).rectangular()


def test_the_formula() -> None:
    vision = gated()
    one, two = encode(vision.first), vision.project(encode(vision.second))
    gate = torch.sigmoid(torch.cat([one, two], dim=-1) @ vision.gate.weight.T + vision.gate.bias)
    assert gate.min() < 0.1 and gate.max() > 0.9 and gate.shape == (2, 4, 32)
    assert_close(encode(vision), gate * one + (1 - gate) * two)


def test_at_first_it_is_the_mean() -> None:
    vision = GatedVision(first=tower(), second=tower())
    one, two = encode(vision.first), vision.project(encode(vision.second))
    assert_close(encode(vision), (one + two) / 2)


def test_another_resolution_and_grid_are_brought_to_the_first_ones() -> None:
    vision = gated(image_size=48, patch_size=8)
    assert encode(vision.second, 48).shape == (2, 36, 24)
    features = encode(vision)
    assert features.shape == (2, 4, vision.out_dim) and vision.patch_grid(MediaSize(32, 32)) == (1, 2, 2)
    # Patches stay in their places: the second tower's upper half has a say in the upper half only.
    own = torch.zeros(1, 36, vision.out_dim)
    own[:, :18] = 1
    assert vision._to_grid(own)[0, :, 0].tolist() == [1, 1, 0, 0]


def test_both_towers_name_what_they_do_not_use() -> None:
    vision = GatedVision(first=tower(), second=tower(layer=-2))
    unused = vision.unused_parameters()
    assert any(name.startswith("second.model.") and ".layers.2." in name for name in unused)
    assert not any(name.startswith("first.") and ".layers." in name for name in unused)
    assert set(unused) <= {name for name, _ in vision.named_parameters()}


def test_each_tower_loads_its_own_weights(tmp_path) -> None:
    donors = GatedVision(first=tower(), second=tower(hidden_size=24))
    for name, one in (("first", donors.first), ("second", donors.second)):
        one.model.save_pretrained(tmp_path / name)
    vision = gated()
    vision.first.weights, vision.second.weights = (str(tmp_path / name) for name in ("first", "second"))
    vision.load_weights()
    for name, parameter in donors.named_parameters():
        if name.startswith(("first.", "second.")):
            assert torch.equal(parameter, vision.get_parameter(name)), name


def test_a_class_token_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"vision\.second\.keep_cls: true; allowed: false"):
        gated(keep_cls=True)
