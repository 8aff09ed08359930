"""The parameters of BLIP as `transformers` names them, and BERT, its start."""

from __future__ import annotations

import re

from torch import Tensor

from vlm_train.errors import AssetError

RETRIEVAL, CAPTIONING = "retrieval", "captioning"


_TEXT = (
    ("words", "embeddings.word_embeddings"),
    ("positions", "embeddings.position_embeddings"),
    ("norm", "embeddings.LayerNorm"),
)


_ATTENTION = tuple((name, f"self.{name}") for name in ("query", "key", "value"))
_ATTENTION += (("output", "output.dense"), ("norm", "output.LayerNorm"))


_FEED = (("up", "intermediate.dense"), ("down", "output.dense"), ("norm", "output.LayerNorm"))


_LM_HEAD = (("transform.0", "predictions.transform.dense"), ("transform.2", "predictions.transform.LayerNorm"))


_MATCHING = (("image_projection", "vision_proj"), ("text_projection", "text_proj"), ("match_head", "itm_head"))


def name_modules(kind: str, layers: int) -> dict[str, str]:
    """Our names of modules -> theirs, of the class `kind`, but for the vision tower, which is under `vision_model`."""
    decodes = kind == CAPTIONING
    prefix = "text_decoder.bert." if decodes else "text_encoder."
    found = {f"llm.{ours}": f"{prefix}{theirs}" for ours, theirs in _TEXT}
    attentions = (("decoder_attention" if decodes else "encoder_attention", "attention"), ("cross", "crossattention"))
    for number in range(layers):
        mine, other = f"llm.layers.{number}.", f"{prefix}encoder.layer.{number}."
        for ours, theirs in attentions:
            found |= {f"{mine}{ours}.{a}": f"{other}{theirs}.{b}" for a, b in _ATTENTION}
        found |= {f"{mine}feed.{a}": f"{other}{b}" for a, b in _FEED}
    head = {f"llm.{ours}": f"text_decoder.cls.{theirs}" for ours, theirs in _LM_HEAD}
    return found | (head if decodes else dict(_MATCHING))


def bert_state(source: str, layers: int) -> dict[str, Tensor]:
    """The weights of a BERT under the names of `BlipTextModel`, for both of its self-attentions; what
    that lacks is left out.

    Raises:
        AssetError: they cannot be read.
    """
    from transformers import BertForMaskedLM

    try:
        state = BertForMaskedLM.from_pretrained(source, use_safetensors=True).state_dict()
    except (OSError, ValueError, RuntimeError) as error:
        raise AssetError(f"llm.weights: {source!r} is no readable BERT: {error}") from error
    theirs = {re.sub(r"^(bert|cls)\.", r"text_decoder.\1.", name): tensor for name, tensor in state.items()}
    found = {"head_bias": state["cls.predictions.bias"]}
    for ours, other in name_modules(CAPTIONING, layers).items():
        for leaf in ("weight", "bias"):
            if (tensor := theirs.get(f"{other}.{leaf}")) is not None:
                name = f"{ours}.{leaf}".removeprefix("llm.")
                found[name] = tensor
                found[name.replace("decoder_attention", "encoder_attention")] = tensor
    return found
