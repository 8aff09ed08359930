"""The command line: compose -> check -> one mode. Console script `vlm-train` and `python -m vlm_train`.

Exit codes: 0 done, 1 the run failed, 2 the configuration is wrong, 130 and 143 it was interrupted; see `stopping.py`.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from data_pipelines.errors import DataError
from vlm_train import agent, config, launch, provenance
from vlm_train.check import check
from vlm_train.errors import ConfigError, Interrupted, VLMTrainError
from vlm_train.explain import Composition, explain, unknown_in
from vlm_train.runs.folder import RunFolder
from vlm_train.stopping import PREEMPTING

log = logging.getLogger("vlm_train")

MODES = {
    "fit": "vlm_train.fit:fit",
    "eval": "vlm_train.evaluation.run:evaluate",
    "caption": "vlm_train.capfilt.run:caption",
    "score": "vlm_train.capfilt.run:score",
    "export": "vlm_train.export.run:export",
    "import": "vlm_train.export.run:import_",
    "show": "vlm_train.runs.preview:show",
    "lengths": "vlm_train.runs.preview:measure_lengths",
}
"""Mode -> the function that carries it out, imported only then: `(cfg) -> dict | None`."""

"""Where a run keeps its tokenizer."""

DRY_RUN = "vlm_train.dryrun.report:dry_run"

EXPECTED = (VLMTrainError, DataError, OSError)
"""Errors of the user's settings, data and machine (a full disk, a folder that may not be written): one line each."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = get_args_parser().parse_args(argv)
    dirs = [args.config_dir] if args.config_dir else []
    if problems := _refused_flags(args):
        return _report(error := ConfigError(problems), error)
    if _is_single(args):
        return guarded(lambda: run(args.overrides, dirs), args.overrides, dirs)
    if _is_sweep(args):
        return guarded(lambda: _sweep(argv, args.overrides), args.overrides, dirs)
    return guarded(lambda: hydra(argv, dispatch), args.overrides, dirs)


def guarded(work: Callable[[], Any], overrides: Sequence[str] = (), dirs: Sequence[str | Path] = ()) -> int:
    """Runs `work`, prints errors that speak to the user, and returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[_ToStdout()])
    try:
        with signals_interrupt(), agent.leaving_word():
            work()
    except Composition as error:
        return _report(ConfigError(explain(overrides, dirs, error)), error)
    except EXPECTED as error:
        return _report(error, error)
    except (KeyboardInterrupt, SystemExit) as error:
        code = _interruption(error)
        if code is None:
            raise
        if launch.rank() == 0:
            said = error if isinstance(error, Interrupted) else "The same command resumes."
            print(f"Interrupted: {said}", file=sys.stderr)
        return code
    return 0


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Makes what a scheduler sends an exception wherever nothing else handles it, so that a run can say how it ended.

    A second one kills. Training and `run_child` have handlers of their own meanwhile.
    """

    def interrupt(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Interrupted(number)

    main_thread = threading.current_thread() is threading.main_thread()
    free = [one for one in PREEMPTING if main_thread and signal.getsignal(one) is signal.SIG_DFL]  # else: the caller's
    for number in free:
        signal.signal(number, interrupt)
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


def _interruption(error: BaseException) -> int | None:
    """The exit code of a run that a signal ended; None for an exit of another kind."""
    if isinstance(error, Interrupted):
        return error.code
    if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):  # Lightning: exit(1)
        return 128 + signal.SIGINT
    if type(error).__name__ == "SIGTERMException" or (isinstance(error, SystemExit) and error.code == 143):
        return 128 + signal.SIGTERM
    return None


def run(overrides: Sequence[str], dirs: Sequence[str | Path] = (), fresh: bool = False) -> dict[str, Any] | None:
    """Composes, checks and carries out one command line; `fresh` always does so in a new process tree."""
    if _value(overrides, "schedule"):
        from vlm_train import schedule

        return schedule.run(overrides, dirs)
    if _value(overrides, "run"):
        cfg, found = from_run(overrides, dirs)
    else:
        cfg, found = config.compose(overrides, dirs), provenance.origins(overrides, dirs)
    if cfg.mode == "config":
        print(provenance.table(cfg, found))
        return None
    check(cfg, need_assets=not cfg.dry_run and cfg.mode != "lengths")
    launch.check_environment(cfg)
    if cfg.mode == "fit" and not cfg.dry_run and launch.rank() == 0:
        log.info("Run folder: %s\n%s\n", config.run_dir(cfg), provenance.table(cfg, found, only_changed=True))
        launch.prepare(cfg, provenance.table(cfg, found))
    trains = cfg.mode in launch.PARALLEL_MODES and not cfg.dry_run
    own_tree = cfg.launch.devices > 1 or cfg.trainer.guard.rollback  # which can be started again
    if fresh or (trains and own_tree and launch.started_by() == "local"):
        return launch.run_child(cfg, cfg.launch.devices if trains else 1)
    return dispatch(cfg)


def from_run(overrides: Sequence[str], dirs: Sequence[str | Path]) -> tuple[DictConfig, dict[str, provenance.Origin]]:
    """The configuration of `run=<folder>` with this command line's groups and values on top, and its origins."""
    folder = Path(str(_value(overrides, "run"))).absolute()
    run = RunFolder(folder)
    cfg = config.load_config(run.config)
    cfg.allow_targets = []  # the folder may be somebody else's: trust is extended on the command line only
    found = {str(key): provenance.Origin("run", str(run.config)) for key in cfg}
    if (run.tokenizer / "tokenizer.json").is_file():  # what the ids meant, wherever the shards are now
        cfg.tokenizer = {"_target_": "vlm_train.data.tokenizer.pretrained", "name": str(run.tokenizer)}
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    groups = [override for override in parsed if override.key_or_group in config.groups(dirs)]
    chosen = config.compose([str(override.input_line) for override in groups], dirs)
    for override in parsed:
        key = override.key_or_group
        if key in ("recipe", "size", "debug"):
            raise ConfigError(f"{key}: cannot be given with run=; {folder} brings its own configuration.")
        group = override in groups
        key = override.package or key  # +metric@eval.answers.metrics.cer=cer
        value = OmegaConf.select(chosen, key) if group else override.value()
        try:
            OmegaConf.update(cfg, key, value, merge=not group, force_add=str(override.input_line).startswith("+"))
        except (ConfigKeyError, ConfigAttributeError):
            raise ConfigError(unknown_in(key, cfg)) from None
        found[key] = provenance.Origin(provenance.COMMAND_LINE, provenance.COMMAND_LINE)
    cfg.run = str(folder)
    return cfg, found


def dispatch(cfg: DictConfig) -> dict[str, Any] | None:
    """Carries out the mode of a checked configuration in this process."""
    module, _, name = (DRY_RUN if cfg.dry_run else MODES[cfg.mode]).partition(":")
    function: Callable[[DictConfig], dict[str, Any] | None] = getattr(importlib.import_module(module), name)
    return function(cfg)


def _refused_flags(args: argparse.Namespace) -> list[str]:
    """Hydra's flags that would be ignored or lead elsewhere."""
    problems = []
    for name in ("config_name", "config_path", "experimental_rerun"):
        if getattr(args, name, None):
            flag = "--" + name.replace("_", "-")
            problems.append(f"{flag}: there is one root configuration. Choose with recipe=<name> and --config-dir.")
    if args.config_dir and not Path(args.config_dir).is_dir():
        problems.append(f"--config-dir: {args.config_dir} is no folder. Expected one with recipe/<name>.yaml.")
    return problems


def _is_single(args: argparse.Namespace) -> bool:
    """Whether no flag asks Hydra for something else: help, --cfg, --info, a multirun."""
    flags = (args.help, args.hydra_help, args.cfg, args.multirun, args.shell_completion, args.info)
    return not any(flags) and not any(o.startswith("hydra.mode=") for o in args.overrides)


def _is_sweep(args: argparse.Namespace) -> bool:
    """Whether the flags start a multirun, and not an answer about it."""
    asks = any((args.help, args.hydra_help, args.cfg, args.shell_completion, args.info))
    return not asks and (args.multirun or "hydra.mode=MULTIRUN" in args.overrides)


def _sweep(argv: Sequence[str], overrides: Sequence[str]) -> None:
    from vlm_train.sweep.command import sweep

    sweep(argv, overrides)


def _value(overrides: Sequence[str], key: str) -> str | None:
    """The text that an override gives `key`, the last one winning."""
    found = [o.partition("=")[2] for o in overrides if o.partition("=")[0].lstrip("+") == key]
    return found[-1] if found and found[-1] not in ("null", "") else None


def hydra(argv: Sequence[str], job: Callable[[DictConfig], Any]) -> None:
    """Lets Hydra answer: help, composed configuration, and `job` for each job of a multirun."""
    import hydra as framework

    config.register()
    saved = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [sys.argv[0], *argv]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors instead of printing them; we print
    root = {"config_path": str(config.config_dir()), "config_name": config.CONFIG_NAME}
    try:
        with config.composition_errors():
            framework.main(version_base="1.3", **root)(job)()
    finally:
        sys.argv = saved[0]
        if saved[1] is None:
            del os.environ["HYDRA_FULL_ERROR"]


def _report(error: Exception, cause: BaseException) -> int:
    """Prints an error that speaks to the user, without a traceback unless one is asked for."""
    if os.environ.get("VLM_TRAIN_TRACEBACK") == "1" or os.environ.get("HYDRA_FULL_ERROR") == "1":
        raise cause
    if launch.rank() == 0 or not isinstance(error, ConfigError):  # every rank finds the same configuration errors
        _print(error)
    return 2 if isinstance(error, ConfigError) else 1


def _print(error: Exception) -> None:
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
