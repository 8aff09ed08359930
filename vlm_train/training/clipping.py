"""Gradients before the update: their norm, whether they are numbers, and the clip.

On a GPU the host reads the norm one step late, so that a step of one process does not wait for the device. A fused
optimizer takes `found_inf`, a number on the device, and makes no update where it is 1. So the device itself vetoes an
update whose gradients are no numbers. The host learns of it when the next step is about to be made, or earlier where a
step is logged, measured or saved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vlm_train.training.metrics import part_norms


def clip_gradients(module: Any) -> None:
    """Clip by the global norm, unless the guard of a `VLMModule` objects: a parameter without gradient is not updated.

    Where the device can veto, `module.late` is what the host will read.
    """
    module.settle_update(opened=True)
    strategy, optimizer = module.trainer.strategy, module.trainer.optimizers[0]
    strategy.unscale_gradients()
    norms, step = part_norms(module.policy), module.global_step + 1
    total = nn.utils.get_total_norm(norms.values())
    optimizer.found_inf = None
    if _device_can_veto(optimizer, strategy, module, step):
        module.grad_norms, module.late = name_norms(total, norms), LateVerdict(total, step, module.keys)
        optimizer.found_inf = module.late.veto.float()
        module.meter.leave_out_where(module.late.veto)
    elif module.objects_to(total, norms):
        module.zero_grad(set_to_none=True)
        return
    if module.max_grad_norm is not None:
        parameters = [p for group in module.policy.groups for p in group.parameters]
        nn.utils.clip_grads_with_norm_(parameters, module.max_grad_norm, total)


def name_norms(total: Tensor, of_parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The norms of a step under the names that the log gives them."""
    return {"grad_norm": total} | {f"grad_norm/{part}": one for part, one in of_parts.items()}


def read_norms(norms: Mapping[str, Tensor]) -> dict[str, float]:
    """The finite ones of named norms, in one copy from the device. (16-mixed skips steps that overflow.)"""
    read = zip(norms, torch.stack(list(norms.values())).tolist(), strict=True) if norms else ()
    return {name: norm for name, norm in read if math.isfinite(norm)}


@dataclass
class LateVerdict:
    """The norm `[]` of one step on its way to the host.

    Args:
        norm: over all parameters, on the device.
        step: counted from 1.
        keys: of the step's samples.
    """

    norm: Tensor
    step: int
    keys: list[str]
    copied: Any = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.veto = ~self.norm.isfinite()
        self.on_host = self.norm.detach()
        if self.norm.is_cuda:
            self.on_host = torch.empty((), dtype=self.norm.dtype, pin_memory=True).copy_(self.norm, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()

    def read_norm(self) -> float:
        """The norm, once the device has computed it: it waits for that step only, not for what was queued since."""
        if self.copied is not None:
            self.copied.synchronize()
        return float(self.on_host)


def _device_can_veto(optimizer: Any, strategy: Any, module: Any, step: int) -> bool:
    """Whether the veto of a step can be left to the device: nothing but its gradients' being numbers is asked, the
    optimizer's kernel asks it, and the host does not have to know at once, as in the first steps, which it looks at."""
    guard = module.guard
    on_gpu = strategy.root_device.type == "cuda" and strategy.device_can_veto
    plain = guard.spike is None and not guard.scaled and not guard.is_told_to_skip(step)
    fused = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
    looks = module.first_steps.watch is not None or getattr(module.first_steps, "is_first", False)
    return on_gpu and plain and fused and not looks
