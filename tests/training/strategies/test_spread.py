"""Spreading weights: no rank ever holds more than one group of whole parameters besides its shards."""

from __future__ import annotations

import torch
from torch import nn

from vlm_train.training.strategies.spread import broadcast_weights, keep_buffers, list_units


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 4)
        self.register_buffer("inv_freq", torch.rand(4), persistent=False)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.llm = Part()
        self.tied = nn.Linear(8, 4)
        self.tied.weight = self.llm.head.weight


def test_one_group_is_whole_at_a_time() -> None:
    with torch.device("meta"):
        model = Model()
    before = dict(model.named_parameters())
    whole: list[int] = []

    def split(unit: nn.Module) -> None:
        whole.append(sum(p.numel() for p in model.parameters() if not p.is_meta))
        for parameter in unit.parameters():  # as shards of nothing
            torch.utils.swap_tensors(parameter, nn.Parameter(torch.empty_like(parameter, device="meta")))

    groups = list_units(model)
    assert [type(one) for one in groups] == [nn.Linear] * 4 + [Model]
    broadcast_weights(model, groups, torch.device("cpu"), split)
    assert whole == [72, 72, 72, 72, 8 * 4 + 4 + 4]  # a layer each, then the head, its bias and the tied one's
    assert not model.llm.inv_freq.is_meta
    assert model.tied.weight is model.llm.head.weight
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_buffers_keep_their_float_type() -> None:
    model = Model()
    exact = model.llm.inv_freq.clone()
    with keep_buffers(model):
        model.bfloat16()
    assert model.llm.inv_freq.dtype == torch.float32 and torch.equal(model.llm.inv_freq, exact)
    assert model.llm.head.weight.dtype == torch.bfloat16 and "inv_freq" not in model.llm.state_dict()
