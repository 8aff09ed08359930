"""What goes wrong most often: one clear sentence on the command line, no traceback, nothing lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.small_run import command, make_data
from vlm_train import cli
from vlm_train.contracts.media import Features, Grid3
from vlm_train.models.connectors.pool import PooledMLP

TRUST = "allow_targets=[tests.]"
Case = Callable[[Path, Path, pytest.MonkeyPatch], list[str]]


def recipe_with(line: str) -> Case:
    """A user's recipe with one more line."""

    def case(data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        (folder / "mine" / "recipe").mkdir(parents=True)
        text = f"# @package _global_\ndefaults:\n  - easyvqa_stage2\n  - _self_\n{line}\n"
        (folder / "mine" / "recipe" / "mine.yaml").write_text(text)
        return ["--config-dir", str(folder / "mine"), "recipe=mine", *command(data, folder)[1:]]

    return case


def override(*more: str) -> Case:
    return lambda data, folder, monkeypatch: command(data, folder, *more)


def damaged_shard(data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    copy = Path(shutil.copytree(data, folder / "data"))
    next((copy / "tiny" / "train").glob("*.tar")).unlink()
    return command(copy, folder)


def lying_connector(data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    forward = PooledMLP.forward

    def lie(self: PooledMLP, features: Features) -> Features:
        tokens = forward(self, features).rectangular()[:, :-1]
        return Features.from_rectangular(tokens, Grid3(1, 1, tokens.shape[1]))

    monkeypatch.setattr(PooledMLP, "forward", lie)
    return command(data, folder, "connector=pool2x2_mlp")


def damaged_checkpoint(data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    assert cli.main(command(data, folder, "trainer.max_steps=2", name="first")) == 0
    (weights,) = (folder / "first").glob("checkpoints/*/weights.safetensors")
    weights.write_bytes(weights.read_bytes()[:-8])
    return command(data, folder, f"init_from=[{{run: {folder / 'first'}}}]")


def folder_of_another_run(data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    assert cli.main(command(data, folder, "trainer.max_steps=2")) == 0
    return command(data, folder, "optim.lr=0.5")


CASES: dict[str, tuple[Case, int, list[str]]] = {
    "unknown recipe": (override("recipe=easyvqa_stage3"), 2, ["easyvqa_stage3", "easyvqa_stage2"]),
    "misspelt key": (override("optim.lrr=1"), 2, ["optim.lrr", "optim.lr"]),
    "misspelt key in a recipe": (recipe_with("optim: {lrr: 1}"), 2, ["optim.lrr", "optim.lr"]),
    "misspelt group in a recipe": (recipe_with("trainr: {epochs: 1}"), 2, ["trainr", "trainer"]),
    "wrong type": (override("batch.samples=many"), 2, ["batch.samples", "many"]),
    "wrong type in a recipe": (recipe_with("optim: {lr: fast}"), 2, ["optim.lr", "fast"]),
    "number in place of a list": (override("data.train=5"), 2, ["data.train", "got 5"]),
    "mapping in place of a schedule": (lambda *_: ["schedule={a: 1}"], 2, ["schedule={a: 1}", "name of an option"]),
    "list in place of an option": (override("optim=[1]"), 2, ["optim=[1]", "name of an option"]),
    "negative width": (
        override("llm.config.intermediate_size=-5"),
        2,
        ["llm.config.intermediate_size: expected a number >= 1, got -5"],
    ),
    "activation of no name": (
        override("+llm.config.hidden_act=none"),
        2,
        ["llm: ", "HFCausalLM cannot be made", "config.hidden_act=none", "KeyError", "VLM_TRAIN_TRACEBACK"],
    ),
    "activation of no name, dry run": (
        override("dry_run=true", "+vision.config.hidden_act=none"),
        2,
        ["vision: ", "config.hidden_act=none", "KeyError", "activations.py"],
    ),
    "no configuration of a part": (override("llm.config=null"), 2, ["llm.config: expected Mapping", "got None"]),
    "no attention head": (
        override("dry_run=true", "vision.config.num_attention_heads=0"),
        2,
        ["vision.config.num_attention_heads: expected a number >= 1, got 0"],
    ),
    "patch larger than the picture": (
        override("vision.config.patch_size=64"),
        2,
        ["vision.config: image_size=(32, 32) holds no patch of patch_size=(64, 64)"],
    ),
    "key heads that do not divide the heads": (
        override("llm.config.num_key_value_heads=3"),
        2,
        ["llm.config.num_key_value_heads: got 3", "divisors of the 4 heads"],
    ),
    "pixels divided by zero": (override("vision.image_std=[0,0,0]"), 2, ["vision.image_std", "above 0"]),
    "a step that cannot be computed": (
        override("dry_run=true", "connector=linear", "connector._target_=tests.contract.broken.Raises", TRUST),
        2,
        ["model: no step can be computed", "ArithmeticError: too hard", "broken.py"],
    ),
    "rule that matches nothing": (
        override("params.rules=[{match: 'conector.*', lr: 1e-3}]"),
        2,
        ["params.rules[0]", "conector", "vision, connector, llm"],
    ),
    "missing weights": (override("llm.weights=/nowhere/vicuna"), 2, ["llm.weights", "/nowhere/vicuna"]),
    "missing shards": (override("data.train=[{shards: /nowhere}]"), 2, ["data.train.0.shards", "/nowhere"]),
    "missing shard": (damaged_shard, 2, [".tar", "data/tiny/train", "manifest.json"]),
    "features that do not fill their placeholders": (
        lying_connector,
        1,
        ["3 image features but 4 placeholders", "sample-"],
    ),
    "too few supervised tokens": (override("trainer.min_supervised_ratio=0.99"), 1, ["supervised", "mode=show"]),
    "corrupt checkpoint": (damaged_checkpoint, 1, ["weights.safetensors", "damaged"]),
    "folder of another run": (folder_of_another_run, 2, ["optim.lr: 0.001 -> 0.5", "run_name"]),
}


@pytest.mark.parametrize("name", CASES)
def test_wrong_thing_gets_a_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_data(tmp_path / "given")
    case, code, words = CASES[name]
    arguments = case(data, tmp_path, monkeypatch)
    capsys.readouterr()
    assert cli.main(arguments) == code
    said = capsys.readouterr()
    assert [word for word in words if word not in said.err] == [], said.err
    assert "Traceback" not in said.err + said.out
    assert len(said.err.splitlines()) <= 3, said.err
