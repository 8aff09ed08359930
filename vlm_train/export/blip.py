"""To and from the BLIP of `transformers`, which has two classes for what is one model here.

`BlipForImageTextRetrieval` holds the encoder (ITC, ITM), `BlipForConditionalGeneration` the decoder (LM). Both have the
vision tower and what encoder and decoder share; a model is read from either, or from both.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm_train.data.processor import Processor
from vlm_train.errors import AssetError
from vlm_train.models.families.blip import Blip
from vlm_train.models.llms.blip_text import BlipTextModel
from vlm_train.models.vision.hf import HFVision
from vlm_train.models.weights.blip_names import CAPTIONING, RETRIEVAL, name_modules


def to_library(model: Blip, kind: str) -> dict[str, Tensor]:
    """The weights of `model` under the names of the class `kind`."""
    known = name_modules(kind, len(model.llm.layers))
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    found = {
        f"{known[m]}.{leaf}": t for name, t in state.items() for m, _, leaf in [name.rpartition(".")] if m in known
    }
    found |= {name.replace("vision.model.", "vision_model.", 1): t for name, t in state.items() if _is_tower(name)}
    if kind == CAPTIONING:
        bias = state["llm.head_bias"]
        found |= {f"text_decoder.cls.predictions.{name}": bias for name in ("bias", "decoder.bias")}
        found["text_decoder.cls.predictions.decoder.weight"] = state["llm.words.weight"]
    return found


@torch.no_grad()
def from_library(model: Blip, kind: str, theirs: Mapping[str, Tensor]) -> None:
    """Copy the weights of the class `kind` into `model`; what the class does not have stays as it is.

    Raises:
        AssetError: a tensor is missing, unknown, or of another shape.
    """
    own = to_library(model, kind)
    problems = [f"{name}: not in the checkpoint" for name in own if name not in theirs]
    problems += [f"{name}: unknown" for name in theirs if name not in own and not name.endswith("position_ids")]
    problems += [
        f"{name}: {list(theirs[name].shape)}, the model has {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in theirs and theirs[name].shape != tensor.shape
    ]
    if problems:
        raise AssetError(f"import: no {kind} checkpoint of this BLIP: {'; '.join(problems[:3])}")
    for name, tensor in own.items():
        tensor.copy_(theirs[name])


class BlipExporter:
    """Writes BLIP: one folder for retrieval, one for captioning."""

    def problems(self, model: Any) -> list[str]:
        return find_problems(model)

    def write(self, model: Any, processor: Processor, folder: Path) -> str:
        write_blip(model, folder, processor.tokenizer)
        return "one folder for retrieval and one for captioning"

    def verify(self, model: Any, folder: Path) -> float:
        return verify_blip(model, folder)


def find_problems(model: Any) -> list[str]:
    """Every reason why BLIP cannot express `model`. Reads no weight."""
    if type(model) is not Blip or not isinstance(model.llm, BlipTextModel):
        return [f"model: {type(model).__name__} has no BLIP equivalent; only Blip with BlipTextModel does"]
    vision = model.vision
    kind = vision.model.config.model_type if isinstance(vision, HFVision) else type(vision).__name__
    if kind != "blip_vision_model" or not vision.final_norm or not vision.keep_cls:
        return ["vision: BLIP takes a blip_vision_model with its class token and final norm, got " + kind]
    if vision.interpolates:
        return ["vision.image_size: BLIP does not interpolate positions; use null"]
    return []


def library_config(model: Blip, tokenizer: Any = None) -> Any:
    """The `BlipConfig` of `model`; `tokenizer` says what ends and pads a text."""
    from transformers import BlipConfig

    numbers = model.llm.numbers
    text = {
        name: getattr(numbers, name)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
            "layer_norm_eps",
        )
    }
    text |= {"hidden_dropout_prob": numbers.dropout, "attention_probs_dropout_prob": numbers.dropout}
    text |= {"bos_token_id": model.llm.decoder_start}
    if tokenizer is not None:
        ends = tokenizer.eos_token_id
        text |= {"eos_token_id": ends, "sep_token_id": ends, "pad_token_id": tokenizer.pad_token_id or 0}
    return BlipConfig(
        text_config=text,
        vision_config=model.vision.model.config.to_dict(),
        image_text_hidden_size=model.image_projection.out_features,
    )


def _classes() -> dict[str, Any]:
    from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval

    return {RETRIEVAL: BlipForImageTextRetrieval, CAPTIONING: BlipForConditionalGeneration}


def write_blip(model: Blip, folder: str | Path, tokenizer: Any = None) -> None:
    """Write `<folder>/retrieval` and `<folder>/captioning`, which plain `transformers` loads, each with the tokenizer.

    They have no image processor, for that of BLIP squashes pictures, whatever the run did.
    """
    config = library_config(model, tokenizer)
    for kind, blip in _classes().items():
        with torch.device("meta"):
            library = blip(config)
        library.load_state_dict(to_library(model, kind), strict=True, assign=True)
        library.tie_weights()
        library.save_pretrained(Path(folder) / kind)
        if tokenizer is not None:
            tokenizer.save_pretrained(Path(folder) / kind)


def verify_blip(model: Blip, folder: str | Path) -> float:
    """Read both folders with plain `transformers` and compare every weight. Returns 0: they are equal.

    Raises:
        AssetError: a weight is another one, missing or too many.
    """
    for kind, blip in _classes().items():
        state = to_library(model, kind)
        loaded = blip.from_pretrained(Path(folder) / kind, dtype=model.llm.words.weight.dtype).state_dict()
        for name in sorted(state.keys() | loaded.keys()):
            if name not in loaded or name not in state or not _equal_tensors(state[name], loaded[name]):
                raise AssetError(f"export: {Path(folder) / kind}: {name} is not the model's")
    return 0.0


def _is_tower(name: str) -> bool:
    return name.startswith("vision.model.")


def _equal_tensors(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.cpu(), other.cpu())
