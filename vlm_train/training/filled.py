"""Whether every part that a run keeps frozen holds values that somebody learned: nothing learns from noise."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from vlm_train.contracts.model_parts import find_parts
from vlm_train.distributed import say_once
from vlm_train.errors import ConfigError

LOOKED_AT = 4096
"""Numbers of a tensor that tell whether it is constant, as norms and gates begin."""


def find_random_parts(model: Any, filled: Collection[str]) -> dict[str, int]:
    """Part -> frozen random numbers, of the parts most of whose matrices are frozen and come from no file.

    A part comes from files if its `weights` says so, or if its parameters are in `filled`. Adapters, what the chosen
    layers never use, vectors (norms, biases) and constant tensors are not looked at.
    """
    unused = set(model.unused_parameters())
    found: dict[str, int] = {}
    for part, module in find_parts(model).items():
        if getattr(module, "weights", None):
            continue
        random = total = 0
        for name, parameter in ((f"{part}.{name}", p) for name, p in module.named_parameters()):
            if parameter.ndim < 2 or name in unused or ".lora_" in name:
                continue
            total += parameter.numel()
            if not parameter.requires_grad and name not in filled and not _is_constant(parameter):
                random += parameter.numel()
        if random > total / 2:
            found[part] = random
    return found


def is_filled(model: nn.Module, part: str, filled: Collection[str]) -> bool:
    """Whether most numbers of a part come from files."""
    module = find_parts(model).get(part)
    if module is None:
        return False
    sizes = {f"{part}.{name}": parameter.numel() for name, parameter in module.named_parameters()}
    from_files = sum(size for name, size in sizes.items() if name in filled)
    return bool(getattr(module, "weights", None)) or from_files > sum(sizes.values()) / 2


def require_filled(model: Any, filled: Collection[str], otherwise: str, *, resumes: bool = False) -> None:
    """Look for parts that stay at random values.

    Args:
        filled: names of the parameters that came from files beside the parts' own `weights`.
        otherwise: refuse | warn | allow, `trainer.guard.random_frozen`.
        resumes: the run began so, and may end: it is only warned.

    Raises:
        ConfigError: there are some, and they are to be refused.
    """
    if otherwise == "allow":
        return
    problems = [
        f"{part}: frozen by params.rules, but its {count:,} numbers are random: neither {part}.weights nor init_from "
        f"fills it. Give it weights, take it from a run (init_from=[{{run: <run>, parts: [{part}]}}]), or let it learn "
        "(params.rules). If its code reads weights itself, let it have an attribute `weights` that names them; if this "
        "is wanted: trainer.guard.random_frozen=allow."
        for part, count in find_random_parts(model, filled).items()
    ]
    if problems and otherwise == "refuse" and not resumes:
        raise ConfigError(problems)
    for problem in problems:
        say_once(f"warning: {problem}")


def _is_constant(tensor: Tensor) -> bool:
    looked_at = tensor.detach().flatten()[:LOOKED_AT]
    return not tensor.is_meta and bool((looked_at == looked_at[:1]).all())
