"""Keys under their old names: run folders of earlier versions load, other places are told the new name."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from vlm_train.check.check import check_config
from vlm_train.check.hydra_errors import explain_errors, unknown_key
from vlm_train.config import renamed_keys
from vlm_train.config.compose import compose_config, compose_tiny
from vlm_train.config.moved_targets import restore_first_targets
from vlm_train.config.renamed_keys import RenamedKey, find_renamed_key, rename_keys, restore_first_names
from vlm_train.config.run_file import load_config, save_config
from vlm_train.config.run_identity import training_config, training_hash
from vlm_train.errors import ConfigError

AUGMENTED = ("recipe=blip_base", "size=tiny")


def test_every_new_name_is_a_key_of_today() -> None:
    """A key that was renamed twice has two rows, both with the newest name."""
    for old, key in renamed_keys._table().items():
        assert find_renamed_key(key.now) is None, f"{old} -> {key.now}, which is an old key itself"


def test_an_old_key_is_answered_with_the_new_one(tmp_path: Path) -> None:
    said = "image.draft: it is image.jpeg_draft now."
    assert unknown_key("image.draft", [], []) == said
    clip = "trainer.clip_norm: it is trainer.max_grad_norm now."
    with pytest.raises(Exception, match="clip_norm") as error:
        compose_config(["recipe=llava15_stage1", "trainer.clip_norm=1"])
    assert explain_errors(["recipe=llava15_stage1", "trainer.clip_norm=1"], [], error.value) == [clip]
    with pytest.raises(Exception, match="Could not override 'image.draft'") as error:
        compose_config(["recipe=llava15_stage1", "image.draft=true"])
    assert explain_errors(["recipe=llava15_stage1", "image.draft=true"], [], error.value) == [said]
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("# @package _global_\nimage: {draft: true, augment: [2, 5]}\n")
    with pytest.raises(ConfigError) as problems:
        check_config(compose_config(["recipe=mine", "size=tiny"], [tmp_path]), need_assets=False)
    assert said in problems.value.problems and (
        "image.augment: it is image.rand_augment now, with {num_ops: ..., magnitude: ...} in place of a list."
        in problems.value.problems
    )
    assert len(problems.value.problems) == 2


def test_an_old_option_is_answered_with_the_new_one(tmp_path: Path) -> None:
    said = "model=align: it is model=blip2_stage1 now."
    with pytest.raises(Exception, match="align") as error:
        compose_config(["recipe=easyvqa_blip2_stage1", "model=align"])
    assert explain_errors(["recipe=easyvqa_blip2_stage1", "model=align"], [], error.value) == [said]
    (tmp_path / "recipe").mkdir()
    recipe = tmp_path / "recipe" / "mine.yaml"
    recipe.write_text("# @package _global_\ndefaults:\n  - override /model: align\n")
    with pytest.raises(Exception, match="align") as error:
        compose_config(["recipe=mine"], [tmp_path])
    assert explain_errors(["recipe=mine"], [tmp_path], error.value) == [f"{recipe}: {said}"]


@pytest.mark.parametrize(
    ("old", "now"),
    [("batch.normalise", "batch.normalize"), ("peft.quantise_match", "peft.quantize_match")],
)
def test_british_spellings_are_answered_with_the_american_ones(old: str, now: str) -> None:
    assert unknown_key(old, ["peft=qlora"], []) == f"{old}: it is {now} now."


def test_an_old_key_of_a_named_component_is_answered_too() -> None:
    assert unknown_key("image.clip.draft", [], []) == "image.clip.draft: it is image.clip.jpeg_draft now."


def test_a_run_of_an_earlier_version_loads_and_keeps_its_id(tmp_path: Path) -> None:
    cfg = compose_config(AUGMENTED)
    old = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(old, dict)
    image = old["image"]
    image["area"] = image.pop("random_resized_crop")
    image["draft"] = image.pop("jpeg_draft")
    image["augment"] = list(image.pop("rand_augment").values())
    old["trainer"]["clip_norm"] = old["trainer"].pop("max_grad_norm")
    old["batch"]["normalise"] = old["batch"].pop("normalize")
    assert image["augment"] == [2, 5]
    OmegaConf.save(OmegaConf.create(old), tmp_path / "config.yaml")
    loaded = load_config(tmp_path / "config.yaml")
    assert loaded == cfg and training_hash(loaded) == training_hash(cfg)


def test_first_names_are_those_of_earlier_versions() -> None:
    cfg: dict[str, Any] = {
        "image": {"rand_augment": {"num_ops": 2, "magnitude": 5}, "a": {"jpeg_draft": True}},
        "data": {"pack_patches": 4},
    }
    restore_first_names(cfg)
    assert cfg == {"image": {"augment": [2, 5], "a": {"draft": True}}, "data": {"pack_patches": 4}}
    rename_keys(cfg)
    assert cfg["image"] == {"rand_augment": {"num_ops": 2, "magnitude": 5}, "a": {"jpeg_draft": True}}


def test_a_run_keeps_the_id_that_it_had_before_a_renaming() -> None:
    cfg = compose_config(AUGMENTED)
    plain = training_config(cfg)
    plain["image"] |= {"area": plain["image"].pop("random_resized_crop"), "draft": plain["image"].pop("jpeg_draft")}
    plain["image"]["augment"] = list(plain["image"].pop("rand_augment").values())
    plain["trainer"]["clip_norm"] = plain["trainer"].pop("max_grad_norm")
    plain["batch"]["normalise"] = plain["batch"].pop("normalize")
    for old, new in {"group": "group_by", "pool": "shuffle_buffer_shards", "window": "block_samples"}.items():
        plain["data"][old] = plain["data"].pop(new)
    plain["data"]["pack_views"] = plain["data"].pop("pack_patches")
    text = json.dumps(restore_first_targets(plain), sort_keys=True)
    assert training_hash(cfg) == hashlib.sha256(text.encode()).hexdigest()[:8]


def test_a_saved_key_whose_value_means_something_else_is_refused(tmp_path: Path) -> None:
    cfg = compose_tiny("recipe=llava15_stage1")
    save_config(cfg, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text(encoding="utf-8")
    (tmp_path / "config.yaml").write_text(text.replace("pack_patches: null", "pack_views: 8"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"config\.yaml: data\.pack_views: it is data\.pack_patches now: views times"):
        load_config(tmp_path / "config.yaml")


def test_what_refers_to_an_old_key_refers_to_the_new_one_in_a_saved_run_and_is_told_it_elsewhere(
    tmp_path: Path,
) -> None:
    cfg = compose_tiny("recipe=llava15_stage1", "optim.lr=${trainer.max_grad_norm}", "seed=${batch.micro}")
    cfg.params.rules[0].lr = "${trainer.max_grad_norm}"
    old = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(old, dict)
    old["trainer"]["clip_norm"] = old["trainer"].pop("max_grad_norm")
    old["optim"]["lr"] = old["params"]["rules"][0]["lr"] = "${trainer.clip_norm}"
    OmegaConf.save(OmegaConf.create(old), tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == cfg
    with pytest.raises(ConfigError) as error:
        check_config(compose_tiny("recipe=llava15_stage1", "optim.lr=${trainer.clip_norm}"), need_assets=False)
    assert "optim.lr: trainer.clip_norm: it is trainer.max_grad_norm now." in error.value.problems


def test_an_option_that_still_has_the_name_of_an_old_key_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renamed_keys, "_table", lambda: {"image.flip": RenamedKey("image.mirror")})
    ours = {"image": {"_target_": "vlm_train.data.images.transform.ImageTransform", "flip": True}}
    rename_keys(ours)
    assert "flip" in ours["image"]
    gone = {"image": {"_target_": "vlm_train.data.images.transform.ImageTransform", "flop": True}}
    monkeypatch.setattr(renamed_keys, "_table", lambda: {"image.flop": RenamedKey("image.mirror")})
    rename_keys(gone)
    assert "mirror" in gone["image"] and "flop" not in gone["image"]


def test_options_of_another_package_were_never_renamed() -> None:
    theirs: dict[str, Any] = {"connector": {"_target_": "somewhere.Else", "dim": 8, "inner": {"layers": 2}}}
    theirs["llm"] = {"width": "${connector.dim}"}
    kept = copy.deepcopy(theirs)
    rename_keys(theirs)
    assert theirs == kept
    theirs["connector"] |= {"hidden_size": 4, "inner": {"num_hidden_layers": 2}}
    kept = copy.deepcopy(theirs)
    restore_first_names(theirs)
    assert theirs == kept


def test_a_run_with_a_q_former_of_before_loads_and_keeps_its_id(tmp_path: Path) -> None:
    cfg = compose_config(["recipe=easyvqa_blip2_stage1"])
    old = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(old, dict)
    for now, before in (
        ("num_query_tokens", "queries"),
        ("hidden_size", "dim"),
        ("num_hidden_layers", "layers"),
        ("num_attention_heads", "heads"),
        ("intermediate_size", "ffn"),
        ("cross_attention_frequency", "cross_every"),
    ):
        old["connector"][before] = old["connector"].pop(now)
        assert unknown_key(f"connector.{before}", [], []) == f"connector.{before}: it is connector.{now} now."
    OmegaConf.save(OmegaConf.create(old), tmp_path / "config.yaml")
    loaded = load_config(tmp_path / "config.yaml")
    assert loaded == cfg and training_hash(loaded) == training_hash(cfg)
    plain = training_config(cfg)
    restore_first_names(plain)
    assert plain["connector"]["queries"] == 8 and "hidden_size" not in plain["connector"]


def test_a_key_that_came_later_leaves_the_id_of_runs_that_do_not_use_it() -> None:
    cfg = compose_tiny("recipe=llava15_stage1")
    plain = training_config(cfg)
    assert "lr" in plain["params"]["rules"][0] and "min_ratio" in plain["lr_schedule"]
    assert not {"frozen_mode", "decay_norms_and_biases"} & {key for rule in plain["params"]["rules"] for key in rule}
    assert not {"start_ratio", "warmup_counts"} & set(plain["lr_schedule"])
    for change in ("lr_schedule.warmup_counts=true", "lr_schedule.start_ratio=0.01"):
        assert training_hash(compose_tiny("recipe=llava15_stage1", change)) != training_hash(cfg)
    cfg.params.rules[1].frozen_mode = "train"
    assert training_config(cfg)["params"]["rules"][1]["frozen_mode"] == "train"


@pytest.mark.parametrize(("key", "other"), [("vision.attention", "flex"), ("vision.init_std", 0.1)])
def test_keys_of_an_encoder_that_came_later_leave_ids_alone(key: str, other: Any) -> None:
    cfg = compose_tiny("recipe=qwen25_vl_3b")
    assert key.split(".")[1] in cfg.vision and key.split(".")[1] not in training_config(cfg)["vision"]
    assert training_hash(compose_tiny("recipe=qwen25_vl_3b", f"{key}={other}")) != training_hash(cfg)
