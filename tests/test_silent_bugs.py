"""docs/silent_bugs.md: every row names tests that are there, or says that it is open."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "silent_bugs.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")


def list_rows(page: str) -> list[str]:
    """The rows of the page's tables, without their heads."""
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    return [line for line in lines if not line.startswith(("| ---", "| what goes wrong", "| guard |"))]


def find_problem(row: str) -> str | None:
    """What is wrong with the last column of a row."""
    last = row.rstrip(" |").rpartition("|")[2].strip()
    named = NAMED.findall(last)
    if last == "open":
        return None
    if not named or NAMED.sub("", last).strip(", "):
        return f"{last!r} is neither a list of tests nor `open`"
    for file, test in named:
        path = TESTS / file
        if not path.is_file() or not re.search(rf"^def {test}\(", path.read_text(encoding="utf-8"), re.MULTILINE):
            return f"{file}::{test} is not there"
    return None


@pytest.mark.parametrize("row", list_rows(PAGE), ids=lambda row: row[2:50])
def test_every_row_names_tests_that_are_there(row: str) -> None:
    assert find_problem(row) is None


def test_few_rows_are_open() -> None:
    rows = list_rows(PAGE)
    assert len(rows) >= 60 and sum(row.endswith("| open |") for row in rows) <= 2


@pytest.mark.parametrize("last", ["`test_silent_bugs.py::test_nothing`", "`nowhere.py::test_a`", "later", ""])
def test_the_check_sees_what_is_missing(last: str) -> None:
    assert find_problem(f"| a | b | c | {last} |") is not None
