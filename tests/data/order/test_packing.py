"""Packing: bounds, shares of real tokens on published shapes, and rows of like cost for ranks that wait."""

from __future__ import annotations

import numpy as np
import pytest

from vlm_train.data.order.packing import assign_rows_to_ranks, fill_rows, share_rows
from vlm_train.errors import ConfigError

SAMPLES = 4096


def text(rng: np.random.Generator, median: float = 130, spread: float = 0.8, most: int = 1400) -> np.ndarray:
    return np.clip(rng.lognormal(np.log(median), spread, SAMPLES), 8, most).astype(int)


def shape(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and patches of samples as published models see them."""
    rng = np.random.default_rng(0)
    if name == "llava15":  # 576 tokens an image, 6 % text-only dialogue
        alone = rng.random(SAMPLES) < 0.06
        return np.where(alone, text(rng, 400, 0.7, 2000), 576 + text(rng)), 1 - alone.astype(int)
    if name == "anyres":
        patches = rng.integers(1, 6, SAMPLES)
        return 576 * patches + text(rng), patches
    if name == "internvl":
        patches = rng.integers(1, 14, SAMPLES)
        return 256 * patches + text(rng), patches
    native = np.exp(rng.uniform(np.log(64), np.log(4096), SAMPLES)).astype(int)
    return native + text(rng), np.ones(SAMPLES, int)


@pytest.mark.parametrize(
    ("name", "length", "least"),
    [
        ("llava15", 2048, 0.93),
        ("llava15", 4096, 0.99),
        ("llava15", 8192, 0.99),
        ("anyres", 8192, 0.985),
        ("anyres", 16384, 0.99),
        ("internvl", 8192, 0.99),
        ("qwen", 8192, 0.99),
    ],
)
def test_rows_are_full(name, length, least):
    tokens = np.minimum(shape(name)[0], length).tolist()
    rows = fill_rows(tokens, length)
    assert sorted(i for row in rows for i in row) == list(range(SAMPLES))
    assert all(row == sorted(row) for row in rows)
    assert max(sum(tokens[i] for i in row) for row in rows) <= length
    assert sum(tokens) / (len(rows) * length) >= least


@pytest.mark.parametrize("most", [20, 26, 40])
def test_views_bound_a_row_too(most):
    tokens, patches = (column[:600].tolist() for column in shape("internvl"))
    rows = fill_rows(tokens, 8192, patches=patches, max_patches=most)
    assert sorted(i for row in rows for i in row) == list(range(600))
    assert max(sum(patches[i] for i in row) for row in rows) <= most
    assert max(sum(tokens[i] for i in row) for row in rows) <= 8192
    bound = max(sum(tokens) / 8192, sum(patches) / most)
    assert len(rows) <= 1.04 * bound + 1


def test_the_best_subset_of_few_views_is_the_best():
    """Against every subset, where patches are scarce."""
    rng = np.random.default_rng(1)
    for _ in range(50):
        tokens, patches = rng.integers(1, 30, 12).tolist(), rng.integers(0, 5, 12).tolist()
        (first, *_), budget, room = fill_rows(tokens, 60, patches=patches, max_patches=8, buffer=25), 60, 8
        best = 0
        for mask in range(1 << 11):
            row = [0, *(k + 1 for k in range(11) if mask >> k & 1)]
            total, seen = sum(tokens[i] for i in row), sum(patches[i] for i in row)
            best = max(best, total) if total <= budget and seen <= room else best
        assert sum(tokens[i] for i in first) == best


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_samples_that_cannot_be_used_leave_the_rows_full(share):
    rng = np.random.default_rng(0)
    tokens = np.where(rng.random(SAMPLES) < share, 0, rng.integers(50, 150, SAMPLES))
    rows = fill_rows(tokens.tolist(), 2048)
    assert sorted(i for row in rows for i in row) == list(range(SAMPLES)) and all(row == sorted(row) for row in rows)
    assert tokens.sum() / (len(rows) * 2048) >= 0.97


def test_no_sample_waits_longer_than_its_turn():
    tokens = [700] + [1] * 300  # the long one fits no remainder, but opens a row of its own
    rows = fill_rows(tokens, 702, buffer=8)
    assert 0 in rows[0] and len(rows[0]) == 3


def test_a_sample_that_fits_no_row_is_an_error():
    with pytest.raises(ConfigError, match=r"data\.pack: a sample of 9 tokens does not fit into rows of 8"):
        fill_rows([3, 9], 8)
    with pytest.raises(ConfigError, match=r"data\.pack_patches: a sample of 4 patches does not fit into rows of 3"):
        share_rows([3, 5], [1, 1], 8, patches=[1, 4], max_patches=3)


@pytest.mark.parametrize("multiple", [1, 4, 8, 24])
def test_a_given_set_is_spread_over_few_even_rows(multiple):
    tokens, patches = (column[:128].tolist() for column in shape("llava15"))
    costs = [t + t * t / 8000 for t in tokens]
    rows = share_rows(tokens, costs, 4096, multiple=multiple, patches=patches, max_patches=8)
    assert sorted(i for row in rows for i in row) == list(range(128)) and len(rows) % multiple == 0
    assert max(sum(tokens[i] for i in row) for row in rows) <= 4096
    assert max(sum(patches[i] for i in row) for row in rows) <= 8
    least = -(-max(-(-sum(tokens) // 4096), -(-sum(patches) // 8)) // multiple) * multiple
    assert len(rows) <= max(least + multiple, 1.1 * least)
    held = np.array([sum(costs[i] for i in row) for row in rows])
    if multiple <= 8:
        ranks = held[assign_rows_to_ranks(held, multiple)].sum(axis=0)
        assert ranks.max() / ranks.mean() <= 1.02


def test_fewer_samples_than_rows_leave_rows_empty():
    assert sorted(share_rows([5, 6], [5, 6], 10, multiple=4), key=len) == [[], [], [1], [0]]


def test_rows_of_like_cost_are_computed_at_the_same_time():
    turns = assign_rows_to_ranks([5, 1, 4, 2, 6, 3], 2)
    assert turns.tolist() == [[4, 0], [5, 2], [3, 1]]


def test_what_fills_a_row_to_its_bound_of_patches_fits():
    assert fill_rows([3, 3], 8, patches=[4, 4], max_patches=8) == [[0, 1]]
    assert fill_rows([3, 3], 8, patches=[4, 5], max_patches=8) == [[0], [1]]
    assert fill_rows([3], 8, patches=[8], max_patches=8) == [[0]]
    rows = share_rows([3, 3], [1.0, 1.0], 8, patches=[4, 4], max_patches=8)
    assert rows == [[0, 1]]
