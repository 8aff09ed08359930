"""Models that mix tokens without a mask are known by their structure, and refuse packed rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.support.tiny_models import text_stream, tiny_llm
from vlm_train.errors import ConfigError
from vlm_train.models.layers.passes import decode_stream
from vlm_train.models.llms.hf import HFCausalLM
from vlm_train.models.llms.mixers import mixers_without_mask

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 60}
HEADS = {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
MIXERS = {
    "mamba": {"model_type": "mamba", "state_size": 4},
    "falcon_mamba": {"model_type": "falcon_mamba", "state_size": 4},
    "jamba": {"model_type": "jamba", **HEADS, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1},
    "qwen3_next": {"model_type": "qwen3_next", **HEADS, "head_dim": 8, **LINEAR, "num_experts": 2},
    "lfm2": {"model_type": "lfm2", **HEADS, "layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"model_type": "recurrent_gemma", **HEADS, "lru_width": 32},
    "minimax": {"model_type": "minimax", **HEADS, "layer_types": ["linear_attention", "full_attention"]},
    "rwkv": {"model_type": "rwkv", "attention_hidden_size": 32},
}
NAMES = {
    "mamba": "MambaMixer",
    "falcon_mamba": "FalconMambaMixer",
    "jamba": "JambaMambaMixer",
    "qwen3_next": "Qwen3NextGatedDeltaNet",
    "lfm2": "Lfm2ShortConv",
    "recurrent_gemma": "RecurrentGemmaRecurrentBlock",
    "minimax": "linear_attention",
    "rwkv": "RwkvBlock",
}


def build(name: str) -> HFCausalLM:
    for attention in ("packed", "sdpa", "eager"):
        try:
            return tiny_llm(SMALL | MIXERS[name], attention=attention)
        except ConfigError as error:
            assert "cannot" in str(error)
    raise AssertionError(name)


@pytest.mark.parametrize("name", MIXERS)
def test_mixers_refuse_packed_rows(name):
    with torch.device("meta"):
        llm = build(name)
    assert NAMES[name] in llm.unmasked_mixers
    stream = text_stream([[1, 2, 3, 4, 5]], segments=[[1, 1, 2, 2, 2]], positions=[[0, 1, 0, 1, 2]])
    with pytest.raises(ConfigError, match=f"'{name}' has .*{NAMES[name]}.* Use data.pack=null") as raised:
        decode_stream(llm, torch.zeros(1, 5, 32, device="meta"), stream)
    assert "llm.config.model_type" in str(raised.value)


@pytest.mark.parametrize("name", ["jamba", "lfm2"])
def test_mixers_take_plain_rows(name):
    """Each row is then as the library computes it, whatever stands in its padding."""
    torch.manual_seed(0)
    llm, stream = build(name).eval(), replace(text_stream([[5, 6, 7, 8], [3, 4]]), plain_causal=True)
    hidden = decode_stream(llm, llm.embed(stream.ids), stream)
    for row, ids in enumerate(([5, 6, 7, 8], [3, 4])):
        expected = llm.model.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(hidden[row, : len(ids)], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "gemma3_text", "falcon", "bloom", "mixtral"])
def test_attention_is_no_such_mixer(model_type):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    with torch.device("meta"):
        decoder = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](num_hidden_layers=2)).get_decoder()
    layers = decoder.layers if hasattr(decoder, "layers") else decoder.h
    assert mixers_without_mask(layers, getattr(decoder.config, "layer_types", None) or ()) == []


def test_a_layer_without_a_mask_is_a_mixer():
    class Recurrence(nn.Module):
        def forward(self, hidden):
            return hidden.cumsum(1)

    class Attention(nn.Module):
        def forward(self, hidden, attention_mask=None):
            return hidden

    assert mixers_without_mask([Attention(), Recurrence()]) == ["Recurrence"]
