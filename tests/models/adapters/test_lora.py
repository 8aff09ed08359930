"""Adapters sit on the language model's linear layers, all but its head, and on nothing else that was not asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from tests.support.tiny_models import assert_close
from vlm_train.config.folders import config_dir
from vlm_train.errors import ConfigError
from vlm_train.export.merged import merged_state
from vlm_train.models.adapters.lora import adapted_layers, compact_names, describe_adapters, lora
from vlm_train.models.connectors.mlp import MLP
from vlm_train.models.families.prefix_vlm import PrefixVLM
from vlm_train.models.llms.hf import HFCausalLM
from vlm_train.models.vision.hf import HFVision

LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEAR += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
EXPECTED = [f"llm.model.model.layers.{layer}.{name}" for layer in range(2) for name in LINEAR]
OPTIONS = sorted(path.stem for path in (config_dir() / "peft").glob("*.yaml") if path.stem != "none")


def model(width: int = 16) -> Any:
    torch.manual_seed(0)
    size = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = HFVision(
        config={"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **size},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    llm = HFCausalLM(config={"model_type": "llama", "vocab_size": 40, "num_key_value_heads": 2, **size})
    return PrefixVLM(vision=vision, connector=MLP(in_dim=width, out_dim=width), llm=llm)


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
        ConfigError, match=r"'.\*q_proj' also matches 1 layers outside llm, for example vision.*\(llm\|vis"
    ):
        lora(model=model(), match=".*q_proj")


def test_other_parts_are_adapted_when_named_but_for_layers_that_never_run() -> None:
    built = model()
    assert lora(model=built, match=r"vision\..*\.q_proj", rank=2) == adapted_layers(built)
    assert adapted_layers(built) == ["vision.model.encoder.layers.0.self_attn.q_proj"]  # the features are layer -2's
    assert lora(model=model(), match=r"connector\..*", rank=2) == ["connector.layers.0", "connector.layers.2"]


@pytest.mark.parametrize("meta", [False, True], ids=["tiny", "meta"])
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_adapts_exactly_the_intended_layers(option: str, meta: bool) -> None:
    """The contract of conf/peft/*.yaml: no parameter is added elsewhere, and none is lost."""
    if "bits" in node(option) and not meta:
        pytest.importorskip("bitsandbytes")
    with torch.device("meta" if meta else "cpu"):
        plain, built = model(64), model(64)  # NF4 packs blocks of 64
        names = instantiate(node(option), _partial_=True)(model=built)
    assert sorted(names) == sorted(adapted_layers(built)) == sorted(EXPECTED)
    before = {name for name, _ in plain.named_parameters()}
    after = {name for name, _ in built.named_parameters()}
    new = {name for name in after if ".lora_" in name}
    assert {name.replace(".base_layer.", ".") for name in after - new} == before
    assert {name.partition(".lora_")[0] for name in new} == set(EXPECTED)
    assert {name.removesuffix(".weight").removesuffix(".base_layer") for name in after - new - before} == set(EXPECTED)


def node(option: str) -> Any:
    loaded = OmegaConf.load(config_dir() / "peft" / f"{option}.yaml")
    return OmegaConf.create(OmegaConf.to_container(loaded, resolve=True))


def learn(built: Any) -> None:
    """Stand-in for training: every adapter tensor moves."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if ".lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def logits(built: Any) -> torch.Tensor:
    torch.manual_seed(5)
    embeds, positions = torch.randn(1, 5, built.llm.dim), torch.arange(5).view(1, 1, 5)
    return built.llm.head(built.llm.decode(embeds, positions, None)).detach()


@pytest.mark.parametrize("kind", [{}, {"rslora": True}, {"dora": True}, {"dora": True, "rslora": True}], ids=str)
def test_merged_logits_equal_unmerged(kind: dict[str, bool]) -> None:
    built, plain = model(), model()
    lora(model=built, rank=4, alpha=8, **kind)
    before = logits(built)
    learn(built)
    after = logits(built.eval())
    assert (after - before).abs().max() > 0.1 * before.abs().max(), "what was learned has to matter"
    plain.load_state_dict(merged_state(built))
    assert_close(logits(plain), after)


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    scales = []
    for rslora in (False, True):
        built = model()
        lora(model=built, match=r"llm\..*0\.mlp\.up_proj", rank=4, alpha=8, rslora=rslora)
        (layer,) = [module for module in built.modules() if hasattr(module, "lora_A")]
        scales.append(layer.scaling["default"])
    assert scales == [8 / 4, 8 / 2]


def test_the_hit_list_is_short_and_complete() -> None:
    built = model()
    assert describe_adapters(built) == []
    lora(model=built, rank=2)
    (line,) = describe_adapters(built)
    attention, mlp = "{q_proj,k_proj,v_proj,o_proj}", "{gate_proj,up_proj,down_proj}"
    layers = f"llm.model.model.layers.{{0-1}}.{{self_attn.{attention},mlp.{mlp}}}"
    assert line == f"peft: 14 linear layers adapted: {layers}"
    assert compact_names(["a.0.q", "a.1.q", "a.2.q", "a.4.q", "b"]) == "{a.{0-2,4}.q,b}"


@pytest.mark.parametrize(("match", "message"), [(r"llm\.nothing", "matches no linear layer"), ("(", "regular expr")])
def test_a_match_without_a_hit_is_an_error(match: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lora(model=model(), match=match)
