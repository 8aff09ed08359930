"""One process: it runs one mode of a checked configuration and prints errors that speak to the user.

`python -m vlm_train.runs.process <config.yaml>` is the child's side of `launch`: it reads the composed configuration as
data and runs it."""

from __future__ import annotations

import importlib
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from data_pipelines.errors import DataError
from vlm_train.check.check import check_config
from vlm_train.check.hydra_errors import Composition, explain_errors
from vlm_train.config.run_file import load_config
from vlm_train.data.worker_errors import explain_loader_error
from vlm_train.distributed import process_rank
from vlm_train.errors import ENDING, FAILED, REFUSED, ConfigError, Interrupted, PartError, VLMTrainError
from vlm_train.runs import torchrun


def main(argv: Sequence[str] | None = None) -> int:
    """The child's side: runs one composed configuration file. Returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv

    if argv is None:
        torchrun.exit_with_agent()
    (path,) = arguments

    def dispatch_child() -> None:
        cfg = load_config(path)
        check_config(cfg, need_assets=False)
        dispatch_mode(cfg)

    return run_guarded(dispatch_child)


MODES = {
    "fit": "vlm_train.training.fit:fit_run",
    "eval": "vlm_train.evaluation.run:evaluate_run",
    "caption": "vlm_train.evaluation.score_shards:write_captions",
    "score": "vlm_train.evaluation.score_answers:write_scores",
    "export": "vlm_train.export.run:export_run",
    "import": "vlm_train.export.run:import_run",
    "show": "vlm_train.runs.preview:show_sample",
    "lengths": "vlm_train.runs.preview:measure_lengths",
}
"""Mode -> the function that carries it out, imported only then: `(cfg) -> dict | None`."""


DRY_RUN, REPORT = "vlm_train.dryrun.report:dry_run", "vlm_train.report:write_report"
SHORTAGE = "vlm_train.dryrun.shortage:say_shortage"


EXPECTED = (VLMTrainError, DataError, OSError)
"""Errors of the user's settings, data and machine (a full disk, a folder that may not be written): one line each."""


def run_guarded(work: Callable[[], Any], overrides: Sequence[str] = (), dirs: Sequence[str | Path] = ()) -> int:
    """Runs `work`, prints errors that speak to the user, and returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[_ToStdout()])
    try:
        with interrupt_on_signals(), torchrun.record_error():
            work()
    except Composition as error:
        return report_error(ConfigError(explain_errors(overrides, dirs, error)), error)
    except EXPECTED as error:
        return report_error(explain_loader_error(error) or error, error)
    except RuntimeError as error:
        if (told := explain_loader_error(error)) is None:
            raise
        return report_error(told, error)
    except (KeyboardInterrupt, SystemExit) as error:
        code = _interruption_code(error)
        if code is None:
            raise
        if process_rank() == 0 and not (isinstance(error, Interrupted) and error.said):
            said = error if isinstance(error, Interrupted) else "The same command resumes."
            with suppress(OSError):  # the terminal may be closed
                print(f"Interrupted: {said}", file=sys.stderr)
        return code
    return 0


@contextmanager
def interrupt_on_signals() -> Iterator[None]:
    """Makes what a scheduler sends an exception wherever nothing else handles it, so that a run can say how it ended.

    A second one kills. Training and `run_child` have handlers of their own meanwhile.
    """

    def raise_interrupted(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Interrupted(number)

    main_thread = threading.current_thread() is threading.main_thread()
    free = [one for one in ENDING if main_thread and signal.getsignal(one) is signal.SIG_DFL]  # else: the caller's
    for number in free:
        signal.signal(number, raise_interrupted)
    try:
        yield
    finally:
        for number in free:
            signal.signal(number, signal.SIG_DFL)


class _ToStdout(logging.StreamHandler[Any]):
    """Writes to what sys.stdout is at the time, which callers of `main` may have redirected."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout
        super().emit(record)


def _interruption_code(error: BaseException) -> int | None:
    """The exit code of a run that a signal ended; None for an exit of another kind."""
    if isinstance(error, Interrupted):
        return error.code
    if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):  # Lightning: exit(1)
        return 128 + signal.SIGINT
    if type(error).__name__ == "SIGTERMException" or (isinstance(error, SystemExit) and error.code == 143):
        return 128 + signal.SIGTERM
    return None


def dispatch_mode(cfg: DictConfig) -> dict[str, Any] | None:
    """Carries out the mode of a checked configuration in this process."""
    carry_out = _function(DRY_RUN if cfg.dry_run else MODES[cfg.mode])
    trains = cfg.mode == "fit" and not cfg.dry_run
    result: dict[str, Any] | None = carry_out(cfg, _function(SHORTAGE)) if trains else carry_out(cfg)
    return result


def write_report(folder: Path) -> Path:
    """Writes the page over what a run, schedule or sweep folder holds and returns its path."""
    path: Path = _function(REPORT)(folder)
    return path


def _function(name: str) -> Callable[..., Any]:
    """The function that `module:function` names, imported now."""
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def report_error(error: Exception, cause: BaseException) -> int:
    """Prints an error that speaks to the user, without a traceback unless one is asked for."""
    if os.environ.get("VLM_TRAIN_TRACEBACK") == "1" or os.environ.get("HYDRA_FULL_ERROR") == "1":
        raise cause
    # Every rank finds the same configuration errors; a part may fail on one of them only.
    if process_rank() == 0 or not isinstance(error, ConfigError) or isinstance(error, PartError):
        _print_error(error)
    return REFUSED if isinstance(error, VLMTrainError) and error.code == REFUSED else FAILED


def _print_error(error: Exception) -> None:
    lines = error.problems if isinstance(error, ConfigError) else [str(error)]
    if isinstance(error, OSError) and error.filename is not None:
        lines = [f"{error.filename}: {error.strerror}. VLM_TRAIN_TRACEBACK=1 shows who wanted it."]
    lines = [_own_words(line) for line in lines]
    title = f"{type(error).__name__}: "
    if len(lines) > 1:
        title, lines = f"{title}{len(lines)} problems", ["", *lines]
    print(title + "\n  - ".join(lines), file=sys.stderr)


def _own_words(text: str) -> str:
    """The message alone, where a data loader's worker has put it at the end of its traceback."""
    caught = re.match(r"Caught (\w+) in DataLoader worker process \d+\.\nOriginal Traceback", text)
    if caught is None:
        return text
    return re.split(rf"^(?:\w+\.)*{caught[1]}: ", text, flags=re.MULTILINE)[-1].strip()


if __name__ == "__main__":
    torchrun.run_and_exit(main)
