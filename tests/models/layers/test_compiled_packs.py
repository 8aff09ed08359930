"""`torch.compile` of packed rows: layers are not compiled again for other numbers and lengths of samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch.nn import functional as F

from tests.support.tiny_models import assert_close, llama_config, text_stream, tiny_llm
from vlm_train.contracts.batch import TokenStream
from vlm_train.data.collate import pack_sequences
from vlm_train.models.layers import attention as attention_module
from vlm_train.models.layers.passes import decode_stream

PACKS = 30


@torch.library.custom_op("vlm_train_tests::varlen", mutates_args=())
def varlen_operator(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scale: float | None, window: list[int]
) -> Tensor:
    """Stands in for FlashAttention, which is an operator that `torch.compile` does not look into either."""
    lengths = starts.diff().tolist()
    assert max(lengths) == longest and window == [-1, 0]
    parts = []
    for q, k, v in zip(*(states.split(lengths) for states in (query, key, value)), strict=True):
        q, k, v = (one.transpose(0, 1)[None] for one in (q, k, v))
        part = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        parts.append(part[0].transpose(0, 1))
    return torch.cat(parts)


@varlen_operator.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scale: float | None, window: list[int]):
    return torch.empty_like(query)


def flash(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    """`varlen_attn` on a CPU, without gradients."""
    return varlen_operator(query, key, value, cu_seq_q, max_q, scale, list(window_size))


def packs() -> Iterator[TokenStream]:
    """Packed rows: some as long as the last, some with as many samples, some with as long a longest sample."""
    generator = torch.Generator().manual_seed(0)
    shapes = [[5, 9, 3], [5, 9, 3, 2], [9, 3, 7], [4, 4, 4, 7], [8, 8], [16], [9, 7]]
    for number in range(PACKS):
        lengths = shapes[number] if number < len(shapes) else None
        if lengths is None:
            lengths = torch.randint(2, 12, (int(torch.randint(1, 9, (1,), generator=generator)),), generator=generator)
            lengths = lengths.tolist()
        total = sum(lengths)
        ids = torch.randint(0, 97, (total,), generator=generator).tolist()
        segments = [n for n, length in enumerate(lengths, start=1) for _ in range(length)]
        stream = text_stream([ids], segments=[segments], positions=[[t for length in lengths for t in range(length)]])
        starts = [sum(lengths[:n]) for n in range(len(lengths))]
        causal = pack_sequences(list(zip(starts, lengths, strict=True)), total)
        yield replace(stream, causal=causal, sample_lengths=(tuple(lengths),))


def count_graphs() -> tuple[Counter[str], Callable[..., Any]]:
    """A backend for `torch.compile` that runs graphs, and those of their gradients, as they are; and counts them."""
    counts: Counter[str] = Counter()

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        counts["graphs"] += 1
        return aot_eager(graph, inputs)

    return counts, backend


def count_over_packs(streams: list[TokenStream], *, gradients: bool) -> int:
    """Graphs that compiled layers need for all of `streams`; results and gradients are those of plain layers."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    counts, backend = count_graphs()
    llm = tiny_llm(llama_config(hidden_size=64, intermediate_size=48)).train()
    results = []
    for compiled in (False, True):
        if compiled:
            for layer in llm.layers:
                layer.compile(backend=backend)
        found = []
        for stream in streams:
            llm.zero_grad()
            with torch.set_grad_enabled(gradients):
                hidden = decode_stream(llm, llm.embed(stream.ids), stream)
            found.append(hidden.detach())
            if gradients:
                hidden.square().sum().backward()
                found += [parameter.grad.clone() for name, parameter in llm.layers.named_parameters()]
        results.append(found)
    for plain, got in zip(*results, strict=True):
        assert_close(got, plain)
    torch._dynamo.reset()
    return counts["graphs"]


@pytest.fixture
def kernel(monkeypatch):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(varlen, "varlen_attn", flash)
    monkeypatch.setattr(attention_module, "kernel_fits", lambda *_: True)


def test_packs_need_two_graphs_with_the_kernel(kernel):
    """Both layers share them: one of fixed sizes, one of open ones."""
    assert count_over_packs(list(packs()), gradients=False) <= 2


def test_a_number_of_the_pack_would_need_more(kernel, monkeypatch):
    """The count can fail: the longest sample taken from the lengths on the CPU."""

    def by_lengths(query, key, value, mask, scaling):
        starts, longest = mask.causal.cu_seqlens, max(mask.causal.lengths)
        return flash(query, key, value, starts, starts, longest, longest, scale=scaling, window_size=(-1, 0))

    monkeypatch.setattr(attention_module, "_by_kernel", by_lengths)
    assert count_over_packs(list(packs()), gradients=False) > 2


@pytest.mark.parametrize("gradients", [False, True])
def test_packs_need_two_graphs_on_a_cpu(gradients):
    assert count_over_packs(list(packs())[: 8 if gradients else PACKS], gradients=gradients) <= 2


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("window", [None, 3])
def test_the_operator_is_a_proper_one(groups, window):
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(9, count, 8, generator=generator, requires_grad=True) for count in (4, 2, 2)]
    group = torch.tensor([0, -1, -1, 1, 2, 0, 0, -1, -1], dtype=torch.int32) if groups else None
    starts = torch.tensor([0, 5, 9], dtype=torch.int32)
    torch.library.opcheck(torch.ops.vlm_train.attend_one_by_one, (*states, starts, group, window, 0.3))
