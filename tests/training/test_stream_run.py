"""A run over tars without an index: it ends in the same weights however it is interrupted and by however many processes
it is read, and what a stream cannot give is refused before anything is read."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from tests.support import ranks
from tests.support.small_run import command, make_data, picture, train
from tests.training.test_fit import assert_same_end, metrics, stop_after
from vlm_train import cli
from vlm_train.errors import TrainingError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny sets, and three uneven tars of captions: 18 samples, of which 6 steps draw 24."""
    root = make_data(tmp_path_factory.mktemp("data"))
    write_tars(root)
    return root


def write_tars(root: Path, bad: int = 0) -> None:
    """`bad`: pictures of each tar that are none."""
    for shard, size in enumerate((5, 9, 4)):
        with tarfile.open(root / f"{shard}.tar", "w") as file:
            for i in range(size):
                for name, content in (
                    ("png", b"none" if i < bad else picture(shard * 9 + i)),
                    ("txt", b"shape %d" % i),
                ):
                    info = tarfile.TarInfo(f"{shard}-{i}.{name}")
                    info.size = len(content)
                    file.addfile(info, io.BytesIO(content))


def streaming(data: Path, runs: Path, *more: str) -> list[str]:
    entry = f"data.train=[{{tars: '{data}/{{0..2}}.tar', shuffle_buffer: 3, index: {runs}/index}}]"
    fixed = ["data.shuffle=shards", "data.annotations=first", "trainer.epochs=null", "batch.samples=4"]
    return command(data, runs, entry, *fixed, *more)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps that nothing interrupted."""
    return train(streaming(data, tmp_path_factory.mktemp("whole")))


@pytest.mark.parametrize(("workers", "lost"), [(0, False), (2, False), (0, True)])
def test_a_stopped_run_resumes_exactly(
    workers: int, lost: bool, data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the indexes of its finished shards are still there or not."""
    overrides = streaming(data, tmp_path, f"data.workers={workers}", "trainer.log_every=1")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        stop_after(patch, 5, micro=1)
        train(overrides)
    written = sorted((tmp_path / "index" / "index").iterdir())
    assert written
    for path in written if lost else ():
        path.unlink()
    train(overrides)
    assert_same_end(tmp_path / "run", whole)


@pytest.mark.slow
def test_two_ranks_learn_what_one_does(data: Path, whole: Path, tmp_path: Path) -> None:
    ended = ranks.run(streaming(data, tmp_path, "strategy=ddp"), tmp_path / "out")
    assert ended.codes == [0, 0], ended.output
    losses = [[row["loss"] for row in metrics(run)] for run in (tmp_path / "run", whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 6


def test_bad_samples_are_kept_apart_and_counted(tmp_path: Path) -> None:
    write_tars(make_data(tmp_path / "data"), bad=1)
    with pytest.raises(TrainingError, match=r"of 24 drawn samples are bad; trainer.max_bad_share=0.05"):
        train(streaming(tmp_path / "data", tmp_path))
    noted = (tmp_path / "run" / "quarantine-0.jsonl").read_text()
    assert '"shard": "' in noted and "0.tar" in noted and '"key": "0-0"' in noted
    run = train(streaming(tmp_path / "data", tmp_path, "trainer.max_bad_share=0.5", "resume=restart"))
    assert [row["step"] for row in metrics(run)] == list(range(1, 7))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.epochs=1", "trainer.epochs: tars tell no size of a pass; use trainer.epochs=null"),
        ("trainer.largest_first=true", "trainer.largest_first: tars tell no lengths"),
        ("data.shuffle=full", "data.shuffle: tars are shuffled by shards and a buffer; use shards, or none"),
        ("mode=lengths", "mode=lengths: tars have no index of their samples"),
        ("data.train=[{tars: /nowhere/0.tar}]", "data.train: /nowhere/0.tar: no such tar"),
        ("data.train=[{tars: 'pipe:cat 0.tar'}]", "pipe: runs a shell command, which is refused"),
        ("data.train=[{tars: 0.tar, laylout: x}]", "an entry of tars has no laylout; its keys: tars, layout"),
        ("data.val=[{tars: 0.tar}]", "data.val.0.tars: unknown key"),
        ("data.train=[{stream: 0.tar}]", "data.train.0.stream: it is data.train.0.tars now"),
    ],
)
@pytest.mark.parametrize("dry", [False, True])
def test_refused_before_anything_is_read(
    dry: bool, override: str, message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if dry and "nowhere" in override:
        pytest.skip("a dry run needs no data")
    assert cli.main([*streaming(data, tmp_path), override, *(["dry_run=true"] if dry else [])]) == 2
    said = capsys.readouterr()
    assert message in said.err and "Traceback" not in said.err


def test_a_dry_run_knows_the_steps(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*streaming(data, tmp_path), "dry_run=true"]) == 0
    assert "6 optimizer steps" in capsys.readouterr().out and not (tmp_path / "index").exists()
