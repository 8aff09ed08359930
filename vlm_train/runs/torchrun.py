"""torchrun whose workers get the signals: `python -m vlm_train.runs.torchrun <torchrun's arguments>`.

torchrun alone kills workers 30 s after a SIGTERM, which may be within a step, and a SIGUSR1 ends it. This one forwards
signals and waits. When a worker fails, it ends the others within seconds, and the last line names the first error.
torch's `errors.record` cannot name it: it keeps whole seconds, and the ranks that fail because another one is gone fail
within the same second.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from vlm_train.distributed import exit_with_parent
from vlm_train.errors import ENDING, REPEATED, Interrupted, exit_code

PID, ERRORS = "VLM_TRAIN_AGENT", "VLM_TRAIN_ERRORS"
"""Variables that tell workers the id of their agent, and the folder where a failing worker writes its error."""

PATIENCE = 5.0
"""Seconds that workers have after another one has failed. Those that wait for it in a collective would take minutes."""


def main(arguments: Sequence[str]) -> int:
    """Starts and supervises the workers of this machine. Returns the exit code."""
    received, first = _forward_signals(), FirstFailure()
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)  # reported below
    logging.getLogger("torch.distributed.elastic.agent.server.api").addFilter(_is_cause)
    own = ["--signals-to-handle", "SIGQUIT"] if sys.platform == "linux" else []
    with tempfile.TemporaryDirectory(prefix="vlm_train-") as errors:
        os.environ |= {PID: str(os.getpid()), ERRORS: errors}
        if sys.platform == "linux":
            threading.Thread(target=_end_survivors, args=(first, received, Path(errors)), daemon=True).start()
        try:
            torchrun([*own, *arguments])
        except ChildFailedError as error:
            if received:
                return exit_code(received[0])
            return _report_first_failure(error.failures, first, Path(errors))
    return 0


def _is_cause(entry: logging.LogRecord) -> bool:
    """Whether a log entry says why the run failed. The entry that the rendezvous is gone after the end does not."""
    return not str(entry.msg).startswith("Error waiting on exit barrier")


def _forward_signals() -> list[int]:
    """Sends the signals of this process to its workers. Returns the list of signals, bursts counted once.

    A third one kills: a worker that hangs in a collective never runs its Python handlers.
    """
    received: list[int] = []
    last = 0.0

    def forward(number: int, _: Any) -> None:
        nonlocal last
        workers, now = _list_children(), time.monotonic()
        if now - last > REPEATED or not received:
            received.append(number)
        last = now
        if not workers:
            raise Interrupted(number)
        for pid in workers:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if len(received) > 2 else number)

    for number in ENDING if sys.platform == "linux" else ():  # elsewhere there is no /proc to find the workers in
        if signal.getsignal(number) is not signal.SIG_IGN:  # not ignored here: workers would inherit that
            signal.signal(number, forward)
    return received


AFTERWARDS = 2 * 10**9
"""Nanoseconds after an error from which a kill counts as its consequence: workers notice a killed one at once."""


@dataclass
class FirstFailure:
    """The first worker seen to fail: process id, exit code (negative for a signal), time in ns. Id 0: none yet."""

    pid: int = 0
    code: int = 0
    time: int = 0


def _end_survivors(first: FirstFailure, received: Sequence[int], errors: Path) -> None:
    """Kills the workers that outlive a failed one: a worker that waits in a collective does not handle a SIGTERM."""
    while not first.pid and not any(errors.glob("*.json")):  # torchrun may collect it before we see it
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT | os.WNOHANG)  # left for torchrun to collect
        except ChildProcessError:  # none is there yet, or any more
            ended = None
        if ended is not None and ended.si_status:
            first.time = time.time_ns()
            first.pid, first.code = ended.si_pid, ended.si_status * (1 if ended.si_code == os.CLD_EXITED else -1)
        else:
            time.sleep(0.02)  # torchrun looks every 0.1 s
    if first.code in {exit_code(number) for number in ENDING}:  # all workers save and end themselves
        return
    time.sleep(PATIENCE)
    for pid in [] if received else _list_children():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _report_first_failure(failures: Mapping[int, Any], first: FirstFailure, errors: Path) -> int:
    """Prints which worker failed first, and its error. Returns its exit code.

    The other workers fail at about the same time because it is gone, and may end before it does.
    """
    found = [json.loads(path.read_text(encoding="utf-8")) for path in errors.glob("*.json")]
    found = sorted((error for error in found if error["rank"] in failures), key=lambda error: error["time"])
    by_pid = {failure.pid: rank for rank, failure in failures.items()}
    # torchrun ends those that are left by SIGTERM. On a busy machine we may see that before what was the cause of it.
    causes = {rank: failure for rank, failure in failures.items() if failure.exitcode != -signal.SIGTERM} or failures
    rank = by_pid.get(first.pid, -1)
    if rank not in causes:
        rank = min(causes, key=lambda one: causes[one].timestamp)
    code = failures[rank].exitcode
    # torchrun may have collected the first one before we saw it: then we saw a survivor, which was killed afterwards.
    survivor = found and (not first.pid or code == -signal.SIGTERM or first.time > found[0]["time"] + AFTERWARDS)
    if code < 0 and not survivor:
        print(f"Rank {rank} was killed by {signal.Signals(-code).name}.", file=sys.stderr)
        return 128 - code
    if found:
        rank = found[0]["rank"]
        code = max(failures[rank].exitcode, 1)
        if code == 1:  # a wrong setting is the same on every rank
            print(f"Rank {rank} failed first: {found[0]['error']}", file=sys.stderr)
    return int(code)


def _list_children() -> list[int]:
    """Ids of this process's children, from Linux's /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            state, parent = path.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if int(parent) == os.getpid() and state != "Z":
                found.append(int(path.parent.name))
    return found


def exit_with_agent() -> None:
    """Ends this worker when its agent is killed. torch does not do that."""
    if sys.platform == "linux" and (pid := os.environ.get(PID)):
        exit_with_parent()
        if os.getppid() != int(pid):  # it was killed before we asked
            raise SystemExit(1)


@contextmanager
def record_error() -> Iterator[None]:
    """Writes an error of the block for the agent, if there is one, before another rank notices that this one failed."""
    try:
        yield
    except Exception as error:
        if folder := os.environ.get(ERRORS):
            rank = int(os.environ.get("RANK", 0))
            found = {"rank": rank, "time": time.time_ns(), "error": f"{type(error).__name__}: {error}"}
            with suppress(OSError):
                Path(folder, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
        raise


def run_and_exit(work: Callable[[], int]) -> NoReturn:
    """Runs a process's main function and ends the process with its exit code.

    One of several that fails ends at once: Python's own shutdown may wait for collectives that the others never join.
    One of several that is done does what Python does at exit, but leaves the interpreter standing: threads of gloo may
    outlive their groups, and one that frees a tensor while the interpreter is taken down aborts the process.
    """
    try:
        code = work()
    except Exception:
        sys.excepthook(*sys.exc_info())  # torch's names the rank
        code = 1
    if "RANK" not in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) == 1:
        raise SystemExit(code)
    if code not in (1, 2):
        threading._shutdown()  # type: ignore[attr-defined]  # the first two steps of Py_FinalizeEx, in its order
        atexit._run_exitfuncs()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
