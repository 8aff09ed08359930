"""Components under their old names: run folders of earlier versions load, other places are told the new name."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import json
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from vlm_train.check.check import check_config
from vlm_train.config import moved_targets
from vlm_train.config.compose import compose_tiny
from vlm_train.config.run_file import load_config, save_config
from vlm_train.config.run_identity import run_id
from vlm_train.data.order.lengths import hash_content
from vlm_train.data.order.mixture import Mixture, Share
from vlm_train.errors import ConfigError

OLD = "vlm_train.models.prefix.PrefixVLM"
OLD_RUNS = sorted((Path(__file__).parent / "old_runs").glob("*.yaml"))


def test_every_old_name_leads_to_a_module_that_is_there() -> None:
    table = yaml.safe_load(Path(moved_targets.__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    assert len(table) > 30
    for old, new in table.items():
        module, _, name = new.rpartition(".")
        found = hasattr(importlib.import_module(module), name) or importlib.util.find_spec(new)
        assert found, f"{old} -> {new}"


def test_a_run_of_an_earlier_version_loads(tmp_path: Path) -> None:
    cfg = compose_tiny("recipe=llava15_stage1")
    now = cfg.model._target_
    cfg.model._target_ = OLD
    save_config(cfg, tmp_path / "config.yaml")
    loaded = load_config(tmp_path / "config.yaml")
    assert OLD in (tmp_path / "config.yaml").read_text(encoding="utf-8") and loaded.model._target_ == now
    cfg.model._target_ = now
    assert loaded == cfg and OmegaConf.is_interpolation(loaded.paths, "data") == OmegaConf.is_interpolation(
        cfg.paths, "data"
    )


def test_an_old_name_elsewhere_is_answered_with_the_new_one() -> None:
    cfg = compose_tiny("recipe=llava15_stage1", f"model._target_={OLD}")
    with pytest.raises(ConfigError) as error:
        check_config(cfg, need_assets=False)
    (line,) = [line for line in error.value.problems if OLD in line]
    assert line == f"model._target_: got {OLD}, which is now {compose_tiny('recipe=llava15_stage1').model._target_}."


TEXT = "vlm_train.models.llms.blip_text."
STAGE_1 = "vlm_train.models.families.blip2_qformer."


@pytest.mark.parametrize(
    ("old", "now"),
    [
        ("vlm_train.models.med.Med", f"{TEXT}BlipTextModel"),
        (f"{TEXT}Med", f"{TEXT}BlipTextModel"),
        ("vlm_train.models.align.Aligner", f"{STAGE_1}Blip2QFormerModel"),
        (f"{STAGE_1}Aligner", f"{STAGE_1}Blip2QFormerModel"),
    ],
)
def test_a_renamed_component_is_found_from_every_module_that_it_was_in(old: str, now: str) -> None:
    assert moved_targets.moved_target(old) == now


@pytest.mark.parametrize("file", OLD_RUNS, ids=lambda file: file.stem)
def test_a_run_keeps_the_id_that_it_had_before_modules_components_and_keys_were_renamed(file: Path) -> None:
    """The files are configurations as an earlier version saved them, called what it called the runs."""
    assert "vlm_train.optim.adamw" in file.read_text(encoding="utf-8")
    assert run_id(load_config(file)) == file.stem


def test_a_moved_module_changes_no_hash_of_an_order() -> None:
    order = Mixture(sources=(Share(size=12, shards=(0, 5, 10)),), seed=42)
    share = ["vlm_train.data.mixture", "Share", dataclasses.asdict(order.sources[0])]
    fields = {**dataclasses.asdict(order), "sources": [share]}
    text = json.dumps([["vlm_train.data.mixture", "Mixture", fields]], sort_keys=True)
    assert hash_content(order) == hashlib.sha256(text.encode()).hexdigest()


def test_a_name_that_never_was_stays() -> None:
    assert moved_targets.moved_target("vlm_train.models.nothing.Here") is None and moved_targets.moved_target(3) is None
