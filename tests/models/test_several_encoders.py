"""Two encoders of other sizes and means in one model: built, trained, resumed, planned, each with its own settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from tests.support.small_run import make_data, picture
from vlm_train.build import build_assembly
from vlm_train.check.check import check_config
from vlm_train.config import compose as config_compose
from vlm_train.config.run_file import save_config
from vlm_train.config.run_identity import run_dir
from vlm_train.contracts.layout import MediaSize
from vlm_train.dryrun.report import dry_run
from vlm_train.errors import ConfigError
from vlm_train.runs.folder import RunFolder
from vlm_train.training.fit import fit_run

RECIPE = """# @package _global_
defaults:
  - llava15_stage1
  - /vision@vision.clip: clip_vit_l14
  - /vision@vision.siglip: siglip_so400m_384
  - /connector@connector.clip: mlp2x_gelu
  - /connector@connector.siglip: linear
  - /image@image.clip: resize
  - /image@image.siglip: pad
  - override /vision: null
  - override /connector: null
  - override /image: null
recipe_name: two_encoders
init_from: []
model: {_target_: tests.models.mixture.TokenMixture}
params:
  rules:
    - {match: 'vision\\.clip\\..*', lr: null}
    - {match: 'vision\\.siglip\\..*', lr: 1e-3}
    - {match: 'connector\\..*', lr: 1e-2}
    - {match: '.*', lr: 2e-3}
"""
SMALL = ["size=tiny", "vision.siglip.config.image_size=48", "vision.siglip.layer=-1", "vision.clip.layer=-2"]
STEPS = ["batch.micro=2", "trainer.max_steps=2", "trainer.save_every=1", "trainer.keep_last=9", "trainer.threads=1"]
STEPS += ["allow_targets=[tests.models.mixture.]", "trainer.val_every=null", "eval=none", "data.shuffle=none"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    (folder / "recipe").mkdir()
    (folder / "recipe" / "two_encoders.yaml").write_text(RECIPE)
    make_data(folder / "data")
    return folder


def compose(folder: Path, *overrides: str, runs: str = "runs") -> Any:
    where = [f"paths.data={folder / 'data'}", f"paths.runs={folder / runs}", "run_name=two"]
    cfg = config_compose.compose_config(["recipe=two_encoders", *SMALL, *STEPS, *where, *overrides], [folder])
    check_config(cfg, need_assets=False)
    return cfg


def test_every_encoder_has_its_own_size_mean_and_width(folder: Path) -> None:
    built = build_assembly(compose(folder))
    model: Any = built.model
    assert list(model.vision) == list(model.connector) == list(built.processor.images) == ["clip", "siglip"]
    plans: Any = built.processor.images
    assert (plans["clip"].size, plans["siglip"].size) == ((32, 32), (48, 48))
    assert plans["clip"].fill != plans["siglip"].fill  # the mean colour that pads
    views = built.processor.make_views([picture(0)])
    assert [views[name][0].values.shape for name in views] == [(1, 3, 32, 32), (1, 3, 48, 48)]
    pieces = built.processor.layout([MediaSize(width=40, height=30)])
    assert [piece.count for item in pieces for piece in item] == [16 + 36]  # 4 x 4 and 6 x 6 patches


def test_an_encoder_does_not_change_with_its_neighbors(folder: Path) -> None:
    """Random weights come from the seed and the encoder's name."""
    one, two = (
        build_assembly(compose(folder)).model,
        build_assembly(compose(folder, "vision.siglip.config.image_size=64")).model,
    )
    assert all(map(torch.equal, one.vision["clip"].parameters(), two.vision["clip"].parameters()))


def train_run(cfg: Any) -> Path:
    folder = run_dir(cfg)
    save_config(cfg, RunFolder(folder).config)
    fit_run(cfg)
    return folder


def weights_of(run: Path, step: int = 2) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "weights.safetensors")


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """A run of two steps that nothing interrupted."""
    return train_run(compose(folder))


def test_every_encoder_learns_as_its_rule_says(folder: Path, whole: Path) -> None:
    before, after = dict(build_assembly(compose(folder)).model.named_parameters()), weights_of(whole)
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    for part in ("vision.siglip.", "connector.clip.", "connector.siglip.", "llm."):
        assert any(name.startswith(part) for name in moved), part
    assert not any(name.startswith("vision.clip.") for name in after), "frozen, so not saved"
    rates = {(row["name"], row["lr"]) for row in json.loads((whole / "params.json").read_text())}
    assert {("vision.clip", None), ("vision.siglip", 1e-3), ("connector.clip", 1e-2), ("llm", 2e-3)} <= rates
    assert ("vision.clip", 1e-3) not in rates


def test_it_resumes_exactly(folder: Path, whole: Path) -> None:
    run = folder / "resumed" / "two"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "step-00000002")
    (run / "run.json").unlink()  # it says that the run is done
    assert train_run(compose(folder, runs="resumed")) == run
    mine, theirs = weights_of(run), weights_of(whole)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_its_dry_run_tells_encoders_apart(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = dry_run(compose(folder))
    assert plan["visual_tokens"] == 16 + 36
    assert {"vision.clip", "vision.siglip", "connector.clip", "connector.siglip", "llm"} <= plan["parameters"].keys()
    assert "vision.siglip" in capsys.readouterr().out


def test_a_connector_of_one_encoder_behind_two_is_refused(folder: Path) -> None:
    cfg = compose(folder)
    cfg.connector = OmegaConf.create({"_target_": "vlm_train.models.connectors.mlp.MLP"})
    with pytest.raises(ConfigError, match="takes the features of one encoder, but vision has clip, siglip"):
        build_assembly(cfg)


def test_a_family_has_to_say_where_several_encoders_stand(folder: Path) -> None:
    more = ["model._target_=vlm_train.models.families.prefix_vlm.PrefixVLM"]
    with pytest.raises(ConfigError, match="several vision encoders: clip, siglip"):
        build_assembly(compose(folder, *more))
