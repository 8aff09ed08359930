"""Language models, encoder-decoders and text towers keep the contracts of `vlm_train.contracts.parts`.

Legend: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlm_train.contract.component import Component
from vlm_train.contract.finding import (
    Finding,
    check_gradients,
    check_on_meta,
    check_state,
    compare_tensors,
    compare_values,
    require_members,
    weigh_values,
)
from vlm_train.contracts.batch import IGNORE, SequenceMask, Slots, TokenStream
from vlm_train.contracts.cross_states import CrossStates
from vlm_train.contracts.layout import PLACEHOLDER_ID
from vlm_train.data.collate import pack_sequences

GIVEN: dict[str, Any] = {"vocab_size": 50}
"""What the tokenizer decides."""

ROWS, LENGTH, CUT = 2, 7, 4
CAPTIONS = ((5, 6, 7), (8,), (9, 10, 11, 12))


def check_llm(component: Component) -> Iterator[Finding]:
    """A language model, an encoder-decoder (it has a `start_id`) or a text tower (it has `pooled`)."""
    yield check_on_meta(component.make_on_meta(**GIVEN))
    llm = component.make_small(**GIVEN)
    if hasattr(llm, "pooled"):
        yield from _check_text_tower(component, llm)
        return
    seq2seq = hasattr(llm, "start_id")
    members = ("dim", "vocab_size", "layers", "takes_packed", "embed", "decode", "head")
    yield (found := require_members(llm, (*members, "encode") if seq2seq else members))
    if found.problem:
        return
    yield from _check_text_model(component, llm.train(), seq2seq)
    if not seq2seq:
        yield from _check_masks(llm.eval())
        yield from _check_inserted_blocks(component)


def _check_text_model(component: Component, llm: Any, seq2seq: bool) -> Iterator[Finding]:
    """Shapes, layers, gradients and saving; of an encoder-decoder both halves."""
    ids = _make_ids()
    marked = ids.clone()
    marked[:, 1] = PLACEHOLDER_ID
    embeds = llm.embed(marked)
    yield compare_values("embeddings are [B, T, dim]", list(embeds.shape), [ROWS, LENGTH, llm.dim])
    finite = bool(torch.isfinite(embeds).all())
    yield Finding("a placeholder has a finite embedding", "" if finite else "embed(PLACEHOLDER_ID) is not finite")

    run = partial(_run_pair if seq2seq else _run_causal, ids=ids)
    with _CountedLayers(llm.layers) as calls:
        hidden = run(llm)
    layers = isinstance(llm.layers, nn.ModuleList) and len(llm.layers)
    idle = [number for number, _ in enumerate(llm.layers) if calls[number] != 1] if layers else "no nn.ModuleList"
    yield compare_values("every one of its layers runs once in a pass", idle, [])
    logits = llm.head(hidden)
    yield compare_values("hidden states are [B, T, dim]", list(hidden.shape), [ROWS, LENGTH, llm.dim])
    yield compare_values("logits are [B, T, vocab_size]", list(logits.shape), [ROWS, LENGTH, llm.vocab_size])
    unused = [
        name
        for method in ("unused_parameters", "encoder_parameters")
        for name in (getattr(llm, method)() if hasattr(llm, method) else ())
    ]
    yield check_gradients(llm, weigh_values(logits), unused)
    yield check_state(llm, component.make_small(**GIVEN), lambda one: one.head(run(one)))


@torch.no_grad()
def _check_masks(llm: Any) -> Iterator[Finding]:
    """Causal without a mask; a mask, and packed samples, mean what they say."""
    embeds, positions = llm.embed(_make_ids()), _count_positions(ROWS)
    plain = llm.decode(embeds, positions, None)
    other = embeds.clone()
    other[:, CUT:] = other[:, CUT:].flip(1) + 1.0
    found = llm.decode(other, positions, None)
    yield compare_tensors("a token sees none that follow it", found[:, :CUT], plain[:, :CUT])
    mixers = getattr(llm, "unmasked_mixers", ())
    if mixers:
        yield Finding(f"no mask reaches {', '.join(mixers)}: it says so in unmasked_mixers, and packing is refused")
        return
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None]
    masked = llm.decode(embeds, positions, causal.expand(ROWS, -1, -1, -1))
    yield compare_tensors("a causal mask gives what no mask gives", masked, plain)

    blocks = causal.repeat(ROWS, 1, 1, 1)
    blocks[0, :, CUT:, :CUT] = False  # two samples in the first row
    packed_positions = positions.clone()
    packed_positions[:, 0, CUT:] -= CUT
    dense = llm.decode(embeds, packed_positions, blocks)
    changed = embeds.clone()
    changed[0, :CUT] += 1.0
    apart = llm.decode(changed, packed_positions, blocks)[0, CUT:]
    yield compare_tensors("a sample of a packed row does not see the one before it", apart, dense[0, CUT:])
    if llm.takes_packed:
        sequences = pack_sequences([(0, CUT), (CUT, LENGTH - CUT), (LENGTH, LENGTH)], ROWS * LENGTH)
        packed = llm.decode(embeds, packed_positions, SequenceMask(causal=sequences))
        yield compare_tensors("a SequenceMask gives what the mask gives", packed, dense)


@torch.no_grad()
def _check_inserted_blocks(component: Component) -> Iterator[Finding]:
    """`insert` is an offer: families with cross-attention between the layers need it."""
    llm = component.make_small(**GIVEN).eval()
    if not hasattr(llm, "insert"):
        yield Finding("offers no insert: families with blocks between the layers refuse it")
        return
    embeds, positions = llm.embed(_make_ids()), _count_positions(ROWS)
    before = llm.decode(embeds, positions, None)
    blocks = llm.insert(lambda: _Shift(llm.dim), every=1)
    states = CrossStates(features=torch.zeros(1, 1, llm.dim), media_of_token=torch.full((ROWS, LENGTH), -1))
    after = llm.decode(embeds, positions, None, cross_states=states)
    yield compare_values(
        "inserted blocks run once before every layer", [one.calls for one in blocks], [1] * len(llm.layers)
    )
    same = torch.equal(before, after)
    yield Finding("what an inserted block returns is used", "the hidden states are as without blocks" if same else "")
    inside = [name for name, _ in llm.named_parameters() if name.endswith("contract_shift")]
    yield compare_values("inserted blocks are no part of the language model's own parameters", inside, [])


def _check_text_tower(component: Component, tower: Any) -> Iterator[Finding]:
    """Captions to vectors, `TextTower`."""
    yield (found := require_members(tower, ("dim", "layers", "pooled", "head_parameters")))
    if found.problem:
        return
    stream = _make_captions(CAPTIONS)
    vectors = tower.pooled(stream)
    yield compare_values("vectors are [B, dim]", list(vectors.shape), [len(CAPTIONS), tower.dim])
    yield check_gradients(tower, weigh_values(vectors), tower.head_parameters())
    tower.eval()
    with torch.no_grad():
        together = tower.pooled(stream)
        alone = torch.cat([tower.pooled(_make_captions([row])) for row in CAPTIONS])
        left = tower.pooled(_make_captions(CAPTIONS, left=True))
    yield compare_tensors("a caption gives what it gives alone, without padding", together, alone)
    yield compare_tensors("padding on the left changes nothing", left, together)
    yield check_state(tower, component.make_small(**GIVEN), lambda one: one.pooled(stream))


def _run_causal(llm: Any, ids: Tensor) -> Tensor:
    hidden: Tensor = llm.decode(llm.embed(ids), _count_positions(ROWS), None)
    return hidden


def _run_pair(llm: Any, ids: Tensor) -> Tensor:
    prompt = ids[:, :5]
    mask = torch.ones(ROWS, 1, 1, prompt.shape[1], dtype=torch.bool)
    encoded = llm.encode(llm.embed(prompt), mask)
    hidden: Tensor = llm.decode(llm.embed(ids), _count_positions(ROWS), None, encoded=encoded)
    return hidden


def _make_ids() -> Tensor:
    return torch.randint(0, GIVEN["vocab_size"], (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


def _count_positions(rows: int) -> Tensor:
    return torch.arange(LENGTH).expand(1, rows, LENGTH)


def _make_captions(rows: Any, *, left: bool = False) -> TokenStream:
    """Captions, one a row, padded on the right or on the left."""
    length = max(map(len, rows))

    def pad_rows(fill: Callable[[tuple[int, ...]], list[int]]) -> Tensor:
        padded = [
            [0] * (length - len(row)) + fill(row) if left else fill(row) + [0] * (length - len(row)) for row in rows
        ]
        return torch.tensor(padded)

    ids = pad_rows(list)
    return TokenStream(
        ids=ids,
        labels=torch.full_like(ids, IGNORE),
        weights=torch.zeros(ids.shape),
        positions=pad_rows(lambda row: list(range(len(row))))[None],
        segment_ids=pad_rows(lambda row: [1] * len(row)).int(),
        attention_group=torch.zeros_like(ids).int(),
        slots=Slots(index=torch.zeros(0, dtype=torch.long), placeholders=0),
        supervised=torch.zeros(0, dtype=torch.long),
        plain_causal=not left,
    )


class _CountedLayers:
    """How often each layer runs while it is open."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self.layers, self.calls = layers, Counter[int]()

    def __enter__(self) -> Counter[int]:
        def count_call(number: int) -> Callable[..., None]:
            return lambda *_: self.calls.update([number])

        self.hooks = [layer.register_forward_hook(count_call(number)) for number, layer in enumerate(self.layers)]
        return self.calls

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


class _Shift(nn.Module):
    """A block that adds the same to every token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.contract_shift = nn.Parameter(torch.linspace(0.5, 1.5, dim))
        self.calls = 0

    def forward(self, hidden: Tensor, cross_states: CrossStates) -> Tensor:
        self.calls += 1
        return hidden + self.contract_shift
