"""After the first update: what is frozen has not changed, and what learns has. Sums of bits tell, on every rank for the
weights that it holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlm_train.distributed import say_once
from vlm_train.errors import TrainingError
from vlm_train.training.loss_sums import OverRanks
from vlm_train.training.params import Policy

PATIENCE = 10
"""Updates after which a part that should have changed, and has not, is said."""

FEW = 1000
"""Numbers of a part that may all be too large, in 16 bits, for a small update to change one of them."""

_CHUNK = 2**24
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class WeightsWatch:
    """Compares weights with what they were before the first update of this process.

    Frozen weights are compared once: none may differ in a bit. Of every part that learns some weight must have changed,
    on any rank, once its learning rate is not 0 and a gradient has reached it. A rate of 0 (warm-up), an update that is
    left out, and a part without a gradient (no image in the batch, a gate that is still closed) prove nothing: the part
    is looked at again after the next updates. Single tensors may stay: LoRA's A has no gradient while B is 0, a layer
    may be unused, and a norm of 1.0 does not feel an update of 1e-9.

    Args:
        over_ranks: adds up over ranks; called on all of them after the same updates.
    """

    def __init__(self, model: nn.Module, policy: Policy, over_ranks: OverRanks) -> None:
        self.over_ranks = over_ranks
        self.frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad and p.dtype != torch.int8}
        self.parts: dict[str, list[nn.Parameter]] = {}
        for group in policy.groups:
            self.parts.setdefault(group.name, []).extend(group.parameters)
        self.before_frozen = sum_bits(self.frozen.values())
        self.before = {part: sum_bits(parameters) for part, parameters in self.parts.items()}
        self.updates: dict[str, int] = dict.fromkeys(self.parts, 0)  # that should have changed the part
        self.idle: dict[str, int] = dict.fromkeys(self.parts, 0)  # without a gradient for it
        self.changed: set[str] = set()
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
        active = [part for part in self.parts if rates.get(part, 0.0) > 0.0]
        counts = {part: float(sum_bits(self.parts[part]) != self.before[part]) for part in active}
        changed = {part for part, number in self.over_ranks(counts).items() if number} if active else set()
        self.changed |= changed
        for part in active:
            moved = norms.get(part, 0.0) != 0.0
            self.updates[part] += moved
            self.idle[part] += not moved
            if (moved and part in self.changed) or self.updates[part] + self.idle[part] >= PATIENCE:
                self._judge(part)
                del self.parts[part]

    def _require_frozen(self) -> None:
        self.compared = True
        now = sum_bits(self.frozen.values())
        mine = [name for name, a, b in zip(self.frozen, self.before_frozen, now, strict=True) if a != b]
        self.frozen = {}
        if found := self.over_ranks(dict.fromkeys(mine, 1.0)):
            first = ", ".join(sorted(found)[:3])
            raise TrainingError(
                f"training: {len(found)} frozen weights changed in the first update, for example {first}. Something "
                "beside the optimizer writes to them (a callback, the model's own code), or they share memory with "
                "what learns. Find it, let them learn (params.rules), or switch this check off: "
                "trainer.guard.weights=false."
            )

    def _judge(self, part: str) -> None:
        """Say, or raise, what is wrong with a part after so many updates, if anything is."""
        if not self.updates[part]:
            say_once(
                f"warning: {part} learns (params.rules), but no gradient has reached it in {self.idle[part]} updates. "
                "If no sample is to use it yet, this is right; else its output does not reach the loss, or is detached."
            )
        elif part not in self.changed:
            problem = (
                f"{part} learns, and gradients reach it, but none of its weights changed in {self.updates[part]} "
                "updates: the optimizer holds other tensors than the model"
            )
            held = self.parts[part]
            if sum(p.numel() for p in held) < FEW and any(_local_part(p).element_size() < 4 for p in held):
                say_once(f"warning: {problem}, or its updates are too small for 16 bits (optim.lr, trainer.precision).")
                return
            raise TrainingError(
                f"training: {problem}, or its updates are too small for its precision. Look at optim.lr and params."
                "rules; to switch this check off: trainer.guard.weights=false."
            )


def sum_bits(parameters: Iterable[nn.Parameter]) -> list[int]:
    """A sum of the bits of every tensor that this rank holds (of its shard), read as whole numbers."""
    sums = [_sum_tensor(_local_part(parameter)) for parameter in parameters]
    return torch.stack([one.to(sums[0].device) for one in sums]).tolist() if sums else []


def _sum_tensor(tensor: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    if not _is_here(tensor) or not tensor.numel():
        return total
    for chunk in tensor.contiguous().flatten().view(_BITS[tensor.element_size()]).split(_CHUNK):
        total += chunk.sum(dtype=torch.int64)
    return total


def _local_part(parameter: Any) -> Tensor:
    """What this rank holds of a parameter: all of it, the part of ZeRO-3, or the shard of FSDP2."""
    held = getattr(parameter, "ds_tensor", parameter).detach()
    local: Tensor = held.to_local() if hasattr(held, "to_local") else held
    return local


def _is_here(tensor: Any) -> bool:
    """Whether the values are in memory: ZeRO-3 may have put them on a disk."""
    return getattr(getattr(tensor, "status", None), "name", "AVAILABLE") == "AVAILABLE"
