"""README and docs: every file, folder and command that they name exists, and the README's steps work."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from data_pipelines.build import main as build_shards
from data_pipelines.cli import CONF, _compose_config
from tests.support import small_run
from vlm_train import cli
from vlm_train.build import build_evaluators
from vlm_train.check.check import check_config
from vlm_train.config.compose import compose_config
from vlm_train.config.run_file import save_config
from vlm_train.config.schema import Root
from vlm_train.contracts.evaluator import validation_metrics
from vlm_train.dryrun.report import dry_run
from vlm_train.errors import ConfigError
from vlm_train.runs.schedule import plan_schedule
from vlm_train.runs.single import from_run

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
    text = re.sub(r"```python\n.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)  # `batch` is a variable
    named = re.findall(rf"(?<![\w./-])({'|'.join(groups)})\.(?!py\b)(\w+(?:\.\w+)*)", text)
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


CHECKED = ["README", "faq", "data", "building", "evaluation", "hallucination", "contrastive", "capfilt", "qformer"]
CHECKED += ["slurm", "sweeps"]
"""Pages whose commands are composed; the commands of docs/extending.md need the parts that it adds, see its tests."""


def list_commands(page: Path) -> list[tuple[str, str]]:
    """(module, arguments) of the commands in the page's code blocks and text; without those of the reader's own
    package, shortened ones, and those that ask the hub, which are tested with local folders."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += [" ".join(inline.split()) for inline in re.findall(r"`(python -m [^`]+)`", text)]
    found = [one for line in lines for one in re.findall(r"python -m ([\w.]+) +(.*?)(?=;|$|&&)", line)]
    left_out = r"\.\.\.|--config-dir|--help|=auto\b.*=auto\b|source=<|^mode=show$"
    return [(module, words) for module, words in found if not re.search(left_out, words.partition("#")[0])]


@pytest.mark.parametrize("page", CHECKED)
def test_commands_compose(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes, keys and values are allowed where they are given; a run that is named has an evaluation of answers."""
    monkeypatch.chdir(tmp_path)
    save_config(compose_config(["recipe=easyvqa_stage2", "eval=easyvqa"]), tmp_path / "runs" / "x" / "config.yaml")
    counted = 0
    for module, text in list_commands(ROOT / "README.md" if page == "README" else ROOT / "docs" / f"{page}.md"):
        text = text.rstrip("'") if text.count("'") % 2 else text  # build='python -m ...'
        words = shlex.split(re.sub(r"<\w+>", "x", text), comments=True)
        sweeps = "-m" in words
        words = [word.split(",")[0] if sweeps and "[" not in word else word for word in words if word != "-m"]
        if module.startswith("data_pipelines."):
            _compose_config(module.partition(".")[2], words, [CONF])
        elif module != "vlm_train" or any("(" in word for word in words):  # Optuna's distributions
            continue
        elif any(word.startswith("schedule=") for word in words):
            plan_schedule([*words, "dry_run=true"])
        elif any(word.startswith("run=") for word in words):
            words = ["run=runs/x" if word.startswith("run=") else word for word in words]
            check_config(from_run(words, [])[0], need_assets=False)
        else:
            check_config(compose_config(words), need_assets=False)
        counted += 1
    assert counted >= (0 if page in ("faq", "evaluation") else 1)


def test_settings_of_the_questions_compose() -> None:
    text = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
    named = re.findall(r"`('?\+?[\w.]+=[^`]*)`", text)
    given = [words.replace("<run>", "x").replace("<folder>", "models/x") for words in named if "source=" not in words]
    assert len(given) > 8
    for words in given:
        more = ["logger=wandb"] if words.startswith("logger.wandb.") else []
        more += ["run_name=x"] if words == "mode=import" else []
        more += ["run=runs/x"] if words == "mode=export" else []
        check_config(compose_config(["recipe=llava15_stage2", *more, *shlex.split(words)]), need_assets=False)


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


def test_readme_trains_on_a_folder_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The section's line and commands; then the same with small parts, without dry_run."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Train your own")[1].split("\n## ")[0]
    (line,) = re.findall(r"```json\n(.*?)```", section, re.DOTALL)
    (commands,) = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    shards, plan = (shlex.split(command)[3:] for command in commands.splitlines())
    (tmp_path / "mine" / "cats").mkdir(parents=True)
    (tmp_path / "mine" / "cats" / "1.jpg").write_bytes(small_run.picture(1))
    (tmp_path / "mine" / "train.jsonl").write_text(line * 8)
    monkeypatch.chdir(tmp_path)
    assert build_shards(shards) == 0
    assert cli.main(plan) == 0
    assert "Cheapest that fits" in capsys.readouterr().out
    small = ["size=tiny", "trainer.max_steps=1", "run_name=own", "trainer.threads=1"]
    assert cli.main([*(word for word in plan if word != "dry_run=true"), *small]) == 0
    assert (tmp_path / "runs" / "own" / "checkpoints" / "LATEST").is_file()


@pytest.mark.slow
def test_readme_goes_from_captions_to_a_table(tmp_path: Path) -> None:
    """The section's table and commands with small parts, with the package installed and in another folder."""
    section = (
        (ROOT / "README.md").read_text(encoding="utf-8").split("## Your pictures with captions")[1].split("\n## ")[0]
    )
    (table,) = re.findall(r"```text\n(.*?)```", section, re.DOTALL)
    (commands,) = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    (tmp_path / "mine" / "cats").mkdir(parents=True)
    header, row = table.splitlines()
    for number in range(1, 5):
        (tmp_path / "mine" / "cats" / f"{number}.jpg").write_bytes(small_run.picture(number))
    rows = [row.replace("1.jpg", f"{number}.jpg") for number in range(1, 5)]
    for split in ("train", "val"):
        (tmp_path / "mine" / f"{split}.csv").write_text("\n".join([header, *rows]) + "\n")
    small = {"recipe": " size=tiny trainer.max_steps=1 trainer.threads=1"}
    said = ""
    for line in commands.splitlines():
        words = shlex.split(line + next((more for word, more in small.items() if f" {word}=" in line), ""))
        done = subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        said = done.stdout
    assert re.search(r"this run .*4 .*generation, token f1", said) and "images shuffled" in said


def test_readme_names_every_schedule() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Recipes")[1].split("\n## ")[0]
    schedules = {path.stem for path in OWN_OPTIONS["schedule"].glob("*.yaml")}
    assert schedules <= set(re.findall(r"`schedule=(\w+)`", section))


@pytest.mark.timeout(200)
def test_data_page_shows_what_its_commands_print(tmp_path: Path) -> None:
    """The page's script and commands, in an empty folder; only seconds and folders may differ."""
    section = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").split("## Your own data")[0]
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
