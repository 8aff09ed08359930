"""Signals on any rank of two: all save the step they are in, leave with one code, and the same command continues."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.support import faults, ranks
from tests.support.small_run import command, make_data
from tests.training.test_fit import assert_same_end
from vlm_train.checkpoint.files import verify_checkpoint
from vlm_train.errors import Interrupted, exit_code
from vlm_train.runs import record

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="signals of Unix"),
]

STRATEGIES = {"ddp": []}
"""Name -> overrides: how two ranks train."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", params=STRATEGIES)
def strategy(request: pytest.FixtureRequest) -> list[str]:
    return STRATEGIES[request.param]


def two_ranks(data: Path, runs: Path, *more: str) -> list[str]:
    """A run of 6 steps whose only checkpoints are those of stops and of the end."""
    fixed = ["trainer.save_every=null", "trainer.export=false", "batch.micro=1", *faults.OVERRIDES]
    return command(data, runs, *fixed, *more)


@pytest.fixture(scope="module")
def whole(strategy: list[str], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing stops."""
    runs = tmp_path_factory.mktemp("whole")
    ended = ranks.run(two_ranks(data, runs, *strategy), runs / "out")
    assert ended.codes == [0, 0], ended.output
    return runs / "run"


def newest(run: Path) -> str:
    pointer = run / "checkpoints" / "LATEST"
    return pointer.read_text().strip() if pointer.is_file() else "none"


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        pytest.param("SIGUSR1 1 3", 143),  # the rank that Lightning's own handling hangs on
        pytest.param("SIGTERM*2 all 3", 143),  # schedulers signal every process, and srun forwards it
        pytest.param("SIGTERM 0 3", 143, marks=slow),
        pytest.param("SIGTERM 1 3", 143, marks=slow),
        pytest.param("SIGTERM all 3", 143, marks=slow),
        pytest.param("SIGTERM*2 1 3", 143, marks=slow),
        pytest.param("SIGUSR1 0 3", 143, marks=slow),
        pytest.param("SIGUSR1 all 3", 143, marks=slow),
        pytest.param("SIGUSR1*2 0 3", 143, marks=slow),
        pytest.param("SIGUSR2 all 3", 143, marks=slow),
        pytest.param("SIGINT all 3", 130, marks=slow),
        pytest.param("SIGHUP all 3", 129, marks=slow),  # a terminal tells all
        pytest.param("SIGHUP 1 3", [143, 129], marks=slow),  # rank 0 is asked by rank 1, as a scheduler asks
    ],
)
def test_all_ranks_save_the_step_and_leave(
    fault: str, code: int | list[int], strategy: list[str], data: Path, whole: Path, tmp_path: Path
) -> None:
    overrides, run = two_ranks(data, tmp_path, *strategy, "data.workers=1"), tmp_path / "run"
    stopped = ranks.run(overrides, tmp_path / "out", fault=fault)
    assert stopped.codes == (code if isinstance(code, list) else [code, code]), stopped.output
    step = int(newest(run).removeprefix("step-"))
    assert step in (4, 5), "the ranks agree at the start of the next step"
    assert verify_checkpoint(run / "checkpoints" / newest(run))["step"] == step
    assert f"at step {step}, which is saved. The same command resumes." in stopped.output
    assert "Traceback" not in stopped.output
    assert record.read_record(run)["status"] == "interrupted"
    resumed = ranks.run(overrides, tmp_path / "out")
    assert resumed.codes == [0, 0]
    assert resumed.output.count(f"resuming from {run}/checkpoints/step-{step:08d}\n") == 1, "rank 0 speaks"
    assert_same_end(run, whole)


@pytest.mark.slow
def test_a_second_signal_leaves_at_once(strategy: list[str], data: Path, whole: Path, tmp_path: Path) -> None:
    overrides, run = two_ranks(data, tmp_path, *strategy), tmp_path / "run"
    stopped = ranks.run(overrides, tmp_path / "out", fault="leave all 3")
    assert stopped.codes == [-signal.SIGTERM, -signal.SIGTERM], stopped.output
    assert newest(run) == "none"
    assert ranks.run(overrides, tmp_path / "out").codes == [0, 0]
    assert_same_end(run, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_one_code_means_resume_me(number: signal.Signals) -> None:
    assert exit_code(number) == 143 and Interrupted(number).code == 143
    assert exit_code(signal.SIGINT) == 130
