"""A vision-language model from two folders that the project has never seen, by the README's one command."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from tests.support.hub_folders import ADDED, WORDS, make_llm, make_vision
from tests.support.small_run import make_data
from vlm_train import cli
from vlm_train.config.folders import config_dir

README = config_dir().parent / "README.md"


def read_command(folders: Path, data: Path) -> list[str]:
    """The README's command with local folders in place of its hub names and data, and a run of four steps."""
    section = README.read_text(encoding="utf-8").split("## Any encoder, any language model")[1].split("\n## ")[0]
    (block,) = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    words = shlex.split(block)[3:]
    places = {"vision.weights": folders / "vision", "llm.weights": folders / "llm"}
    words = [f"{key}={places[key]}" if (key := word.partition("=")[0]) in places else word for word in words]
    words = [word.replace("data/mine/train", f"{data}/tiny/train") for word in words]
    small = ["batch.samples=4", "batch.micro=2", "trainer.epochs=null", "trainer.max_steps=4", "trainer.save_every=2"]
    return [*words, *small, "trainer.precision=32-true", "trainer.threads=1", "data.workers=0", "run_name=run"]


def change_weights(folder: Path) -> None:
    """Other values in one file, of the same shapes."""
    file = sorted(folder.glob("*.safetensors"))[0]
    save_file({name: tensor + 0.01 for name, tensor in load_file(file).items()}, file, {"format": "pt"})


@pytest.mark.timeout(600)
def test_two_unseen_folders_train_resume_and_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folders, data = tmp_path / "hub", make_data(tmp_path / "data")
    make_llm(folders / "llm")
    make_vision(folders / "vision")
    assert len(list((folders / "llm").glob("*.safetensors"))) > 2
    command = read_command(folders, data)
    assert cli.main(command) == 0
    run = tmp_path / "runs" / "run"
    last = run / "checkpoints" / "step-00000004"
    first = load_file(last / "weights.safetensors")
    added = len(AutoTokenizer.from_pretrained(folders / "llm")) - WORDS
    assert added >= len(ADDED)  # the library gives a Qwen2 without a padding token one
    assert len(first["llm.model.model.embed_tokens.new_embeddings"]) == added

    shutil.rmtree(last)
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"status": "interrupted"}))
    capsys.readouterr()
    assert cli.main(command) == 0
    assert "resuming from" in capsys.readouterr().out
    again = load_file(last / "weights.safetensors")
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)

    assert cli.main(["mode=export", f"run={run}"]) == 0
    loaded, report = LlavaForConditionalGeneration.from_pretrained(run / "export", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    text, vision = loaded.config.text_config, loaded.config.vision_config
    assert (text.hidden_size, text.tie_word_embeddings, vision.image_size, vision.patch_size) == (40, True, 42, 7)
    assert text.rope_parameters["rope_theta"] == 12345.0
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    assert tokenizer.convert_tokens_to_ids("cat") == WORDS + 2

    change_weights(folders / "vision")
    capsys.readouterr()
    assert cli.main(["mode=export", f"run={run}"]) == 1
    assert "weights changed since" in capsys.readouterr().err
