"""torchrun whose workers get the signals: `python -m vlm_train.runs.torchrun <torchrun's arguments>`.

torchrun alone kills workers 30 s after a SIGTERM, which may be within a step, and dies of a SIGUSR1. This one hands
signals on and waits; when a worker fails, the others are ended within seconds, and the last line names the first error.
"""

from __future__ import annotations

import ctypes
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

from vlm_train.errors import ENDING, PREEMPTED, REPEATED, Interrupted, exit_code

PID, ERRORS = "VLM_TRAIN_AGENT", "VLM_TRAIN_ERRORS"
"""Variables that tell workers the id of their agent, and the folder where a failing one leaves word."""

PATIENCE = 5.0
"""Seconds that workers have after another one has failed. Those that wait for it in a collective would take minutes."""


def main(arguments: Sequence[str]) -> int:
    """Starts and supervises the workers of this machine. Returns the exit code."""
    received, first = _hand_on_signals(), First()
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)  # we say it
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
    """Not that another machine's agent, which had the rendezvous, left first when all was done."""
    return not str(entry.msg).startswith("Error waiting on exit barrier")


def _hand_on_signals() -> list[int]:
    """Sends what this process gets to its workers. Returns the list of signals, bursts counted once.

    A third one kills: a worker that hangs in a collective never runs its Python handlers.
    """
    received: list[int] = []
    last = 0.0

    def hand_on(number: int, _: Any) -> None:
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
            signal.signal(number, hand_on)
    return received


AFTERWARDS = 2 * 10**9
"""Nanoseconds after an error from which a kill is its consequence: those that fail of a kill notice it at once."""


@dataclass
class First:
    """The first worker seen to fail: process id, exit code (negative for a signal), time in ns. Id 0: none yet."""

    pid: int = 0
    code: int = 0
    time: int = 0


def _end_survivors(first: First, received: Sequence[int], errors: Path) -> None:
    """Kills the workers that outlive a failed one: torchrun's SIGTERM does not reach the Python of who waits in C."""
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
    if first.code in (PREEMPTED, exit_code(signal.SIGINT)):  # all leave, in good order
        return
    time.sleep(PATIENCE)
    for pid in [] if received else _list_children():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _report_first_failure(failures: Mapping[int, Any], first: First, errors: Path) -> int:
    """Says which worker failed first, and of what. Returns its exit code.

    The others fail of its absence at about the same time, may be quicker to leave and need more words.
    """
    words = [json.loads(path.read_text(encoding="utf-8")) for path in errors.glob("*.json")]
    words = sorted((word for word in words if word["rank"] in failures), key=lambda word: word["time"])
    by_pid = {failure.pid: rank for rank, failure in failures.items()}
    rank = by_pid.get(first.pid, min(failures, key=lambda one: failures[one].timestamp))
    code = failures[rank].exitcode
    # torchrun may have collected the first one before we saw it: then we saw a survivor, which was killed afterwards.
    survivor = words and (not first.pid or code == -signal.SIGTERM or first.time > words[0]["time"] + AFTERWARDS)
    if code < 0 and not survivor:
        print(f"Rank {rank} was killed by {signal.Signals(-code).name}.", file=sys.stderr)
        return 128 - code
    if words:
        rank = words[0]["rank"]
        code = max(failures[rank].exitcode, 1)
        if code == 1:  # a wrong setting is the same on every rank
            print(f"Rank {rank} failed first: {words[0]['error']}", file=sys.stderr)
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


def die_with_agent() -> None:
    """Ends this worker with its agent, which can be killed too. torch does not see to that."""
    if sys.platform == "linux" and (pid := os.environ.get(PID)):
        die_with_parent()
        if os.getppid() != int(pid):  # it was killed before we asked
            raise SystemExit(1)


def die_with_parent() -> None:
    """Asks Linux to end this process when its parent is killed, so that no orphan writes to a run folder."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


@contextmanager
def leaving_word() -> Iterator[None]:
    """What is raised here is told to the agent, if there is one, before anything else notices that we are gone."""
    try:
        yield
    except Exception as error:
        if folder := os.environ.get(ERRORS):
            rank = int(os.environ.get("RANK", 0))
            word = {"rank": rank, "time": time.time_ns(), "error": f"{type(error).__name__}: {error}"}
            with suppress(OSError):
                Path(folder, f"{rank}.json").write_text(json.dumps(word), encoding="utf-8")
        raise


def run_and_exit(work: Callable[[], int]) -> NoReturn:
    """Runs a process's main function and ends the process with its exit code.

    One of several that fails ends at once: Python's farewell may wait for collectives that the others never join.
    """
    try:
        code = work()
    except Exception:
        sys.excepthook(*sys.exc_info())  # torch's names the rank
        code = 1
    if code in (1, 2) and ("RANK" in os.environ or int(os.environ.get("SLURM_NTASKS", 1)) > 1):
        logging.shutdown()
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
