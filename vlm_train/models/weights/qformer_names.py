"""The parameters of a Q-Former as others name them: `transformers` (BLIP-2, InstructBLIP), and BERT, its start.

A name of theirs becomes ours by the first pattern that fits. Ours are those of a `QFormerConnector`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

_PARTS = {"attention": "attention", "crossattention": "cross"}
_LAYER = r"qformer\.encoder\.layer\.(\d+)\."
_RULES: tuple[tuple[str, str], ...] = (
    (r"query_tokens", "qformer.queries"),
    (r"qformer\.layernorm\.(\w+)|qformer\.embeddings\.layernorm\.(\w+)", r"qformer.norm.\1\2"),
    (r"(?:qformer\.)?embeddings\.word_embeddings\.weight", "text.words.weight"),
    (r"(?:qformer\.)?embeddings\.position_embeddings\.weight", "text.positions.weight"),
    (_LAYER + r"attention\.attention\.(query|key|value)\.(\w+)", r"qformer.layers.\1.attention.\2.\3"),
    (_LAYER + r"attention\.output\.dense\.(\w+)", r"qformer.layers.\1.attention.output.\2"),
    (_LAYER + r"attention\.output\.LayerNorm\.(\w+)", r"qformer.layers.\1.attention.norm.\2"),
    (_LAYER + r"crossattention\.attention\.(query|key|value)\.(\w+)", r"qformer.layers.\1.cross.\2.\3"),
    (_LAYER + r"crossattention\.output\.dense\.(\w+)", r"qformer.layers.\1.cross.output.\2"),
    (_LAYER + r"crossattention\.output\.LayerNorm\.(\w+)", r"qformer.layers.\1.cross.norm.\2"),
    (_LAYER + r"intermediate_query\.dense\.(\w+)", r"qformer.layers.\1.feed.up.\2"),
    (_LAYER + r"output_query\.dense\.(\w+)", r"qformer.layers.\1.feed.down.\2"),
    (_LAYER + r"output_query\.LayerNorm\.(\w+)", r"qformer.layers.\1.feed.norm.\2"),
    (_LAYER + r"intermediate\.dense\.(\w+)", r"text.feeds.\1.up.\2"),
    (_LAYER + r"output\.dense\.(\w+)", r"text.feeds.\1.down.\2"),
    (_LAYER + r"output\.LayerNorm\.(\w+)", r"text.feeds.\1.norm.\2"),
)
_PROJECTION = r"language_projection\.(\w+)"


def our_name(name: str) -> str | None:
    """What a parameter of the library's BLIP-2 or InstructBLIP is called in our connector; None: not part of it."""
    for pattern, replacement in (*_RULES, (_PROJECTION, r"projection.\1")):
        if found := re.fullmatch(pattern, name):
            return found.expand(replacement)
    return None


def from_library(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The connector's part of the state of a `transformers` model, by our names."""
    named = {our_name(name): tensor for name, tensor in state.items()}
    return {name: tensor[0] if name == "qformer.queries" else tensor for name, tensor in named.items() if name}


def to_library(state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """A connector's state by the names that a `transformers` model has among `names`."""
    found = {name: state[own] for name in names if (own := our_name(name)) is not None and own in state}
    return {name: tensor[None] if name == "query_tokens" else tensor for name, tensor in found.items()}


def connector_state(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a connector with the state `own` takes from BERT, or from a model of `transformers` with a Q-Former."""
    found = from_bert(state, own) if is_bert(state) else from_library(state)
    return {name: tensor for name, tensor in found.items() if name in own}


def is_known(name: str) -> bool:
    """Whether a checkpoint's tensor may be part of a Q-Former's start."""
    return our_name(name) is not None or our_name(_bert_name(name)) is not None


def is_bert(names: Iterable[str]) -> bool:
    """Whether a checkpoint with these names is BERT's."""
    return not any(name.startswith("qformer.") for name in names)


def new_beside_bert(name: str) -> bool:
    """Whether a parameter of ours has no counterpart in BERT."""
    return ".cross." in name or name.startswith(("qformer.queries", "qformer.level_norms", "qformer.select"))


def from_bert(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a Q-Former takes from BERT (LAVIS `blip2_qformer.py`): self-attention, embeddings, and every FFN twice, for
    text and for queries. Queries and cross-attention stay as they are, and so do rows of added tokens.

    Args:
        state: of a `BertModel` or a model that holds one as `bert`.
        own: the connector's, for the rows that BERT lacks.
    """
    taken: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if (found := our_name(_bert_name(name))) is None:
            continue
        taken[found] = tensor
        if (text := re.fullmatch(r"text\.feeds\.(\d+)\.(.+)", found)) is not None:
            taken[f"qformer.layers.{text[1]}.feed.{text[2]}"] = tensor
    if (words := taken.get("text.words.weight")) is not None and "text.words.weight" in own:
        taken["text.words.weight"] = torch.cat([words, own["text.words.weight"][len(words) :].to(words)])
    return taken


def head_from_bert(state: Mapping[str, Tensor], bias: Tensor) -> dict[str, Tensor]:
    """What the head of a `Blip2QFormerModel` that generates text takes from BERT's; its `bias` is longer by the added
    tokens."""
    taken: dict[str, Tensor] = {}
    for theirs, own in (("transform.dense", "lm_head.0"), ("transform.LayerNorm", "lm_head.2")):
        for kind, old in (("weight", "gamma"), ("bias", "beta")):
            named = [f"cls.predictions.{theirs}.{one}" for one in (kind, old)]
            taken |= {f"{own}.{kind}": state[name] for name in named if name in state}
    if (found := state.get("cls.predictions.bias")) is not None:
        taken["lm_bias"] = torch.cat([found, bias[len(found) :].to(found)])
    return taken


def _bert_name(name: str) -> str:
    """BERT's name of a parameter as a Q-Former would have it; old files say gamma and beta."""
    name = name.removeprefix("bert.").replace("attention.self.", "attention.attention.")
    name = name.replace("embeddings.LayerNorm", "qformer.layernorm")
    name = re.sub(r"gamma$", "weight", re.sub(r"beta$", "bias", name))
    return f"qformer.{name}" if name.startswith("encoder.") else name
