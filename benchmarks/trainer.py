"""Benchmarks of the trainer: `python -m benchmarks.trainer [key=value ...]`.

Options: quick=true (default) or false; lines=[step,fused,fixed,checkpoint,saves] (by default all); output=<file>.json.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from benchmarks import sides
from benchmarks.measure import Line, Report, Tick, in_turns, ratio
from benchmarks.work import Clock, Work, small_llava, toy

ROWS = 8
FIRST = 5
"""Steps that are not counted: they fill caches."""

NO_WIDTH, WIDTH = 8, 8192
"""Width of the weight matrix where steps should cost nothing, and where its state should be large (800 MB)."""

STEPS_BETWEEN = 20
"""Steps between two saves, long enough for one that is written meanwhile to end."""


@dataclass
class Settings:
    """What the command line sets, `key=value`."""

    quick: bool = True
    lines: list[str] = field(default_factory=list)
    output: str = "data/bench/trainer.json"

    @property
    def pairs(self) -> int:
        return 7 if self.quick else 15


Side = Callable[[Work, int], Clock]

PEERS: dict[str, Side] = {
    "plain loop": sides.plain,
    "bare Lightning": sides.bare_lightning,
    "HF Trainer": sides.hf_trainer,
}
GOALS = {"plain loop": (1.02, 1.01), "bare Lightning": (1.01, None), "HF Trainer": (1.0, 0.97)}


def missing(name: str) -> str:
    """What has to be installed for a peer; empty if nothing has."""
    return "pip install accelerate" if name == "HF Trainer" and not importlib.util.find_spec("accelerate") else ""


def step(settings: Settings) -> Iterator[Line]:
    """Time of an optimizer step, ours / theirs, on a small LLaVA."""
    steps = FIRST + (150 if settings.quick else 400)
    for name, theirs in PEERS.items():
        must, aim = GOALS[name]
        about: dict[str, Any] = {"must": must, "aim": aim, "less": True, "unit": "s/step"}
        if problem := missing(name):
            yield Line(name=f"step / {name}", note=problem)
            continue
        pairs = in_turns(partial(train, sides.ours, steps), partial(train, theirs, steps), steps)[FIRST:]
        yield ratio(f"step / {name}", pairs, **about)


def fused(settings: Settings) -> Iterator[Line]:
    """Time of our optimizer step with AdamW in one kernel / without."""
    steps = FIRST + (40 if settings.quick else 200)
    with_it, without = (partial(train, sides.ours, steps, overrides=(f"optim.fused={kind}",)) for kind in (True, False))
    pairs = in_turns(with_it, without, steps)[FIRST:]
    yield ratio("step, AdamW fused / not", pairs, must=1.0, less=True, unit="s/step")


def train(side: Side, steps: int, tick: Tick, *, overrides: tuple[str, ...] = ()) -> None:
    """One side trains the small LLaVA and says when a step is done."""
    work = small_llava(ROWS, *overrides)
    work.clock = partial(Told, tick)
    side(work, steps)


class Told(Clock):
    """A clock that passes every tick on."""

    def __init__(self, tick: Tick) -> None:
        super().__init__()
        self.tick = tick  # type: ignore[method-assign]


def fixed(settings: Settings) -> Iterator[Line]:
    """Milliseconds that a trainer adds to every step of a plain loop, on a model that computes nothing."""
    work, steps = toy(NO_WIDTH), 203
    for name, side in {"ours": sides.ours, **PEERS}.items():
        if side is sides.plain:
            continue
        if problem := missing(name):
            yield Line(name=f"fixed cost of a step, {name}", note=problem)
            continue
        goal: dict[str, Any] = {"must": 1.5, "aim": 0.5} if name == "ours" else {}
        yield added(f"fixed cost of a step, {name}", side, work, steps, settings.pairs, **goal)


def added(name: str, side: Callable[[Work, int], Clock], work: Work, steps: int, pairs: int, **goal: Any) -> Line:
    """Milliseconds a step, one side minus the plain loop, after one pair of warm-up."""
    found = [(side(work, steps).step * 1e3, sides.plain(work, steps).step * 1e3) for _ in range(pairs + 1)][1:]
    low, middle, high = statistics.quantiles([a - b for a, b in found], n=4)
    ours, theirs = (statistics.median(one) for one in zip(*found, strict=True))
    spread = {"low": low, "high": high, "pairs": pairs}
    return Line(name=name, value=middle, **spread, ours=ours, theirs=theirs, less=True, unit="ms", **goal)


def checkpoint(settings: Settings) -> Iterator[Line]:
    """Bytes of a checkpoint folder / those of the trainable weights and their optimizer state."""
    for name, work in (("small LLaVA", small_llava(1)), ("one matrix", toy(WIDTH))):
        sizes: list[int] = []
        look = lambda folder, sizes=sizes: sizes.append(newest_bytes(folder / "checkpoints"))  # noqa: E731
        sides.ours(work, 1, saves=[], look=look)  # the end of a run is saved
        needed = 3 * sum(p.nbytes for p in work.learned)  # AdamW keeps two numbers for each
        about: dict[str, Any] = {"ours": sizes[0] / 1e6, "theirs": needed / 1e6, "unit": "MB"}
        line = f"checkpoint bytes / trainable state, {name}"
        yield Line(name=line, value=sizes[0] / needed, must=1.02, less=True, **about)


def newest_bytes(root: Path) -> int:
    """Bytes of the newest checkpoint."""
    folder = max(root.glob("step-*"))
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def saves(settings: Settings) -> Iterator[Line]:
    """Time that an asynchronous save blocks training / that of a synchronous one, after a first save of each kind."""
    found: dict[bool, list[float]] = {}
    count = 5 if settings.quick else 10
    for background in (False, True):
        work = toy(WIDTH, f"trainer.save_every={STEPS_BETWEEN}")
        if "async_save" in work.cfg.trainer:
            work.cfg.trainer.async_save = background
        elif background:
            yield Line(name="blocked by an async / a sync save", note="there is no trainer.async_save")
            return
        blocked: list[float] = []
        sides.ours(work, (1 + count) * STEPS_BETWEEN + 1, saves=blocked)
        found[background] = blocked[1 : 1 + count]  # training waits for the save of its end
        if not background:
            yield Line(name="blocked by a sync save", value=statistics.median(found[False]), unit="s", less=True)
    ratios = [a / b for a, b in zip(found[True], found[False], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    ours, theirs = (statistics.median(found[kind]) for kind in (True, False))
    spread: dict[str, Any] = {"low": low, "high": high, "pairs": count, "ours": ours, "theirs": theirs, "unit": "s"}
    yield Line(name="blocked by an async / a sync save", value=middle, must=0.2, aim=0.05, less=True, **spread)


LINES: dict[str, Callable[[Settings], Iterator[Line]]] = {
    one.__name__: one for one in (step, fused, fixed, checkpoint, saves)
}


def main(argv: list[str]) -> int:
    """The command line."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    settings: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Settings), OmegaConf.from_dotlist(argv)))
    lines = settings.lines or list(LINES)
    if unknown := set(lines) - set(LINES):
        print(f"lines: no {', '.join(sorted(unknown))}; allowed: {', '.join(LINES)}", file=sys.stderr)
        return 2
    report = Report({"quick": settings.quick, "threads": 1, "rows": ROWS})
    report.run((LINES[name](settings) for name in lines), settings.output)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
