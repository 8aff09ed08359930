"""The order of samples: each once an epoch, dealt to steps, ranks and micro-batches without any memory."""

from __future__ import annotations

import pytest

from vlm_train.data.mixture import Address, Mixture, Share
from vlm_train.data.order import SamplePlan
from vlm_train.errors import ConfigError


def plan(samples: int = 10, seed: int = 3, shuffle: str = "full", **changes) -> SamplePlan:
    mixture = Mixture(sources=(Share(size=samples),), seed=seed, shuffle=shuffle)
    return SamplePlan(**{"mixture": mixture, "batch": 4, "total": 30} | changes)


def step_of(which: SamplePlan, step: int) -> list[Address]:
    """One global batch in the order of positions: the ranks' shares interleaved."""
    shares = [[a for micro in which.step(step, rank) for (a,) in micro] for rank in range(which.world)]
    return [share[row] for row in range(max(map(len, shares))) for share in shares if row < len(share)]


@pytest.mark.parametrize("shuffle", ["full", "shards", "none"])
def test_each_sample_is_drawn_once_in_each_epoch(shuffle):
    drawn = [a for step in range(plan().steps) for a in step_of(plan(shuffle=shuffle), step)]
    assert len(drawn) == 30
    for epoch in range(3):
        assert sorted(a.index for a in drawn if a.epoch == epoch) == list(range(10))
    orders = {tuple(a.index for a in drawn if a.epoch == epoch) for epoch in range(3)}
    assert len(orders) == (1 if shuffle == "none" else 3)


def test_the_seed_decides_the_order():
    assert step_of(plan(), 0) == step_of(plan(), 0)
    assert [a for s in range(5) for a in step_of(plan(), s)] != [a for s in range(5) for a in step_of(plan(seed=4), s)]


@pytest.mark.parametrize(("total", "steps"), [(1, 1), (4, 1), (5, 2), (8, 2), (30, 8)])
def test_steps_include_the_short_last_one(total, steps):
    assert plan(total=total).steps == steps


@pytest.mark.parametrize(("total", "shares"), [(7, [1, 0, 0]), (9, [1, 1, 1]), (11, [2, 2, 1]), (12, [2, 2, 2])])
def test_a_short_last_step_is_as_even_as_it_can_be(total, shares):
    which = plan(batch=6, world=3, total=total)
    last = [which.step(1, rank) for rank in range(3)]
    assert [sum(map(len, rows)) for rows in last] == shares
    assert {len(rows) for rows in last} == {which.micro_count}  # every rank makes the same calls


@pytest.mark.parametrize("world", [2, 3, 4, 6])
@pytest.mark.parametrize("micro", [1, 2, 5])
def test_another_world_size_sees_the_same_global_batches(world, micro):
    alone, shared = plan(batch=12, total=40), plan(batch=12, total=40, world=world, micro=micro)
    assert alone.steps == shared.steps
    for step in range(alone.steps):
        assert step_of(shared, step) == step_of(alone, step)
        assert all(len(rows) <= micro for rank in range(world) for rows in shared.step(step, rank))


def test_resuming_at_any_step_is_the_same():
    whole = [plan(world=2).step(step, 1) for step in range(8)]
    for start in range(8):
        resumed = plan(world=2)
        assert [resumed.step(step, 1) for step in range(start, 8)] == whole[start:]


def test_a_step_may_span_several_epochs():
    drawn = step_of(plan(samples=3, batch=8, total=8), 0)
    assert [a.epoch for a in drawn] == [0, 0, 0, 1, 1, 1, 2, 2]


def test_a_batch_that_the_ranks_cannot_share_is_an_error():
    with pytest.raises(ConfigError, match=r"batch\.samples=4 cannot be shared evenly by 3 ranks; .* multiples of 3"):
        plan(world=3)


def test_no_samples_is_an_error():
    with pytest.raises(ConfigError, match="no samples"):
        plan(samples=0)
