"""Full-size parameter counts on the meta device, from the shipped configurations."""

from __future__ import annotations

import hydra
import pytest
import torch

from tests.support.components import component
from vlm_train.build import build_model
from vlm_train.config.compose import compose_config
from vlm_train.models.families.prefix_vlm import PrefixVLM
from vlm_train.models.vision.example import blank_input


def build(group: str, option: str, **arguments):
    with torch.device("meta"):
        return hydra.utils.instantiate(component(group, option), **arguments)


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("group", "option", "expected"),
    [
        ("vision", "clip_vit_l14_336", 303_507_456),
        ("vision", "eva_clip_vit_g", 985_952_256),
        ("vision", "intern_vit_300m", 304_012_288),
        ("llm", "opt_2_7b", 2_651_596_800),
        ("llm", "opt_6_7b", 6_658_473_984),
        ("llm", "vicuna_7b_v15", 6_738_415_616),
        ("llm", "vicuna_7b_v0", 6_738_415_616),
        ("llm", "vicuna_7b_v11", 6_738_415_616),
        ("llm", "llama2_7b_chat", 6_738_415_616),
        ("llm", "vicuna_13b_v15", 13_015_864_320),
        ("llm", "llama3_8b", 8_030_261_248),
        ("llm", "llama31_8b", 8_030_261_248),
        ("llm", "llama32_1b", 1_235_814_400),
        ("llm", "mistral_7b", 7_241_732_096),
        ("llm", "qwen2_7b", 7_615_616_512),
        ("llm", "smollm2_135m", 134_515_008),
        ("llm", "internlm2_1_8b", 1_889_110_016),
        ("llm", "internlm25_1_8b", 1_889_110_016),
        ("llm", "internlm25_7b", 7_737_708_544),
        ("vision", "siglip2_base_512", 93_520_128),
        ("vision", "siglip2_so400m_naflex", 412_649_712),
        ("llm", "smollm2_360m", 361_821_120),
        ("llm", "qwen3_1_7b", 1_720_574_976),
        ("llm", "qwen3_4b", 4_022_468_096),
        ("llm", "qwen3_4b_molmo2", 4_022_795_776),
        ("llm", "qwen3_8b", 8_190_735_360),
    ],
)
def test_parts(group, option, expected):
    assert count(build(group, option)) == expected


@pytest.mark.parametrize(
    ("option", "dim", "expected"),
    [
        ("linear", 4096, 4_198_400),
        ("linear", 5120, 5_248_000),
        ("mlp2x_gelu", 4096, 20_979_712),
        ("mlp2x_gelu", 5120, 31_467_520),
        ("pool2x2_mlp", 4096, 20_979_712),
        ("pixel_shuffle_mlp", 896, 4_482_816),
        ("pixel_shuffle_mlp", 2048, 12_595_200),
        ("pixel_shuffle_mlp", 4096, 33_570_816),
    ],
)
def test_connectors(option, dim, expected):
    assert count(build("connector", option, in_dim=1024, out_dim=dim)) == expected


def test_four_patches_of_vit_g():
    assert count(build("connector", "concat4_linear", in_dim=1408, out_dim=4096)) == 23_072_768


def test_llava15_7b():
    vision, llm = build("vision", "clip_vit_l14_336"), build("llm", "vicuna_7b_v15")
    connector = build("connector", "mlp2x_gelu", in_dim=vision.out_dim, out_dim=llm.dim)
    model = PrefixVLM(vision=vision, connector=connector, llm=llm)
    assert count(model) == 7_062_902_784
    unused = sum(vision.get_parameter(name).numel() for name in vision.unused_parameters())
    assert unused == 12_596_224 + 2_048  # layer 24 and the final norm


def test_molmo2_4b():
    """As `Molmo2ForConditionalGeneration` with the numbers of Molmo2-4B counts: 25 layers of the tower, and one table
    of embeddings for head and input."""
    pytest.importorskip("transformers.models.molmo2")
    from transformers import Molmo2Config, Molmo2ForConditionalGeneration

    model = build_model(compose_config(["recipe=molmo2_4b_pretrain"]), meta=True)
    text = model.llm.model.config
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    numbers = {name: getattr(text, name) for name in (*names, "head_dim", "vocab_size", "rope_parameters")}
    adapter = {"intermediate_size": 9728, "text_hidden_size": 2560}
    with torch.device("meta"):
        theirs = Molmo2ForConditionalGeneration(Molmo2Config(text_config=numbers, adapter_config=adapter))
    unused = sum(model.get_parameter(name).numel() for name in model.unused_parameters())
    offset = model.connector.offset.numel()  # theirs: a row of the table
    assert count(theirs.model.vision_tower) == count(model.vision) - unused == 382_505_936
    assert count(theirs.model.multi_modal_projector) == count(model.connector) - offset == 56_611_328
    assert count(theirs.model.language_model) == count(model.llm) == 4_022_795_776
    assert count(model) == 4_507_635_264 and unused == 45_719_664


@pytest.mark.parametrize(
    ("option", "tokens"),
    [
        ("clip_vit_l14", 256),
        ("clip_vit_l14_336", 576),
        ("siglip_so400m_384", 729),
        ("siglip2_so400m_378", 729),
        ("eva_clip_vit_g", 257),
        ("gated", 256),
    ],
)
def test_visual_tokens_of_an_image(option, tokens):
    vision = build("vision", option)
    with torch.device("meta"):
        assert vision.encode(blank_input(vision)).grids[0].size == tokens


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [("clip_vitb32", 151_277_313), ("clip_vitl14", 427_616_513), ("siglip_so400m", 877_360_306)],
)
def test_two_towers(recipe, expected):
    """As published: openai/clip-vit-{base-patch32,large-patch14} and open_clip's ViT-SO400M-14-SigLIP."""
    model = build_model(compose_config([f"recipe={recipe}"]), meta=True)
    assert count(model) == expected
    assert model.unused_parameters() == []
