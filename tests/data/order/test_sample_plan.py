"""The order of samples: each once an epoch, dealt to steps, ranks and micro-batches without any memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from vlm_train.data.order import token_plan
from vlm_train.data.order.cost import Cost, CostsOnDemand
from vlm_train.data.order.mixture import Mixture, SampleRef, Share
from vlm_train.data.order.sample_plan import Packing, SamplePlan, Sizes
from vlm_train.data.order.token_plan import STEPS, TokenPlan
from vlm_train.errors import ConfigError


def plan(samples: int = 10, seed: int = 3, shuffle: str = "full", **changes) -> SamplePlan:
    mixture = Mixture(sources=(Share(size=samples),), seed=seed, shuffle=shuffle)
    return SamplePlan(**{"mixture": mixture, "batch": 4, "total": 30} | changes)


def step_of(which: SamplePlan, step: int) -> list[SampleRef]:
    """One global batch in the order of positions: the ranks' shares interleaved."""
    shares = [[a for micro in which.step(step, rank) for (a,) in micro] for rank in range(which.world)]
    return [share[row] for row in range(max(map(len, shares))) for share in shares if row < len(share)]


@pytest.mark.parametrize("shuffle", ["full", "computed", "shards", "none"])
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


def shaped(count: int = 4096) -> Sizes:
    """Lengths of a LLaVA-like mixture: images of 576 tokens and text, some of it alone."""
    rng = np.random.default_rng(0)
    text = np.clip(rng.lognormal(np.log(130), 0.8, count), 8, 1400).astype(np.int32)
    views = (rng.random(count) > 0.06).astype(np.int32)
    tokens = (text + 576 * views).astype(np.int32)
    return Sizes(tokens, views, Cost(1.0, 1e-4, 50.0)(tokens, views))


def packed(count: int = 4096, **changes) -> SamplePlan:
    return plan(
        samples=count, packing=Packing(sizes=shaped(count), length=4096), **{"batch": 128, "total": count} | changes
    )


def by_tokens(count: int = 4096, rows: int = 8, **changes) -> TokenPlan:
    mixture = Mixture(sources=(Share(size=count),), seed=3)
    options = {"total": count, "tokens": rows * 4096} | changes
    return TokenPlan(mixture=mixture, packing=Packing(sizes=shaped(count), length=4096), **options)


def all_rows(which, step: int) -> list[tuple[SampleRef, ...]]:
    return [row for rank in range(which.world) for micro in which.step(step, rank) for row in micro]


@pytest.mark.parametrize(("world", "micro"), [(1, 1), (2, 1), (8, 1), (4, 2)])
def test_packed_steps_hold_the_very_samples_of_unpacked_ones(world, micro):
    alone, shared = packed(), packed(world=world, micro=micro)
    for step in (0, 7, alone.steps - 1):
        expected = [alone.mixture.draw_sample(position) for position in range(128 * step, 128 * (step + 1))]
        rows = all_rows(shared, step)
        assert sorted((a.index, a.epoch) for row in rows for a in row) == sorted((a.index, a.epoch) for a in expected)
        assert max(sum(shared.packing.sizes.tokens[a.index] for a in row) for row in rows) <= 4096
        assert len({len(shared.step(step, rank)) for rank in range(world)}) == 1  # the same number of calls
        assert all(len(m) <= micro for rank in range(world) for m in shared.step(step, rank))


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_a_token_budget_is_kept_and_every_sample_comes_once(world):
    which = by_tokens(world=world)
    assert which.steps == sum(1 for _ in range(which.steps))
    drawn: list[int] = []
    for step in range(which.steps):
        rows = all_rows(which, step)
        assert len(rows) <= 8 and max(sum(which.packing.sizes.tokens[a.index] for a in r) for r in rows) <= 4096
        assert {len(which.step(step, rank)) for rank in range(world)} == {8 // world}
        assert sorted(all_rows(by_tokens(), step)) == sorted(rows) if world > 1 else True  # whatever the world size
        drawn += [a.index for row in rows for a in row]
    assert sorted(drawn) == list(range(4096))
    real = sum(which.packing.sizes.tokens) / (which.steps * 8 * 4096)
    assert real >= 0.98  # the last step may lack rows


def test_token_steps_end_where_they_are_told_to():
    assert by_tokens(most=5).steps == 5
    endless = by_tokens(total=None, most=1000)
    assert endless.steps == 1000
    rows = all_rows(endless, 500)  # goes round as often as needed
    assert len(rows) == 8 and min(a.epoch for row in rows for a in row) > 3
    assert all_rows(by_tokens(total=None, most=1000), 500) == rows


def test_windows_follow_each_other_without_a_gap():
    """Every sample comes once a pass, and what waits at the end of a window opens the next one."""
    endless = by_tokens(1000, total=None, most=1000)
    steps = endless.steps_per_window
    assert steps == 21 < STEPS  # a pass: 1,000 samples of about 700 tokens
    drawn = [a for step in range(3 * steps) for row in all_rows(endless, step) for a in row]
    assert len(set(drawn)) == len(drawn)
    place = endless.find_cursor(3)
    waiting = {endless.mixture.draw_sample(position) for position in place.waiting}
    assert set(drawn) | waiting == {endless.mixture.draw_sample(position) for position in range(place.next)}
    assert 0 < len(place.waiting) <= 64 and min(place.waiting) > place.next - 200
    assert {len(all_rows(endless, step)) for step in range(3 * steps)} == {8}


def test_a_remembered_place_saves_packing_what_lies_before_it(monkeypatch):
    whole = by_tokens(total=None, most=1000)
    expected, place = all_rows(whole, 500), whole.find_cursor(500 // whole.steps_per_window)
    packed_windows: list[int] = []
    pack = token_plan._packed_window.__wrapped__
    monkeypatch.setattr(token_plan, "_packed_window", lambda plan, w: packed_windows.append(w) or pack(plan, w))
    resumed = by_tokens(total=None, most=1000)
    resumed.remember_cursor(500 // whole.steps_per_window, place)
    assert all_rows(resumed, 500) == expected and set(packed_windows) == {500 // whole.steps_per_window}


@pytest.mark.parametrize(("passes", "sources"), [(1, 1), (3, 1), (1, 2)])
def test_an_estimated_end_packs_one_window_and_comes_near_the_counted_one(passes, sources, monkeypatch):
    """12,000 samples; of two sources, the second has short texts and comes twice a pass."""
    sizes, mixture = shaped(12_000), Mixture(sources=(Share(size=12_000),), seed=3)
    if sources == 2:
        mixture = Mixture(sources=(Share(size=8000), Share(size=4000, repeat=2.0)), seed=3)
        tokens = np.where(np.arange(12_000) < 8000, sizes.tokens, sizes.tokens // 4)
        sizes = Sizes(tokens, sizes.patches, sizes.costs)
    packing = Packing(sizes=sizes, length=4096)
    total = passes * mixture.samples
    counted = TokenPlan(mixture=mixture, packing=packing, tokens=8 * 4096, total=total)
    windows: list[int] = []
    packed = token_plan._packed_window
    monkeypatch.setattr(
        token_plan, "_packed_window", lambda plan, window: windows.append(window) or packed(plan, window)
    )
    estimated = counted.end_by_estimate(total)
    assert estimated.steps == estimated.most and set(windows) <= {0}
    monkeypatch.undo()
    assert abs(estimated.steps / counted.steps - 1) < 0.01
    assert [all_rows(estimated, step) for step in (0, 70)] == [all_rows(counted, step) for step in (0, 70)]
    assert len(all_rows(estimated, estimated.steps - 1)) == 8  # a whole one
    assert replace(counted, most=5).end_by_estimate(total).steps == 5


def test_costs_on_demand_are_those_of_an_array():
    sizes, cost = shaped(), Cost(1.7, 1.3e-4, 51.0)
    whole, asked = cost(sizes.tokens, sizes.patches), CostsOnDemand(cost, sizes.tokens, sizes.patches)
    assert [asked[index] for index in range(4096)] == whole.tolist()
    assert asked[[5, 3, 4000]].tolist() == whole[[5, 3, 4000]].tolist()


@pytest.mark.parametrize("world", [8, 64])
def test_ranks_wait_little_for_each_other(world):
    """The slowest rank over the mean, in every step of a simulated run."""
    which = by_tokens(800 * world, rows=2 * world, world=world)
    ratios = []
    for step in range(which.steps):
        costs = [
            sum(which.packing.sizes.costs[a.index] for m in which.step(step, r) for row in m for a in row)
            for r in range(world)
        ]
        ratios.append(max(costs) / (sum(costs) / world))
    assert np.mean(ratios[:-1]) <= 1.01 and len(ratios) > 50  # the last step lacks rows


def test_budgets_that_do_not_go_up_are_errors():
    with pytest.raises(ConfigError, match=r"batch\.tokens=32768 is not shared evenly by 3 ranks .* multiples of 12288"):
        by_tokens(world=3)
    with pytest.raises(ConfigError, match="both null"):
        by_tokens(total=None)


def test_steps_are_of_one_modality_as_far_as_they_go_round():
    media = np.arange(400) % 10 != 0  # a tenth is text
    which = plan(samples=400, batch=16, total=800, media=media, group_by="modality", block_samples=160)
    kinds = [{bool(media[a.index]) for a in which.samples_of_step(step)} for step in range(which.steps)]
    assert sum(len(kind) == 2 for kind in kinds) <= which.steps / 10 and {True} in kinds and {False} in kinds
    drawn = [a for step in range(which.steps) for a in which.samples_of_step(step)]
    for epoch in (0, 1):
        assert sorted(a.index for a in drawn if a.epoch == epoch) == list(range(400))


def test_like_lengths_share_a_micro_batch():
    lengths = np.random.default_rng(0).integers(10, 500, 100).astype(np.int32)
    which = plan(samples=100, batch=20, total=100, world=2, micro=5, lengths=lengths, group_by="length")
    for step in range(which.steps):
        assert sorted(step_of(which, step)) == sorted(which.samples_of_step(step))
        micros = [[lengths[a.index] for (a,) in micro] for micro in which.step(step, 1)]
        assert min(micros[0]) >= max(micros[1])


def test_unknown_groups_are_errors():
    with pytest.raises(ConfigError, match=r"data\.group_by: 'size'; allowed: null, modality, length, modality_length"):
        plan(group_by="size")
