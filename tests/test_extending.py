"""docs/extending.md: its files and commands work, in a package of one's own; a connector's also in place."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines import build as build_command
from data_pipelines import contract as source_contract
from tests.support import small_run
from vlm_train import cli
from vlm_train.contract import command as contract

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (An? .+?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.M))
COMMANDS = {
    "vlm_train.contract": contract.main,
    "vlm_train": cli.main,
    "data_pipelines.contract": source_contract.main,
    "data_pipelines.build": build_command.main,
}


def read_section(title: str) -> tuple[dict[str, str], list[list[str]]]:
    """The files of a section and its commands, as words."""
    files = dict(re.findall(r"^`([\w/]+\.(?:py|yaml))`\n\n```\w+\n(.*?)```", SECTIONS[title], re.DOTALL | re.M))
    (commands,) = re.findall(r"```bash\n(.*?)```", SECTIONS[title], re.DOTALL)
    return files, [shlex.split(line) for line in commands.splitlines()]


def write_pairs(folder: Path) -> None:
    """The raw data that the page speaks of."""
    (folder / "pictures").mkdir()
    for number in range(3):
        (folder / "pictures" / f"{number}.png").write_bytes(small_run.picture(number))
    (folder / "pairs.tsv").write_text("".join(f"{number}.png\tpicture {number}\n" for number in range(3)))


def test_the_page_has_a_section_for_every_kind() -> None:
    connectors = ["A connector", "A connector with a fixed number of tokens"]
    kinds = ["A vision encoder", "A family", "An objective", "A metric", "A source", "An exporter"]
    assert list(SECTIONS) == [*connectors, *kinds]


@pytest.mark.parametrize("title", SECTIONS)
def test_a_package_of_ones_own(
    title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page's files in a package and a folder of YAML; its commands with what the page says that they get then."""
    package = f"mypackage_{title.split()[-1]}"  # each of its own: modules stay imported
    ((module, code), (options, yaml)), commands = read_section(title)[0].items(), read_section(title)[1]
    (tmp_path / package).mkdir()
    (tmp_path / package / Path(module).name).write_text(code)
    own = tmp_path / "mine" / Path(*Path(options).parts[-2:])
    own.parent.mkdir(parents=True)
    where = module.removesuffix(".py").replace("/", ".")
    assert where in yaml
    own.write_text(yaml.replace(where, f"{package}.{Path(module).stem}"))
    write_pairs(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    assert len(commands) == 2
    for python, flag, name, *arguments in commands:
        assert (python, flag) == ("python", "-m")
        given = ["--config-dir", "mine", *arguments, f"allow_targets=[{package}.]"]
        code = COMMANDS[name](given)
        said = capsys.readouterr()
        assert code == 0, said.out + said.err
        if name.endswith("contract"):
            assert f"{own.parent.name}={own.stem}: keeps its contract" in said.out


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_connector_in_the_repository(tmp_path: Path) -> None:
    """Both files where the page says, in a copy of the checkout; the recipe of the second command trains a step."""
    files, commands = read_section("A connector")
    copy = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("vlm_train", "data_pipelines", "conf", "recipes"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    for path, text in files.items():
        (copy / path).write_text(text, encoding="utf-8")
    small_run.make_data(copy / "data")
    train = [word for word in commands[1] if word != "dry_run=true"]
    train += ["init_from=[]", "trainer.max_steps=1", "run_name=own", "trainer.threads=1"]
    for _, *arguments in (commands[0], train):
        environment = {**os.environ, "PYTHONPATH": str(copy)}
        done = subprocess.run([sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (copy / "runs" / "own" / "checkpoints" / "LATEST").is_file()


def test_a_trained_run_answers_in_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_run.train(small_run.command(small_run.make_data(tmp_path / "data"), tmp_path / "runs", name="mine"))
    write_pairs(tmp_path)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    (script,) = re.findall(r"## Python: a trained run answers\n\n```python\n(.*?)```", PAGE, re.DOTALL)
    found: dict[str, object] = {}
    exec(compile(script, "extending.md", "exec"), found)
    assert capsys.readouterr().out.strip() == str(found["processor"].decode_answer(found["ids"][0].tolist())).strip()  # type: ignore[attr-defined,index]
    assert 1 <= found["ids"].shape[1] <= 16  # type: ignore[attr-defined]
