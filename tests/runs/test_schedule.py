"""Schedules: all stages checked before the first, hand-off, skipping, stopping, state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from tests.support.slow import run_few
from vlm_train import cli
from vlm_train.config.folders import recipes_dir
from vlm_train.config.run_identity import run_dir
from vlm_train.errors import AssetError, ConfigError, Interrupted
from vlm_train.runs import launch, process, schedule

OURS = sorted(path.stem for path in (recipes_dir() / "schedule").glob("*.yaml"))

FIRST = "# @package _global_\nbatch: {samples: 4}\noptim: {lr: 0.5}\n"
SECOND = '# @package _global_\nbatch: {samples: 8}\ninit_from:\n  - {run: "???", parts: [connector]}\n'
PAIR = """
name: pair
stages:
  - recipe: first
  - recipe: second
    init_from: [{run: first, parts: [connector]}]
    overrides: [seed=5]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with two recipes and a schedule; assets need not exist, and no report is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vlm_train.check.assets._missing_weights", lambda cfg, ask_hub: [])
    monkeypatch.setattr("vlm_train.check.assets._missing_shards", lambda cfg: [])
    monkeypatch.setattr(schedule, "_write_schedule_report", lambda folder: None)
    for name in ("recipe", "schedule"):
        (tmp_path / name).mkdir()
    (tmp_path / "recipe/first.yaml").write_text(FIRST)
    (tmp_path / "recipe/second.yaml").write_text(SECOND)
    (tmp_path / "schedule/pair.yaml").write_text(PAIR)
    return tmp_path


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[DictConfig]:
    """Stages that were started; each ends at once as done."""
    seen: list[DictConfig] = []

    def child(cfg: DictConfig) -> dict[str, Any]:
        seen.append(cfg)
        status = {"status": "done", "step": 3, "metrics": {"val/loss": len(seen)}}
        (run_dir(cfg) / "run.json").write_text(json.dumps(status))
        return status["metrics"]

    monkeypatch.setattr(launch, "run_child", child)
    return seen


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    return schedule.run_schedule(["schedule=pair", *overrides], [folder])


def test_stages_run_in_order_and_hand_over(folder: Path, ran: list[DictConfig]) -> None:
    assert run(folder) == {"val/loss": 2}
    first, second = ran
    assert (first.recipe_name, second.recipe_name) == ("first", "second")
    assert Path(second.init_from[0].run) == run_dir(first)
    assert second.init_from[0].parts == ["connector"]
    assert (first.seed, second.seed) == (42, 5)
    assert (run_dir(second) / "config_origins.txt").is_file()


def test_command_line_applies_to_every_stage(folder: Path, ran: list[DictConfig]) -> None:
    run(folder, "trainer.max_steps=7", "seed=9")
    assert [cfg.trainer.max_steps for cfg in ran] == [7, 7]
    assert [cfg.seed for cfg in ran] == [9, 9]


def test_one_stage_can_be_changed(folder: Path, ran: list[DictConfig]) -> None:
    run(folder, "schedule.stages.0.overrides=['optim.lr=0.125', 'batch.micro=2']")
    assert (ran[0].optim.lr, ran[0].batch.micro, ran[1].batch.micro) == (0.125, 2, 1)


def test_override_applies_where_its_key_exists(folder: Path, ran: list[DictConfig]) -> None:
    (folder / "recipe/second.yaml").write_text(
        SECOND.replace("batch:", "defaults:\n  - override /connector: linear\nbatch:")
    )
    run(folder, "connector.depth=3")
    assert ran[0].connector.depth == 3 and "depth" not in ran[1].connector
    with pytest.raises(ConfigError) as caught:
        run(folder, "connector.dept=3")
    assert [line.partition(":")[0] for line in caught.value.problems] == ["stage 0 (first)", "stage 1 (second)"]


def test_change_of_a_stage_changes_the_runs_after_it(folder: Path, ran: list[DictConfig]) -> None:
    run(folder)
    run(folder, "schedule.stages.0.overrides=['optim.lr=0.125']")
    names = [run_dir(cfg).name for cfg in ran]
    assert len(names) == 4 and len(set(names)) == 4


def test_run_ids_do_not_depend_on_the_folder(folder: Path, ran: list[DictConfig]) -> None:
    run(folder)
    run(folder, "paths.runs=elsewhere")
    names = [run_dir(cfg).name for cfg in ran]
    assert names[:2] == names[2:]


def test_finished_stages_are_skipped(folder: Path, ran: list[DictConfig]) -> None:
    run(folder)
    assert run(folder) == {"val/loss": 2}
    assert len(ran) == 2


def test_first_failure_stops_and_the_same_command_goes_on(
    folder: Path, ran: list[DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    working = launch.run_child

    def failing(cfg: DictConfig) -> dict[str, Any]:
        if cfg.recipe_name == "second":
            raise launch.ChildError("out of memory", 1)
        return working(cfg)

    monkeypatch.setattr(launch, "run_child", failing)
    with pytest.raises(launch.ChildError, match=r"Stage 2 of 2, second: out of memory"):
        run(folder)
    (state,) = [json.loads(path.read_text()) for path in (folder / "runs").glob("pair-*/schedule.json")]
    assert [stage["status"] for stage in state["stages"]] == ["done", "pending"]
    monkeypatch.setattr(launch, "run_child", working)
    run(folder)
    assert [cfg.recipe_name for cfg in ran] == ["first", "second"]


def test_state_names_the_runs(folder: Path, ran: list[DictConfig]) -> None:
    run(folder)
    (path,) = (folder / "runs").glob("pair-*/schedule.json")
    state = json.loads(path.read_text())
    assert state["name"] == "pair"
    assert [(s["recipe"], s["run"], s["status"]) for s in state["stages"]] == [
        (cfg.recipe_name, str(run_dir(cfg)), "done") for cfg in ran
    ]


def test_all_stages_are_checked_before_the_first_starts(folder: Path, ran: list[DictConfig]) -> None:
    (folder / "recipe/second.yaml").write_text(SECOND.replace("8", "8, micro: 0"))
    (folder / "recipe/first.yaml").write_text(FIRST + "connector: {dept: 3}\n")
    with pytest.raises(ConfigError) as caught:
        run(folder)
    assert any(line.startswith("stage 0 (first): connector.dept") for line in caught.value.problems)
    assert any(line.startswith("stage 1 (second): batch.micro") for line in caught.value.problems)
    assert ran == [] and not (folder / "runs").exists()


def test_missing_assets_of_all_stages_are_listed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_train.check.assets._missing_shards", lambda cfg: [f"shards of {cfg.recipe_name}"])
    with pytest.raises(AssetError) as caught:
        run(folder)
    assert caught.value.problems == ["stage 0 (first): shards of first", "stage 1 (second): shards of second"]


def test_unknown_recipe_of_a_stage(folder: Path) -> None:
    (folder / "schedule/pair.yaml").write_text(PAIR.replace("recipe: second", "recipe: secund"))
    with pytest.raises(ConfigError, match=r"stage 1 \(secund\): recipe=secund: no such option. Did you mean second\?"):
        run(folder)


def test_hand_off_names_an_earlier_stage(folder: Path) -> None:
    (folder / "schedule/pair.yaml").write_text(PAIR.replace("run: first", "run: firts"))
    with pytest.raises(ConfigError, match=r"firts is neither an earlier stage nor a path. Did you mean first\?"):
        run(folder)


def test_equal_stages_are_refused(folder: Path) -> None:
    (folder / "schedule/pair.yaml").write_text("name: pair\nstages:\n  - recipe: first\n  - recipe: first\n")
    with pytest.raises(ConfigError, match="it equals an earlier stage"):
        run(folder)


@pytest.mark.parametrize("override", ["recipe=first", "run_name=x", "run=runs/x", "mode=eval"])
def test_settings_of_one_run_are_refused(folder: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{override.partition('=')[0]}: "):
        run(folder, override)


def test_dry_run_plans_every_stage(folder: Path, ran: list[DictConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "dispatch_mode", lambda cfg: {"steps": cfg.batch.samples})
    assert run(folder, "dry_run=true") == {"first": {"steps": 4}, "second": {"steps": 8}}
    assert ran == [] and not (folder / "runs").exists()


def test_command_line(folder: Path, ran: list[DictConfig], capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--config-dir", str(folder), "schedule=pair"]
    assert cli.main([*argv, "optim.lr=0.25"]) == 0
    assert [cfg.optim.lr for cfg in ran] == [0.25, 0.25]
    assert cli.main([*argv, "trainer.max_stepz=3"]) == 2
    assert "Did you mean trainer.max_steps?" in capsys.readouterr().err
    assert cli.main(["schedule=pairs"]) == 2
    assert "schedule=pairs: no such option" in capsys.readouterr().err
    assert cli.main([*argv, "mode=config"]) == 0
    assert "init_from" in capsys.readouterr().out


@pytest.mark.parametrize("given", run_few(OURS, ("blip2_opt", "easyvqa", "internvl25_8b")))
def test_our_schedules_plan(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name, stages = schedule.plan_schedule([f"schedule={given}", "dry_run=true"])
    assert name == given and len({stage.folder for stage in stages}) == len(stages)


def test_launchers_are_refused(folder: Path, ran: list[DictConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"launch\.kind: torchrun starts the processes"):
        run(folder, "launch=torchrun")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"schedule: torchrun started several .*docs/slurm\.md"):
        run(folder, "launch=torchrun")
    assert ran == [] and not (folder / "runs").exists()


def test_interruption_stops_the_schedule(
    folder: Path, ran: list[DictConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(cfg: DictConfig) -> dict[str, Any]:
        raise Interrupted(15)

    monkeypatch.setattr(launch, "run_child", interrupted)
    assert cli.main(["--config-dir", str(folder), "schedule=pair"]) == 143
    assert capsys.readouterr().err.endswith("Interrupted: SIGTERM. The same command resumes.\n")
    assert next((folder / "runs").glob("pair-*/schedule.json")).is_file()


def test_unknown_schedule_is_all_that_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--config-dir", str(folder), "schedule=piar"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("ConfigError: schedule=piar: no such option. Did you mean pair?") and "batch" not in text
