"""The glossary of docs/architecture.md: names in code and configuration do not use the words that it replaces."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PACKAGES = ("vlm_train", "data_pipelines")
YAML = ("conf", "recipes", "data_pipelines/conf")


def read_table(heading: str) -> dict[str, str]:
    """First column -> second column of the table below a heading."""
    section = PAGE.split(f"{heading}\n", 1)[1].split("\n#", 1)[0]
    rows = re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", section, re.M)
    return dict(rows[2:] if set(rows[1][0]) <= {"-", " "} else rows[1:])


def words_of(name: str) -> set[str]:
    """`ModelPart` and `model_part` -> {model, part}."""
    return set(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_"))


def public_names() -> Iterator[tuple[str, str]]:
    """Public classes, their fields, functions and arguments, and keys of YAML: where, name."""
    for path in (path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                yield str(path.relative_to(ROOT)), node.name
                if isinstance(node, ast.ClassDef):
                    fields = (one.target for one in node.body if isinstance(one, ast.AnnAssign))
                    yield from ((str(path.relative_to(ROOT)), one.id) for one in fields if isinstance(one, ast.Name))
                if isinstance(node, ast.FunctionDef):
                    for argument in (*node.args.args, *node.args.kwonlyargs):
                        yield str(path.relative_to(ROOT)), argument.arg
    for path in (path for folder in YAML for path in (ROOT / folder).rglob("*.yaml")):
        yield from ((str(path.relative_to(ROOT)), key) for key in keys_of(yaml.safe_load(path.read_text("utf-8"))))


def keys_of(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, inner in node.items():
            yield str(key)
            yield from keys_of(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from keys_of(inner)


def test_names_use_the_words_of_the_glossary() -> None:
    banned = read_table("### Words not used in names")
    assert len(banned) >= 8
    used = {f"{where}: {name}" for where, name in public_names() if words_of(name) & banned.keys()}
    assert sorted(used) == []


def test_a_word_is_either_explained_or_banned() -> None:
    banned, known = read_table("### Words not used in names"), read_table("## Glossary")
    assert len(known) > 30 and not banned.keys() & known.keys()
    single = {word for word in banned.values() if word in known}
    assert single, "a word that replaces another is one of the glossary, or plain English"


def test_words_of_a_name() -> None:
    assert words_of("BlipTextModel") == {"blip", "text", "model"} and words_of("num_views") == {"num", "views"}
