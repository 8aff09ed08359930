"""The command line: one clear error for each wrong thing, exit codes, modes, multirun."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from data_pipelines.errors import DataError
from vlm_train import __main__, cli
from vlm_train.check.bounds import LITERALS
from vlm_train.config.run_file import load_config
from vlm_train.config.run_identity import run_dir, run_id
from vlm_train.errors import BatchError, ConfigError, Interrupted, TrainingError
from vlm_train.runs import launch, process

STAGE = "recipe=llava15_stage1"


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No launcher's variables, no traceback switches, run folders in a temporary directory."""
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "VLM_TRAIN_TRACEBACK", "HYDRA_FULL_ERROR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_assets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Composition and launching without weights and shards."""
    monkeypatch.setattr("vlm_train.check.check.missing_assets", lambda *_: [])


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch, no_assets: None) -> list[DictConfig]:
    """Configurations that reached their mode instead of being carried out."""
    seen: list[DictConfig] = []

    def dispatch(cfg: DictConfig) -> dict[str, Any]:
        seen.append(cfg)
        return {"val/loss": 1.0}

    monkeypatch.setattr(process, "dispatch_mode", dispatch)
    return seen


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command line that must end with exit code 2 and returns what it says."""

    def run(*argv: str) -> str:
        assert cli.main(list(argv)) == 2
        text = capsys.readouterr().err
        assert text.startswith(("ConfigError: ", "AssetError: ")) and "Traceback" not in text
        return text

    return run


def recipe(folder: Path, text: str, name: str = "mine") -> str:
    """Writes a user's recipe and returns the flag's value."""
    (folder / "recipe").mkdir(exist_ok=True)
    (folder / "recipe" / f"{name}.yaml").write_text(text)
    return str(folder)


def test_unknown_recipe_lists_the_known_ones(fails: Callable[..., str]) -> None:
    text = fails("recipe=llava15_stagee1")
    assert "Did you mean llava15_stage1?" in text and "easyvqa_clip" in text
    assert "batch" not in text, "nothing is known of the rest while the recipe is not"


def test_unknown_option_lists_the_known_ones(fails: Callable[..., str]) -> None:
    text = fails(STAGE, "vision=clip_vit_l14_366")
    assert "Did you mean clip_vit_l14_336?" in text and "_tiny" not in text


def test_unknown_option_in_a_recipe_names_the_file(fails: Callable[..., str], tmp_path: Path) -> None:
    folder = recipe(tmp_path, "# @package _global_\ndefaults:\n  - override /optim: adamv\n")
    text = fails("--config-dir", folder, "recipe=mine")
    assert "mine.yaml: optim=adamv: no such option. Did you mean adamw?" in text


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("trainer.max_stepz=3", "trainer.max_steps"),
        ("connector.dept=3", "connector.depth"),
        ("optm.lr=3", "optim.lr"),
        ("sead=3", "seed"),
        ("batch.sample=3", "batch.samples"),
    ],
)
def test_misspelt_key_on_the_command_line(fails: Callable[..., str], override: str, meant: str) -> None:
    text = fails(STAGE, override)
    assert f"Did you mean {meant}?" in text and f"+{override}" not in text


def test_misspelt_typed_key_in_a_recipe(fails: Callable[..., str], tmp_path: Path) -> None:
    folder = recipe(tmp_path, "# @package _global_\ntrainer: {max_stepz: 3}\n")
    assert "recipe/mine.yaml: trainer.max_stepz: unknown key. Did you mean trainer.max_steps?" in fails(
        "--config-dir", folder, "recipe=mine"
    )


def test_misspelt_component_key_in_a_recipe(fails: Callable[..., str], tmp_path: Path) -> None:
    folder = recipe(tmp_path, "# @package _global_\nconnector: {dept: 3}\nbatch: {samples: 8}\n")
    assert "Did you mean connector.depth?" in fails("--config-dir", folder, "recipe=mine")


def test_misspelt_group_in_a_recipe(fails: Callable[..., str], tmp_path: Path) -> None:
    folder = recipe(tmp_path, "# @package _global_\noptimm: {lr: 3}\n")
    assert "optimm" in (text := fails("--config-dir", folder, "recipe=mine")) and "Did you mean optim?" in text


@pytest.mark.parametrize("override", ["trainer.max_steps=many", "optim.lr=abc"])
def test_wrong_type(fails: Callable[..., str], override: str) -> None:
    key, _, value = override.partition("=")
    text = fails(STAGE, override)
    assert key in text and f"'{value}'" in text


def test_wrong_type_in_a_recipe(fails: Callable[..., str], tmp_path: Path) -> None:
    folder = recipe(tmp_path, "# @package _global_\ntrainer: {max_steps: many}\n")
    assert "recipe/mine.yaml: trainer.max_steps: " in fails("--config-dir", folder, "recipe=mine")


def test_recipe_without_its_first_line(fails: Callable[..., str], tmp_path: Path) -> None:
    folder = recipe(tmp_path, "trainer: {max_steps: 3}\n")
    assert "mine.yaml: the first line of a recipe must be '# @package _global_'" in fails(
        "--config-dir", folder, "recipe=mine"
    )


def test_broken_yaml(fails: Callable[..., str], tmp_path: Path) -> None:
    folder = recipe(tmp_path, "# @package _global_\ntrainer: {max_steps: 3\n")
    assert "mine.yaml, line 3: not valid YAML" in fails("--config-dir", folder, "recipe=mine")


@pytest.mark.parametrize("override", ["nonsense", "optim.lr=[1"])
def test_not_an_override(fails: Callable[..., str], override: str) -> None:
    assert f"{override}: not of the form key=value" in fails(STAGE, override)


def test_setting_of_an_empty_group(fails: Callable[..., str]) -> None:
    assert "peft is empty. Choose an option for it first, peft=<option>." in fails(STAGE, "peft.rank=3")
    said = fails(STAGE, "vision=null")
    assert "vision=null: a group on the command line takes the name of an option" in said and "; ~vision leaves" in said


def test_problems_of_composition_and_of_the_check_come_together(fails: Callable[..., str]) -> None:
    text = fails(STAGE, "trainer.max_stepz=3", "vision=nothing", "batch.micro=0", "optim.lr=abc")
    for part in ("trainer.max_stepz", "vision=nothing", "batch.micro", "optim.lr"):
        assert part in text


def test_missing_assets_are_listed(fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = fails(STAGE)
    assert "data.train.0.shards" in text and "vision.weights" in text and "llm.weights" in text


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_TRAIN_TRACEBACK", "1")
    with pytest.raises(Exception, match="max_stepz"):
        cli.main([STAGE, "trainer.max_stepz=3"])


def test_runtime_failures_exit_with_1(
    dispatched: list[DictConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: DictConfig) -> None:
        raise TrainingError("step 3: the loss is not finite.")

    monkeypatch.setattr(process, "dispatch_mode", fail)
    assert cli.main([STAGE, "mode=show"]) == 1
    assert capsys.readouterr().err == "TrainingError: step 3: the loss is not finite.\n"


def test_fit_prepares_its_folder(dispatched: list[DictConfig], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([STAGE, "optim.lr=0.5"]) == 0
    (cfg,) = dispatched
    folder = run_dir(cfg)
    assert load_config(folder / "config.yaml") == cfg
    origins = (folder / "config_origins.txt").read_text()
    assert [line.split()[1:] for line in origins.splitlines() if line.startswith("optim.lr ")] == [
        ["0.5", "command", "line"]
    ]


def test_folder_of_another_run_is_refused(dispatched: list[DictConfig], fails: Callable[..., str]) -> None:
    assert cli.main([STAGE, "run_name=mine"]) == 0
    assert cli.main([STAGE, "run_name=mine", "optim.lr=0.5"]) == 0  # nothing was trained yet
    Path("runs/mine/checkpoints/step-00000001").mkdir(parents=True)
    assert cli.main([STAGE, "run_name=mine", "optim.lr=0.5", "trainer.log_every=1"]) == 0
    assert "holds checkpoints of another configuration (optim.lr: 0.5 -> 0.25)" in fails(
        STAGE, "run_name=mine", "optim.lr=0.25"
    )


def test_mode_config_prints_origins(dispatched: list[DictConfig], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([STAGE, "mode=config", "seed=7"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert rows["seed"].endswith("command line") and rows["optim.lr"].endswith("recipe: llava15_stage1")
    assert dispatched == []


def test_modes_name_functions_that_are_spelt_as_in_the_table() -> None:
    for place in (*process.MODES.values(), process.DRY_RUN, process.SHORTAGE):
        module, _, name = place.partition(":")
        assert module.startswith("vlm_train.") and name.isidentifier()


def test_run_takes_the_folders_config_and_this_command_lines_values(
    dispatched: list[DictConfig], fails: Callable[..., str]
) -> None:
    assert cli.main([STAGE, "run_name=first", "optim.lr=0.5", "connector.depth=3"]) == 0
    assert cli.main(["mode=eval", "run=runs/first", "batch.micro=3", "image=resize"]) == 0
    cfg = dispatched[-1]
    assert (cfg.mode, cfg.optim.lr, cfg.connector.depth, cfg.batch.micro) == ("eval", 0.5, 3, 3)
    assert cfg.image.mode == "resize" and run_dir(cfg) == Path("runs/first").absolute()
    assert "Did you mean connector.depth?" in fails("mode=eval", "run=runs/first", "connector.dept=3")
    assert "recipe: cannot be given with run=" in fails("mode=eval", "run=runs/first", STAGE)
    assert "runs/second/config.yaml does not exist" in fails("mode=eval", "run=runs/second")


def test_config_of_a_run_folder_is_not_trusted(dispatched: list[DictConfig], fails: Callable[..., str]) -> None:
    assert cli.main([STAGE, "run_name=first"]) == 0
    path = Path("runs/first/config.yaml")
    path.write_text(path.read_text().replace("vlm_train.models.connectors.mlp.MLP", "os.system"))
    assert "connector._target_: 'os.system' is not trusted" in fails("mode=export", "run=runs/first")
    assert len(dispatched) == 1


def test_run_folder_cannot_extend_trust(dispatched: list[DictConfig], fails: Callable[..., str]) -> None:
    trusting = ["+eval.mine._target_=fractions.Fraction", "allow_targets=[fractions.]"]
    assert cli.main([STAGE, "run_name=first", *trusting]) == 0
    assert "eval.mine._target_: 'fractions.Fraction' is not trusted" in fails("mode=eval", "run=runs/first")
    assert cli.main(["mode=eval", "run=runs/first", trusting[1]]) == 0
    assert len(dispatched) == 2


@pytest.mark.parametrize("place", ["recipe", "source of data", "schedule"])
def test_no_file_extends_trust(place: str, fails: Callable[..., str], tmp_path: Path, no_assets: None) -> None:
    """Recipes are passed around: whose code runs, the command line says alone, also for a dry run."""
    target = "eval: {mine: {_target_: fractions.Fraction}}\n"
    trusting = "" if place == "schedule" else "allow_targets: [fractions.]\n"
    folder = recipe(tmp_path, f"# @package _global_\ndefaults:\n  - llava15_stage1\n{target}{trusting}")
    words = ["--config-dir", folder, "recipe=mine", "dry_run=true"]
    if place == "source of data":  # any file at the root
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "theirs.yaml").write_text("# @package _global_\nallow_targets: [fractions.]\n")
        words.append("data=theirs")
    if place == "schedule":
        (tmp_path / "schedule").mkdir()
        stage = "{recipe: mine, overrides: ['allow_targets=[fractions.]']}"
        (tmp_path / "schedule" / "theirs.yaml").write_text(f"name: theirs\nstages:\n  - {stage}\n")
        words = ["--config-dir", folder, "schedule=theirs", "dry_run=true"]
    said = fails(*words)
    assert "allow_targets: " in said and "on the command line" in said


@pytest.mark.parametrize("behind", [1, 2, 3])
def test_flags_may_stand_among_and_behind_overrides(dispatched: list[DictConfig], tmp_path: Path, behind: int) -> None:
    words = ["recipe=mine", "size=tiny", f"paths.runs={tmp_path}"]
    words[behind:behind] = ["--config-dir", recipe(tmp_path, "# @package _global_\ndefaults:\n  - llava15_stage1\n")]
    assert cli.main(words) == 0
    assert dispatched[0].recipe_name == "mine"


def test_a_multirun_takes_flags_behind_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(cli, "_run_sweep", lambda argv, overrides: seen.append(list(argv)))
    assert cli.main(["recipe=mine", "--config-dir", str(tmp_path), "seed=1,2", "-m"]) == 0
    assert seen == [["--config-dir", str(tmp_path), "-m", "recipe=mine", "seed=1,2"]]


@pytest.mark.parametrize(
    "flag", [["--config-name", "x"], ["--config-path", "x"], ["--config-dir", "/nonexistent/conf"]]
)
def test_flags_that_would_be_ignored_are_refused(fails: Callable[..., str], flag: list[str]) -> None:
    assert flag[0] in fails(*flag, STAGE, "mode=config")
    assert flag[0] in fails(*flag, "-m", STAGE)


def _raise(error: BaseException) -> None:
    raise error


class SIGTERMException(SystemExit):
    """As Lightning's: a SystemExit without a code."""


def _lightnings_exit() -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)


@pytest.mark.parametrize(
    ("work", "code"),
    [
        (lambda: _raise(KeyboardInterrupt()), 130),
        (_lightnings_exit, 130),
        (lambda: _raise(SIGTERMException()), 143),
        (lambda: sys.exit(143), 143),
        (lambda: _raise(Interrupted(1)), 129),
    ],
)
def test_interruptions_have_their_exit_codes(work: Callable[[], None], code: int, capsys) -> None:
    assert process.run_guarded(work) == code
    assert capsys.readouterr().err.endswith("The same command resumes.\n")


def test_sigterm_is_an_interruption_where_nothing_else_handles_it(capsys: pytest.CaptureFixture[str]) -> None:
    cleaned: list[int] = []

    def work() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            cleaned.append(1)

    assert process.run_guarded(work) == 143 and cleaned == [1]
    assert "SIGTERM. The same command resumes." in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_handlers_of_the_caller_stay() -> None:
    seen: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        assert process.run_guarded(lambda: os.kill(os.getpid(), signal.SIGTERM)) == 0 and seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_other_exits_are_left_alone() -> None:
    with pytest.raises(SystemExit) as caught:
        process.run_guarded(lambda: sys.exit(3))
    assert caught.value.code == 3


def test_trouble_with_data_and_disk_is_one_line(no_assets: None, capsys: pytest.CaptureFixture[str]) -> None:
    Path("taken").touch()
    assert cli.main([STAGE, "paths.runs=taken"]) == 1
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and "taken" in text and "VLM_TRAIN_TRACEBACK=1" in text
    full = OSError(errno.ENOSPC, "No space left on device", "runs/x")
    assert process.run_guarded(lambda: _raise(full)) == 1
    assert capsys.readouterr().err.startswith("OSError: runs/x: No space left on device.")
    assert process.run_guarded(lambda: _raise(DataError("data/x: shard 3 is cut off"))) == 1
    assert capsys.readouterr().err == "DataError: data/x: shard 3 is cut off\n"


def test_error_of_a_loader_worker_is_shown_without_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    trace = (
        "Caught BatchError in DataLoader worker process 1.\nOriginal Traceback (most recent call last):\n"
        '  File "/x/worker.py", line 1, in _worker_loop\n    data = fetcher.fetch(index)\n'
        "vlm_train.errors.BatchError: 3 placeholders, 4 features\nin shard 7\n"
    )
    assert process.run_guarded(lambda: _raise(BatchError(trace))) == 1
    assert capsys.readouterr().err == "BatchError: 3 placeholders, 4 features\nin shard 7\n"
    config_trace = trace.replace("BatchError", "ConfigError")
    assert process.run_guarded(lambda: _raise(ConfigError(config_trace))) == 2
    assert capsys.readouterr().err.startswith("ConfigError: 3 placeholders")


def test_devices_start_a_child(dispatched: list[DictConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    monkeypatch.setattr(launch, "run_child", lambda cfg, devices: started.append(devices) or {})
    assert cli.main([STAGE, "launch.devices=2"]) == 0
    assert started == [2] and dispatched == []
    assert cli.main([STAGE, "launch.devices=2", "dry_run=true"]) == 0
    assert len(dispatched) == 1
    assert cli.main([STAGE, "run_name=first"]) == 0
    assert cli.main(["mode=eval", "run=runs/first", "launch.devices=2"]) == 0, "eval knows one device"
    assert started == [2] and len(dispatched) == 3


def test_multirun_starts_each_job_as_a_child(
    dispatched: list[DictConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs: list[DictConfig] = []

    def child(cfg: DictConfig, devices: int) -> dict[str, Any]:
        jobs.append(cfg)
        if cfg.optim.lr == 0.5:
            raise launch.ChildError("the first job failed", 1)
        return {"val/loss": 2.0}

    monkeypatch.setattr(launch, "run_child", child)
    assert cli.main(["-m", STAGE, "optim.lr=0.5,0.25", "sweep_metric=val/loss"]) == 1
    assert [job.optim.lr for job in jobs] == [0.5, 0.25], "a failed job must not stop the others"
    assert len({run_id(job) for job in jobs}) == 2 and dispatched == []
    assert "the first job failed" in capsys.readouterr().err
    assert {path.name for path in Path().iterdir()} == {"runs"}, "Hydra made a folder of its own"


def test_multirun_finds_the_users_recipes(
    dispatched: list[DictConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    jobs: list[DictConfig] = []
    monkeypatch.setattr(launch, "run_child", lambda cfg, devices: jobs.append(cfg) or {})
    folder = recipe(tmp_path, "# @package _global_\nbatch: {samples: 8}\n")
    assert cli.main(["--config-dir", folder, "-m", "recipe=mine", "seed=1,2"]) == 0
    assert [(job.recipe_name, job.batch.samples, job.seed) for job in jobs] == [("mine", 8, 1), ("mine", 8, 2)]


def test_launch_must_match_how_the_process_was_started(
    dispatched: list[DictConfig], fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "launch.kind: torchrun starts the processes" in fails(STAGE, "launch=torchrun")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "Use launch=torchrun." in fails(STAGE)
    assert cli.main([STAGE, "launch=torchrun"]) == 0 and len(dispatched) == 1


def run_process(*argv: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that runs `main` and then says which heavy packages it imported."""
    script = (
        "import sys, json\nfrom vlm_train.cli import main\ntry:\n    code = main(sys.argv[1:])\n"
        "except SystemExit as error:\n    code = error.code\n"
        "heavy = [m for m in ('torch', 'transformers', 'lightning') if m in sys.modules]\n"
        "print(json.dumps([code, heavy]), file=sys.stderr)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", script, *argv], capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["--help"], 0, "recipe: "),
        (["--cfg", "job", STAGE], 0, "max_steps: null"),
        ([STAGE, "trainer.max_stepz=3"], 2, "Did you mean trainer.max_steps?"),
        ([STAGE, "optim.lr=abc"], 2, "optim.lr"),
        ([STAGE, "mode=config"], 0, "recipe: llava15_stage1"),
    ],
)
def test_help_config_and_errors_import_no_framework(argv: list[str], code: int, says: str) -> None:
    done = run_process(*argv)
    assert json.loads(done.stderr.splitlines()[-1]) == [code, []], done.stderr
    assert says in done.stdout + done.stderr
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("own", [None, "ACTIVE"])
def test_idle_threads_sleep_unless_the_user_says_otherwise(own: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMP reads it when torch is imported: before any mode, and in the processes that are started."""
    monkeypatch.setenv("OMP_WAIT_POLICY", own or "")
    if own is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    seen: list[str | None] = []
    monkeypatch.setattr(__main__.torchrun, "run_and_exit", lambda _: seen.append(os.environ.get("OMP_WAIT_POLICY")))
    __main__.main()
    assert seen == [own or "PASSIVE"]


def test_help_asks_no_composition(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Hydra's own help copies the whole configuration once a group, which takes five times as long."""
    for name in ("run_hydra", "run", "_run_sweep"):
        monkeypatch.setattr(cli, name, lambda *_: pytest.fail("composed"))
    Path("mine/recipe").mkdir(parents=True)
    Path("mine/recipe/own.yaml").write_text("# @package _global_\n")
    assert cli.main(["--help", "--config-dir", "mine"]) == 0
    lines = capsys.readouterr().out.splitlines()
    images = (
        "image: anyres, anyres_max9, canvas, crop, library, longest_side, naflex, native, overlapping_tiles, pad, "
        "qwen2, resize, tiles"
    )
    assert images in lines and not any(line.startswith(("hydra:", "./")) for line in lines)
    (recipes,) = [line for line in lines if line.startswith("recipe: ")]
    assert "llava15_stage1, " in recipes and " own, " in recipes


def test_help_explains_modes_and_recipes() -> None:
    text = run_process("--help").stdout
    for mode in LITERALS["mode"]:
        assert f"mode={mode} " in text
    for part in ("schedule=", "size=tiny", "dry_run=true", "llava15_stage1", "easyvqa", "--config-dir"):
        assert part in text
