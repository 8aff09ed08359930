"""Optimizers and learning-rate schedules: library ones behind explicit keyword arguments, so that config is checked.

`build.py` gives the parameter groups and the number of optimizer steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from vlm_train.errors import ConfigError

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

FUSED_DEVICES = ("cpu", "cuda", "xpu", "mps")
"""Where torch updates in one kernel; others take its default."""


def adamw(
    params: Iterable[dict[str, Any]],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    fused: bool | Literal["auto"] | None = None,
) -> Optimizer:
    """AdamW (Loshchilov and Hutter 2019). `lr` and `weight_decay` are the defaults that rules refer to.

    Args:
        fused: update in one kernel; auto: where torch has one for every parameter. None: torch's
            own choice, which is not to, as in runs of before this setting. The rounding differs in the last bit.

    Raises:
        ConfigError: `fused=true`, and torch has no such kernel for a parameter.
    """
    from torch.optim import AdamW

    groups = list(params)
    if fused in ("auto", True):
        lacking = _find_unfused(parameter for group in groups for parameter in group["params"])
        if fused is True and lacking:
            raise ConfigError(f"optim.fused=true: there is no fused kernel for {lacking}. Allowed: auto, false.")
        one_kernel: bool | None = lacking is None
    else:
        one_kernel = False if fused is False else None
    return AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=one_kernel)


def keep_kernel(settings: Any, checkpoint: Mapping[str, Any]) -> None:
    """Let a run that goes on from `checkpoint`, a manifest, round as it did before: `optim.fused=auto` becomes what the
    manifest says, None for one of before this setting. In place."""
    if settings.get("fused") == "auto":
        settings["fused"] = checkpoint.get("fused")


def _find_unfused(parameters: Iterable[Any]) -> str | None:
    """The first kind of parameter for which torch has no fused AdamW; None: it has one for all."""
    for parameter in parameters:
        kernel = parameter.device.type in FUSED_DEVICES and parameter.is_floating_point()
        if not kernel:
            return f"{str(parameter.dtype).removeprefix('torch.')} on {parameter.device.type}"
    return None


def sgd(params: Iterable[dict[str, Any]], *, lr: float, momentum: float = 0.0, weight_decay: float = 0.0) -> Optimizer:
    """Plain SGD: for parity tests across strategies, where Adam's scale invariance would hide errors."""
    from torch.optim import SGD

    return SGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay)


def warmup_length(total_steps: int, *, warmup_ratio: float, warmup_steps: int | None) -> int:
    """Warm-up in optimizer steps: `warmup_steps`, or the ratio of `total_steps` rounded up (as `transformers` does)."""
    if warmup_steps is not None and warmup_ratio:
        raise ConfigError(f"lr_schedule: give warmup_steps ({warmup_steps}) or warmup_ratio ({warmup_ratio}), not both")
    return math.ceil(total_steps * warmup_ratio) if warmup_steps is None else warmup_steps


def cosine(
    optimizer: Optimizer,
    *,
    total_steps: int,
    warmup_ratio: float = 0.0,
    warmup_steps: int | None = None,
    min_ratio: float = 0.0,
    start_ratio: float = 0.0,
    warmup_counts: bool = False,
) -> LRScheduler:
    """Linear warm-up, then half a cosine down to `min_ratio` of each group's rate.

    Args:
        start_ratio: what the warm-up starts from, as a ratio of each group's rate.
        warmup_counts: the cosine begins at step 0 and is followed from the end of the warm-up on, where it is below the
            full rate (LAVIS, MiniGPT-4); else it begins at the end of the warm-up.
    """
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import get_cosine_with_min_lr_schedule_with_warmup

    warmup = warmup_length(total_steps, warmup_ratio=warmup_ratio, warmup_steps=warmup_steps)
    if not start_ratio and not warmup_counts:
        return get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, total_steps, min_lr_rate=min_ratio)
    first = 0 if warmup_counts else warmup

    def ratio(step: int) -> float:
        if step < warmup:
            return start_ratio + (1 - start_ratio) * step / warmup
        done = min((step - first) / max(total_steps - first, 1), 1.0)
        return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * done)) / 2

    return LambdaLR(optimizer, ratio)


def linear(
    optimizer: Optimizer, *, total_steps: int, warmup_ratio: float = 0.0, warmup_steps: int | None = None
) -> LRScheduler:
    """Linear warm-up from 0, then linear decay to 0."""
    from transformers import get_linear_schedule_with_warmup

    warmup = warmup_length(total_steps, warmup_ratio=warmup_ratio, warmup_steps=warmup_steps)
    return get_linear_schedule_with_warmup(optimizer, warmup, total_steps)


def constant(
    optimizer: Optimizer, *, total_steps: int, warmup_ratio: float = 0.0, warmup_steps: int | None = None
) -> LRScheduler:
    """Linear warm-up from 0, then constant."""
    from transformers import get_constant_schedule_with_warmup

    warmup = warmup_length(total_steps, warmup_ratio=warmup_ratio, warmup_steps=warmup_steps)
    return get_constant_schedule_with_warmup(optimizer, warmup)


def epoch_decay(
    optimizer: Optimizer,
    *,
    total_steps: int,
    epochs: float | None,
    factor: float,
    warmup_ratio: float = 0.0,
    warmup_steps: int | None = None,
    min_ratio: float = 0.0,
) -> LRScheduler:
    """Linear warm-up from 0, then constant within a pass over the data and `factor` times as high in each next one,
    `min_ratio` at least (BLIP, `utils.py`).

    Args:
        epochs: passes in `total_steps`; None: one.
    """
    from torch.optim.lr_scheduler import LambdaLR

    warmup = warmup_length(total_steps, warmup_ratio=warmup_ratio, warmup_steps=warmup_steps)
    one_pass = total_steps / (epochs or 1)

    def ratio(step: int) -> float:
        return min(step / warmup if warmup else 1.0, max(min_ratio, factor ** int(step / one_pass)))

    return LambdaLR(optimizer, ratio)
