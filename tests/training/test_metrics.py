"""What a log line says: sums by source, rates, FLOPs, norms by part; all of it survives a checkpoint."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.small_run import command, make_data, train
from vlm_train.build import build_model
from vlm_train.config.compose import compose_config
from vlm_train.contracts.batch import Batch, MediaBatch, Slots, TokenStream, Window
from vlm_train.contracts.media import Grid3, MediaInput
from vlm_train.contracts.objective import Loss
from vlm_train.dryrun.report import without_assets
from vlm_train.training import device, fit, metrics
from vlm_train.training.flops import count_flops
from vlm_train.training.loss_sums import Sums
from vlm_train.training.meta_batch import count_patches
from vlm_train.training.metrics import Meter, part_norms
from vlm_train.training.module import VLMModule
from vlm_train.training.step_flops import Work, work_of
from vlm_train.training.trace import trace_step

CPU = torch.device("cpu")


def alone(values: dict[str, float]) -> dict[str, float]:
    return values


def loss(total: float, count: float, weight: float = 1.0, **sources: tuple[float, float]) -> Loss:
    parts = {name: torch.tensor(pair) for name, pair in sources.items()}
    return Loss(torch.tensor(total), torch.tensor(count), weight, {"accuracy": torch.tensor(0.5)}, parts)


def test_means_by_objective_and_source() -> None:
    sums = Sums({})
    sums.add_loss("lm", loss(6.0, 3.0, 2.0, a=(2.0, 2.0), b=(4.0, 1.0)))
    sums.add_loss("lm", loss(3.0, 3.0, 2.0, a=(3.0, 3.0)))
    sums.add_loss("contrastive", loss(5.0, 1.0, 1.0, a=(5.0, 1.0)))
    assert sums.compute_means(alone) == {
        "loss": 2 * 9 / 6 + 5,
        "lm_loss": 1.5,
        "lm_accuracy": 0.5,
        "contrastive_loss": 5.0,
        "contrastive_accuracy": 0.5,
        "loss/a": 2 * 5 / 5 + 5,
        "loss/b": 8.0,
    }


def test_one_source_is_the_loss_itself() -> None:
    sums = Sums({})
    sums.add_loss("lm", loss(6.0, 3.0, a=(6.0, 3.0)))
    assert sums.compute_means(alone) == {"loss": 2.0, "lm_accuracy": 0.5}


def test_sources_of_other_ranks_count() -> None:
    sums = Sums({})
    sums.add_loss("lm", loss(6.0, 3.0, a=(6.0, 3.0)))
    there = iter([{"lm/sum": 1.0, "lm/count": 1.0}, {"lm/b/sum": 1.0, "lm/b/count": 1.0}])

    def over_ranks(here: dict[str, float]) -> dict[str, float]:
        other = next(there)
        return {name: here.get(name, 0.0) + other.get(name, 0.0) for name in here | other}

    row = sums.compute_means(over_ranks)
    assert (row["loss"], row["loss/a"], row["loss/b"]) == (7 / 4, 2.0, 1.0)


def packed(*rows: list[int], width: int, sources: tuple[tuple[str, ...], ...] = ()) -> Batch:
    """Rows of samples of these lengths, padded to `width`."""
    segments = torch.zeros(len(rows), width, dtype=torch.int32)
    for row, lengths in enumerate(rows):
        ids = [number for number, length in enumerate(lengths, start=1) for _ in range(length)]
        segments[row, : len(ids)] = torch.tensor(ids)
    zeros = torch.zeros(len(rows), width, dtype=torch.int64)
    stream = TokenStream(
        ids=zeros, labels=zeros, weights=zeros.float(), positions=zeros[None], segment_ids=segments,
        attention_group=zeros.int(), slots=Slots(index=zeros[0, :0], placeholders=0),
        supervised=zeros[0, :0],        sample_lengths=tuple(map(tuple, rows)),
    )  # fmt: skip
    media = MediaBatch(row=zeros[0, :0])
    keys = tuple(tuple(map(str, lengths)) for lengths in rows)
    return Batch(text={"llm": stream}, media=media, sources=sources, keys=keys)


def test_sum_by_source_of_packed_rows() -> None:
    batch = packed([2, 1], [3], width=4, sources=(("a", "b"), ("b",)))
    index = torch.tensor([0, 2, 4, 6])  # of a, b, b, b
    values = torch.tensor([[1.0, 1], [2, 1], [4, 1], [8, 1]])
    found = batch.sum_by_source(batch.text["llm"], index, values)
    assert {name: pair.tolist() for name, pair in found.items()} == {"a": [1, 1], "b": [14, 3]}


def test_padding_makes_no_pairs() -> None:
    batch = packed([2, 1], [3], [4], width=4)
    one = Meter(alone)
    one.add_batch(batch)
    assert (one.counts["pairs"], one.counts["patches"]) == (4 + 1 + 9 + 16, 0)


def test_patches_of_media_items_count_and_those_of_a_blank_view_do_not() -> None:
    grids = (Grid3(1, 2, 3), Grid3(2, 2, 1), Grid3(1, 1, 5))
    for view_counts, patches in (((1, 2), 15), ((1, 1), 10), ((), 0)):
        shown = {"vision": MediaInput(torch.zeros(15, 4), grids, view_counts)}
        batch, one = packed([2], width=2), Meter(alone)
        one.add_batch(replace(batch, media=replace(batch.media, inputs=shown)))
        assert one.counts["patches"] == patches


def test_where_only_a_mask_tells_the_samples_of_a_row_they_count_as_equally_long() -> None:
    batch = packed([2, 1], [3], [], width=4)
    stream = replace(batch.text["llm"], sample_lengths=None)
    one = Meter(alone)
    one.add_batch(replace(batch, text={"llm": stream}, keys=(("a", "b"), ("c",), ())))
    assert one.counts["pairs"] == 2**2 + 2**2 + 4**2


def clocked(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock.now)
    return clock


def step(one: Meter, clock: Any, *, wait: float, work: float, samples: int = 4) -> None:
    clock.now += wait
    one.add_batch(packed([1], width=1))
    sums = {"samples": {"a": samples - 1.0, "b": 1.0}}
    one.open_step(
        Window(step=0, micro=0, micro_count=1, sums=sums, samples=samples, tokens=60, positions_total=80, supervised=15)
    )
    one.train.add_loss("lm", loss(6.0, 3.0))
    clock.now += work
    one.on_step_end()


def test_a_line_of_rates_and_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = clocked(monkeypatch)
    one = Meter(alone, work=Work(patch=0, token=1e12, pair=0, supervised=4e12), peak_tflops=100.0)
    clock.now += 50  # until training starts
    one.start_clock()
    step(one, clock, wait=1.0, work=3.0)
    one.pause_clock()  # a validation
    clock.now += 1000
    one.go_on()
    step(one, clock, wait=0.5, work=3.5)
    one.add_count("skipped_steps")
    row = one.make_line(CPU)
    assert row.pop("peak_memory_gib") > 0.01
    assert row == {
        "loss": 2.0,
        "lm_accuracy": 0.5,
        "samples_per_second": 1.0,
        "tokens_per_second": 15.0,
        "supervised_share": 0.25,
        "padding_share": 0.25,
        "data_wait": 1.5 / 8,
        "tflops": (120 + 4 * 30) / 8,
        "mfu": 0.3,
        "skipped": 0.0,
        "skipped_steps": 1.0,
        "share/a": 0.75,
        "share/b": 0.25,
    }
    step(one, clock, wait=0.0, work=2.0)
    assert {
        k: v for k, v in one.make_line(CPU).items() if k in ("data_wait", "samples_per_second", "skipped_steps")
    } == {
        "data_wait": 0.0,
        "samples_per_second": 2.0,
    }


def test_flops_are_counted_when_the_first_line_is_due_and_on_nobody_s_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, counted = clocked(monkeypatch), []

    def count_work() -> Work:
        counted.append(clock.now)
        clock.now += 1000
        return Work(0, 1e12, 0, 0)

    one = Meter(alone, count_work=count_work)
    one.start_clock()
    for _ in range(2):
        step(one, clock, wait=1.0, work=1.0)
        assert len(counted) < 2
        row = one.make_line(CPU)
        assert (row["data_wait"], row["tflops"], row["tokens_per_second"]) == (0.5, 30.0, 30.0)
    assert len(counted) == 1


def test_a_run_counts_flops_after_its_first_steps_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, counted, steps = make_data(tmp_path / "data"), [], []
    inner = VLMModule.training_step

    def training_step(self: VLMModule, batch: Batch, batch_idx: int) -> None:
        steps.append(batch_idx)
        inner(self, batch, batch_idx)

    monkeypatch.setattr(VLMModule, "training_step", training_step)
    monkeypatch.setattr(fit, "_count_work", lambda *_: counted.append(len(steps)))
    small = ["trainer.max_steps=3", "trainer.save_every=null", "batch.samples=2"]
    train(command(data, tmp_path / "runs", *small, "trainer.log_every=4", name="silent"))
    assert (len(steps), counted) == (3, [])
    train(command(data, tmp_path / "runs", *small, "trainer.log_every=2", name="logs"))
    assert (len(steps), counted) == (6, [3 + 2])


def test_devices_share_the_flops_and_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = clocked(monkeypatch)
    one = Meter(lambda values: {k: 2 * v for k, v in values.items()}, work=Work(0, 1e12, 0, 0))
    one.start_clock()
    step(one, clock, wait=1.0, work=1.0)
    row = one.make_line(CPU)
    assert (row["data_wait"], row["tflops"], row["tokens_per_second"]) == (0.5, 30.0, 60.0) and "mfu" not in row


def test_a_checkpoint_keeps_the_line_that_is_being_written(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, rows = clocked(monkeypatch), []
    for stopped in (False, True):
        one = Meter(alone)
        one.start_clock()
        step(one, clock, wait=1.0, work=1.0)
        one.train.add_loss("lm", loss(1.0, 1.0, a=(1.0, 1.0), b=(0.5, 2.0)))
        if stopped:
            state = json.loads(json.dumps(one.export_state()))
            clock.now += 500
            one = Meter(alone)
            one.load_state(state, CPU)
            clock.now += 500
            one.start_clock()
        step(one, clock, wait=0.25, work=1.0, samples=8)
        rows.append(one.make_line(CPU) | {"peak_memory_gib": 0.0})
    assert rows[0] == pytest.approx(rows[1]) and "loss/b" in rows[0]
    assert rows[1]["samples_per_second"] == pytest.approx(12 / 3.25)


def model_of(*overrides: str) -> tuple[Any, Any]:
    cfg, _ = without_assets(compose_config(["dry_run=true", *overrides]))
    return cfg, build_model(cfg, meta=True)


@pytest.mark.parametrize("recipe", ["easyvqa_stage1", "easyvqa_stage2", "easyvqa_clip", "easyvqa_lm"])
def test_work_is_what_the_dry_run_counts(recipe: str) -> None:
    cfg, model = model_of(f"recipe={recipe}", "size=tiny")
    work = work_of(cfg, model)
    seen = trace_step(cfg, model, text_tokens=50, supervised=13).products
    slots = 0 if recipe in ("easyvqa_clip", "easyvqa_lm") else model.connector.token_grid(model.vision.grid)
    tokens = 50 + (slots.size if slots else 0)
    expected = sum(part.total for part in count_flops(seen).values())
    assert work(patches=count_patches(model), tokens=tokens, pairs=tokens**2, supervised=13) == pytest.approx(
        expected, rel=1e-6
    )


@pytest.mark.parametrize(
    "recipe, tokens, supervised, tflops",
    [
        ("llava15_stage1", 620, 40, 16.7),
        ("llava15_stage2", 760, 100, 30.6),
        ("llava15_lora", 760, 100, 20.5 + 6 * 0.3198 * 0.760),  # the adapters, too
    ],
)
def test_work_of_published_shapes(recipe: str, tokens: int, supervised: int, tflops: float) -> None:
    cfg, model = model_of(f"recipe={recipe}")
    found = work_of(cfg, model)(patches=576, tokens=tokens, pairs=tokens**2, supervised=supervised) / 1e12
    assert found == pytest.approx(tflops, rel=0.02)


def test_peaks_of_known_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        "NVIDIA H200": 989.0,
        "NVIDIA H100 PCIe": 756.0,
        "NVIDIA A100-SXM4-80GB": 312.0,
        "NVIDIA GH200 480GB": 989.0,
    }
    names |= {"NVIDIA L40S": 362.0, "NVIDIA B200": 2250.0, "NVIDIA H20": 148.0, "Toy": None}  # type: ignore[dict-item]
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert device.peak_tflops(torch.device("cuda")) == peak, name
    assert device.peak_tflops(CPU) is None


def test_norms_of_parts() -> None:
    parameters = {name: [nn.Parameter(torch.zeros(2)) for _ in range(2)] for name in ("llm", "vision")}
    for value, one in enumerate([*parameters["llm"], parameters["vision"][0]], start=1):
        one.grad = torch.full((2,), float(value))
    groups = [SimpleNamespace(name=name, parameters=[one]) for name, held in parameters.items() for one in held]
    norms = {name: float(norm) for name, norm in part_norms(SimpleNamespace(groups=groups)).items()}  # type: ignore[arg-type]
    assert norms == pytest.approx({"llm": math.sqrt(2 + 8), "vision": math.sqrt(18)})


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    root = make_data(tmp_path_factory.mktemp("data"))
    entries = ", ".join(
        f"{{shards: {root}/tiny/{split}, name: {name}}}" for split, name in (("train", "a"), ("val", "b"))
    )
    return root, f"data.train=[{entries}]"


def rows_of(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("time", *metrics.TIMED)} for row in found]


def test_lines_of_a_run_are_the_same_after_a_resume(two_sources: tuple[Path, str], tmp_path: Path) -> None:
    data, sources = two_sources
    more = [sources, "trainer.log_every=4", "trainer.max_steps=4", "trainer.peak_tflops=1", "trainer.val_every=4"]
    whole = train(command(data, tmp_path / "whole", *more))
    inner = VLMModule.training_step

    def training_step(self: VLMModule, batch: Batch, batch_idx: int) -> Any:
        if self.global_step == 3:
            raise RuntimeError("stopped")
        return inner(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        patch.setattr(VLMModule, "training_step", training_step)
        train(command(data, tmp_path, *more))
    resumed = train(command(data, tmp_path, *more))
    assert rows_of(resumed) == rows_of(whole)
    training = json.loads((whole / "metrics.jsonl").read_text().splitlines()[0])
    assert (
        min(training["loss/a"], training["loss/b"]) <= training["loss"] <= max(training["loss/a"], training["loss/b"])
    )
    parts = [training[f"grad_norm/{part}"] for part in ("connector", "llm")]
    assert training["grad_norm"] == pytest.approx(math.hypot(*parts))
    assert 0 < training["data_wait"] < 1 and training["tflops"] == training["mfu"] > 0
    assert 0 < training["padding_share"] < 0.5 and training["peak_memory_gib"] > 0.05


def test_training_time_goes_on_where_the_checkpoint_stood(monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts is the time that led to the weights: neither the hours between two starts, nor what was lost."""
    clock = clocked(monkeypatch)
    first = Meter(alone)
    clock.now += 7  # until training starts
    first.start_clock()
    clock.now += 40
    state = first.export_state()
    clock.now += 5000  # killed, and started again later
    second = Meter(alone)
    second.load_state(state, CPU)
    second.start_clock(step=4)
    assert second.estimate_rest(4, 10) == 0, "no step is done yet"
    clock.now += 6
    assert (first.count_seconds(), second.count_seconds()) == (5046, 46)
    assert second.estimate_rest(6, 10) == 12, "at the speed of this start"
