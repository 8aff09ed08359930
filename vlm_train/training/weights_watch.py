"""After the first update: what is frozen has not changed, and what learns has. Sums of bits tell, on every rank for the
weights that it holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlm_train.distributed import say_once
from vlm_train.errors import TrainingError
from vlm_train.training.loss_sums import OverRanks
from vlm_train.training.params import Policy

PATIENCE = 10
"""Updates after which a part that should have changed, and has not, is said."""

LOOKS = 100
"""Updates after which a part is no longer looked at, whatever was found."""

ENOUGH = 1000
"""Weights, or half of a part's, that are small enough to feel an update, of which one then must have changed."""

_FELT_GRADIENT = 1e-7
"""Mean size of a gradient from which on an update of Adam is as large as the rate, whatever its `eps`."""

_CHUNK = 2**24
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class _Part:
    """What is known of a part that learns."""

    parameters: list[nn.Parameter]
    before: list[int | None]
    updates: int = 0  # that must have changed it
    faint: int = 0  # too small to be felt by its precision
    idle: int = 0  # without a gradient for it
    changed: bool = False


class WeightsWatch:
    """Compares weights with what they were before the first update of this process.

    Frozen weights are compared once: none may differ in a bit. Of every part that learns some weight must have changed,
    on any rank, once a gradient has reached it at a rate that its precision feels. A rate of 0 (warm-up), an update
    that is left out, a part without a gradient (no image in the batch, a gate that is still closed) and an update that
    rounds to nothing prove nothing: the part is looked at again after the next updates. Single tensors may stay: LoRA's
    A has no gradient while B is 0, and a layer may be unused. Not judged are parts with a rule of rate 0, and weights
    on a disk.

    Args:
        over_ranks: adds up over ranks; called on all of them after the same updates.
        exact_copy: the optimizer keeps fp32 weights behind those in 16 bits, which change once that is worth a bit.
    """

    def __init__(self, model: nn.Module, policy: Policy, over_ranks: OverRanks, *, exact_copy: bool = False) -> None:
        self.over_ranks, self.exact_copy = over_ranks, exact_copy
        self.frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad and p.dtype != torch.int8}
        still = {group.name for group in policy.groups if not group.lr}
        held: dict[str, list[nn.Parameter]] = {}
        for group in policy.groups:
            if group.name not in still:
                held.setdefault(group.name, []).extend(group.parameters)
        self.before_frozen = sum_bits(self.frozen.values())
        self.parts = {part: _Part(parameters, sum_bits(parameters)) for part, parameters in held.items()}
        self.compared = False

    @property
    def done(self) -> bool:
        """Whether there is nothing left to look at."""
        return self.compared and not self.parts

    def look_after_update(self, rates: Mapping[str, float], norms: Mapping[str, float]) -> None:
        """Compare, after an update that was made with these learning rates and gradient norms of the parts.

        Raises:
            TrainingError: on every rank, if a frozen weight has changed or a part that learns has not.
        """
        if not self.compared:
            self._require_frozen()
        active = {name: part for name, part in self.parts.items() if rates.get(name, 0.0) > 0.0}
        if not active:
            return
        counts: dict[str, float] = {}
        for name, part in active.items():
            changed = part.changed or differ(part.before, sum_bits(part.parameters))
            small, total = (0, 0) if changed else _count_small(part.parameters, rates[name], norms.get(name, 0.0))
            counts |= {f"changed/{name}": float(changed), f"small/{name}": small, f"total/{name}": total}
        counts = self.over_ranks(counts)
        for name, part in active.items():
            part.changed = counts[f"changed/{name}"] > 0
            felt = counts[f"small/{name}"] >= min(ENOUGH, max(counts[f"total/{name}"] / 2, 1))
            moved = norms.get(name, 0.0) != 0.0
            part.updates, part.faint = part.updates + (moved and felt), part.faint + (moved and not felt)
            part.idle += not moved
            if (moved and part.changed) or self._judge(name, part):
                del self.parts[name]

    def _require_frozen(self) -> None:
        self.compared = True
        now = sum_bits(self.frozen.values())
        mine = [n for n, a, b in zip(self.frozen, self.before_frozen, now, strict=True) if differ([a], [b])]
        self.frozen = {}
        if found := self.over_ranks(dict.fromkeys(mine, 1.0)):
            first = ", ".join(sorted(found)[:3])
            raise TrainingError(
                f"training: {len(found)} frozen weights changed in the first update, for example {first}. Something "
                "beside the optimizer writes to them (a callback, the model's own code), or they share memory with "
                "what learns. Find it, let them learn (params.rules), or switch this check off: "
                "trainer.guard.weights=false."
            )

    def _judge(self, name: str, part: _Part) -> bool:
        """Say, or raise, what is wrong with a part after so many updates, if anything is. Whether it is done."""
        reached = part.updates + part.faint
        if not reached and part.idle >= PATIENCE:
            say_once(
                f"warning: {name} learns (params.rules), but no gradient has reached it in {part.idle} updates. "
                "If no sample is to use it yet, this is right; else its output does not reach the loss, or is detached."
            )
            return True
        if part.updates >= PATIENCE:
            raise TrainingError(
                f"training: {name} learns, and gradients reach it, but none of its weights changed in {part.updates} "
                "updates: the optimizer holds other tensors than the model, or something puts them back. Look at "
                "callbacks and params.rules; to switch this check off: trainer.guard.weights=false."
            )
        if reached + part.idle < LOOKS:
            return False
        if part.faint and not self.exact_copy and all(map(_is_here, part.parameters)):
            say_once(
                f"warning: {name} learns, and gradients reach it, but none of its weights changed in {reached} "
                "updates: they are too small for its precision (optim.lr, trainer.precision)."
            )
        return True


def differ(before: Sequence[int | None], now: Sequence[int | None]) -> bool:
    """Whether a sum of bits has changed; of what was not in memory at one of both times nothing is known."""
    return any(None not in (a, b) and a != b for a, b in zip(before, now, strict=True))


def sum_bits(parameters: Iterable[nn.Parameter]) -> list[int | None]:
    """A sum of the bits of every tensor that this rank holds (of its shard), read as whole numbers. None: on a disk."""
    held = [_local_part(parameter) if _is_here(parameter) else None for parameter in parameters]
    sums = [_sum_tensor(tensor) for tensor in held if tensor is not None]
    numbers = iter(torch.stack([one.to(sums[0].device) for one in sums]).tolist() if sums else [])
    return [None if tensor is None else next(numbers) for tensor in held]


def _sum_tensor(tensor: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    if not tensor.numel():
        return total
    for chunk in tensor.contiguous().flatten().view(_BITS[tensor.element_size()]).split(_CHUNK):
        total += chunk.sum(dtype=torch.int64)
    return total


def _local_part(parameter: Any) -> Tensor:
    """What this rank holds of a parameter: all of it, the part of ZeRO-3, or the shard of FSDP2."""
    held = getattr(parameter, "ds_tensor", parameter).detach()
    local: Tensor = held.to_local() if hasattr(held, "to_local") else held
    return local


def _is_here(parameter: Any) -> bool:
    """Whether the values are in memory: ZeRO-3 may have put them on a disk."""
    status = getattr(getattr(parameter, "ds_tensor", None), "status", None)
    return getattr(status, "name", "AVAILABLE") == "AVAILABLE"


def _count_small(parameters: Sequence[nn.Parameter], rate: float, norm: float) -> tuple[int, int]:
    """How many weights that this rank holds are so small that an update with this rate and gradient changes them, and
    how many it holds in all."""
    held = [_local_part(parameter) for parameter in parameters]
    total = sum(tensor.numel() for tensor in held)
    if not total or not all(map(_is_here, parameters)):
        return 0, total
    update = rate * min(1.0, norm / math.sqrt(total) / _FELT_GRADIENT)
    small = [
        (chunk.abs() < update / (4 * torch.finfo(tensor.dtype).eps)).sum()
        for tensor in held
        for chunk in tensor.flatten().split(_CHUNK)
    ]
    return int(torch.stack([one.to(small[0].device) for one in small]).sum()), total
