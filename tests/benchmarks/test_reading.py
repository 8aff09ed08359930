"""The figures of benchmarks/reading.py that must not grow again, and that they count what they say."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from benchmarks import reading


def test_no_new_import_cycle() -> None:
    files = reading.read_imports().running
    assert reading.find_cycles(files) == []
    assert reading.find_cycles(reading.folder_graph(files)) == []


def test_files_are_short() -> None:
    assert reading.long_files() == {}


def test_functions_are_short() -> None:
    assert reading.long_functions() == {}


@pytest.mark.slow
def test_the_way_from_a_sample_to_the_loss_is_short() -> None:
    called = reading.leave_out_short(reading.trace_step(reading.ROOT, reading.PACKAGES)[0])
    assert len(called) <= 50 and len({name.partition(":")[0] for name in called}) <= 22, called


def test_cycles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a", "e"}, "e": {"f"}, "f": {"e"}, "g": set[str]()}
    assert reading.find_cycles(graph) == [["a", "b", "c"], ["e", "f"]]


def test_a_folder_stands_for_its_files_among_its_siblings() -> None:
    graph = {"p.a.x": {"p.b.y"}, "p.b.z": {"p.a.w", "p.b.y"}, "p.b.y": {"p.b.c.v"}, "p.b.c.v": {"p.b", "p"}}
    found = reading.folder_graph(graph)
    assert found["p.a"] == {"p.b"} and found["p.b"] == {"p.a", "p.__init__"}
    assert found["p.b.z"] == {"p.b.y"} and found["p.b.y"] == {"p.b.c"} and found["p.b.c"] == {"p.b.__init__"}


def test_imports_in_functions_count_and_those_for_typing_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "if TYPE_CHECKING:\n    import p.b\ndef f():\n    from p import c, name\n    from . import d\n"
    files = {name: tmp_path / f"{name}.py" for name in ("p", "p.a", "p.b", "p.c", "p.d")}
    for name, path in files.items():
        path.write_text(text if name == "p.a" else "", encoding="utf-8")
    monkeypatch.setattr(reading, "python_files", lambda: files)
    found = reading.read_imports()
    assert found.running["p.a"] == {"p", "p.c", "p.d"} and found.typing_only["p.a"] == {"p.b"}


def read_only(text: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The project is one file, `p/a.py`, of this text."""
    monkeypatch.setattr(reading, "ROOT", root)
    monkeypatch.setattr(reading, "python_files", lambda: {"p.a": root / "p" / "a.py"})
    monkeypatch.setattr(reading, "tree_of", lambda _: ast.parse(text))


def test_a_one_word_name_is_one_without_an_underscore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "class P(Protocol):\n    def encode(self): ...\n"
        "class A:\n    def encode(self): ...\n    def __len__(self): ...\n    def _fit(self): ...\n"
        "def encode(): ...\ndef load_row():\n    def inner(): ...\n"
    )
    read_only(text, tmp_path, monkeypatch)
    found, asked = reading.one_word_names("p")
    assert found == ["p/a.py:A._fit", "p/a.py:encode", "p/a.py:load_row.inner"] and asked == 4


def test_short_functions_take_a_reader_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "class A:\n    @property\n    def size(self):\n        a = 1\n        return a\n"
        "    def __len__(self):\n        a = 1\n        return a\n"
        "    def __call__(self):\n        a = 1\n        return a\n"
        "def forward_only(x):\n    'Says so.'\n    import os\n    del x\n    return os\n"
        "def loop(x):\n    for _ in x:\n        pass\n"
        "def outer():\n    def inner():\n        a = 1\n        return a\n    return inner\n"
    )
    read_only(text, tmp_path, monkeypatch)
    names = ["A.size", "A.__len__", "A.__call__", "forward_only", "loop", "outer", "outer.<locals>.inner"]
    found = reading.leave_out_short([f"p/a.py:{name}" for name in names])
    assert found == [f"p/a.py:{name}" for name in ("A.__call__", "loop", "outer", "outer.<locals>.inner")]
