"""Whole models of `transformers` as the folder that the library reads: what it gave, with what was learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm_train.data.processor import Processor
from vlm_train.errors import AssetError
from vlm_train.export.merged import find_quantized, merged_state
from vlm_train.export.shared import require_same_logits
from vlm_train.models.families.hf_vlm import HFVLM, build_whole
from vlm_train.models.hf_vlm.inputs import make_inputs
from vlm_train.models.hf_vlm.parts import Part
from vlm_train.models.hf_vlm.probe import make_probe


class HFVLMExporter:
    """Writes the model's own class and its processor, adapters folded in."""

    def problems(self, model: Any) -> list[str]:
        if not isinstance(model, HFVLM):
            return [f"model: {type(model).__name__} is no whole model of transformers"]
        if layer := find_quantized(model):
            return [f"{layer}: is quantized; its adapter can only be merged into an unquantized base model"]
        return []

    def write(self, model: Any, processor: Processor, folder: Path) -> str:
        state = model.library_state({name: merged_state(part) for name, part in _list_parts(model)})
        with torch.device("meta"):
            whole, _ = build_whole(model.whole.config, "sdpa", "sdpa")
        kept = {name: one for name, one in state.items() if name in whole.state_dict()}
        missing = whole.load_state_dict(kept, strict=False, assign=True).missing_keys
        whole.tie_weights()
        if lost := [name for name in missing if whole.get_parameter(name).is_meta]:
            raise AssetError(f"export: {type(whole).__name__} has parameters that no part holds: {', '.join(lost[:3])}")
        whole.generation_config = _name_tokens(whole.generation_config, processor)
        whole.save_pretrained(folder)
        model.processor.inner.save_pretrained(folder)
        return "the model's own processor and chat template"

    @torch.no_grad()
    def verify(self, model: Any, folder: Path) -> float:
        from transformers import AutoModelForImageTextToText

        parameter = next(model.llm.parameters())
        served, report = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=parameter.dtype, output_loading_info=True
        )
        if report["missing_keys"] or report["unexpected_keys"]:
            missing, more = sorted(report["missing_keys"])[:3], sorted(report["unexpected_keys"])[:3]
            raise AssetError(f"export: {folder} is missing {missing}, has {more} too many")
        served = served.to(parameter.device).eval()
        batch = make_probe(model).to(parameter.device)
        theirs = served(**make_inputs(batch, batch.text["llm"], model.wants, blank=True)).logits
        return require_same_logits(model.logits(model(batch)), theirs, folder)


def _list_parts(model: nn.Module) -> list[tuple[str, Part]]:
    return [(name, part) for name, part in model.named_children() if isinstance(part, Part)]


def _name_tokens(config: Any, processor: Processor) -> Any:
    tokenizer = processor.tokenizer
    config.eos_token_id = list(processor.end_ids) or tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    return config
