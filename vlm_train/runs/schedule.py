"""A schedule: an ordered list of recipes with their hand-off, supervised by one process.

Every stage is composed and checked before the first one starts. Each runs as a child; finished ones are skipped, and
the first failure stops the schedule, so that the same command goes on where it stopped. The command line's overrides
apply to every stage that has their key; `"schedule.stages.1.overrides=['optim.lr=1e-3']"` changes one stage.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from data_pipelines.nearest import did_you_mean
from vlm_train.check.assets import missing_assets
from vlm_train.check.check import check_config
from vlm_train.check.hydra_errors import Composition, explain_errors
from vlm_train.config import origins as config_origins
from vlm_train.config.compose import compose_config
from vlm_train.config.folders import list_groups
from vlm_train.config.run_identity import run_dir
from vlm_train.errors import AssetError, ConfigError
from vlm_train.runs import launch, process, record
from vlm_train.runs.folder import RunFolder

log = logging.getLogger("vlm_train")

MODES = ("fit", "config")
"""What a schedule does with its stages."""


@dataclass(frozen=True)
class PlannedStage:
    """One stage, composed: its recipe, configuration, origins of every key and run folder."""

    recipe: str
    cfg: DictConfig
    origins: dict[str, config_origins.Origin]
    folder: Path

    @property
    def done(self) -> bool:
        """Whether a run of exactly this configuration has finished."""
        return record.read_record(self.folder).get("status") == "done"


def run_schedule(overrides: Sequence[str], dirs: Sequence[str | Path] = ()) -> dict[str, Any]:
    """Runs the schedule that `overrides` name; the other overrides apply to every stage. Returns the last metrics.

    Raises ConfigError with the problems of all stages before any starts, or the error of the first stage that fails.
    """
    _refuse_launcher()
    name, stages = plan_schedule(overrides, dirs)
    if any(stage.cfg.mode == "config" for stage in stages):
        for stage in stages:
            print(f"== {stage.recipe}\n{config_origins.format_origins(stage.cfg, stage.origins)}\n")
        return {}
    if any(stage.cfg.dry_run for stage in stages):
        return _dry_run(stages)
    for stage in stages:
        launch.check_environment(stage.cfg)
    folder = folder_of(name, stages)
    log.info("Schedule %s: %s", name, folder)
    results: dict[str, Any] = {}
    try:
        for number, stage in enumerate(stages, 1):
            results = _run_stage(stage, f"Stage {number} of {len(stages)}, {stage.recipe}")
            _write_state(folder, name, stages)
    finally:
        _write_state(folder, name, stages)
        _write_schedule_report(folder)
        log.info("%s", format_summary(stages))
    return results


def _refuse_launcher() -> None:
    """A schedule starts the processes of its stages itself; several schedules would start every stage several times."""
    if (found := launch.started_by()) != "local":
        raise ConfigError(
            f"schedule: {found} started several processes, and each would run the whole schedule. On one node start it "
            f"once, without {found}, with launch.devices=<n>; on several run the stages one by one (docs/slurm.md)."
        )


def plan_schedule(overrides: Sequence[str], dirs: Sequence[str | Path] = ()) -> tuple[str, list[PlannedStage]]:
    """The schedule's name and its stages, composed and checked. Raises ConfigError with the problems of all stages."""
    own = [o for o in overrides if _key_of(o).split(".")[0] == "schedule"]
    common = [o for o in overrides if o not in own]
    _refuse_overrides(common)
    schedule = compose_config(own, dirs).schedule
    name = str(next(o for o in own if _key_of(o) == "schedule").partition("=")[2])
    stages: list[PlannedStage] = []
    problems: list[str] = []
    fitting = _fitting_overrides(schedule, common, dirs)
    for index, stage in enumerate(schedule.stages):
        try:
            stages.append(_plan_stage(schedule, index, stages, fitting[index], dirs))
        except ConfigError as error:
            problems += [f"stage {index} ({stage.recipe}): {line}" for line in error.problems]
    if not schedule.stages:
        problems = [f"schedule={name}: it has no stages."]
    if problems:
        raise ConfigError(problems)
    if missing := _missing_assets(stages):
        raise AssetError(missing)
    return name, stages


def _fitting_overrides(schedule: DictConfig, common: list[str], dirs: Sequence[str | Path]) -> list[list[str]]:
    """The command line's overrides for each stage: those whose key it has, such as `eval.answers.limit`.

    A key that no stage has stays in all of them, to be reported.
    """
    choices = [o for o in common if _key_of(o) in list_groups(dirs)]
    absent: list[set[str]] = []
    for stage in schedule.stages:
        try:
            cfg = compose_config([f"recipe={stage.recipe}", *stage.overrides, *choices], dirs)
        except (*Composition, ConfigError):
            absent.append(set())
            continue
        plain = [o for o in common if o not in choices and not o.startswith(("+", "~"))]
        absent.append({o for o in plain if not _has_key(cfg, _key_of(o))})
    nowhere = set.intersection(*absent) if absent else set()
    return [[o for o in common if o not in missing - nowhere] for missing in absent]


def _has_key(cfg: DictConfig, key: str) -> bool:
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, parent, throw_on_missing=False) if parent else cfg
    return node is not None and (not OmegaConf.is_dict(node) or name in node)


def _missing_assets(stages: Sequence[PlannedStage]) -> list[str]:
    """What the stages that train lack, except the runs that earlier stages fill."""
    missing = []
    for index, stage in enumerate(stages):
        if stage.cfg.mode == "fit" and not stage.cfg.dry_run:
            filled = [earlier.folder for earlier in stages[:index]]
            missing += [f"stage {index} ({stage.recipe}): {line}" for line in missing_assets(stage.cfg, filled)]
    return missing


def _plan_stage(
    schedule: DictConfig, index: int, earlier: list[PlannedStage], common: list[str], dirs: Sequence[str | Path]
) -> PlannedStage:
    stage = schedule.stages[index]
    if any(_key_of(override).split(".")[0] == "allow_targets" for override in stage.overrides):
        raise ConfigError("allow_targets: no schedule extends trust. Say allow_targets=[...] on the command line.")
    overrides = [f"recipe={stage.recipe}", *stage.overrides, *common]
    try:
        cfg = compose_config(overrides, dirs)
    except Composition as error:
        raise ConfigError(explain_errors(overrides, dirs, error)) from error
    found = config_origins.find_origins(overrides, dirs)
    if stage.init_from:
        names = [str(other.recipe) for other in schedule.stages[:index]]
        cfg.init_from = [_hand_off(source, names, earlier) for source in stage.init_from]
        found["init_from"] = config_origins.Origin("schedule", str(schedule.get("name", "schedule")))
    check_config(cfg, need_assets=False)
    planned = PlannedStage(str(stage.recipe), cfg, found, run_dir(cfg))
    if any(planned.folder == other.folder for other in earlier):
        raise ConfigError(f"it equals an earlier stage, so both would be the run {planned.folder.name}.")
    return planned


def _hand_off(source: DictConfig, names: list[str], earlier: list[PlannedStage]) -> DictConfig:
    """`init_from` of a stage, with the name of an earlier recipe replaced by that stage's run folder.

    The folder is written relative to `paths.runs`, so that the run id does not depend on where runs lie.
    """
    source = source.copy()
    found = [stage for stage in earlier if stage.recipe == source.run]
    if found:
        source.run = "${paths.runs}/" + found[-1].folder.name
    elif source.run in names:  # that stage has problems, which are reported with it
        source.run = "???"
    elif not Path(source.run).exists():
        raise ConfigError(
            f"init_from: {source.run} is neither an earlier stage nor a path.{did_you_mean(source.run, names)} "
            f"Earlier stages: {', '.join(names) or 'none'}."
        )
    return source


def _refuse_overrides(overrides: Sequence[str]) -> None:
    for override in overrides:
        key, value = _key_of(override), override.partition("=")[2]
        if key in ("recipe", "run", "run_name"):
            raise ConfigError(f"{key}: names one run, but schedule= runs several. Leave out one of the two.")
        if key == "mode" and value not in MODES:
            raise ConfigError(f"mode: a schedule knows {', '.join(MODES)}, got {value}. For one run: run=<run folder>.")


def _dry_run(stages: list[PlannedStage]) -> dict[str, Any]:
    for index, stage in enumerate(stages):  # runs of earlier stages will be there
        filled = [str(earlier.folder) for earlier in stages[:index]]
        named = [(source, OmegaConf.select(source, "run", throw_on_missing=False)) for source in stage.cfg.init_from]
        stage.cfg.init_from = [source for source, run in named if run not in filled]
    return {stage.recipe: process.dispatch_mode(stage.cfg) for stage in stages}


def _run_stage(stage: PlannedStage, title: str) -> dict[str, Any]:
    if stage.done:
        log.info("%s: done already, %s", title, stage.folder)
        return launch.read_result(stage.folder)
    log.info(
        "%s: %s\n%s\n", title, stage.folder, config_origins.format_origins(stage.cfg, stage.origins, only_changed=True)
    )
    launch.prepare_folder(stage.cfg, config_origins.format_origins(stage.cfg, stage.origins))
    try:
        return launch.run_child(stage.cfg)
    except launch.ChildError as error:
        raise launch.ChildError(f"{title}: {error}", error.code) from error


def format_summary(stages: Sequence[PlannedStage]) -> str:
    """A table of stage, status, steps and run folder."""
    rows = [("stage", "status", "step", "run")]
    for stage in stages:
        state = record.read_record(stage.folder)
        rows.append((stage.recipe, state.get("status", "-"), str(state.get("step", "-")), str(stage.folder)))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  ".join([*(f"{c:<{w}}" for c, w in zip(row, widths, strict=False)), row[3]]) for row in rows)


def folder_of(name: str, stages: Sequence[PlannedStage]) -> Path:
    """The folder of a schedule, `<paths.runs>/<its name>-<hash of its stages>`."""
    digest = hashlib.sha256(" ".join(stage.folder.name for stage in stages).encode()).hexdigest()[:8]
    return Path(stages[0].cfg.paths.runs) / f"{name}-{digest}"


def _write_state(folder: Path, name: str, stages: Sequence[PlannedStage]) -> None:
    """`schedule.json`, which the report reads."""
    listed = [
        {
            "recipe": stage.recipe,
            "run": str(stage.folder),
            "status": record.read_record(stage.folder).get("status", "pending"),
        }
        for stage in stages
    ]
    record.write_json(RunFolder(folder).schedule, {"name": name, "stages": listed})


def _write_schedule_report(folder: Path) -> None:
    """The HTML report over all stages. Trouble with it must not hide the result."""
    try:
        log.info("Report: %s", process.write_report(folder))
    except Exception as error:
        log.warning("No report for %s: %s", folder, error)


def _key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")
