"""`batch.normalize=source`: the mean over sources, however much of a step each has, and however a step is cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.data.test_collate import PLANS, collate, item, stream
from vlm_train.data.collate import Example
from vlm_train.data.source_weights import source_factors, weigh_sources


def loss_by_hand(losses: dict[str, list[tuple[float, float]]]) -> float:
    """Mean over sources of the weighted mean of `(nll, weight)` pairs."""
    return sum(sum(n * w for n, w in pairs) / sum(w for _, w in pairs) for pairs in losses.values()) / len(losses)


def test_factors_make_sources_equal_and_keep_the_denominator() -> None:
    sums = {"a": 90.0, "b": 9.0, "c": 1.0, "none": 0.0}
    factors = source_factors(sums)
    assert "none" not in factors
    assert [sums[s] * factors[s] for s in "abc"] == pytest.approx([100 / 3] * 3)
    assert source_factors({"only": 7.0}) == {"only": 1.0} and source_factors({}) == {}


def made(learned: int, source: str, weight: float = 1.0) -> Example:
    one = item(stream(8, learned), weight=weight)
    return Example(one.rendered, one.views, source=source, weight=weight)


def test_loss_of_a_step_is_the_mean_over_its_sources() -> None:
    items = [made(7, "big"), made(6, "big", 2.0), made(5, "big"), made(2, "small", 0.5)]
    sums = {"big": 7 + 12 + 5.0, "small": 1.0}
    generator = torch.Generator().manual_seed(0)
    nll = torch.rand(4, 8, generator=generator)
    by_source: dict[str, list[tuple[float, float]]] = {"big": [], "small": []}
    total = torch.zeros(())
    for first in (0, 2):  # two micro-batches: neither knows the other's sources
        batch = collate(items[first : first + 2], PLANS, normalize="source")
        weighed = weigh_sources(batch, {"llm": source_factors(sums), "samples": {}})
        total = total + (weighed.text["llm"].weights * nll[first : first + 2]).sum() / sum(sums.values())
        for row, one in enumerate(items[first : first + 2]):
            weights = batch.text["llm"].weights[row].tolist()
            by_source[one.source] += list(zip(nll[first + row].tolist(), weights, strict=True))
    assert float(total) == pytest.approx(loss_by_hand(by_source))


def test_segments_of_a_row_have_their_own_sources_and_padding_none() -> None:
    batch = collate([made(8, "a"), made(8, "b")], PLANS, normalize="source")
    text = batch.text["llm"]
    segments = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1, 1]], dtype=torch.int32)
    packed = replace(batch, text={"llm": replace(text, segment_ids=segments)}, sources=(("a", "b"), ("b",)))
    weights = weigh_sources(packed, {"llm": {"a": 2.0, "b": 3.0}}).text["llm"].weights
    assert weights.tolist() == [[2.0] * 3 + [3.0] * 4 + [0.0], [3.0] * 8]


def test_an_empty_micro_batch_stays_as_it_is() -> None:
    batch = weigh_sources(collate([], PLANS), {"llm": {"a": 2.0}})
    assert batch.text["llm"].weights.tolist() == [[0.0]]
