"""An exporter and an importer of a user's own package: one file of safetensors, under the names of the parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file

from vlm_train.data.processor import Processor
from vlm_train.errors import AssetError

FILE = "plain.safetensors"


class PlainExporter:
    """Writes models with a linear connector."""

    def problems(self, model: Any) -> list[str]:
        kind = type(model.connector).__name__
        return [] if kind == "Linear" else [f"connector: {kind} is not linear"]

    def write(self, model: Any, processor: Processor, folder: Path) -> str:
        save_file({name: tensor.detach().clone() for name, tensor in model.named_parameters()}, folder / FILE)
        return f"{len(processor.tokenizer)} tokens"

    def verify(self, model: Any, folder: Path) -> float:
        if any(not torch.equal(load_file(folder / FILE)[name], one) for name, one in model.named_parameters()):
            raise AssetError(f"export: {folder} holds other weights")
        return 0.0


class PlainImporter:
    """Reads what `PlainExporter` writes."""

    def problems(self, folder: Path) -> list[str]:
        return [] if (folder / FILE).is_file() else [f"{folder} has no {FILE}"]

    def adapt(self, cfg: DictConfig, folder: Path) -> None:
        cfg.vision.weights = cfg.llm.weights = None

    @torch.no_grad()
    def read(self, model: Any, folder: Path) -> None:
        state = load_file(folder / FILE)
        for name, parameter in model.named_parameters():
            parameter.copy_(state[name])
