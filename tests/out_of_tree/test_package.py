"""The package stays what a user would write: few files, public names only, no line of the core."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.out_of_tree.command_line import CONF, PACKAGE

FILES = {
    "connector": ["resampler.py", "conf/connector/my_resampler.yaml"],
    "native": ["native_vit.py", "conf/vision/my_native_vit.yaml"],
    "cross_attention": ["cross_attention.py", "conf/model/my_cross_attention.yaml"],
    "mixture": ["mixture.py", "conf/recipe/my_mixture.yaml"],
    "preference": ["preference.py", "conf/objective/my_preference.yaml"],
    "metric": ["word_error_rate.py", "conf/metric/my_word_error_rate.yaml"],
    "source": ["notes.py", "conf/source/my_notes.yaml"],
}
"""Piece -> what it is made of."""

ROOT = Path(__file__).resolve().parents[2]


def test_a_piece_is_at_most_two_python_files_and_one_yaml_file() -> None:
    assert len(FILES) == 7
    for piece, names in FILES.items():
        kinds = [Path(name).suffix for name in names]
        assert 1 <= kinds.count(".py") <= 2 and kinds.count(".yaml") <= 1, piece
    listed = sorted([*sum(FILES.values(), []), "__init__.py"])
    found = [str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*") if path.is_file()]
    assert sorted(name for name in found if "__pycache__" not in name) == listed


def test_it_imports_public_names_only() -> None:
    imported = 0
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("vlm_train", "data_pipelines"):
                names = [*node.module.split("."), *(alias.name for alias in node.names)]
                assert not [name for name in names if name.startswith("_")], path.name
                imported += len(node.names)
            assert not (isinstance(node, ast.Attribute) and node.attr.startswith("_") and node.attr != "__init__"), path
    assert imported > 20


def test_the_core_does_not_know_it() -> None:
    for folder in ("vlm_train", "data_pipelines", "conf", "recipes"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".yaml"):
                assert "my_vlm" not in path.read_text(), path
    assert CONF.is_dir()
