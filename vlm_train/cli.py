"""The command line: compose -> check -> one mode. Console script `vlm-train` and `python -m vlm_train`.

Exit codes: 0 done, 1 the run failed, 2 the configuration is wrong, 130 and 143 it was interrupted; see `errors.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra._internal.utils import get_args_parser

from vlm_train.config.compose import run_hydra
from vlm_train.config.help import format_help
from vlm_train.errors import ConfigError
from vlm_train.runs import process
from vlm_train.runs.process import report_error, run_guarded
from vlm_train.runs.single import run


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = get_args_parser()
    args = parser.parse_intermixed_args(argv)  # flags may stand behind overrides, too
    argv = [*(word for word in argv if word not in args.overrides), *args.overrides]  # Hydra wants those in one piece
    dirs = [args.config_dir] if args.config_dir else []
    if problems := _refused_flags(args):
        return report_error(error := ConfigError(problems), error)
    if args.help:
        return run_guarded(lambda: print(format_help(parser, dirs), flush=True))
    if _is_single(args):
        return run_guarded(lambda: run(args.overrides, dirs), args.overrides, dirs)
    if _is_sweep(args):
        return run_guarded(lambda: _run_sweep(argv, args.overrides), args.overrides, dirs)
    return run_guarded(lambda: run_hydra(argv, process.dispatch_mode), args.overrides, dirs)


def _refused_flags(args: argparse.Namespace) -> list[str]:
    """Hydra's flags that would be ignored or lead elsewhere."""
    problems = []
    for name in ("config_name", "config_path", "experimental_rerun"):
        if getattr(args, name, None):
            flag = "--" + name.replace("_", "-")
            problems.append(f"{flag}: there is one root configuration. Choose with recipe=<name> and --config-dir.")
    if args.config_dir and not Path(args.config_dir).is_dir():
        problems.append(f"--config-dir: {args.config_dir} is not a folder. Expected one with recipe/<name>.yaml.")
    return problems


def _is_single(args: argparse.Namespace) -> bool:
    """Whether no flag asks for something else: help, --cfg, --info, a multirun."""
    flags = (args.help, args.hydra_help, args.cfg, args.multirun, args.shell_completion, args.info)
    return not any(flags) and not any(o.startswith("hydra.mode=") for o in args.overrides)


def _is_sweep(args: argparse.Namespace) -> bool:
    """Whether the flags start a multirun, and not an answer about it."""
    asks = any((args.help, args.hydra_help, args.cfg, args.shell_completion, args.info))
    return not asks and (args.multirun or "hydra.mode=MULTIRUN" in args.overrides)


def _run_sweep(argv: Sequence[str], overrides: Sequence[str]) -> None:
    from vlm_train.runs.sweep.command import run_sweep

    run_sweep(argv, overrides)
