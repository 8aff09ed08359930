"""LoRA adapts the language model's linear layers, all but its head, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vlm_train.errors import ConfigError
from vlm_train.models.connectors.mlp import MLP
from vlm_train.models.llms.hf import HFCausalLM
from vlm_train.models.prefix import PrefixVLM
from vlm_train.models.vision.hf import HFVision
from vlm_train.peft import lora


def model() -> Any:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = HFVision(
        config={"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **size},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    llm = HFCausalLM(config={"model_type": "llama", "vocab_size": 40, "num_key_value_heads": 2, **size})
    return PrefixVLM(vision=vision, connector=MLP(in_dim=16, out_dim=16), llm=llm)


def test_adapts_every_linear_layer_but_the_head() -> None:
    built = model()
    names = lora(model=built, rank=4, alpha=8)
    layers = [name for name in names if name.startswith("llm.model.model.layers.")]
    assert len(names) == len(layers) == 2 * 7
    adapters = [name for name, _ in built.named_parameters() if "lora_" in name]
    assert len(adapters) == 2 * len(names)
    assert not any("lm_head" in name or name.startswith(("vision", "connector")) for name in adapters)


def test_adapted_model_starts_equal() -> None:
    built = model()
    embeds, positions = torch.randn(1, 5, 16), torch.arange(5).view(1, 1, 5)
    before = built.llm.decode(embeds, positions, None)
    lora(model=built, rank=4, alpha=8)
    assert torch.equal(built.llm.decode(embeds, positions, None), before)


def test_a_match_chooses_layers() -> None:
    names = lora(model=model(), match=r"llm\..*\.layers\.1\..*\.[qv]_proj", rank=2, alpha=2)
    assert names == ["llm.model.model.layers.1.self_attn.q_proj", "llm.model.model.layers.1.self_attn.v_proj"]


def test_a_match_outside_the_llm_is_an_error() -> None:
    with pytest.raises(
        ConfigError, match=r"peft.match: '.\*q_proj' also matches 2 layers outside llm, for example vision"
    ):
        lora(model=model(), match=".*q_proj")


@pytest.mark.parametrize(("match", "message"), [(r"llm\.nothing", "matches no linear layer"), ("(", "regular expr")])
def test_a_match_without_a_hit_is_an_error(match: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lora(model=model(), match=match)
