"""Benchmarks of starting: `python -m benchmarks.start [key=value ...]`.

CPU seconds of whole processes, in turns: other programs lengthen them less than the wall's, and alike on both sides.
Options: pairs=7; lines=[help,settings] (by default all); output=<file>.json.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf

from benchmarks.loaders import CONF
from benchmarks.measure import Line, Report, paired

HYDRA = ["-c", "import hydra"]
OURS = ["-m", "vlm_train"]


@dataclass
class Settings:
    """What the command line sets, `key=value`."""

    pairs: int = 7
    lines: list[str] = field(default_factory=list)
    output: str = "data/bench/start.json"


def help(settings: Settings) -> Iterator[Line]:  # noqa: A001 (named as the flag)
    """`--help` / a Python that imports Hydra."""
    yield _compare_commands("--help / import hydra", [*OURS, "--help"], settings, must=3.0)


def settings(settings: Settings) -> Iterator[Line]:
    """Composing and checking a recipe / a Python that imports Hydra."""
    yield _compare_commands("mode=config / import hydra", [*OURS, "recipe=llava15_stage2", "mode=config"], settings)


def _compare_commands(name: str, command: list[str], settings: Settings, **goal: Any) -> Line:
    about: dict[str, Any] = {"less": True, "unit": "CPU s", **goal}
    return paired(name, lambda: cpu_seconds(command), lambda: cpu_seconds(HYDRA), pairs=settings.pairs, **about)


def cpu_seconds(arguments: list[str]) -> float:
    """CPU seconds of a Python with these arguments and all of its children."""
    before = os.times()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, cwd=CONF.parent)
    after = os.times()
    return (after.children_user + after.children_system) - (before.children_user + before.children_system)


LINES: dict[str, Callable[[Settings], Iterator[Line]]] = {one.__name__: one for one in (help, settings)}


def main(argv: list[str]) -> int:
    """The command line."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    chosen: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Settings), OmegaConf.from_dotlist(argv)))
    if unknown := set(chosen.lines) - set(LINES):
        print(f"lines: no {', '.join(sorted(unknown))}; allowed: {', '.join(LINES)}", file=sys.stderr)
        return 2
    report = Report({"pairs": chosen.pairs})
    report.run((LINES[name](chosen) for name in chosen.lines or LINES), chosen.output)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
