"""Composition, run identity, origins of values."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.support.components import options
from tests.support.slow import run_few
from vlm_train.config import origins
from vlm_train.config.compose import compose_config, compose_tiny, describe_replaced_data
from vlm_train.config.folders import config_dir
from vlm_train.config.run_file import load_config, save_config
from vlm_train.config.run_identity import run_dir, run_id, training_hash
from vlm_train.config.size import SIZED_GROUPS, TINY
from vlm_train.errors import ConfigError

RECIPE = "recipe=llava15_stage1"


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A user's own configuration folder with one recipe."""
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /optim: adamw\noptim: {lr: 0.5}\nbatch: {samples: 7}\n"
    )
    return tmp_path


def test_recipe_beats_default_and_command_line_beats_recipe(mine: Path) -> None:
    assert compose_config(["recipe=mine"], [mine]).batch.samples == 7
    assert compose_config(["recipe=mine", "batch.samples=9"], [mine]).batch.samples == 9


def test_group_choice_keeps_the_recipes_values_on_top(mine: Path) -> None:
    cfg = compose_config(["recipe=mine", "optim=sgd"], [mine])
    assert cfg.optim._target_.endswith("sgd") and cfg.optim.lr == 0.5


def test_recipe_name_is_derived_from_the_choice(mine: Path) -> None:
    assert compose_config(["recipe=mine"], [mine]).recipe_name == "mine"
    assert compose_config([]).recipe_name == "custom"


def test_run_id_ignores_what_does_not_change_the_weights(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = run_id(compose_config(["recipe=mine"], [mine]))
    assert base.startswith("mine-") and len(base) == len("mine-") + 8
    neutral = ("paths.runs=elsewhere", "paths.data=/data", "trainer.log_every=3", "launch.devices=2", "mode=show")
    for same in (*neutral, "image.decode=simplejpeg", "data.pack=4096", "batch.micro=2"):
        assert run_id(compose_config(["recipe=mine", same], [mine])) == base, same
    monkeypatch.chdir(mine)
    assert run_id(compose_config(["recipe=mine"], [mine])) == base
    for other in ("seed=1", "optim.lr=0.25", "batch.samples=8", "trainer.max_steps=3", "vision.layer=-1"):
        assert run_id(compose_config(["recipe=mine", other], [mine])) != base, other
    budget = ["recipe=mine", "batch.samples=null", "batch.tokens=8192"]  # rows decide what fits into a step
    ids = {run_id(compose_config([*budget, f"data.pack={pack}"], [mine])) for pack in (4096, 8192)}
    assert len(ids) == 2


def test_a_run_keeps_the_id_that_named_its_rows(mine: Path, tmp_path: Path) -> None:
    cfg = compose_config(["recipe=mine", "data.pack=4096", f"paths.runs={tmp_path}"], [mine])
    named = f"mine-{training_hash(cfg, with_packing=True)}"
    assert run_id(cfg) != named
    (tmp_path / named).mkdir()
    assert run_id(cfg) == named


def test_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = compose_config(["run_name=first"])
    monkeypatch.chdir("/")
    assert run_dir(cfg) == tmp_path / "runs" / "first"


def test_saved_config_keeps_interpolations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "hunter2")
    cfg = compose_config(["vision.weights=${oc.env:A_SECRET}"])
    save_config(cfg, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    assert "hunter2" not in text
    assert load_config(tmp_path / "config.yaml").vision.weights == "hunter2"


def test_loaded_config_refuses_unknown_keys(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("trainer: {max_stepz: 3}\n")
    with pytest.raises(ConfigError, match="max_stepz"):
        load_config(tmp_path / "config.yaml")


def test_size_tiny_wins_over_the_recipe() -> None:
    full, small = compose_config([RECIPE]), compose_tiny(RECIPE)
    assert small.vision.config.hidden_size < full.vision.config.hidden_size
    assert small.vision.weights is None and small.llm.weights is None
    assert small.trainer.max_steps == 4 and small.batch.samples == 4
    assert compose_config([RECIPE, "size=tiny", "batch.samples=6"]).batch.samples == 6


def test_size_tiny_says_whose_data_it_replaces(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    own = "data: {train: [{shards: mine}], max_length: 9}"
    text = f"# @package _global_\ndefaults:\n  - llava15_stage1\n  - _self_\n{own}\n"
    (tmp_path / "recipe" / "mine.yaml").write_text(text)
    words = ["recipe=mine", "size=tiny"]
    assert compose_config(words, [tmp_path]).data.train[0].shards.endswith("/tiny/train")
    said = describe_replaced_data(words, [tmp_path])
    assert said is not None and "made pictures take the place of the recipe's own data.train;" in said
    for quiet in (["recipe=mine"], [*words, "data.train=[{shards: x}]"], ["recipe=llava15_stage1", "size=tiny"]):
        assert describe_replaced_data(quiet, [tmp_path]) is None


def test_size_tiny_drops_what_a_recipe_says_about_exchanged_parts() -> None:
    small = compose_tiny("recipe=easyvqa_lm")
    assert "shards" not in small.tokenizer
    assert small.vision is None


def test_size_tiny_lays_a_components_own_block_over_it() -> None:
    encoder_decoder = compose_tiny(RECIPE, "llm=flant5_xl").llm
    assert encoder_decoder.config.d_model == 64 and encoder_decoder.config.num_layers == 2
    assert encoder_decoder.config.feed_forward_proj == "gated-gelu" and encoder_decoder.weights is None
    assert not {"hidden_size", "num_key_value_heads"} & set(encoder_decoder.config)
    decoder = compose_tiny(RECIPE).llm
    assert decoder.config.hidden_size == 64 and not {"d_model", "num_heads"} & set(decoder.config)
    assert compose_tiny(RECIPE, "llm=flant5_xl", "llm.config.d_model=32").llm.config.d_model == 32
    assert compose_tiny(RECIPE, "llm.tiny.config.hidden_size=32").llm.config.hidden_size == 32


@pytest.mark.parametrize(
    "group", run_few([group for group in SIZED_GROUPS if group != "parts"], ("connector", "vision"))
)
def test_every_component_says_how_it_becomes_small(group: str) -> None:
    for option in options(group):
        full, small = (compose_config([f"{group}={option}", *more]) for more in ([], ["size=tiny"]))
        assert TINY not in full[group] and TINY not in small[group], option


def test_a_component_without_a_block_is_refused_under_size_tiny(tmp_path: Path) -> None:
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "own.yaml").write_text("config: {model_type: x, hidden_size: 8}\n_target_: x\n")
    assert compose_config([RECIPE, "llm=own"], [tmp_path]).llm.config.hidden_size == 8
    with pytest.raises(ConfigError, match=r"size=tiny: llm=own has no `tiny:` block\. Add one to its file"):
        compose_config([RECIPE, "llm=own", "size=tiny"], [tmp_path])
    (tmp_path / "llm" / "own.yaml").write_text(
        "config: {hidden_size: 8}\n_target_: x\ntiny: {config: {hidden_size: 2}}\n"
    )
    assert compose_config([RECIPE, "llm=own", "size=tiny"], [tmp_path]).llm.config.hidden_size == 2


def test_blocks_of_components_inside_a_component_count_too(tmp_path: Path) -> None:
    (tmp_path / "vision").mkdir()
    lines = ["defaults:", "  - /vision@first: clip_vit_l14", "  - /vision@second: siglip_so400m_384", "_target_: x"]
    (tmp_path / "vision" / "two.yaml").write_text("\n".join(lines) + "\n")
    small = compose_config([RECIPE, "vision=two", "size=tiny", "vision.second.layer=3"], [tmp_path]).vision
    assert [small[name].config.hidden_size for name in ("first", "second")] == [32, 32]
    assert small.second.layer == 3 and small.first.weights is None and TINY not in small.second
    assert compose_config([RECIPE, "vision=two"], [tmp_path]).vision.second.config.hidden_size == 1152


def test_every_member_of_a_part_needs_a_block(tmp_path: Path) -> None:
    (tmp_path / "vision").mkdir()
    (tmp_path / "vision" / "own.yaml").write_text("_target_: x\n")
    two = [RECIPE, "+vision@vision.a=vit_small", "+vision@vision.b=own", "~vision"]
    with pytest.raises(ConfigError, match=r"size=tiny: vision\.b has no `tiny:` block"):
        compose_config([*two, "size=tiny"], [tmp_path])
    (tmp_path / "vision" / "own.yaml").write_text("_target_: x\ntiny: {}\n")
    assert list(compose_config([*two, "size=tiny"], [tmp_path]).vision) == ["a", "b"]


def test_size_tiny_gives_an_instruction_only_where_there_is_one() -> None:
    assert compose_tiny(RECIPE).instruction is None
    small = compose_tiny(RECIPE, "instruction=bert").instruction
    assert small.tokenizer is None and small.max_length == 128


def test_command_line_wins_over_size_tiny_and_the_recipe_loses(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("# @package _global_\ntokenizer: {add: [recipe]}\n")
    line = ["recipe=mine", "size=tiny"]
    assert compose_config(line, [tmp_path]).tokenizer.add == []
    assert compose_config([*line, "tokenizer.add=['<img>']"], [tmp_path]).tokenizer.add == ["<img>"]
    assert compose_config([*line, "+tokenizer.extra=3"], [tmp_path]).tokenizer.extra == 3
    kept = compose_config([*line, "tokenizer=words", "tokenizer.tiny=null", "tokenizer.min_count=2"], [tmp_path])
    assert kept.tokenizer.min_count == 2 and kept.tokenizer._target_.endswith("words_from_shards")
    with pytest.raises(ConfigError, match=r"tokenizer\.shards: tokenizer has no such option under size=tiny"):
        compose_config(["recipe=easyvqa_lm", "size=tiny", "tokenizer.shards=x"])


@pytest.mark.parametrize("line", ["defaults:\n  - override /hydra/launcher: basic", "hydra: {verbose: true}"])
def test_recipes_cannot_set_hydra(tmp_path: Path, line: str) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "bad.yaml").write_text(f"# @package _global_\n{line}\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml.*hydra"):
        compose_config(["recipe=bad"], [tmp_path])


def test_lost_mandatory_value_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "bad.yaml").write_text("# @package _global_\ninit_from: ???\n")
    with pytest.raises(ConfigError, match="init_from"):
        compose_config(["recipe=bad"], [tmp_path])


def test_origins_name_the_layer(mine: Path) -> None:
    overrides = ["recipe=mine", "seed=3", "image=pad", "size=tiny"]
    found = {key: str(origin) for key, origin in origins.find_origins(overrides, [mine]).items()}
    assert found["optim.lr"] == "recipe: mine"
    assert found["seed"] == "command line"
    assert found["image.mode"] == "command line (image/pad)"
    assert found["vision.config.hidden_size"] == "size: tiny"
    assert found["batch.samples"] == "size: tiny"
    assert found["vision.layer"] == "default: vision/clip_vit_l14_336.yaml"
    assert found["trainer.max_grad_norm"] == "default: vlm_train/config/schema.py"


def test_origins_cover_every_leaf(mine: Path) -> None:
    overrides = ["recipe=mine", "params.rules=[{match: '.*', lr: 1.0}]"]
    table = origins.format_origins(compose_config(overrides, [mine]), origins.find_origins(overrides, [mine]))
    rows = dict(line.split(maxsplit=1) for line in table.splitlines())
    assert set(rows) == set(origins.flatten_leaves(compose_config(overrides, [mine])))
    assert rows["params.rules"].endswith("command line")
    changed = origins.format_origins(
        compose_config(overrides, [mine]), origins.find_origins(overrides, [mine]), only_changed=True
    )
    keys = {line.split()[0] for line in changed.splitlines()}
    assert keys == {"batch.samples", "optim.lr", "params.rules", "recipe_name"}


def test_a_recipe_that_extends_another_has_its_own_name() -> None:
    assert compose_config(["recipe=llava15_qlora"]).recipe_name == "llava15_qlora"
    assert str(origins.find_origins(["recipe=llava15_qlora"])["recipe_name"]) == "recipe: llava15_qlora"


def test_what_no_training_run_reads_is_shown_last() -> None:
    rows = [line.split()[0] for line in origins.format_origins(compose_config([RECIPE]), {}).splitlines()]
    last = [row.split(".")[0] in origins.NOT_TRAINING for row in rows]
    assert last == sorted(last) and any(last) and "columns" not in rows[0]


def test_every_option_of_debug_launch_and_paths_composes() -> None:
    for group in ("debug", "launch", "paths", "size"):
        for path in (config_dir() / group).glob("*.yaml"):
            compose_config([f"{group}={path.stem}"])


def test_paths_are_pinned_to_the_launch_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = compose_config(["paths.data=shards"])
    assert cfg.paths.data == os.fspath(tmp_path / "shards")
    assert OmegaConf.select(cfg, "data.train.0.shards").startswith(os.fspath(tmp_path / "shards"))
