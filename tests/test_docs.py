"""README and docs: every file, folder and command that they name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("conf", "recipes", "vlm_train", "data_pipelines", "tests", "benchmarks", "docs")
OWN_OPTIONS = {"recipe": ROOT / "recipes" / "recipe", "schedule": ROOT / "recipes" / "schedule"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if not re.match(r"[a-z]+:", target)]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipes_and_schedules_exist(page: Path) -> None:
    named = re.findall(r"(?<![\w./-])(recipe|schedule)=([a-z0-9_]+)", page.read_text(encoding="utf-8"))
    allowed = {"my_recipe", "mine"}  # what the reader is told to write
    missing = {(k, v) for k, v in named if v not in allowed and not (OWN_OPTIONS[k] / f"{v}.yaml").is_file()}
    assert missing == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"(?:^|`|\$ )make ([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE))
    assert named <= targets


def test_tree_in_the_readme_is_the_tree() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```$", readme, re.DOTALL | re.MULTILINE)
    tree = next((block for block in blocks if re.search(r"^vlm_train/", block, re.MULTILINE)), None)
    assert tree is not None, "README.md shows no tree"
    names = set(re.findall(r"^([\w.][\w./-]*)", tree, re.MULTILINE))
    assert {name for name in names if not (ROOT / name).exists()} == set()
    assert {f"{folder}/" for folder in FOLDERS} <= names
