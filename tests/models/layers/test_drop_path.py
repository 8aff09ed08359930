"""Drop path leaves out branches in training, as often as its rate says, and nothing in evaluation."""

from __future__ import annotations

import pytest
import torch

from tests.support.tiny_models import clip_config, siglip_config, tiny_vision
from vlm_train.contracts.media import MediaInput
from vlm_train.errors import ConfigError
from vlm_train.models.layers.drop_path import add_drop_path


def views(count: int = 4) -> MediaInput:
    values = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return MediaInput(values.expand(count, -1, -1, -1))


@pytest.mark.parametrize("config", [clip_config(), siglip_config()])
def test_evaluation_is_as_without(config: dict) -> None:
    torch.manual_seed(0)
    plain = tiny_vision(config, layer=-1).eval()
    torch.manual_seed(0)
    dropping = tiny_vision(config, layer=-1, drop_path=0.5).eval()
    assert torch.equal(plain.encode(views()).values, dropping.encode(views()).values)


def test_training_drops_branches_of_single_samples() -> None:
    torch.manual_seed(0)
    vision = tiny_vision(layer=-1, drop_path=0.5).train()
    outputs = vision.encode(views(64)).rectangular()
    kinds = {tuple(one.flatten()[:3].tolist()) for one in outputs}
    assert len(kinds) > 4, "the same picture, with different branches left out"


def test_the_rate_grows_and_the_mean_stays() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = torch.nn.Identity()

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.mlp(hidden)

    torch.manual_seed(0)
    layers = [Layer().train() for _ in range(3)]
    add_drop_path(layers, 0.4, setting="vision.drop_path")
    ones = torch.ones(20_000, 1, 1)
    shares = [float((layer(ones) == 0).float().mean()) for layer in layers]
    assert shares == pytest.approx([0.0, 0.2, 0.4], abs=0.02)
    assert float(layers[2](ones).mean()) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_wrong_rates_are_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match=r"vision\.drop_path: got .*; allowed"):
        tiny_vision(drop_path=rate)


def test_layers_without_branches_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"vision\.drop_path: Linear has no branch called"):
        add_drop_path([torch.nn.Linear(1, 1)], 0.1, setting="vision.drop_path")
