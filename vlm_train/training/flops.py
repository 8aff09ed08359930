"""FLOPs of one training sample, from the shapes of its forward pass.

A multiply-add counts as two. A product costs its forward, the same again if a gradient passes through it, and again if
its weight learns. Causal attention counts half, the head only supervised positions, an input embedding nothing, and
recomputation (activation checkpointing, chunked loss) nothing: this is the useful work that MFU refers to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vlm_train.training.trace import Product


@dataclass
class Flops:
    """FLOPs of a part: forward, backward to its inputs, backward to its weights."""

    forward: float = 0.0
    input_grad: float = 0.0
    weight_grad: float = 0.0

    @property
    def total(self) -> float:
        """FLOPs of the forward and the whole backward pass."""
        return self.forward + self.input_grad + self.weight_grad


def count_flops(products: Iterable[Product], *, samples: int = 1, causal_share: float = 0.5) -> dict[str, Flops]:
    """FLOPs per sample of every part.

    Args:
        samples: samples in the traced batch.
        causal_share: 0.5 counts the lower triangle of causal attention; 1.0 all of it, as kernels without that saving
            (and torch's `FlopCounterMode`) do.
    """
    parts: dict[str, Flops] = {}
    for product in products:
        flops = product.flops * (causal_share if product.causal else 1.0) / samples
        part = parts.setdefault(product.part, Flops())
        part.forward += flops
        part.input_grad += flops * product.input_grads
        part.weight_grad += flops * product.weight_grads
    return parts
