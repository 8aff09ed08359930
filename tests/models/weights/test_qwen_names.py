"""The language model of a whole Qwen2-VL or Qwen2.5-VL, under the names and numbers of older and newer checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from tests.support.tiny_models import assert_close
from vlm_train.config.architecture import read_architecture
from vlm_train.errors import AssetError
from vlm_train.models.llms.hf import HFCausalLM

TEXT: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [2, 2, 2]}
VISION = {"depth": 1, "num_heads": 2, "patch_size": 4}
KINDS: dict[str, Any] = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration, VISION | {"embed_dim": 32, "hidden_size": 48}),
    "qwen2_5_vl": (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        VISION | {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 48},
    ),
}
CASES = [(kind, tied, newer) for kind in KINDS for tied in (True, False) for newer in (True, False)]


def write_release(folder: Path, kind: str, tied: bool, newer: bool, leave_out: str = "") -> Any:
    """A checkpoint with names and config.json of the newer library, or of the first releases; returns the model."""
    config_class, model_class, vision = KINDS[kind]
    torch.manual_seed(0)
    text = TEXT | {"rope_parameters": ROPE, "tie_word_embeddings": tied}
    model = model_class(config_class(text_config=text, vision_config=vision, tie_word_embeddings=tied))
    model.save_pretrained(folder)
    state = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        bare = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        if newer and bare != "lm_head.weight":
            inside = bare.startswith("visual.")
            bare = f"model.{bare}" if inside else bare.replace("model.", "model.language_model.", 1)
        if not leave_out or not bare.endswith(leave_out):
            state[bare] = tensor
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    if not newer:  # huggingface.co/Qwen/Qwen2-VL-2B-Instruct config.json
        rope = {"type": "mrope", "mrope_section": ROPE["mrope_section"]}
        flat = TEXT | {"rope_theta": ROPE["rope_theta"], "rope_scaling": rope, "tie_word_embeddings": tied}
        flat |= {"model_type": kind, "architectures": [model_class.__name__], "vision_config": vision}
        (folder / "config.json").write_text(json.dumps(flat))
    return model


def read_llm(folder: Path, kind: str, tied: bool, **changes: Any) -> HFCausalLM:
    config = TEXT | {"model_type": f"{kind}_text", "rope_parameters": ROPE, "tie_word_embeddings": tied} | changes
    llm = HFCausalLM(config=config, weights=str(folder), new_tokens=2)
    llm.load_weights()
    return llm


@pytest.mark.parametrize(("kind", "tied", "newer"), CASES)
def test_language_model_of_a_whole_one(kind: str, tied: bool, newer: bool, tmp_path: Path) -> None:
    model = write_release(tmp_path, kind, tied, newer)
    llm = read_llm(tmp_path, kind, tied)
    ours = {name: value for name, value in llm.model.model.state_dict().items() if "embed_tokens" not in name}
    theirs = model.model.language_model.state_dict()
    assert len(ours) == len(theirs) - 1
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    table, head = llm.model.get_input_embeddings().weight, llm.model.get_output_embeddings().weight
    assert torch.equal(table, model.get_input_embeddings().weight) and torch.equal(head, model.lm_head.weight)
    assert (head is table) == tied


@pytest.mark.parametrize("newer", [True, False])
def test_its_numbers_are_read(newer: bool, tmp_path: Path) -> None:
    write_release(tmp_path, "qwen2_vl", True, newer)
    numbers = read_architecture(str(tmp_path), "text", "llm.weights")
    assert numbers["model_type"] == "qwen2_vl_text" and numbers["rope_parameters"] == ROPE
    assert {key: numbers[key] for key in TEXT} == TEXT and numbers["tie_word_embeddings"] is True
    with pytest.raises(AssetError, match=r"rope_parameters = .*500000\.0.*the config says .*10000\.0"):
        read_llm(tmp_path, "qwen2_vl", True, rope_parameters=ROPE | {"rope_theta": 1e4})


@pytest.mark.parametrize("newer", [True, False])
def test_a_missing_tensor_is_named(newer: bool, tmp_path: Path) -> None:
    write_release(tmp_path, "qwen2_5_vl", False, newer, leave_out="layers.1.mlp.up_proj.weight")
    with pytest.raises(AssetError, match=r"llm\.weights: .* missing .*layers\.1\.mlp\.up_proj\.weight"):
        read_llm(tmp_path, "qwen2_5_vl", False)


def test_it_starts_from_a_model_of_one_axis(tmp_path: Path) -> None:
    """Qwen2-VL from Qwen2 (arXiv 2409.12191): the same tensors and numbers, but for the sections of the rotations."""
    torch.manual_seed(0)
    rope = {key: value for key, value in ROPE.items() if key != "mrope_section"}
    text = Qwen2ForCausalLM(Qwen2Config(**TEXT, rope_parameters=rope, tie_word_embeddings=True))
    text.save_pretrained(tmp_path)
    llm = read_llm(tmp_path, "qwen2_vl", True).eval()
    ids = torch.arange(3, 11)[None]
    positions = torch.arange(8).expand(3, 1, 8)
    with torch.no_grad():
        got = llm.head(llm.decode(llm.embed(ids), positions, None))[..., : TEXT["vocab_size"]]
        assert_close(got, text.eval()(input_ids=ids).logits)
    with pytest.raises(AssetError, match=r"rope_parameters = .*500000\.0.*the config says .*10000\.0"):
        read_llm(tmp_path, "qwen2_vl", True, rope_parameters=ROPE | {"rope_theta": 1e4})
