"""The trace of a step: what runs after the first step, from a sample to its loss, and what only reads the shard."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.step_trace import StepTrace

SOURCE = """
def parse(): pass
def both(): pass
def load():
    parse()
    both()
def collate(): both()
def loss(): forward()
def forward(): pass
def after(): pass
def step():
    load()
    load()
    collate()
    loss()
    after()
"""


def test_what_only_reads_the_shard_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    names: dict[str, object] = {}
    exec(compile(SOURCE, str(tmp_path / "pkg/a.py"), "exec"), names)  # noqa: S102 - our own text
    trace = StepTrace(names["load"].__code__, names["loss"].__code__)  # type: ignore[attr-defined]
    sys.setprofile(trace)
    try:
        names["step"]()  # type: ignore[operator]
        names["step"]()  # type: ignore[operator]
    finally:
        sys.setprofile(None)
    assert trace.done
    found = [trace.list_functions(tmp_path, ["pkg"], reading=reading) for reading in (True, False)]
    everything = [f"pkg/a.py:{name}" for name in ("load", "parse", "both", "collate", "loss", "forward")]
    assert found == [everything, [name for name in everything if name not in ("pkg/a.py:load", "pkg/a.py:parse")]]
