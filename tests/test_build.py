"""Every component of a run is made in one place."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import vlm_train
from vlm_train.contracts.family import Family
from vlm_train.data.media_layout import make_layout

PACKAGE = Path(vlm_train.__file__).parent


def imported_names(path: Path) -> set[str]:
    """Dotted names that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_only_build_makes_components() -> None:
    makers = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(name.startswith(("hydra.utils", "hydra._internal.instantiate")) for name in imported_names(path))
    }
    assert makers == {"build.py"}


def test_the_data_half_does_not_know_how_a_run_is_built() -> None:
    knowing = [
        path.name
        for path in (PACKAGE / "data").rglob("*.py")
        if any(name.startswith("vlm_train.build") for name in imported_names(path))
    ]
    assert knowing == []


def test_a_family_may_lay_out_its_media_itself() -> None:
    class Own(Family):
        def media_layout(self, images: Mapping[str, Any]) -> Any:
            return ("its own", images)

    assert make_layout(Own(), {}) == ("its own", {})
