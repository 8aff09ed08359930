"""The trace of a forward pass on small hand-made modules: every expectation is arithmetic."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from vlm_train.training.flops import count_flops
from vlm_train.training.trace import trace_forward


class Pair(nn.Module):
    """Two parts of one linear layer each, 3 -> 5 -> 7, in sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.second = nn.Linear(5, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)).sum()


def pair(*, first: bool, second: bool) -> dict[str, tuple[float, float, float]]:
    with torch.device("meta"):
        model, x = Pair(), torch.zeros(4, 3)
    model.first.requires_grad_(first)
    model.second.requires_grad_(second)
    parts = count_flops(trace_forward(model, lambda: model(x)).products, samples=2)
    return {name: (flops.forward, flops.input_grad, flops.weight_grad) for name, flops in parts.items()}


FIRST, SECOND = 2 * 4 * 3 * 5 / 2, 2 * 4 * 5 * 7 / 2  # multiply-add = 2, 4 rows, 2 samples


def test_gradient_passes_only_behind_what_learns() -> None:
    assert pair(first=True, second=False) == {"first": (FIRST, 0, FIRST), "second": (SECOND, SECOND, 0)}
    assert pair(first=False, second=True) == {"first": (FIRST, 0, 0), "second": (SECOND, 0, SECOND)}
    assert pair(first=True, second=True) == {"first": (FIRST, 0, FIRST), "second": (SECOND, SECOND, SECOND)}


def test_causal_attention_counts_half_and_is_fused() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor, causal: bool) -> torch.Tensor:
            heads = self.project(x).unflatten(-1, (2, 4)).transpose(1, 2)  # [1, 2, 6, 4]
            return F.scaled_dot_product_attention(heads, heads, heads, is_causal=causal).sum()

    with torch.device("meta"):
        model, x = Attention(), torch.zeros(1, 6, 8)
    scores = 2 * 2 * 2 * 6 * 6 * 4  # two products of 2 heads, 6 x 6 positions, width 4
    for causal, share in ((False, 1.0), (True, 0.5)):
        seen = trace_forward(model, lambda causal=causal: model(x, causal))
        attention = count_flops([product for product in seen.products if product.input_grads == 2])["project"]
        assert (attention.forward, attention.input_grad) == (scores * share, 2 * scores * share)
        widest = 6 * 6 * 2 * 4
        assert seen.outside < 8 * 6 * 8 * 4 + widest, "scores of [T, T] would be kept otherwise"


class Deep(nn.Module):
    """A part with numbered layers."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.part = nn.Module()
        self.part.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(depth)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.part.layers:
            x = layer(x)
        return x.sum()


def test_checkpointing_keeps_layer_inputs_and_one_layer() -> None:
    with torch.device("meta"):
        model, x = Deep(4), torch.zeros(10, 16)
    seen = trace_forward(model, lambda: model(x))
    given, inside = 10 * 16 * 4, 10 * (16 + 64 + 64) * 4  # input, before and after GELU
    assert list(seen.layers.values()) == [(given, inside)] * 4
    assert seen.activations == seen.outside + 4 * inside
    assert seen.checkpointed == seen.outside + 4 * given + inside
    products = 10 * (64 + 16) * 4
    assert seen.selective == seen.checkpointed + 4 * products


def test_frozen_layers_before_the_first_that_learns_keep_nothing() -> None:
    with torch.device("meta"):
        model, x = Deep(3), torch.zeros(10, 16)
    for layer in model.part.layers[:2]:
        layer.requires_grad_(False)
    kept = [inside for _, inside in trace_forward(model, lambda: model(x)).layers.values()]
    assert kept[:2] == [0, 0]
    assert kept[2] > 0


def test_shared_storage_is_counted_once() -> None:
    with torch.device("meta"):
        weight = nn.Linear(1, 1)
        x = torch.zeros(100, requires_grad=True)
    seen = trace_forward(weight, lambda: (x * x).sum() + (x.view(10, 10) * x.view(10, 10)).sum())
    assert seen.activations == 400


def test_meta_and_real_tensors_are_traced_alike() -> None:
    seen = []
    for device in ("meta", "cpu"):
        with torch.device(device):
            model, x = Deep(2), torch.zeros(10, 16)
        seen.append(trace_forward(model, lambda model=model, x=x: model(x)))
    assert seen[0] == seen[1]
