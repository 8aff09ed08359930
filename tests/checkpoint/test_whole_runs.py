"""A run that another one starts from stands for the whole model it trained with; a part that nothing fills is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.small_run import command, make_data, train
from vlm_train import cli
from vlm_train.build import build_model, build_tokenizer
from vlm_train.checkpoint.files import hash_manifest
from vlm_train.checkpoint.resume import newest_valid
from vlm_train.checkpoint.weights import load_run_weights, weights_file
from vlm_train.config.compose import compose_config
from vlm_train.errors import CheckpointError, ConfigError
from vlm_train.training.prepare_models import prepare_models

REFUSE = "trainer.guard.random_frozen=refuse"
SHORT = ["trainer.max_steps=1", "trainer.save_every=1", "trainer.export=false"]
FIRST = "vision.model.encoder.layers.0.mlp.fc1.weight"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tower`, whose vision learned, and `middle`, which kept that vision frozen."""
    runs = tmp_path_factory.mktemp("runs")
    train(command(data, runs, *SHORT, "params=all", "seed=5", "optim.lr=0.1", name="tower"))
    train(command(data, runs, *SHORT, REFUSE, f"init_from=[{{run: {runs / 'tower'}, parts: [vision]}}]", name="middle"))
    return runs


def start(data: Path, runs: Path, source: str | Path, *more: str, resumed: Any = None) -> Any:
    cfg = compose_config(command(data, runs, *SHORT, "seed=77", f"init_from=[{{run: {source}}}]", *more))
    return prepare_models(cfg, resumed, shares=False, to_bf16=False)


def vision_of(run: Path) -> dict[str, torch.Tensor]:
    return {n: t for n, t in load_file(weights_file(run)).items() if n.startswith("vision.")}


@pytest.mark.parametrize("which", ["run", "checkpoint"])
def test_a_run_brings_what_it_kept_frozen(which: str, data: Path, runs: Path) -> None:
    source = runs / "middle" if which == "run" else weights_file(runs / "middle").parent
    models = start(data, runs, source)
    own = dict(models.assembly.model.named_parameters())
    tower, middle = vision_of(runs / "tower"), load_file(weights_file(runs / "middle"))
    assert tower and all(torch.equal(own[name], tensor) for name, tensor in tower.items())
    assert not vision_of(runs / "middle") and all(torch.equal(own[name], tensor) for name, tensor in middle.items())
    assert models.handed.filled >= tower.keys() | middle.keys()


def test_a_chain_of_runs_trains_and_is_evaluated_with_the_first_tower(data: Path, runs: Path, tmp_path: Path) -> None:
    overrides = command(
        data, tmp_path, *SHORT, REFUSE, "seed=77", f"init_from=[{{run: {runs / 'middle'}}}]", name="end"
    )
    run, cfg = train(overrides), compose_config(overrides)
    model = build_model(cfg, build_tokenizer(cfg))
    load_run_weights(model, cfg.init_from, run)
    own = dict(model.named_parameters())
    assert all(torch.equal(own[name], tensor) for name, tensor in vision_of(runs / "tower").items())


def test_a_run_from_before_goes_on_with_what_it_began_with(data: Path, runs: Path, tmp_path: Path) -> None:
    """Then a run gave only what it had learned, and the frozen tower stayed random."""
    more = [*SHORT, "seed=77", f"init_from=[{{run: {runs / 'middle'}}}]"]
    run = train(command(data, tmp_path, *more))
    path = run / "checkpoints/step-00000001/manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest.pop("whole_runs") is True
    path.write_text(json.dumps(manifest | {"sha256": hash_manifest(manifest)}))
    models = start(data, tmp_path, runs / "middle", resumed=newest_valid(run / "checkpoints"))
    assert not torch.equal(models.assembly.model.get_parameter(FIRST), vision_of(runs / "tower")[FIRST])
    (run / "run.json").unlink()  # it is not done
    train(command(data, tmp_path, *more, REFUSE, "trainer.max_steps=2"))  # warned, not refused
    last = json.loads((run / "checkpoints/step-00000002/manifest.json").read_text())
    assert last["whole_runs"] is False


def test_a_chain_that_broke_is_said(data: Path, runs: Path, tmp_path: Path) -> None:
    middle = Path(shutil.copytree(runs / "middle", tmp_path / "middle"))
    (middle / "config.yaml").rename(tmp_path / "config.yaml")
    with pytest.raises(CheckpointError, match=r"kept vision frozen.*config\.yaml.* missing.*parts: \["):
        start(data, tmp_path, middle)
    text = (tmp_path / "config.yaml").read_text()
    (middle / "config.yaml").write_text(text.replace(str(runs / "tower"), str(tmp_path / "gone")))
    with pytest.raises(CheckpointError, match=r"middle kept parts frozen that it had from another run: .*gone"):
        start(data, tmp_path, middle)
    (middle / "config.yaml").write_text(text.replace(str(runs / "tower"), str(middle)))
    with pytest.raises(CheckpointError, match="holds no vision"):
        start(data, tmp_path, middle)


def test_frozen_weights_of_a_file_are_asked_for(data: Path, tmp_path: Path) -> None:
    cfg = compose_config(command(data, tmp_path))
    tower = build_model(cfg, build_tokenizer(cfg)).vision
    tower.model.save_pretrained(tmp_path / "clip")  # type: ignore[union-attr,operator]
    weights = f"vision.weights={tmp_path / 'clip'}"
    run = train(command(data, tmp_path, *SHORT, REFUSE, weights))
    with pytest.raises(CheckpointError, match=r"kept vision frozen, as .*clip has it.* vision\.weights=\S*clip,"):
        start(data, tmp_path, run)
    models = start(data, tmp_path, run, weights)
    assert FIRST in models.handed.filled
    assert torch.equal(models.assembly.model.get_parameter(FIRST), tower.get_parameter(FIRST.removeprefix("vision.")))
    (run / "config.yaml").unlink()  # not needed where every frozen part has weights
    assert FIRST in start(data, tmp_path, run, weights).handed.filled


def test_a_frozen_part_that_nothing_fills_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^vision: frozen by params\.rules, but its [\d,]+ numbers are random"
    ) as told:
        train(command(data, tmp_path, REFUSE))
    assert len(told.value.problems) == 1 and "parts: [vision]" in str(told.value)
    adapted = [REFUSE, "peft=lora", r"params.rules=[{match: '.*\.lora_.*', lr: 1e-3}, {match: '.*', lr: null}]"]
    with pytest.raises(ConfigError) as told:
        train(command(data, tmp_path, *adapted, name="lora"))
    assert [problem.partition(":")[0] for problem in told.value.problems] == ["vision", "connector", "llm"]


def test_what_learns_may_begin_at_random(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(command(data, tmp_path, *SHORT, REFUSE, "params=all"))
    assert "numbers are random" not in capsys.readouterr().out


def test_small_copies_are_only_warned(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(command(data, tmp_path, *SHORT))
    assert "warning: vision: frozen" in capsys.readouterr().out
    train(command(data, tmp_path, *SHORT, "trainer.guard.random_frozen=allow", name="allowed"))
    assert "numbers are random" not in capsys.readouterr().out


def test_the_command_line_says_it_without_a_traceback(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command(data, tmp_path, REFUSE)) == 2
    said = capsys.readouterr().err
    assert "trainer.guard.random_frozen=allow" in said and "Traceback" not in said


def test_a_dry_run_says_it_too(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note = "vision is frozen, and neither vision.weights nor init_from fills it: a run refuses that"
    assert cli.main(command(data, tmp_path, "dry_run=true", REFUSE)) == 0
    assert note in capsys.readouterr().out
    for filled in ("init_from=[{run: ???, parts: [vision]}]", "init_from=[{run: ???}]", "vision.weights=???"):
        assert cli.main(command(data, tmp_path, "dry_run=true", REFUSE, filled)) == 0
        assert note not in capsys.readouterr().out
