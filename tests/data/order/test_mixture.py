"""Mixtures: passes are exact per source, quotas per block, orders by shard, and every setting that cannot be."""

from __future__ import annotations

import hashlib
import json
import pickle
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from vlm_train.data.order.mixture import Mixture, Share, _Pools, apportion_shares
from vlm_train.errors import ConfigError


def mixture(*sizes, **options):
    sources = tuple(Share(size=one) if isinstance(one, int) else one for one in sizes)
    return Mixture(**{"sources": sources, "seed": 1} | options)


def draws(of: Mixture, count: int, first: int = 0) -> list[tuple[int, int, int]]:
    """(source, number in the source, epoch) of `count` positions."""
    starts = np.cumsum([0, *(source.size for source in of.sources)])
    found = []
    for position in range(first, first + count):
        ref = of.draw_sample(position)
        which = int(np.searchsorted(starts, ref.index, side="right")) - 1
        found.append((which, ref.index - int(starts[which]), ref.epoch))
    return found


@pytest.mark.parametrize("shuffle", ["full", "computed", "shards", "none"])
@pytest.mark.parametrize(
    "options",
    [
        {"rule": "concat"},
        {"rule": "concat", "block": 9},
        {"rule": "sqrt", "block": 32},
        {"rule": "temperature", "temperature": 2.0, "block": 32},
    ],
)
def test_every_sample_comes_once_in_every_pass_over_its_source(shuffle, options):
    of = mixture(7, Share(size=23, shards=(0, 5, 11, 20)), 40, shuffle=shuffle, pool=2, **options)
    seen = draws(of, 400)
    for which, source in enumerate(of.sources):
        mine = [(number, epoch) for w, number, epoch in seen if w == which]
        for first in range(0, len(mine) - source.size + 1, source.size):
            one_pass = mine[first : first + source.size]
            assert sorted(number for number, _ in one_pass) == list(range(source.size))
            assert {epoch for _, epoch in one_pass} == {first // source.size}


def test_concat_is_everything_once():
    of = mixture(7, 23)
    assert of.samples == 30 and sorted(draws(of, 30)) == [(0, n, 0) for n in range(7)] + [(1, n, 0) for n in range(23)]
    assert draws(of, 30) != draws(of, 30, first=30)


@pytest.mark.parametrize("shuffle", ["shards", "computed"])
@pytest.mark.parametrize("block", [7, 64, 10_000])
def test_concat_in_blocks_is_everything_once_a_pass(block, shuffle):
    of = mixture(3, 500, Share(size=120, repeat=0.5), shuffle=shuffle, block=block)
    assert of.samples == 563
    for turn in range(2):
        counts = Counter((which, number) for which, number, _ in draws(of, 563, first=563 * turn))
        assert max(counts.values()) == 1
        assert Counter(which for which, _ in counts) == {0: 3, 1: 500, 2: 60}


def test_repeats_are_whole_passes_and_shares_of_passes():
    of = mixture(10, Share(size=10, repeat=2.5))
    assert of.samples == 35
    counts = Counter(draws(of, 70))
    assert all(counts[0, n, epoch] == 1 for n in range(10) for epoch in range(2))
    assert all(counts[1, n, epoch] == 1 for n in range(10) for epoch in range(5))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rule": "sqrt"}, [10, 30]),
        ({"rule": "temperature", "temperature": 2.0}, [10, 30]),
        ({"rule": "temperature", "temperature": 1.0}, [4, 36]),
    ],
)
def test_quotas_of_a_block_follow_the_rule(options, expected):
    of = mixture(100, 900, block=40, **options)
    assert of.quotas.tolist() == expected
    for block in range(5):
        assert Counter(which for which, *_ in draws(of, 40, first=40 * block)) == dict(enumerate(expected))


def test_weights_and_a_fixed_share_of_text():
    text = Share(size=50, share=0.1)
    of = mixture(Share(size=10, weight=3.0), Share(size=999, weight=1.0), text, rule="weights", block=400)
    assert of.quotas.tolist() == [270, 90, 40]
    of = mixture(30, 60, text, block=100)  # the others as they are
    assert of.quotas.tolist() == [30, 60, 10]


def test_the_order_depends_on_the_seed_and_the_position_only():
    of, again, other = mixture(30, 40), mixture(30, 40), mixture(30, 40, seed=2)
    backwards = [again.draw_sample(position) for position in reversed(range(200))][::-1]
    assert [of.draw_sample(position) for position in range(200)] == backwards
    assert backwards != [other.draw_sample(position) for position in range(200)]
    assert pickle.loads(pickle.dumps(of)).draw_sample(77) == of.draw_sample(77)


def test_an_order_by_shards_reads_a_pool_at_a_time_and_mixes_it():
    """64 shards of 100 samples, 8 at a time: the memory is 800 numbers, and neighbours are mixed all over the pool."""
    shards = tuple(range(0, 6400, 100))
    of = mixture(Share(size=6400, shards=shards), shuffle="shards", pool=8)
    order = np.array([number for _, number, _ in draws(of, 6400)])
    for pool in order.reshape(8, 800):
        assert len(set(pool // 100)) == 8
        places = np.argsort(pool)  # of every sample, in the order of the shards
        distance = np.abs(np.diff(places.reshape(8, 100), axis=1)).mean()
        assert 0.9 < distance / (800 / 3) < 1.1  # that of two random places
    assert len({tuple(sorted(set(pool // 100))) for pool in order.reshape(8, 800)}) == 8
    again = np.array([number for _, number, _ in draws(of, 6400, first=6400)])
    assert set(order[:800] // 100) != set(again[:800] // 100)


def test_sources_by_shards_do_not_mix_each_others_pools(monkeypatch):
    made: list[int] = []
    mix = _Pools._mix_group
    monkeypatch.setattr(_Pools, "_mix_group", lambda pools, group: made.append(group) or mix(pools, group))
    draws(
        mixture(*(Share(size=40, shards=(0, 10, 20, 30)) for _ in range(5)), shuffle="shards", pool=2, block=200), 200
    )
    assert sorted(made) == [0] * 5 + [1] * 5  # once a source, however the draws alternate


def test_apportioning():
    assert apportion_shares([0.9, 1.55, 1.55], 4).tolist() == [1, 2, 1]  # one rounded up to 1 is not rounded up again
    assert apportion_shares([1, 1, 1], 10).tolist() == [4, 3, 3]
    assert apportion_shares([0.5, 0.25, 0.25], 8).tolist() == [4, 2, 2]
    assert apportion_shares([1e6, 1, 1], 10).tolist() == [8, 1, 1]


@pytest.mark.parametrize(
    ("sources", "options", "message"),
    [
        ([], {}, "no samples"),
        ([0], {}, "no samples"),
        ([5], {"rule": "size"}, r"data\.mixture: 'size'; allowed: concat, weights, sqrt, temperature"),
        ([5], {"shuffle": "yes"}, r"data\.shuffle: 'yes'; allowed: full, shards, none"),
        ([5, Share(size=5, weight=2.0)], {}, r"a weight counts only with data\.mixture=weights, got 'concat'"),
        ([5, Share(size=5, share=1.0)], {}, r"the fixed shares add up to 1, which leaves nothing"),
        ([5, 5], {"temperature": 2.0}, r"data\.temperature: counts only with data\.mixture=temperature"),
        (
            [5, Share(size=5, share=0.001)],
            {"block": 64},
            r"a share of 0\.001 of data\.block_samples=64 is less than a sample",
        ),
        ([Share(size=5, share=0.5), Share(size=5, share=0.4)], {}, r"they add up to 0\.9, not 1"),
    ],
)
def test_settings_that_cannot_be(sources, options, message):
    with pytest.raises(ConfigError, match=message):
        mixture(*sources, **options)


EARLIER = {
    ("full", "concat"): "374b824f3c800ac0",
    ("full", "sqrt"): "43451083fecc43c7",
    ("full", "weights"): "c23a6fd3791201c8",
    ("shards", "concat"): "7fe35df7f01d16f4",
    ("shards", "sqrt"): "b4f188659b82defe",
    ("shards", "weights"): "a25d6f7c56cc41e5",
    ("none", "concat"): "75bcc104ad642549",
    ("none", "sqrt"): "67c424ae51c05d04",
    ("none", "weights"): "d16f5c7395ec2f5a",
}
"""Hashes of the first 700 draws, as every version so far made them: a checkpoint says nothing but its step."""


@pytest.mark.parametrize(("shuffle", "rule"), EARLIER)
def test_orders_of_earlier_runs_stay(shuffle, rule):
    first = {"weight": 2.0} if rule == "weights" else {}
    middle = {"share": 0.1} if rule == "weights" else {"repeat": 2.5, "shards": (0, 5, 11, 20)}
    sources = [Share(size=37, shards=(0, 10, 20, 30), **first), Share(size=23, **middle), Share(size=40)]
    of = mixture(*sources, seed=5, shuffle=shuffle, pool=2, rule=rule, block=40 if rule == "weights" else 32)
    drawn = [(ref.index, ref.epoch) for ref in map(of.draw_sample, range(700))]
    assert hashlib.sha256(json.dumps(drawn).encode()).hexdigest()[:16] == EARLIER[shuffle, rule]


@pytest.mark.parametrize("sources", [1, 12])
def test_a_computed_order_takes_no_memory(sources):
    """A hundred million samples: draws from four passes hold no more than two blocks of 8,192."""
    tracemalloc.start()
    of = mixture(*[100_000_000 // sources] * sources, shuffle="computed")
    drawn = [of.draw_sample(position) for position in range(0, 4 * of.samples, of.samples // 25)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(drawn)) == len(drawn) and {ref.epoch for ref in drawn} == {0, 1, 2, 3}
    assert peak < 2_000_000


def test_a_computed_order_keeps_the_shares_of_every_block():
    of = mixture(4000, 1000, shuffle="computed", block=50)
    for first in range(0, 5000, 50):
        assert Counter(which for which, *_ in draws(of, 50, first=first)) == {0: 40, 1: 10}
