"""Weights that are handed over by parts."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from vlm_train.checkpoint.weights import load_weights


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 2)
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.temperature_of_others = nn.Parameter(torch.tensor(0.07))


def test_a_part_may_be_a_parameter_of_the_model_itself(tmp_path: Path) -> None:
    """BLIP's filter goes on with the temperature of its pre-training."""
    file, model = tmp_path / "weights.safetensors", Model()
    save_file({name: torch.full_like(p, 0.5) for name, p in model.state_dict().items()}, file)
    assert load_weights(model, file, ["temperature"]) == {"temperature"}
    assert model.temperature.item() == 0.5 and model.temperature_of_others.item() != 0.5
    assert not (model.head.weight == 0.5).any()
