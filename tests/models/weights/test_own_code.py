"""InternLM2 and InternViT, whose checkpoints bring code of their own, are read as models of `transformers`.

Features and logits were compared with that code itself (github.com/OpenGVLab/InternVL at 2410d1d, in fp32): largest
difference 1e-6 of the largest number, also beyond `max_position_embeddings`. Here their layouts are written out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support.tiny_models import llama_config, tiny_llm, tiny_vision
from vlm_train.config.architecture import read_architecture
from vlm_train.errors import AssetError
from vlm_train.models.llms.hf import HFCausalLM
from vlm_train.models.vision.hf import HFVision

HEADS, SHARED = 6, 2
ROPE = {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0}
LLM = llama_config(num_attention_heads=HEADS, num_key_value_heads=SHARED, rms_norm_eps=1e-5, rope_parameters=ROPE)
INTERNLM2 = {
    "model_type": "internlm2",
    "architectures": ["InternLM2ForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"},
    "bias": False,
    "rope_theta": 1_000_000,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    **{name: value for name, value in LLM.items() if name not in ("model_type", "rope_parameters")},
}
INTERN_VIT = {
    "model_type": "intern_vit_6b",
    "auto_map": {"AutoModel": "modeling_intern_vit.InternVisionModel"},
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
}
KINDS = [
    {"norm_type": "layer_norm", "qk_normalization": False, "qkv_bias": True},  # 300M
    {"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False},  # 6B
]


def write_llm(model: Any, prefix: str = "") -> dict[str, Tensor]:
    """InternLM2's names: head by head of the keys, its queries, its key, its value."""
    state, size = model.model.state_dict(), model.dim // HEADS
    found = {"model.tok_embeddings.weight": state["model.embed_tokens.weight"]}
    found |= {"model.norm.weight": state["model.norm.weight"], "output.weight": state["lm_head.weight"]}
    for number in range(2):
        ours, theirs = f"model.layers.{number}.", f"model.layers.{number}."
        q, k, v = (state[f"{ours}self_attn.{one}_proj.weight"].split(size) for one in "qkv")
        rows: list[Tensor] = []
        for shared in range(SHARED):
            rows += [*q[shared * 3 : shared * 3 + 3], k[shared], v[shared]]
        found[f"{theirs}attention.wqkv.weight"] = torch.cat(rows)
        names = {
            "self_attn.o_proj": "attention.wo",
            "mlp.gate_proj": "feed_forward.w1",
            "mlp.up_proj": "feed_forward.w3",
        }
        names |= {"mlp.down_proj": "feed_forward.w2", "input_layernorm": "attention_norm"}
        names |= {"post_attention_layernorm": "ffn_norm"}
        found |= {f"{theirs}{other}.weight": state[f"{ours}{one}.weight"] for one, other in names.items()}
    return {prefix + name: tensor.clone() for name, tensor in found.items()}


def write_vit(model: Any, prefix: str = "") -> dict[str, Tensor]:
    """InternViT's names: queries, keys and values in one layer."""
    state = dict(model.model.state_dict())
    found = {"embeddings.class_embedding": state.pop("embeddings.cls_token")}
    found["embeddings.position_embedding"] = state.pop("embeddings.position_embeddings")
    for kind in ("weight", "bias"):
        found[f"embeddings.patch_embedding.{kind}"] = state.pop(f"embeddings.patch_embeddings.projection.{kind}")
    for number in range(2):
        ours, theirs = f"encoder.layer.{number}.", f"encoder.layers.{number}."
        for kind in ("weight", "bias"):
            if f"{ours}attention.q_proj.{kind}" in state:
                parts = [state.pop(f"{ours}attention.{one}_proj.{kind}") for one in "qkv"]
                found[f"{theirs}attn.qkv.{kind}"] = torch.cat(parts)
            found[f"{theirs}attn.proj.{kind}"] = state.pop(f"{ours}attention.projection_layer.{kind}")
        for one in "12":
            found[f"{theirs}ls{one}"] = state.pop(f"{ours}lambda_{one}")
        for name in [name for name in state if name.startswith(ours)]:
            other = name.replace("layernorm_before", "norm1").replace("layernorm_after", "norm2")
            other = other.replace("attention.", "attn.").replace(ours, theirs)
            found[other] = state.pop(name)
    assert not state
    return {prefix + name: tensor.clone() for name, tensor in found.items()}


def write(folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> str:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def random_llm() -> HFCausalLM:
    torch.manual_seed(0)
    return tiny_llm(LLM)


def random_vit(kind: dict[str, Any]) -> HFVision:
    torch.manual_seed(0)
    numbers = {"model_type": "internvl_vision", "image_size": [32, 32], "patch_size": [8, 8]}
    numbers |= {name: INTERN_VIT[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    numbers |= {"num_attention_heads": 4, "norm_type": kind["norm_type"]}
    numbers |= {"use_qk_norm": kind["qk_normalization"], "attention_bias": kind["qkv_bias"]}
    model = tiny_vision(numbers, layer=-1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def read_vit(source: str) -> HFVision:
    config = read_architecture(source, "vision", "vision.weights")
    model = HFVision(config=config, weights=source, layer=-1, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    model.load_weights()
    return model


def assert_equal(ours: Any, theirs: Any) -> None:
    found, expected = ours.model.state_dict(), theirs.model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", ["internlm2", "internlm"])  # what the first ones call themselves
def test_internlm2_is_a_llama(name: str, tmp_path: Path) -> None:
    model = random_llm()
    source = write(tmp_path, write_llm(model), INTERNLM2 | {"model_type": name})
    numbers = read_architecture(source, "text", "llm.weights")
    assert numbers["model_type"] == "llama" and numbers["rope_parameters"] == ROPE
    read = HFCausalLM(config=numbers, weights=source, new_tokens=2)
    read.load_weights()
    assert read.vocab_size == 99
    read._remove_tokens()
    assert_equal(read, model)


@pytest.mark.parametrize("kind", KINDS, ids=["300M", "6B"])
def test_intern_vit_is_the_tower_of_internvl(kind: dict[str, Any], tmp_path: Path) -> None:
    model = random_vit(kind)
    assert_equal(read_vit(write(tmp_path, write_vit(model), INTERN_VIT | kind)), model)


def test_both_are_read_out_of_a_whole_internvl(tmp_path: Path) -> None:
    llm, tower = random_llm(), random_vit(KINDS[0])
    state = write_llm(llm, "language_model.") | write_vit(tower, "vision_model.")
    state |= {"mlp1.0.weight": torch.zeros(4)}
    config = {"model_type": "internvl_chat", "llm_config": INTERNLM2, "vision_config": INTERN_VIT | KINDS[0]}
    source = write(tmp_path, state, config)
    assert_equal(read_vit(source), tower)
    read = HFCausalLM(config=LLM, weights=source)
    read.load_weights()
    assert_equal(read, llm)


def test_what_the_configuration_leaves_out_is_internlm2s(tmp_path: Path) -> None:
    few = {name: INTERNLM2[name] for name in ("model_type", "hidden_size", "num_attention_heads")}
    numbers = read_architecture(write(tmp_path, {}, few), "text", "llm.weights")
    assert numbers["num_key_value_heads"] == HEADS and numbers["attention_bias"] is True
    assert numbers["vocab_size"] == 103_168
    assert numbers["rope_parameters"] == {"rope_type": "default", "rope_theta": 10_000.0}


@pytest.mark.parametrize("change", [{"rope_theta": 10_000}, {"rope_scaling": None}, {"rms_norm_eps": 1e-6}])
def test_other_numbers_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    source = write(tmp_path, write_llm(random_llm()), INTERNLM2 | change)
    with pytest.raises(AssetError, match="the config says"):
        HFCausalLM(config=LLM, weights=source).load_weights()


def test_tensors_that_nothing_takes_are_an_error(tmp_path: Path) -> None:
    state = write_llm(random_llm(), "language_model.") | {"vision_model.any": torch.zeros(1)}
    state["language_model.model.layers.0.attention.wqkv.bias"] = torch.zeros(4)
    source = write(tmp_path, state, {"model_type": "internvl_chat", "llm_config": INTERNLM2})
    with pytest.raises(AssetError, match=r"unexpected 1 \(language_model.model.layers.0.attention.wqkv.bias\)"):
        HFCausalLM(config=LLM, weights=source).load_weights()


def test_a_tensor_of_another_shape_is_an_error(tmp_path: Path) -> None:
    state = write_llm(random_llm())
    state["model.layers.0.attention.wqkv.weight"] = torch.zeros(7, 48)
    with pytest.raises(AssetError, match="does not fit"):
        HFCausalLM(config=LLM, weights=write(tmp_path, state, INTERNLM2)).load_weights()


@pytest.mark.parametrize("nested", [False, True])
def test_quantized_weights_are_refused(nested: bool, tmp_path: Path) -> None:
    config = INTERNLM2 | {"quantization_config": {"quant_method": "awq"}}
    source = write(tmp_path, {}, {"model_type": "internvl_chat", "llm_config": config} if nested else config)
    with pytest.raises(AssetError, match="its weights are quantized"):
        read_architecture(source, "text", "llm.weights")


def test_rope_is_read_under_both_names_and_no_other_kind(tmp_path: Path) -> None:
    newer = INTERNLM2 | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    assert read_architecture(write(tmp_path, {}, newer), "text", "llm.weights")["rope_parameters"] == ROPE
    source = write(tmp_path, {}, INTERNLM2 | {"rope_scaling": {"type": "yarn", "factor": 2.0}})
    with pytest.raises(AssetError, match="rope_scaling: got 'yarn'; InternLM2 has linear, dynamic, or none"):
        read_architecture(source, "text", "llm.weights")


def test_rope_grows_with_long_texts_alone() -> None:
    ours, theirs = (random_llm().eval() for _ in range(2))
    limit = LLM["max_position_embeddings"]
    rotary = ours.decoder.rotary_emb
    for tokens, kind in ((8, "default"), (limit, "default"), (limit + 20, "dynamic"), (8, "dynamic"), (8, "default")):
        ids = torch.arange(tokens)[None] % 97
        positions = torch.arange(tokens)[None, None]
        with torch.no_grad():
            expected = theirs.decoder(input_ids=ids, position_ids=positions[0], use_cache=False).last_hidden_state
            found = ours.decode(ours.embed(ids), positions, None)
        assert rotary.rope_type == kind, "what asks the device for the largest position"
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    with torch.device("meta"):
        model = tiny_llm(LLM)
        model.decode(torch.empty(1, 8, model.dim), torch.empty(1, 1, 8, dtype=torch.int64), None)


def test_generation_goes_on_beyond_the_limit() -> None:
    ours, theirs = (random_llm().eval() for _ in range(2))
    embeds = ours.embed(torch.arange(LLM["max_position_embeddings"] - 4)[None] % 97).detach()
    found = ours.generate(embeds, torch.ones(embeds.shape[:2], dtype=torch.bool), max_new_tokens=8, eos_ids=[])
    expected = theirs.model.generate(
        inputs_embeds=embeds, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(found, expected)


def test_a_missing_tensor_is_an_error(tmp_path: Path) -> None:
    state = write_llm(random_llm())
    del state["model.layers.1.attention.wqkv.weight"]
    with pytest.raises(AssetError, match="missing"):
        HFCausalLM(config=LLM, weights=write(tmp_path, state, INTERNLM2)).load_weights()
