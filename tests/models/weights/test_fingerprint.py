"""A run notices that the files its parts were read from were exchanged."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from vlm_train.models.weights.fingerprint import hash_sources


class Part(nn.Module):
    def __init__(self, weights: str | None) -> None:
        super().__init__()
        self.weights = weights


def write_weights(folder: Path, value: float) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({"a": torch.full((70_000,), value), "b": torch.zeros(3)}, folder / "model.safetensors")
    return folder


def test_digests_follow_the_values_and_not_the_place(tmp_path: Path) -> None:
    first = write_weights(tmp_path / "first", 1.0)
    model = nn.ModuleDict({"vision": Part(str(first)), "llm": Part(None)})
    before = hash_sources(model)
    assert list(before) == ["vision"]
    model["vision"].weights = str(shutil.copytree(first, tmp_path / "copy"))
    assert hash_sources(model) == before
    write_weights(first, 2.0)
    model["vision"].weights = str(first)
    assert hash_sources(model) != before
    model["vision"].weights = str(tmp_path / "none")
    assert hash_sources(model) == {}
