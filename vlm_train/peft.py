"""Adapters: thin wrappers of `peft`. They change the model in place, after its weights are read."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from vlm_train.errors import ConfigError


def lora(*, model: Any, match: str = r"llm\..*", rank: int = 16, alpha: int = 32, dropout: float = 0.0) -> list[str]:
    """Put LoRA adapters on linear layers of `model.llm`, all but its head (Hu et al. 2021, arXiv 2106.09685).

    `match` is a regex over the full name of a module, such as `llm.model.model.layers.0.self_attn.q_proj`, so that a
    layer of the same name in the vision tower is never taken by accident. Returns the adapted names.

    Raises:
        ConfigError: nothing, or something outside `llm`, matches.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = _matching(model, match)
    inside = [name.removeprefix("llm.") for name in names]
    # One full name each: a list of last names, the library's usual form, also hits layers of other parts.
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules="|".join(re.escape(name) for name in inside)
    )
    inject_adapter_in_model(config, model.llm)
    adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    if sorted(adapted) != sorted(names):
        raise ConfigError(f"peft.match: {match!r} chose {len(names)} layers, but peft adapted {len(adapted)}")
    return names


def _matching(model: Any, match: str) -> list[str]:
    try:
        pattern = re.compile(match)
    except re.error as error:
        raise ConfigError(f"peft.match: {match!r} is not a regular expression: {error}") from error
    head = model.llm.model.get_output_embeddings()
    heads = {id(module) for module in head.modules()} if head is not None else set()
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in heads and pattern.fullmatch(name)
    ]
    outside = [name for name in names if not name.startswith("llm.")]
    if outside:
        raise ConfigError(
            f"peft.match: {match!r} also matches {len(outside)} layers outside llm, for example {outside[0]}"
        )
    if not names:
        raise ConfigError(f"peft.match: {match!r} matches no linear layer. Names look like {_example(model)}.")
    return names


def _example(model: Any) -> str:
    return next(
        (f"llm.{name}" for name, module in model.llm.named_modules() if isinstance(module, nn.Linear)), "llm..."
    )
