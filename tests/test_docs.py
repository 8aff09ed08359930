"""README and docs: every file, folder and command that they name exists, and the README's steps work."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from safetensors.torch import load_file

from tests.support import small_run
from vlm_train.build import build_evaluators
from vlm_train.check.check import check_config
from vlm_train.config.compose import compose_config
from vlm_train.config.schema import Root
from vlm_train.contracts.evaluator import validation_metrics
from vlm_train.dryrun.report import dry_run
from vlm_train.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCALE = ROOT / "docs" / "scale.md"
FOLDERS = ("conf", "recipes", "vlm_train", "data_pipelines", "tests", "benchmarks", "docs")
OWN_OPTIONS = {"recipe": ROOT / "recipes" / "recipe", "schedule": ROOT / "recipes" / "schedule"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_metrics_are_those_of_evaluators(page: Path) -> None:
    """`<evaluator>/<metric>`: what is called like a metric, or stands below an evaluator's name, is one of its own."""
    known: set[str] = set()
    for option in (ROOT / "conf" / "eval").glob("*.yaml"):
        known |= validation_metrics(build_evaluators(compose_config([f"eval={option.stem}"]))).keys()
    evaluators, metrics = ({name.split("/")[side] for name in known} for side in (0, 1))
    named = re.findall(r"`(\w+)/(\w+)`", page.read_text(encoding="utf-8"))
    found = [f"{one}/{two}" for one, two in named if one in evaluators or two in {*metrics, "accuracy"}]
    assert set(found) <= known


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_settings_exist(page: Path) -> None:
    known = {"peft": options("peft"), "strategy": options("strategy")}
    typed: Any = OmegaConf.to_container(OmegaConf.structured(Root))
    groups = {key: leaves(typed[key]) for key in ("trainer", "batch", "launch", "paths", "target")} | known
    named = re.findall(rf"(?<![\w./-])({'|'.join(groups)})\.(?!py\b)(\w+(?:\.\w+)*)", page.read_text(encoding="utf-8"))
    assert {f"{group}.{key}" for group, key in named if key not in groups[group]} == set()


def options(group: str) -> set[str]:
    """The keys of all options of a group."""
    return {
        key
        for file in (ROOT / "conf" / group).glob("*.yaml")
        for key in leaves(OmegaConf.to_container(OmegaConf.load(file)))
    }


def leaves(node: Any) -> set[str]:
    """Dotted keys of a nested mapping, its inner ones too."""
    found = set(map(str, node))
    return found | {f"{key}.{one}" for key in node if isinstance(node[key], dict) for one in leaves(node[key])}


def blocks(page: Path, kind: str) -> list[str]:
    """The page's code blocks of a kind."""
    return re.findall(rf"```{kind}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_commands_of_the_scale_page_are_valid() -> None:
    """Every value is allowed where it is given; what the page says is refused is refused so."""
    refused = [
        block.removeprefix("ConfigError: ") for block in blocks(SCALE, "text") if block.startswith("ConfigError")
    ]
    commands = [shlex.split(line) for block in blocks(SCALE, "bash") for line in block.splitlines()]
    assert len(commands) > 4 and {tuple(words[:3]) for words in commands} == {("python", "-m", "vlm_train")}
    problems = []
    for words in commands:
        try:
            check_config(compose_config(words[3:]), need_assets=False)
        except ConfigError as error:
            problems.append(f"{error}\n")
    assert problems == refused


def test_dry_run_of_the_scale_page(capsys: pytest.CaptureFixture[str]) -> None:
    """The shown lines are printed, in this order; `...` stands for others."""
    (command,) = [block for block in blocks(SCALE, "bash") if "target.gpus" in block]
    (shown,) = [block for block in blocks(SCALE, "text") if "Cheapest that fits" in block]
    dry_run(compose_config(shlex.split(command)[3:]))
    said = capsys.readouterr().out
    for part in filter(None, re.split(r"^\.\.\.\n", shown, flags=re.MULTILINE)):
        _, found, said = said.partition(part)
        assert found == part


def test_tree_in_the_readme_is_the_tree() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```$", readme, re.DOTALL | re.MULTILINE)
    tree = next((block for block in blocks if re.search(r"^vlm_train/", block, re.MULTILINE)), None)
    assert tree is not None, "README.md shows no tree"
    names = set(re.findall(r"^([\w.][\w./-]*)", tree, re.MULTILINE))
    assert {name for name in names if not (ROOT / name).exists()} == set()
    assert {f"{folder}/" for folder in FOLDERS} <= names


@pytest.mark.timeout(280)
def test_readme_steps_add_a_connector(tmp_path: Path) -> None:
    """The section's own files and commands, in a copy of the checkout; training is cut to one step a stage."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Add a connector")[1].split("\n## ")[0]
    (module, code), (options, yaml) = [
        (path, textwrap.dedent(block))
        for path, block in re.findall(r"^\d\. `([\w/]+\.(?:py|yaml))`.*?```\w+\n(.*?)```", section, re.DOTALL | re.M)
    ]
    (check,) = re.findall(r"^\d\. `python (-m vlm_train\.contract [^`]+)`", section, re.M)
    (train,) = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    copy = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("vlm_train", "data_pipelines", "conf", "recipes", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", copy)
    (copy / module).write_text(code, encoding="utf-8")
    (copy / options).write_text(yaml, encoding="utf-8")

    assert f"connector={Path(options).stem}: keeps its contract" in run(check.split(), copy)

    small_run.make_data(copy / "data")
    words = [word for word in shlex.split(train) if word != "\n"]
    small = ["size=tiny", "trainer.max_steps=1", "trainer.save_every=null", "trainer.threads=1"]
    run([*words[1:], *small], copy)
    (weights,) = (copy / "runs").glob("easyvqa_stage2-*/checkpoints/step-00000001/weights.safetensors")
    assert {"connector.norm.weight", "connector.proj.weight"} <= load_file(weights).keys()


@pytest.mark.timeout(200)
def test_data_page_shows_what_its_commands_print(tmp_path: Path) -> None:
    """The page's script and commands, in an empty folder; only seconds and folders may differ."""
    section = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").split("## Sources")[0]
    (script,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (tmp_path / "digits.py").write_text(script, encoding="utf-8")
    commands, shown = (re.findall(rf"```{kind}\n(.*?)```", section, re.DOTALL) for kind in ("bash", "text"))
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": binaries}
    for block, expected in zip(commands, shown, strict=True):
        done = subprocess.run(
            ["bash", "-e", "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        said = done.stdout.replace(f"{tmp_path}/", "")
        seconds = re.compile(r"\d+\.\d s$", re.MULTILINE)
        assert seconds.sub("s", said).strip() == seconds.sub("s", expected).strip()


def run(arguments: list[str], folder: Path) -> str:
    """Run Python in a copy of the checkout, which shadows the installed package."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
