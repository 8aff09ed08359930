"""`python -m data_pipelines.contract` says what is wrong with a source, and passes those that need no files."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from data_pipelines.contract import check_source, main
from data_pipelines.sources import Record
from data_pipelines.sources.tiny import Tiny


class OfFirst(Tiny):
    """Every sample has the key of the first one."""

    def read_record(self, i: int):
        return super().read_record(0)


class NoBytes(Tiny):
    """Forgets the bytes of its media."""

    def read_record(self, i: int):
        return super().read_record(i)[0], []


class Changing(Tiny):
    """Gives other records each time."""

    calls = 0

    def read(self, part: int) -> Iterator[Record]:
        Changing.calls += 1
        self.split = f"call-{Changing.calls}"
        return super().read(part)


class Failing(Tiny):
    """Has no usable record."""

    def read_record(self, i: int):
        raise KeyError("image")


class Nameless(Tiny):
    """Has no name."""

    name = None  # type: ignore[assignment]


class Silent(Tiny):
    __doc__ = None


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (OfFirst, "every sample has a key of its own: twice: train-00000"),
        (NoBytes, "every media item comes with its bytes: not so: train-00000"),
        (Changing, "a part gives the same records in any order: part 0 differs"),
        (Failing, "gives usable samples: none of 4; the first of 4 bad ones: record 0: malformed: KeyError: 'image'"),
        (Nameless, "name, license and split are texts: name is None"),
        (Silent, "has a docstring: say in a sentence what it reads"),
    ],
)
def test_what_is_wrong_is_said(source: type[Tiny], said: str) -> None:
    problems = [f"{checked}: {problem}" for checked, problem in check_source(source(count=4)) if problem]
    assert [one for one in problems if one.startswith(said)], problems


def test_a_source_is_checked_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["source=tiny", "count=4"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "source=tiny: keeps its contract"
    assert main(["source=synthetic", "records=20"]) == 0
    assert main(["source=nothing"]) == 2
    assert "Available: " in capsys.readouterr().err


def test_a_yaml_file_lists_every_option(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "source").mkdir()
    target = "data_pipelines.sources.tiny.Tiny"
    (tmp_path / "source" / "short.yaml").write_text(f"# @package _global_\n_target_: {target}\nsplit: train\n")
    assert main(["--config-dir", str(tmp_path), "source=short"]) == 1
    assert "FAIL  its YAML lists every option of the constructor: not count" in capsys.readouterr().out
