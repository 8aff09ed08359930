"""Drop path (stochastic depth, arXiv 1603.09382): in training a branch of a layer is left out, for some samples.

Legend: N samples (views), P tokens of each, D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlm_train.errors import ConfigError

BRANCHES = ("self_attn", "attention", "attn", "mlp")
"""Names of a layer's branches, whose output is added to its input."""


def add_drop_path(layers: Iterable[nn.Module], rate: float, *, setting: str, growing: bool = True) -> None:
    """Leave out every branch of every layer with a probability that grows from 0 at the first to `rate` at the last.

    What stays is divided by the probability that it does, so that its mean is as without. Evaluation drops nothing.

    Args:
        growing: false: `rate` in every layer.
        setting: dotted path of `rate`, for messages.

    Raises:
        ConfigError: `rate` is no probability below 1, or a layer has no branches of known names.
    """
    if not 0 <= rate < 1:
        raise ConfigError(f"{setting}: got {rate}; allowed: 0, or a probability below 1")
    if rate == 0:
        return
    found = list(layers)
    for number, layer in enumerate(found):
        branches = [getattr(layer, name) for name in BRANCHES if hasattr(layer, name)]
        if not branches:
            raise ConfigError(f"{setting}: {type(layer).__name__} has no branch called {', '.join(BRANCHES)}; use 0")
        dropped = rate * number / max(len(found) - 1, 1) if growing else rate
        for branch in branches:
            branch.register_forward_hook(partial(_drop_samples, rate=dropped))


def _drop_samples(module: nn.Module, args: Any, output: Any, *, rate: float) -> Any:
    """The branch's output `[N, P, D]`, alone or first of a tuple, without that of the dropped samples."""
    if rate == 0 or not module.training:
        return output
    values: Tensor = output[0] if isinstance(output, tuple) else output
    kept = torch.rand(values.shape[0], *[1] * (values.ndim - 1), device=values.device) >= rate
    values = values * kept.to(values.dtype) / (1 - rate)
    return (values, *output[1:]) if isinstance(output, tuple) else values
