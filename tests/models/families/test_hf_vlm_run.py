"""Runs of whole models of `transformers`: frozen parts, resume after a kill, adapters, export, evaluation."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_pipelines.build import write_shards
from data_pipelines.sources.easy_vqa import EasyVQA
from tests.support.hf_vlm_folders import MAKERS, make_folder
from tests.support.jobs import train_on_ranks
from tests.support.small_run import make_data, train
from tests.support.tiny_models import assert_close
from tests.training.strategies.test_resume import assert_same_end

FAST = ("smolvlm",)
"""Kinds that every test run trains; the others are slow together."""
KINDS = [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in MAKERS]
PLAIN = ("paligemma", "blip2")
"""Kinds without a chat template."""
KILL = ["allow_targets=[tests.]", "+callbacks.kill={_target_: tests.support.audit.Kill, when: accumulation, step: 4}"]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with a question each; every second sample is text only."""
    return make_data(tmp_path_factory.mktemp("data"), text_only=True)


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(request.param, tmp_path_factory.mktemp("folders") / request.param)


def command(folder: Path, data: Path, runs: Path, *more: str, name: str = "run") -> list[str]:
    """Overrides of a small run: samples of four in micro-batches of two."""
    own = ["recipe=hf_vlm_sft", f"model.name={folder}", f"data.train=[{{shards: {data}/tiny/train}}]", "data.workers=0"]
    own += ["trainer.precision=32-true", "trainer.accelerator=cpu", "batch.samples=4", "batch.micro=2", "optim.lr=1e-3"]
    own += ["trainer.epochs=null", "trainer.max_steps=2", "trainer.threads=1", "trainer.log_every=1"]
    own += [
        f"paths.runs={runs}",
        f"run_name={name}",
        f"data.cache={runs}/lengths",
        "trainer.guard.random_frozen=refuse",
    ]
    if folder.name in PLAIN:
        own += ["template=paligemma"]
    return [*own, *more]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    last = (run / "checkpoints/LATEST").read_text().strip()
    return load_file(run / "checkpoints" / last / "weights.safetensors")


def test_two_steps_leave_what_is_frozen_and_export_reloads(folder: Path, data: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    run = train(command(folder, data, tmp_path))
    before = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    after = AutoModelForImageTextToText.from_pretrained(
        run / "export"
    ).state_dict()  # verified logits as it was written
    assert before.keys() == after.keys()
    learned = set(weights_of(run))
    assert learned and not any(name.startswith("vision.") for name in learned)
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    towers = ("vision_tower", "vision_model", "visual.blocks", "visual.patch_embed")
    assert len(changed) > 10 and not any(word in name for name in changed for word in towers)


def test_killed_run_ends_as_if_it_was_not(folder: Path, data: Path, tmp_path: Path) -> None:
    own = ["trainer.max_steps=6", "trainer.save_every=2", "trainer.keep_last=9", "trainer.export=false", "params=all"]
    jobs = {name: command(folder, data, tmp_path, *own, name=name) for name in ("whole", "killed")}
    assert kill_within([*jobs["killed"], *KILL], folder.name) == -9
    assert not (tmp_path / "killed/checkpoints/step-00000004").exists()
    train(jobs["whole"])
    train(jobs["killed"])
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


def kill_within(job: list[str], kind: str) -> int:
    """The exit code of a process that trains, and kills itself."""
    if kind not in ("pixtral", "mistral3"):
        return train_on_ranks(job, ranks=1, check=False)[0]
    if (child := os.fork()) == 0:  # only this process knows the processor that stands in for theirs
        train(job)
        os._exit(0)
    return -os.WTERMSIG(os.waitpid(child, 0)[1])


def test_lora_changes_the_language_model_only(folder: Path, data: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    rules = "params.rules=[{match: '.*lora_.*', lr: 1e-2}, {match: '.*', lr: null}]"
    run = train(command(folder, data, tmp_path, "peft=lora", rules))
    assert all(name.startswith("llm.") and ".lora_" in name for name in weights_of(run))
    before = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    after = AutoModelForImageTextToText.from_pretrained(run / "export").state_dict()
    assert before.keys() == after.keys()
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    assert changed and all(any(word in name for word in ("language_model", "text_model")) for name in changed)
    assert not any("lm_head" in name or "embed_tokens" in name for name in changed)


def test_packed_run_or_a_sentence(folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(command(folder, data, tmp_path, "data.pack=512", "trainer.export=false", "trainer.max_steps=1"))
    alone = folder.name in {"qwen3_5", "gemma3", "paligemma", "mllama"}
    assert ("Rows hold one sample each, padded" in capsys.readouterr().out) == alone


def test_activation_checkpointing_changes_nothing(folder: Path, data: Path, tmp_path: Path) -> None:
    own = ["trainer.export=false", "params=all", "trainer.max_steps=1"]
    runs = [
        train(command(folder, data, tmp_path, f"trainer.activation_checkpointing={how}", *own, name=how))
        for how in ("none", "full")
    ]
    plain, again = map(weights_of, runs)
    for name, tensor in plain.items():
        assert_close(again[name], tensor, name, 1e-5)


@pytest.mark.parametrize("kind", ["smolvlm", pytest.param("qwen3_vl", marks=pytest.mark.slow)])
def test_qlora_exports_over_the_unquantized_base(kind: str, data: Path, tmp_path: Path) -> None:
    folder = make_folder(kind, tmp_path / kind)
    rules = "params.rules=[{match: '.*lora_.*', lr: 1e-2}, {match: '.*', lr: null}]"
    run = train(command(folder, data, tmp_path, "peft=qlora", "peft.bits=8", rules))
    assert all(name.startswith("llm.") and ".lora_" in name for name in weights_of(run))
    assert (run / "export/model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["llava_next", "internvl", "qwen3_vl", "smolvlm"])
def test_one_epoch_of_easy_vqa_lowers_the_loss(kind: str, tmp_path: Path) -> None:
    """From random weights, over 320 pictures with their questions, each a branch of its own."""
    write_shards(EasyVQA(), tmp_path / "easy_vqa/train")
    folder = make_folder(kind, tmp_path / kind, spread=1.0)
    own = [
        "data=easyvqa",
        f"paths.data={tmp_path}",
        "data.val=[]",
        "data.limit=320",
        "model.weights=null",
        "params=all",
    ]
    own += ["batch.samples=8", "batch.micro=8", "optim.lr=3e-3", "trainer.export=false", "trainer.max_steps=null"]
    own += ["trainer.epochs=1", "trainer.guard.random_frozen=allow", "trainer.activation_checkpointing=none"]
    kept = [one for one in command(folder, tmp_path, tmp_path) if not one.startswith("data.train")]
    run = train([*kept, *own])
    losses = [row["loss"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
    print(f"{kind}: loss {losses[0]:.3f} at the first of {len(losses)} steps, {losses[-1]:.3f} at the last")
    assert losses[-1] < losses[0] / 2
