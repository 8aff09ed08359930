"""Parameters in 16 bits."""

from __future__ import annotations

import torch
from torch import nn


def cast_to_bf16(model: nn.Module) -> None:
    """Parameters in bf16 (`trainer.precision=bf16-true`), but quantized ones. Buffers stay: rotary ones lose positions
    in 16 bits."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16)
