"""Adapters: thin wrappers of `peft`. They change the model in place, after its weights are read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

from vlm_train.errors import ConfigError
from vlm_train.models.adapters.quantize import quantize_layers, quantized_layers

Compute = Literal["bfloat16", "float16", "float32"]


def lora(
    *,
    model: Any,
    match: str = r"llm\..*",
    rank: int = 16,
    alpha: int = 32,
    dropout: float = 0.0,
    dora: bool = False,
    rslora: bool = False,
) -> list[str]:
    """Put LoRA adapters on linear layers, all but the language model's head (Hu et al. 2021, arXiv 2106.09685).

    Args:
        match: regex over the full name of a module, such as `llm.model.model.layers.0.self_attn.q_proj`. Parts besides
            `llm` count only if it names them: layers of the vision tower have the same last names.
        dora: also learn the length of every output's weights (Liu et al. 2024, arXiv 2402.09353).
        rslora: scale by alpha / sqrt(rank) in place of alpha / rank (Kalajdzievski 2023, arXiv 2312.03732).

    Returns:
        The adapted names.

    Raises:
        ConfigError: nothing matches, or layers outside `llm` of a part that `match` does not name.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = find_linear_layers(model, match, "peft.match")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_dora=dora,
        use_rslora=rslora,
        # One full name each: a list of last names, the library's usual form, also hits layers of other parts.
        target_modules="|".join(re.escape(name) for name in names),
    )
    for bits in {mark.bits for _, mark in quantized_layers(model)}:
        setattr(model, f"is_loaded_in_{bits}bit", True)  # how the library learns of it
    inject_adapter_in_model(config, model)
    if sorted(adapted_layers(model)) != sorted(names):
        raise ConfigError(
            f"peft.match: {match!r} chose {len(names)} layers, but peft adapted {len(adapted_layers(model))}"
        )
    return names


def qlora(
    *,
    model: Any,
    match: str = r"llm\..*",
    quantize_match: str = r"llm\..*",
    bits: int | None = 4,
    double_quant: bool = True,
    compute: Compute | None = None,
    rank: int = 16,
    alpha: int = 32,
    dropout: float = 0.0,
    dora: bool = False,
    rslora: bool = False,
) -> list[str]:
    """LoRA over a frozen base in 4-bit NF4 (Dettmers et al. 2023, arXiv 2305.14314) or 8-bit weights.

    Args:
        match, rank, alpha, dropout, dora, rslora: as in `lora`.
        quantize_match: which linear layers are quantized, by the same rules.
        bits: 4 | 8; null: the same adapters over the base as it is, which is what an export merges into.
        double_quant: the scales of NF4 in 8 bits, too.
        compute: dtype of NF4 products; null: that of the inputs.

    Returns:
        The adapted names.

    Raises:
        ConfigError: as `lora` and `quantize_layers`. AssetError: `bitsandbytes` is not installed.
    """
    if bits is not None:
        names = find_linear_layers(model, quantize_match, "peft.quantize_match")
        dtype = None if compute is None else getattr(torch, compute)
        quantize_layers(model, names, bits=bits, double_quant=double_quant, compute=dtype)
    return lora(model=model, match=match, rank=rank, alpha=alpha, dropout=dropout, dora=dora, rslora=rslora)


def adapted_layers(model: nn.Module) -> list[str]:
    """Names of the layers that carry adapters."""
    return [name for name, module in model.named_modules() if hasattr(module, "lora_A")]


def base_names(model: nn.Module) -> dict[str, str]:
    """Parameters of adapted layers: the name before adapters -> the name now (`q_proj.weight`,
    `q_proj.base_layer.weight`)."""
    inner = ".base_layer."
    return {name.replace(inner, "."): name for name, _ in model.named_parameters() if inner in name}


def find_linear_layers(model: Any, match: str, setting: str) -> list[str]:
    """Linear layers whose full name `match` fits, but the head and layers that are never run.

    Raises:
        ConfigError: not a regular expression, no hit, or hits outside `llm` in a part that it does not name.
    """
    try:
        pattern = re.compile(match)
    except re.error as error:
        raise ConfigError(f"{setting}: {match!r} is not a regular expression: {error}") from error
    head = model.llm.model.get_output_embeddings()
    heads = {id(module) for module in head.modules()} if head is not None else set()
    idle = set(model.unused_parameters())
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in heads and f"{name}.weight" not in idle
    ]
    names = [name for name in linear if pattern.fullmatch(name)]
    asked = ["llm", *(part for part, _ in model.named_children() if re.search(rf"\b{part}\b", match))]
    stray = [name for name in names if name.partition(".")[0] not in asked]
    if stray:
        part = stray[0].partition(".")[0]
        raise ConfigError(
            f"{setting}: {match!r} also matches {len(stray)} layers outside llm, for example {stray[0]}. "
            rf"Begin it with the parts you mean: 'llm\..*', or '(llm|{part})\..*'."
        )
    if not names:
        example = next((name for name in linear if name.startswith("llm.")), "llm...")
        raise ConfigError(f"{setting}: {match!r} matches no linear layer. Names look like {example}.")
    return names


def describe_adapters(model: nn.Module) -> list[str]:
    """Lines that say which layers carry adapters and which are quantized; none for a plain model."""
    lines = []
    if names := adapted_layers(model):
        lines.append(f"peft: {len(names)} linear layers adapted: {compact_names(names)}")
    stored = [(name.removesuffix(".base_layer"), mark) for name, mark in quantized_layers(model)]
    for bits in sorted({mark.bits for _, mark in stored}):
        names = [name for name, mark in stored if mark.bits == bits]
        lines.append(f"peft: {len(names)} linear layers in {bits} bits: {compact_names(names)}")
    return lines


def compact_names(names: Iterable[str]) -> str:
    """Dotted names as one pattern: `layers.{0-31}.mlp.{down,up}`."""
    tree: dict[str, Any] = {}
    for name in names:
        node = tree
        for step in name.split("."):
            node = node.setdefault(step, {})
    return _join_braces(tree)


def _join_braces(tree: dict[str, Any]) -> str:
    alike: dict[str, list[str]] = {}
    for step, inner in tree.items():
        alike.setdefault(_join_braces(inner), []).append(step)
    shown = [
        f"{_join_alternatives(steps)}.{inner}" if inner else _join_alternatives(steps) for inner, steps in alike.items()
    ]
    return shown[0] if len(shown) == 1 else "{" + ",".join(shown) + "}" if shown else ""


def _join_alternatives(steps: list[str]) -> str:
    if len(steps) == 1:
        return steps[0]
    if not all(step.isdigit() for step in steps):
        return "{" + ",".join(steps) + "}"
    numbers = sorted(map(int, steps))
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends)) + "}"
