"""From Qwen2-VL and Qwen2.5-VL of `transformers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from vlm_train.errors import AssetError, ConfigError
from vlm_train.export.llava_import import (
    fill_language_model,
    find_wrong_kind,
    read_parts_later,
    read_whole,
    take_prefix,
)
from vlm_train.export.qwen_vl import choose_classes, find_problems
from vlm_train.models.vision.qwen import flatten_kernel, name_ours


class QwenVLImporter:
    """Reads local folders of Qwen2-VL and Qwen2.5-VL: config.json, safetensors and tokenizer."""

    def problems(self, folder: Path) -> list[str]:
        return find_wrong_kind(folder, ("qwen2_vl", "qwen2_5_vl"), "Qwen2-VL or Qwen2.5-VL")

    def adapt(self, cfg: DictConfig, folder: Path) -> None:
        read_parts_later(cfg, folder)

    def read(self, model: Any, folder: Path) -> None:
        if problems := find_problems(model):
            raise ConfigError(problems)
        state = read_whole(model, folder, choose_classes(model.llm.model.config.model_type)[0])
        visual = take_prefix(state, "model.visual.")
        tower = {
            name_ours(key): flatten_kernel(value) for key, value in visual.items() if not key.startswith("merger.")
        }
        try:
            model.vision.load_state_dict(tower)
            model.connector.patch_norm.load_state_dict(take_prefix(visual, "merger.ln_q."))
            model.connector.layers.load_state_dict(take_prefix(visual, "merger.mlp."))
        except RuntimeError as error:
            raise AssetError(f"import: {str(folder)!r} does not fit the model: {error}") from error
        fill_language_model(model.llm, state, folder)
