"""Activation checkpointing: what is computed again, and that gradients stay what they are."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vlm_train.models.layers.activation_checkpointing import ATTENTION, PRODUCTS, checkpoint_layers


class Layer(nn.Module):
    """Attention and an MLP: four products forward."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(hidden).chunk(3, dim=-1))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        hidden = hidden + self.out(attended.transpose(1, 2).flatten(2))
        return hidden + self.down(nn.functional.gelu(self.up(hidden)))


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ATTENTION:
            self.seen["attention"] += 1
        if func in PRODUCTS and func.overloadpacket._qualified_op_name == "aten::addmm":  # backward has no bias
            self.seen["products"] += 1
        return func(*args, **(kwargs or {}))


def run(how: str) -> tuple[Counter[str], list[torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(Layer(), Layer())
    x = torch.randn(2, 5, 16)
    if how != "none":
        checkpoint_layers(model, selective=how == "selective")
    with Count() as count:
        model(x).square().sum().backward()
    return count.seen, [p.grad for p in model.parameters()]  # type: ignore[misc]


@pytest.mark.parametrize(
    "how, attention, products",
    [("none", 2, 8), ("full", 4, 14), ("selective", 2, 10)],  # of each layer the last product is not needed again
)
def test_what_is_computed_again(how: str, attention: int, products: int) -> None:
    seen, gradients = run(how)
    assert (seen["attention"], seen["products"]) == (attention, products)
    for one, expected in zip(gradients, run("none")[1], strict=True):
        assert torch.equal(one, expected)
