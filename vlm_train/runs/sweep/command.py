"""A sweep as its command line starts it: its folder, its jobs by Hydra's launchers and sweepers, its end."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from vlm_train.config.compose import compose_config, run_hydra
from vlm_train.errors import FAILED, REFUSED, ConfigError, VLMTrainError
from vlm_train.runs import launch, process
from vlm_train.runs.sweep import records, summary
from vlm_train.runs.sweep.direction import direction_of
from vlm_train.runs.sweep.job import JobError, carry_out
from vlm_train.runs.sweep.watch import announce_ends, passing_on

LOCAL = ("joblib", "submitit_local")
"""Launchers whose jobs are processes of this machine."""

SEEDED = (None, "tpe", "random", "cmaes", "nsgaii", "motpe")
"""Optuna's samplers that have a seed."""


class SweepError(VLMTrainError):
    """A sweep with jobs that are not done. Where all of these were refused, it ends with that exit code too."""

    def __init__(self, message: str, unfinished: Sequence[records.Job]) -> None:
        super().__init__(message)
        self.code = REFUSED if all(job.refused for job in unfinished) else FAILED


def run_sweep(argv: Sequence[str], overrides: Sequence[str]) -> None:
    """Runs every job that is not done yet, then prints a table and writes `sweep.html`.

    The sweep's folder is named after its overrides, so that the same command is the same sweep. Raises SweepError when
    jobs failed, after all have run.
    """
    _refuse_overrides(overrides)
    folder = folder_of(overrides)
    launcher = records.value_given(overrides, "hydra/launcher") or "basic"
    records.start_sweep(folder, overrides)
    watched = announce_ends(folder) if launcher != "basic" else nullcontext()
    interruptible = passing_on(folder) if launcher in LOCAL else nullcontext()
    try:
        with watched, interruptible:
            _run_hydra(argv, overrides, folder)
    finally:
        _write_summary(folder)
    if unfinished := [job for job in records.read_sweep(folder).jobs if job.status != "done"]:
        raise SweepError(_describe_unfinished(folder, unfinished), unfinished)


def folder_of(overrides: Sequence[str]) -> Path:
    """`<paths.runs>/sweep-<recipe or schedule>-<hash>`. Of Hydra's own settings only the space it searches counts."""
    own = [o for o in overrides if not o.startswith("hydra") or records.split_override(o)[0].startswith(records.PARAMS)]
    runs = compose_config([o for o in own if records.split_override(o)[0] == "paths.runs"]).paths.runs
    names = (records.value_given(own, key) for key in ("schedule", "recipe"))
    name = re.sub(r"\W+", "_", next(filter(None, names), "custom"))[:40].strip("_")
    return Path(runs) / f"sweep-{name}-{records.hash_overrides(sorted(own))}"


def _refuse_overrides(overrides: Sequence[str]) -> None:
    """Raises ConfigError for what would go wrong in every job, or be ignored."""
    problems = []
    if (found := launch.started_by()) != "local":
        problems.append(f"--multirun: {found} started several processes, and each would run the sweep. Start it once.")
    if records.value_given(overrides, "hydra.sweep.dir") is not None:
        problems.append("hydra.sweep.dir: a sweep's folder is named after its overrides. paths.runs says where it is.")
    for key in ("hydra.launcher.tasks_per_node", "hydra.launcher.nodes"):
        if records.value_given(overrides, key) not in (None, "1"):
            problems.append(f"{key}: a job starts its processes itself, launch.devices=<n>, on one node.")
    if records.value_given(overrides, "hydra/launcher") == "submitit_slurm" and shutil.which("srun") is None:
        problems.append("hydra/launcher=submitit_slurm: there is no SLURM here (no srun). Use submitit_local or basic.")
    sweeper = records.value_given(overrides, "hydra/sweeper") or "basic"
    if sweeper != "basic" and records.value_given(overrides, "sweep_metric") is None:
        problems.append(f"sweep_metric: hydra/sweeper={sweeper} needs a metric on the command line: val_loss, ...")
    if problems:
        raise ConfigError(problems)


def _run_hydra(argv: Sequence[str], overrides: Sequence[str], folder: Path) -> None:
    """Hydra's multirun in our folder. Failed jobs are in the records, so the sweeper's own error says nothing new."""
    quoted = str(folder).replace("\\", "\\\\").replace('"', '\\"')
    more = [f'hydra.sweep.dir="{quoted}"', *optuna_defaults(overrides)]
    first = list(argv).index(overrides[0]) if overrides else len(argv)  # argparse wants them in one piece
    try:
        run_hydra([*argv[:first], *more, *argv[first:]], carry_out)
    except JobError:
        pass
    except ValueError as error:
        if "No trials are completed yet" not in str(error):
            raise


def optuna_defaults(overrides: Sequence[str]) -> list[str]:
    """Optuna's settings that the command line leaves out.

    A failed trial stops nothing; the direction is the metric's; a seed makes the same command propose the same values,
    whose runs are then found done.
    """
    if records.value_given(overrides, "hydra/sweeper") != "optuna":
        return []
    metric = records.value_given(overrides, "sweep_metric") or ""
    wanted = {
        "hydra.sweeper.max_failure_rate": "1.0",
        "hydra.sweeper.direction": direction_of(metric, overrides),
    }
    if records.value_given(overrides, "hydra/sweeper/sampler") in SEEDED:
        wanted["hydra.sweeper.sampler.seed"] = "42"
    return [f"{key}={value}" for key, value in wanted.items() if records.value_given(overrides, key) is None]


def _write_summary(folder: Path) -> None:
    """The table and the page over what there is. Trouble with the page must not hide the result."""
    sweep = records.read_sweep(folder)
    if not sweep.jobs:
        return
    print(f"\n{sweep.name}\n{summary.format_table(sweep)}", flush=True)
    if all(sweep.score_of(job) is None for job in sweep.jobs):
        return
    try:
        print(f"\nSweep: {process.write_report(folder)}", flush=True)
    except (VLMTrainError, OSError, ValueError, KeyError) as error:
        print(f"No page for {folder}: {error}", flush=True)


def _describe_unfinished(folder: Path, unfinished: Sequence[records.Job]) -> str:
    sweep = records.read_sweep(folder)
    listed = [f"job {job.number} ({job.make_label(sweep.keys)}): {job.error or job.status}" for job in unfinished[:8]]
    more = [f"and {len(unfinished) - 8} more"] if len(unfinished) > 8 else []
    return "\n  - ".join(
        [f"{len(unfinished)} of {len(sweep.jobs)} jobs are not done. The same command runs only these:", *listed, *more]
    )
