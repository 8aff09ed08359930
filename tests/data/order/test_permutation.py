"""The computed order: a permutation of any size, the same everywhere, from any place, and as mixed as chance."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from vlm_train.data.order.permutation import Permutation

GOLDEN = [66123612, 91288378, 20685989, 34356567, 60308477]
SMALL = [5, 1, 2, 3, 4, 7, 9, 8, 0, 6]


@pytest.mark.parametrize("size", [*range(1, 70), 1000, 4095, 4096, 4097, 10_007])
def test_every_number_stands_at_one_place(size):
    order = Permutation(7, size)
    assert sorted(map(order, range(size))) == list(range(size))


def test_the_order_is_the_same_on_every_machine():
    assert [Permutation(7, 100_000_000)(place) for place in range(5)] == GOLDEN
    assert [Permutation(7, 10)(place) for place in range(10)] == SMALL
    assert Permutation(8, 100_000_000)(0) != GOLDEN[0]


@pytest.mark.parametrize("place", [-1, 5])
def test_a_place_outside_is_refused(place):
    with pytest.raises(IndexError, match=f"place {place} of 5"):
        Permutation(0, 5)(place)


def test_it_mixes_as_chance_does():
    """Over 2,000 seeds, each of 12 numbers stands at each place about as often; neighbors are far apart in a large
    order."""
    counts = np.zeros((12, 12))
    for seed in range(2000):
        for place in range(12):
            counts[place, Permutation(seed, 12)(place)] += 1
    expected = 2000 / 12
    chi = ((counts - expected) ** 2 / expected).sum()
    assert chi < 121 + 4 * np.sqrt(2 * 121)  # 121 degrees of freedom
    order = np.array([Permutation(3, 1_000_000)(place) for place in range(20_000)])
    assert 0.97 < np.abs(np.diff(order)).mean() / (1_000_000 / 3) < 1.03
    assert abs(np.corrcoef(order, np.arange(20_000))[0, 1]) < 0.03
    ups = (np.diff(order) > 0).mean()
    assert abs(ups - 0.5) < 0.015


def test_it_takes_no_memory():
    tracemalloc.start()
    order = Permutation(1, 10**12)
    found = [order(place) for place in (0, 10**11, 10**12 - 1)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(found)) == 3 and max(found) < 10**12 and peak < 100_000
