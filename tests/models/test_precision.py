"""Frozen layers in 16 bits compute what they compute in fp32 under autocast, to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from tests.support.small_run import command, make_data, train
from vlm_train.config.compose import compose_config
from vlm_train.config.run_identity import run_id
from vlm_train.evaluation.common import evaluation_mode
from vlm_train.models.precision import HALVED, find_halvable, halve_frozen

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}


class Model(nn.Module):
    """A family with one part, whose layers are numbered."""

    def __init__(self, inner: Any, layers: nn.ModuleList) -> None:
        super().__init__()
        self.llm = nn.Module()
        self.llm.inner, self.llm.layers = inner, layers


def make_llama() -> Model:
    inner = transformers.LlamaModel(transformers.LlamaConfig(**SIZES, intermediate_size=48))
    return Model(inner, inner.layers)


def make_opt() -> Model:
    more: dict[str, Any] = {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}
    inner = transformers.OPTModel(transformers.OPTConfig(**SIZES, **more))
    return Model(inner, inner.decoder.layers)


def make_t5() -> Model:
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": 40}
    config = transformers.T5Config(**sizes, feed_forward_proj="gated-gelu", dropout_rate=0.0)  # type: ignore[arg-type]
    inner = transformers.T5EncoderModel(config)
    return Model(inner, inner.encoder.block)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [make_llama, make_opt, make_t5])
def test_numbers_and_gradients_are_the_same_to_the_bit(make: Callable[[], Model], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = make().requires_grad_(False).eval()
    embeds = torch.randn(2, 7, 32, requires_grad=True)

    def compute() -> tuple[torch.Tensor, torch.Tensor]:
        embeds.grad = None
        with torch.autocast("cpu", dtype):
            hidden = model.llm.inner(inputs_embeds=embeds, attention_mask=torch.ones(2, 7, dtype=torch.long))[0]
        hidden.float().square().sum().backward()
        assert embeds.grad is not None
        return hidden.detach(), embeds.grad

    before = compute()
    halved = halve_frozen(model, dtype)
    assert halved > 0.9 * sum(p.numel() for p in model.llm.layers.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, compute(), strict=True))


def test_what_learns_is_shared_or_is_no_product_stays() -> None:
    model = make_llama().requires_grad_(False)
    layer = model.llm.layers[0]
    layer.mlp.up_proj.weight.requires_grad_(True)
    layer.mlp.gate_proj.weight = model.llm.layers[1].mlp.gate_proj.weight
    halve_frozen(model, torch.bfloat16)
    kept = {name for name, p in model.llm.layers.named_parameters() if p.dtype == torch.float32}
    norms = {f"{n}.{kind}_layernorm.weight" for n in (0, 1) for kind in ("input", "post_attention")}
    assert kept == norms | {"0.mlp.up_proj.weight", "0.mlp.gate_proj.weight"}
    assert model.llm.inner.embed_tokens.weight.dtype == model.llm.inner.norm.weight.dtype == torch.float32
    assert len(find_halvable(model)) == 14 - 3


def test_evaluation_runs_in_that_precision() -> None:
    model = make_llama().requires_grad_(False)
    halve_frozen(model, torch.bfloat16)
    assert getattr(model, HALVED) is torch.bfloat16
    with evaluation_mode(model):
        assert model.llm.layers[0].mlp.up_proj(torch.ones(1, 32)).dtype == torch.bfloat16


def test_a_run_with_halved_parts_is_the_same_run(tmp_path: Path) -> None:
    """Losses, norms and weights to the bit; the final numbers come from whole weights, read from the disk."""
    data = make_data(tmp_path / "data")
    more = ["params=connector_only", "trainer.precision=bf16-mixed", "trainer.val_every=2", "trainer.max_steps=3"]
    more += ["trainer.guard.random_frozen=allow", "trainer.export=true"]
    runs = [
        train(command(data, tmp_path, *more, f"trainer.halve_frozen={kind}", name=str(kind))) for kind in (True, False)
    ]
    logs = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    for row, same in zip(*logs, strict=True):
        keys = {key for key in row if key.startswith(("loss", "grad_norm", "lr"))}
        assert keys and {key: row[key] for key in keys} == {key: same[key] for key in keys}
    halved, whole = (load_file(run / "checkpoints/step-00000003/weights.safetensors") for run in runs)
    assert all(torch.equal(halved[name], whole[name]) for name in whole)
    halved, whole = (load_file(run / "export" / "model.safetensors") for run in runs)
    assert all(torch.equal(halved[name], whole[name]) for name in whole)


def test_dora_reads_its_weights_whole() -> None:
    model = make_llama().requires_grad_(False)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["up_proj"], use_dora=True), model.llm.inner)
    halve_frozen(model, torch.bfloat16)
    ups = [p for name, p in model.llm.inner.named_parameters() if "up_proj" in name]
    assert len(ups) == 2 * 4 and all(p.dtype == torch.float32 for p in ups) and len(find_halvable(model)) == 14 - 2


def test_it_names_no_other_run() -> None:
    ids = {run_id(compose_config(["recipe=llava15_stage1", f"trainer.halve_frozen={k}"])) for k in ("true", "false")}
    assert len(ids) == 1
