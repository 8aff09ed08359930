"""What a run promises: exact resumption, verified checkpoints, gradients that do not depend on how a step is cut."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from tests.support.small_run import command, make_data, train
from vlm_train import cli
from vlm_train.checkpoint import files
from vlm_train.checkpoint.files import hash_manifest, verify_checkpoint
from vlm_train.checkpoint.resume import Resume
from vlm_train.errors import CheckpointError, ConfigError, Interrupted, TrainingError
from vlm_train.training.fit import _describe_start
from vlm_train.training.metrics import TIMED
from vlm_train.training.module import VLMModule

TIMING = ("time", *TIMED)
SLOW_START = """
import sys, time
from vlm_train import cli
from vlm_train.training.module import VLMModule
write = VLMModule.write_metrics
def slow(self, split, row):
    write(self, split, row)
    if self.global_step >= 3:
        time.sleep(600)
VLMModule.write_metrics = slow
sys.exit(cli.main(sys.argv[1:]))
"""
"""The command line in a process that stands still after step 3 is logged, so that it can be killed there."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def metrics(run: Path, split: str = "train") -> list[dict[str, Any]]:
    """The lines of a split, without what depends on the clock."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows if row["split"] == split]


def checkpoint_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def same(a: Any, b: Any) -> bool:
    """Bitwise equality of nested containers of tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def assert_same_end(one: Path, other: Path, step: int = 6) -> None:
    """Equal losses of every step, weights, optimizer and schedule, bit for bit."""
    assert metrics(one) == metrics(other)
    assert [row["step"] for row in metrics(one)] == list(range(1, step + 1))
    folders = [checkpoint_of(run, step) for run in (one, other)]
    assert same(*(load_file(folder / "weights.safetensors") for folder in folders))
    states = [torch.load(folder / "state.ckpt", weights_only=True) for folder in folders]
    assert same(*(state["lr_schedulers"] for state in states))
    names = [sorted(path.name for path in folder.glob("optimizer-*")) for folder in folders]
    assert names[0] == names[1] != []
    for name in names[0]:
        assert same(*(load_file(folder / name) for folder in folders)), name
        first, second = ((folder / name).read_bytes() for folder in folders)
        assert first == second, f"{name}: the same tensors in another order"


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, micro: int = 0) -> None:
    """The micro-batch `micro` of the training step after `step` raises, as a crash would."""
    inner = VLMModule.training_step

    def training_step(self: VLMModule, batch: Any, batch_idx: int) -> Any:
        if self.global_step >= step and batch.window.micro == micro:
            raise RuntimeError("stopped")
        return inner(self, batch, batch_idx)

    monkeypatch.setattr(VLMModule, "training_step", training_step)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps that nothing interrupted."""
    return train(command(data, tmp_path_factory.mktemp("whole")))


@pytest.fixture
def stopped(data: Path, tmp_path: Path) -> Path:
    """The folder of the same run, crashed after step 5: checkpoints of steps 2 and 4."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        stop_after(patch, 5)
        train(command(data, tmp_path))
    return tmp_path / "run"


def lines(run: Path) -> list[str]:
    """The log with its times: a line that is the same afterwards was not trained again."""
    return (run / "metrics.jsonl").read_text().splitlines()


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_killed_run_resumes_exactly(workers: int, data: Path, whole: Path, tmp_path: Path) -> None:
    overrides = command(data, tmp_path, f"data.workers={workers}")
    log = tmp_path / "run" / "metrics.jsonl"
    with open(tmp_path / "out", "w") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW_START, *overrides], stdout=out, stderr=out, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 200
            while not (log.is_file() and any(row["step"] >= 3 for row in metrics(tmp_path / "run"))):
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "out").read_text()
                time.sleep(0.2)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == -signal.SIGKILL
    run = tmp_path / "run"
    assert json.loads((run / "run.json").read_text())["status"] == "running"
    assert checkpoint_of(run, 2).is_dir() and not checkpoint_of(run, 4).exists()
    before = lines(run)
    assert cli.main(overrides) == 0
    assert lines(run)[:2] == before[:2] and lines(run)[2] != before[2]  # it went on from step 2
    assert_same_end(run, whole)
    assert json.loads((run / "run.json").read_text())["status"] == "done"


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(one, marks=pytest.mark.slow) for one in (signal.SIGINT, signal.SIGHUP))]
)
def test_asked_to_stop_saves_the_step_and_resumes_exactly(
    number: signal.Signals, data: Path, whole: Path, tmp_path: Path
) -> None:
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("ignored by who started the tests, as by nohup")
    overrides = command(data, tmp_path, "trainer.save_every=null", "data.workers=1")
    code = SLOW_START.replace("time.sleep(600)", "time.sleep(1.5)")
    with open(tmp_path / "out", "w") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *overrides], stdout=out, stderr=out, start_new_session=True
        )
        deadline = time.monotonic() + 200
        while not (tmp_path / "run" / "metrics.jsonl").is_file() or not metrics(tmp_path / "run"):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "out").read_text()
            time.sleep(0.1)
        os.killpg(process.pid, number)  # as a terminal and schedulers do: loader processes get it too
        assert process.wait(timeout=100) == 128 + number
    run, said = tmp_path / "run", (tmp_path / "out").read_text()
    (folder,) = (run / "checkpoints").glob("step-*")
    assert int(folder.name[5:]) < 6 and "The same command resumes" in said and "Traceback" not in said
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    assert cli.main(overrides) == 0
    assert_same_end(run, whole)


@pytest.mark.parametrize(
    "recipe, more",
    [
        (
            "easyvqa_clip",
            ["batch.micro=4", "model.max_scale=1.5", "trainer.log_every=4"],
        ),
        ("llava15_lora", ["image.flip=true", "peft.dropout=0.3", "trainer.save_every=1", "optim.lr=1e-2"]),
    ],
)
def test_other_recipes_resume_exactly(recipe: str, more: list[str], data: Path, tmp_path: Path) -> None:
    overrides = [[f"recipe={recipe}", *command(data, tmp_path / name, *more)[1:]] for name in ("one", "two")]
    one = train(overrides[0])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        stop_after(patch, 3)
        train(overrides[1])
    two = train(overrides[1])
    assert metrics(one) == metrics(two)
    assert_same_weights(one, two)


def assert_same_weights(one: Path, other: Path, step: int = 6) -> None:
    folders = [checkpoint_of(run, step) for run in (one, other)]
    assert same(*(load_file(folder / "weights.safetensors") for folder in folders))


def test_damaged_last_checkpoint_is_written_again(stopped: Path, data: Path, whole: Path) -> None:
    train(command(data, stopped.parent))
    (stopped / "run.json").unlink()
    flip_byte(checkpoint_of(stopped, 6) / "weights.safetensors")
    train(command(data, stopped.parent))
    assert_same_end(stopped, whole)
    assert verify_checkpoint(checkpoint_of(stopped, 6))["step"] == 6


def test_diverged_run_never_counts_as_done(data: Path, tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(TrainingError, match="not finite"):
            train(command(data, tmp_path, "optim.lr=1e30", "trainer.max_steps=3", "trainer.log_every=100"))
        assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_other_shards_are_noticed(tmp_path: Path) -> None:
    first, other = make_data(tmp_path / "data"), make_data(tmp_path / "other", bad=3)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        stop_after(patch, 3)
        train(command(first, tmp_path))
    shutil.rmtree(first)
    other.rename(first)
    with pytest.raises(CheckpointError, match="data changed"):
        train(command(first, tmp_path))


def test_torn_log_is_mended(stopped: Path, data: Path, whole: Path) -> None:
    with open(stopped / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    train(command(data, stopped.parent))
    assert_same_end(stopped, whole)


def test_two_processes_do_not_train_one_run(data: Path, tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process"):
            train(command(data, tmp_path))


def test_added_tokens_get_rows_of_their_own(data: Path, tmp_path: Path) -> None:
    more = ["llm.config.vocab_size=273", 'tokenizer.add=["<img>"]', "trainer.max_steps=1", "params=all"]
    run = train(command(data, tmp_path, *more))
    weights = load_file(checkpoint_of(run, 1) / "weights.safetensors")
    assert [len(t) for n, t in weights.items() if n.endswith("new_embeddings")] == [1]


def test_logged_loss_is_the_one_that_is_minimized(data: Path, tmp_path: Path) -> None:
    weights = ["objective.lm.weight=0.5", "objective.lm.weight=1.0"]
    more = ["trainer.max_steps=1", "lr_schedule.warmup_ratio=0"]
    half, full = [metrics(train(command(data, tmp_path, *more, w, name=w[-3:])))[0] for w in weights]
    assert half["loss"] == pytest.approx(full["loss"] / 2) and half["grad_norm"] == pytest.approx(full["grad_norm"] / 2)


def test_workers_change_nothing(data: Path, whole: Path, tmp_path: Path) -> None:
    assert_same_end(train(command(data, tmp_path, "data.workers=2")), whole)


def test_failed_run_resumes_exactly(stopped: Path, data: Path, whole: Path) -> None:
    assert json.loads((stopped / "run.json").read_text())["status"] == "failed"
    before = lines(stopped)
    train(command(data, stopped.parent))
    assert lines(stopped)[:4] == before[:4] and lines(stopped)[4] != before[4]
    assert_same_end(stopped, whole)


def test_resumed_run_validates_as_the_whole_one(data: Path, tmp_path: Path) -> None:
    """Also when validation and checkpoint fall on the same step, and at the end, which no interval meets."""
    more = ["trainer.val_every=2", "trainer.max_steps=5"]
    one = train(command(data, tmp_path / "one", *more))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        stop_after(patch, 3)
        train(command(data, tmp_path / "two", *more))
    two = train(command(data, tmp_path / "two", *more))
    rows = [[(row["step"], row["loss"]) for row in metrics(run, "val")] for run in (one, two)]
    assert rows[0] == rows[1] and [step for step, _ in rows[0]] == [2, 4, 5]
    best = min(rows[0], key=lambda row: row[1])[0]
    for run in (one, two):
        assert (run / "checkpoints" / "BEST").read_text().strip() == checkpoint_of(run, best).name


@pytest.mark.parametrize("where", ["training_step", "validation_step"])
def test_stop_makes_up_for_the_validation_it_cuts_off(where: str, data: Path, tmp_path: Path) -> None:
    more = ["trainer.val_every=2", "trainer.max_steps=4", "trainer.save_every=null"]
    one = train(command(data, tmp_path / "one", *more))
    inner = getattr(VLMModule, where)

    def ask(self: VLMModule, batch: Any, batch_idx: int) -> Any:
        self.interrupt = signal.SIGTERM if (self.global_step, where) in ((1, "training_step"), (2, where)) else 0
        return inner(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted) as stop:
        patch.setattr(VLMModule, where, ask)
        train(command(data, tmp_path / "two", *more))
    assert stop.value.code == 143 and checkpoint_of(tmp_path / "two" / "run", 2).is_dir()
    two = train(command(data, tmp_path / "two", *more))
    assert [(row["step"], row["loss"]) for row in metrics(one, "val")] == [
        (row["step"], row["loss"]) for row in metrics(two, "val")
    ]
    assert_same_weights(one, two, 4)
    assert (one / "checkpoints" / "BEST").read_text() == (two / "checkpoints" / "BEST").read_text()


def test_moved_source_of_frozen_weights_is_noticed(whole: Path, data: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(whole, tmp_path / "source"))
    more = [f"init_from=[{{run: {source}, parts: [connector]}}]"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        stop_after(patch, 3)
        train(command(data, tmp_path, *more))
    (source / "checkpoints" / "LATEST").write_text("step-00000002\n")
    with pytest.raises(CheckpointError, match="init_from changed"):
        train(command(data, tmp_path, *more))


@pytest.mark.skipif(sys.platform == "win32", reason="limits are a Unix matter")
def test_full_disk_loses_nothing(stopped: Path, data: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file size limit stands for a full disk: the system refuses to write more."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        assert cli.main(command(data, stopped.parent)) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err
    assert "step-00000006: cannot be written" in said and "Traceback" not in said
    assert sorted(p.name for p in (stopped / "checkpoints").iterdir()) == ["LATEST", "step-00000002", "step-00000004"]
    train(command(data, stopped.parent))
    assert_same_end(stopped, whole)


@pytest.mark.parametrize("step", range(6))
@pytest.mark.parametrize("micro", [0, 1])
def test_crash_anywhere_resumes_exactly(step: int, micro: int, data: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        stop_after(patch, step, micro)
        train(command(data, tmp_path))
    assert_same_end(train(command(data, tmp_path)), whole)


def test_crash_in_the_final_evaluation_trains_nothing_again(data: Path, whole: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="too late"):
        patch.setattr("vlm_train.training.fit._finish_run", lambda *_: (_ for _ in ()).throw(RuntimeError("too late")))
        train(command(data, tmp_path))
    before = lines(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 0)
        run = train(command(data, tmp_path))
    assert lines(run) == before and json.loads((run / "run.json").read_text())["status"] == "done"
    assert_same_end(run, whole)


def test_best_checkpoint_is_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 9):
        (tmp_path / f"step-{step:08d}").mkdir()
    (tmp_path / "BEST").write_text("step-00000001\n")
    files.prune_checkpoints(
        tmp_path, "step-00000003", keep_last=1, keep_best=1, keep_every=None, lower=True
    )  # 9 is left behind
    assert sorted(path.name[-1] for path in tmp_path.glob("step-*")) == ["1", "3", "9"]


def test_rates_follow_the_schedule_at_every_step(whole: Path) -> None:
    """Cosine over 6 steps after one of warm-up; the log shows the rate that comes next."""
    rows = metrics(whole)
    base = OmegaConf.load(whole / "config.yaml").optim.lr
    expected = [base * 0.5 * (1 + math.cos(math.pi * max(step - 1, 0) / 5)) for step in range(1, 7)]
    assert [row["lr/connector"] for row in rows] == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_clipping_bounds_the_update(data: Path, tmp_path: Path) -> None:
    more = ["optim=sgd", "~optim.betas", "optim.weight_decay=0", "trainer.max_steps=1", "lr_schedule.warmup_ratio=0"]
    still, moved = (
        load_file(checkpoint_of(train(command(data, tmp_path, *more, f"optim.lr={lr}", *clip, name=f"lr{lr}")), 1)
                  / "weights.safetensors")
        for lr, clip in ((0, []), (1, ["trainer.max_grad_norm=0.01"]))
    )  # fmt: skip
    change = torch.cat([(moved[name] - still[name]).flatten() for name in still]).norm()
    assert float(change) == pytest.approx(0.01, rel=1e-3)


def test_done_run_trains_nothing(data: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    stop_after(monkeypatch, 0)
    train(command(data, whole.parent))
    assert (whole / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("file", ["state.ckpt", "weights.safetensors"])
def test_damaged_newest_checkpoint_is_skipped(
    file: str, stopped: Path, data: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_byte(checkpoint_of(stopped, 4) / file)
    before = lines(stopped)
    train(command(data, stopped.parent))
    said = capsys.readouterr().out
    assert lines(stopped)[:2] == before[:2] and lines(stopped)[2] != before[2]
    assert "skipping" in said and file in said and "SHA-256" in said
    assert_same_end(stopped, whole)


def test_all_checkpoints_damaged(stopped: Path, data: Path) -> None:
    for step in (2, 4):
        flip_byte(checkpoint_of(stopped, step) / "state.ckpt")
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        train(command(data, stopped.parent))


def test_checkpoint_of_another_run(stopped: Path, data: Path) -> None:
    with pytest.raises(CheckpointError, match="'run'.*'another'"):
        train(command(data, stopped.parent, f"resume={checkpoint_of(stopped, 4)}", name="another"))


def test_checkpoint_of_another_version(stopped: Path, data: Path) -> None:
    manifest = checkpoint_of(stopped, 4) / "manifest.json"
    older = json.loads(manifest.read_text()) | {"format": 1}
    manifest.write_text(json.dumps(older | {"sha256": hash_manifest(older)}))
    with pytest.raises(CheckpointError, match="is of format 1, this version resumes 2.*init_from"):
        train(command(data, stopped.parent))


def test_resume_never_keeps_checkpoints(stopped: Path, data: Path) -> None:
    with pytest.raises(CheckpointError, match="resume=never"):
        train(command(data, stopped.parent, "resume=never"))
    assert checkpoint_of(stopped, 4).is_dir()


def test_accumulation_changes_no_gradient(data: Path, tmp_path: Path) -> None:
    more = ["optim=sgd", "~optim.betas", "optim.lr=0.1", "optim.weight_decay=0", "trainer.max_grad_norm=null"]
    more += ["trainer.max_steps=2", "batch.samples=8", "lr_schedule.warmup_ratio=0"]
    runs = [train(command(data, tmp_path, *more, f"batch.micro={n}", name=f"micro{n}")) for n in (8, 2)]
    one, other = (load_file(checkpoint_of(run, 2) / "weights.safetensors") for run in runs)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor - other[name]).abs().max() <= 1e-5 * tensor.abs().max(), name
    for row, same_row in zip(*map(metrics, runs), strict=True):
        assert row["grad_norm"] > 1e-3
        assert [same_row["loss"], same_row["grad_norm"]] == pytest.approx([row["loss"], row["grad_norm"]], rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("recipe", ["easyvqa_stage2", "easyvqa_clip"])
def test_bf16_trains(precision: str, recipe: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, set[torch.dtype]]] = []
    inner = VLMModule.training_step

    def training_step(self: VLMModule, batch: Any, batch_idx: int) -> Any:
        rotary = {b.dtype for n, b in self.model.named_buffers() if n.endswith("inv_freq")}
        seen.append({"parameters": {p.dtype for p in self.model.parameters()}, "rotary": rotary})
        return inner(self, batch, batch_idx)

    monkeypatch.setattr(VLMModule, "training_step", training_step)
    more = ["batch.micro=4", "trainer.max_steps=4", f"trainer.precision={precision}", "lr_schedule.warmup_ratio=0"]
    run = train([f"recipe={recipe}", *command(data, tmp_path, *more)[1:]])
    losses = [row["loss"] for row in metrics(run)]
    assert losses[-1] < losses[0]
    held = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert all(one == {"parameters": {held}, "rotary": {torch.float32}} for one in seen)


def test_frozen_parts_stay_in_eval_mode(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool, bool]] = []
    inner = VLMModule.training_step

    def training_step(self: VLMModule, batch: Any, batch_idx: int) -> Any:
        vision: Any = self.model.vision
        learns = any(p.requires_grad for p in vision.parameters())
        seen.append((learns, any(m.training for m in vision.modules()), bool(self.model.llm.training)))  # type: ignore[union-attr]
        return inner(self, batch, batch_idx)

    monkeypatch.setattr(VLMModule, "training_step", training_step)
    train(command(data, tmp_path, "trainer.max_steps=3", "trainer.val_every=1"))
    assert seen == [(False, False, True)] * 6


def test_hand_over_must_cover_the_part(whole: Path, data: Path, tmp_path: Path) -> None:
    """Another connector of which only some tensors have the same names would start half trained."""
    handed = f"init_from=[{{run: {whole}, parts: [connector]}}]"
    with pytest.raises(CheckpointError, match=r"connector\.\S+: not in the file"):
        train(command(data, tmp_path, "connector=mlp3x_gelu", handed))
    with pytest.raises(CheckpointError, match=r"connector\.layers\.2\.weight: not in the model"):
        train(command(data, tmp_path, "connector.depth=1", handed))


def test_hand_over_accepts_what_was_frozen(whole: Path, data: Path, tmp_path: Path) -> None:
    train(command(data, tmp_path, "trainer.max_steps=1", f"init_from=[{{run: {whole}}}]"))


@pytest.mark.parametrize("name", ["lm", "caption"])
def test_too_few_supervised_tokens(name: str, data: Path, tmp_path: Path) -> None:
    loss = ["~objective.lm", "+objective.caption={_target_: vlm_train.objectives.lm.LanguageModeling}"]
    with pytest.raises(TrainingError, match="supervised"):
        train(command(data, tmp_path, "trainer.min_supervised_ratio=0.99", *(loss if name != "lm" else ())))


def test_bad_sample_is_left_out_and_recorded(tmp_path: Path) -> None:
    bad = make_data(tmp_path / "data", bad=3)
    run = train(command(bad, tmp_path, "trainer.max_steps=3", "trainer.max_bad_share=1"))  # one epoch
    assert sum(row["skipped"] for row in metrics(run)) == 1
    (line,) = (run / "quarantine-0.jsonl").read_text().splitlines()
    assert "sample-03" in json.loads(line)["problem"]


def test_step_of_bad_samples_only_is_passed_over(tmp_path: Path) -> None:
    bad = make_data(tmp_path / "data", bad=3)
    more = ["batch.samples=1", "batch.micro=1", "trainer.max_steps=12", "trainer.val_every=null"]  # one epoch
    more += ["trainer.max_bad_share=1"]
    rows = metrics(train(command(bad, tmp_path, *more)))
    assert len(rows) == 12 and [row["skipped"] for row in rows].count(1) == 1


def test_held_out_set_without_a_usable_sample(tmp_path: Path) -> None:
    root = make_data(tmp_path / "data", bad=0)
    same = f"data.val=[{{shards: {root / 'tiny/train'}}}]"
    run = train(command(root, tmp_path, same, "trainer.max_steps=1", name="some"))
    assert "sample-00" in (run / "quarantine-0.jsonl").read_text() and metrics(run, "val")
    with pytest.raises(TrainingError, match="none of the 1 held-out samples"):
        train(command(root, tmp_path, same, "data.val_limit=1", "trainer.max_steps=1", name="none"))


def test_too_many_bad_samples_stop_the_run(tmp_path: Path) -> None:
    bad = make_data(tmp_path / "data", bad=3)
    with pytest.raises(TrainingError, match="bad samples in a row"):
        train(command(bad, tmp_path, "trainer.max_steps=3", "trainer.max_bad_samples=0"))


@pytest.mark.parametrize("how", ["full", "selective"])
def test_checkpointed_activations_change_nothing(how: str, data: Path, whole: Path, tmp_path: Path) -> None:
    run = train(command(data, tmp_path, f"trainer.activation_checkpointing={how}"))
    assert_same_end(run, whole)


@pytest.mark.slow
def test_compiled_layers_compute_the_same(data: Path, whole: Path, tmp_path: Path) -> None:
    run = train(command(data, tmp_path, "trainer.compile=true", "trainer.max_steps=3"))
    for row, eager in zip(metrics(run), metrics(whole), strict=False):
        assert row["loss"] == pytest.approx(eager["loss"], rel=1e-5)


def test_a_report_that_cannot_be_written_fails_no_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write_report(folder: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vlm_train.report.write_report", write_report)
    run = train(command(data, tmp_path, "trainer.max_steps=1"))
    assert json.loads((run / "run.json").read_text())["status"] == "done"
    assert f"WARNING: {run / 'report.html'}: cannot be written: [Errno 28]" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said_before_anything_else(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command(data, tmp_path, "trainer.accelerator=gpu")) == 2
    said = capsys.readouterr()
    assert said.err.startswith("ConfigError: trainer.accelerator: got gpu, but ") and said.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_resume_says_which_checkpoint_and_what_changed() -> None:
    def describe(manifest: dict[str, Any], world: int) -> str:
        return _describe_start(Resume(Path("x"), {"step": 3, **manifest}), world)

    assert _describe_start(None, 2) == "starting at step 0"
    assert describe({"world": 2}, 2) == describe({}, 2) == "resuming from x"
    assert describe({"world": 2}, 1) == "resuming from x, written by 2 processes; now 1"
