"""Identifiers are spelled as the libraries spell theirs, in American English."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("vlm_train", "data_pipelines", "tests", "benchmarks", "conf", "recipes")
OLD_NAMES = ("tests/config/test_renamed_keys.py", "vlm_train/config/renamed_keys.yaml", "tests/test_spelling.py")
OLD_RUNS = "tests/config/old_runs/"
OLD_ATTRIBUTE = "tests/data_pipelines/test_sample.py"  # a source of one's own that has not been renamed
BRITISH = re.compile(
    r"colour|grey|behaviour|centre(?!d)|licence|neighbour|favour|honour|catalogue|artefact|judgement|cancelled|labell|modell"
    r"|(normal|initial|serial|recogn|organ|quant|optim|token|parallel|summar|general|minim|maxim|util|vector|random|final"
    r"|standard|penal|memor)is(e|es|ed|er|ing|ation)(?![a-z])",
    re.IGNORECASE,
)


def find_british(text: str) -> list[str]:
    names = (token.string for token in tokenize.generate_tokens(io.StringIO(text).readline))
    return [name for name in names if name.isidentifier() and BRITISH.search(name)]


@pytest.mark.parametrize("folder", FOLDERS)
def test_identifiers_are_american(folder: str) -> None:
    found: dict[str, list[str]] = {}
    for path in (ROOT / folder).rglob("*"):
        name = path.relative_to(ROOT).as_posix()
        if name in (*OLD_NAMES, OLD_ATTRIBUTE) or name.startswith(OLD_RUNS):
            continue
        if path.suffix == ".py":
            found[name] = find_british(path.read_text(encoding="utf-8"))
        elif path.suffix == ".yaml":
            keys = OmegaConf.to_yaml(OmegaConf.load(path))
            found[name] = [key for key in re.findall(r"(?m)^[ -]*(\w+):", keys) if BRITISH.search(key)]
    assert found and {name: names for name, names in found.items() if names} == {}


def test_the_check_sees_identifiers_and_not_prose() -> None:
    text = '# colour\nnormalise_rows = "behaviour"\ntokenizer = licence\nadvise(promised, revised, concentre)\n'
    assert find_british(text) == ["normalise_rows", "licence", "concentre"]
