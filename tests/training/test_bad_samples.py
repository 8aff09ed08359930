"""Bad samples while training: recorded once, counted by kind, borne up to a budget, on all ranks alike."""

from __future__ import annotations

import json
import pickle
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from data_pipelines.errors import BadSample
from tests.support.small_run import command, make_data, train
from vlm_train.checkpoint.run_state import collect_counts, restore_counts
from vlm_train.contracts.batch import Problem, Window
from vlm_train.errors import TrainingError
from vlm_train.training import bad_samples
from vlm_train.training.bad_samples import BadSamples
from vlm_train.training.module import VLMModule


def budget(folder: Path, max_in_a_row: int = 10**9, max_share: float = 1.0, strict: bool = False) -> BadSamples:
    return BadSamples(folder, max_in_a_row=max_in_a_row, max_share=max_share, strict=strict)


def problems(*keys: str, kind: str = "corrupt") -> tuple[Problem, ...]:
    return tuple(Problem(f"{key} is bad", kind, "set/0.tar", key) for key in keys)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for path in sorted(folder.glob("quarantine-*")) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "steps, most, stops",
    [
        ([(0, 4), (0, 4)], 8, None),
        ([(0, 4), (0, 5)], 8, 1),
        ([(0, 4), (1, 0), (0, 5)], 8, None),
        ([(3, 1)], 0, 0),
        ([(1000, 101)], 100, None),  # a large step with a few bad ones is no row of bad ones
        ([(1, 201)], 100, 0),  # one of the halves must be longer
    ],
)
def test_bad_samples_in_a_row(tmp_path, steps, most, stops):
    bad = budget(tmp_path, max_in_a_row=most)
    judged = [bad.reason_to_stop(*step) for step in steps]
    assert [number for number, reason in enumerate(judged) if reason] == ([] if stops is None else [stops])
    if stops is not None:
        assert f"bad samples in a row; trainer.max_bad_samples={most}" in judged[stops]


def test_share_is_judged_from_a_thousand_drawn_samples_on(tmp_path):
    bad = budget(tmp_path, max_share=0.05)
    assert [bad.reason_to_stop(400, 99), bad.reason_to_stop(500, 0)] == [None, None]
    assert bad.reason_to_stop(1, 0) == "9.90% of 1000 drawn samples are bad; trainer.max_bad_share=0.05"
    bad = budget(tmp_path, max_share=0.05)
    assert [bad.reason_to_stop(95, 5) for _ in range(30)] == [None] * 30  # as much as is borne


def test_bad_sample_survives_pickling_with_what_it_knows():
    error = pickle.loads(pickle.dumps(BadSample("no", kind="image", shard="a.tar", key="k")))
    assert (
        Problem.from_error(error) == Problem("no", "image", "a.tar", "k")
        and str(Problem.from_error(error)) == "a.tar, key 'k': no"
    )


def test_recorded_once_over_epochs_and_restarts(tmp_path, capsys):
    bad = budget(tmp_path)
    bad.record_problems("train", 1, problems("a", "b", "a"), 0)
    bad.record_problems("train", 2, problems("a"), 0)
    assert capsys.readouterr().out.count("left out") == 1
    (tmp_path / "quarantine-1.jsonl").write_text(
        '{"step": 1, "problem": "x", "kind": "image", "shard": "set/0.tar", "key": "c"}\n{"st'
    )
    again = budget(tmp_path)
    again.record_problems("val", 3, problems("a", "c", "d"), 1)
    again.record_problems("train", 3, [Problem("only told"), Problem("only told")], 0)
    with open(tmp_path / "quarantine-1.jsonl") as file:
        assert [line[:3] for line in file] == ['{"s', '{"s', '{"s']  # the half line is closed, not continued
    (tmp_path / "quarantine-1.jsonl").write_text("")
    found = [(line["step"], line["split"], line["kind"], line["shard"], line["key"]) for line in lines(tmp_path)]
    assert found == [
        (1, "train", "corrupt", "set/0.tar", "a"),
        (1, "train", "corrupt", "set/0.tar", "b"),
        (3, "train", "other", "", ""),
    ]


def make_module(folder: Path, trainer: SimpleNamespace, **options) -> VLMModule:
    module = VLMModule(
        nn.Linear(1, 1),
        {},
        SimpleNamespace(groups=[], in_train_mode=()),
        None,
        None,
        seed=0,
        total_steps=9,
        folder=folder,
        **options,
    )
    module._trainer = trainer
    return module


def window(step: int, good: int, *bad: Problem) -> Window:
    return Window(step=step, micro=0, micro_count=1, sums={}, samples=good, problems=bad)


def test_counts_by_kind_are_logged_and_survive_a_checkpoint(tmp_path):
    trainer = SimpleNamespace(
        world_size=1, global_rank=0, global_step=1, loggers=[], optimizers=[SimpleNamespace(param_groups=[])]
    )
    module = make_module(tmp_path, trainer)
    module._open_step(window(0, 2, *problems("a"), *problems("b", "c", kind="too_long")))
    module.log_training()
    (row,) = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    found = {name: value for name, value in row.items() if name.startswith("skipped")}
    assert found == {"skipped": 3, "skipped/corrupt": 1, "skipped/too_long": 2}
    assert module.meter.counts == dict.fromkeys(("samples", "tokens", "places", "supervised", "skipped"), 0.0)
    counts = collect_counts(module)
    other = make_module(tmp_path, trainer, max_bad_share=0.5)
    restore_counts(other, counts)
    with pytest.raises(TrainingError) as error:
        other._open_step(window(1, 0, *(problems(*(str(n) for n in range(1000)), kind="image"))))
    assert str(error.value).startswith("data.train: 1000 bad samples in a row; trainer.max_bad_samples=100. ")
    assert "So far: corrupt 1, image 1000, too_long 2. All of them: " in str(error.value)
    assert (other.bad.drawn, other.bad.bad) == (1005, 1003)


class Ranks:
    """Two ranks as threads: a reduce that adds, a gather that collects."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.barrier, self.given = threading.Barrier(2, timeout=10), {}
        monkeypatch.setattr(torch.distributed, "all_gather_object", self.gather)

    def exchange(self, value):
        self.given[int(threading.current_thread().name)] = value
        self.barrier.wait()
        values = [self.given[rank] for rank in (0, 1)]
        self.barrier.wait()
        return values

    def reduce(self, local, reduce_op):
        return sum(self.exchange(local))

    def gather(self, into, value):
        into[:] = self.exchange(value)


@pytest.mark.parametrize(
    "options", [{"max_bad_samples": 5, "max_bad_share": 1.0}, {"max_bad_share": 0.5}, {"strict": True}]
)
def test_all_ranks_stop_at_the_same_step(tmp_path, monkeypatch, options):
    monkeypatch.setattr(bad_samples, "MIN_DRAWN", 10)
    ranks, stops = Ranks(monkeypatch), {}

    def run(rank: int) -> None:
        trainer = SimpleNamespace(world_size=2, global_rank=rank, strategy=ranks)
        module = make_module(tmp_path, trainer, **options)
        for step in range(6):
            bad = problems(*(f"{step}-{n}" for n in range(4))) if rank == 1 and step else ()
            try:
                module._open_step(window(step, 0 if step else 4, *bad))
            except TrainingError as error:
                stops[rank] = (step, str(error))
                return

    threads = [threading.Thread(target=run, args=(rank,), name=str(rank)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    step = {"max_bad_samples": 2, "max_bad_share": 3, "strict": 1}[next(iter(options))]
    assert {rank: found[0] for rank, found in stops.items()} == {0: step, 1: step}
    assert all(f"So far: corrupt {4 * step}." in message for _, message in stops.values())


def test_strict_run_stops_at_the_first_bad_sample(tmp_path):
    data = make_data(tmp_path / "data", bad=3)
    with pytest.raises(TrainingError, match=r"data.train: a bad sample, and trainer.strict=true.*sample-03"):
        train(command(data, tmp_path, "trainer.max_steps=3", "trainer.strict=true"))


def test_strict_run_bears_no_bad_held_out_sample(tmp_path):
    same = f"data.val=[{{shards: {make_data(tmp_path / 'data', bad=0) / 'tiny/train'}}}]"
    more = ["data.limit=1", "batch.samples=1", "batch.micro=1"]
    other = f"data.train=[{{shards: {tmp_path / 'data/tiny/val'}}}]"
    with pytest.raises(TrainingError, match=r"data.val: 1 bad samples, and trainer.strict=true"):
        train(command(tmp_path / "data", tmp_path, same, other, *more, "trainer.max_steps=1", "trainer.strict=true"))


def test_budget_goes_on_after_a_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(bad_samples, "MIN_DRAWN", 20)
    data = make_data(tmp_path / "data", bad=3)
    share = "trainer.max_bad_share=0.08"  # one of twelve samples is more
    train(command(data, tmp_path, share, "trainer.max_steps=4", "trainer.save_every=1"))
    assert len(lines(tmp_path / "run")) == 1
    status = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(status | {"status": "interrupted"}))
    with pytest.raises(TrainingError, match=r"10.00% of 20 drawn samples are bad; trainer.max_bad_share=0.08"):
        train(command(data, tmp_path, share, "trainer.max_steps=6", "trainer.save_every=1"))
    assert len(lines(tmp_path / "run")) == 1


def test_more_workers_than_shards(tmp_path):
    data = make_data(tmp_path / "data")
    assert len(list((data / "tiny/train").glob("*.tar"))) == 3
    losses = []
    for workers in (0, 5):
        name = f"workers{workers}"
        run = train(command(data, tmp_path, f"data.workers={workers}", "trainer.log_every=1", name=name))
        losses.append([json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()])
    assert losses[0] == losses[1] and len(losses[0]) >= 6


def test_at_the_last_step_the_share_is_judged_whatever_was_drawn(tmp_path):
    assert budget(tmp_path, max_share=0.05).reason_to_stop(0, 4, last=True) == "none of the 4 drawn samples can be used"
    assert budget(tmp_path, max_share=1.0).reason_to_stop(1, 3, last=True) is None
    few = budget(tmp_path, max_share=0.05)
    assert few.reason_to_stop(1, 3) is None
    assert few.reason_to_stop(4, 0, last=True) == "37.50% of 8 drawn samples are bad; trainer.max_bad_share=0.05"
    assert budget(tmp_path, max_share=0.05).reason_to_stop(4, 0, last=True) is None


def test_a_run_without_a_usable_sample_is_an_error(tmp_path):
    data = make_data(tmp_path / "data")
    with pytest.raises(TrainingError, match=r"none of the \d+ drawn samples can be used\. So far: "):
        train(command(data, tmp_path, "data.max_length=2", "data.over_length=drop", "data.val=[]"))
