"""Dry runs of every recipe at full size: exact parameter counts, tokens and steps, offline and without assets."""

from __future__ import annotations

import math
import time
from functools import lru_cache
from typing import Any

import pytest

from tests.support.slow import run_few
from vlm_train.config.compose import compose_config
from vlm_train.config.folders import recipes_dir
from vlm_train.dryrun.plan import rows_at_once
from vlm_train.dryrun.report import dry_run

RECIPES = sorted(path.stem for path in (recipes_dir() / "recipe").glob("*.yaml"))

CLIP_L14_336, CLIP_L14 = 303_507_456, 303_179_776
LLAMA_7B, LLAMA_13B = 6_738_415_616, 13_015_864_320
LINEAR_7B, MLP_7B, MLP_13B = 4_198_400, 20_979_712, 31_467_520
LORA_7B, LORA_13B = 319_815_680, 500_695_040

VIT_G, LN_VISION, OPT_2_7B = 985_952_256, 2_816, 2_651_596_800
QFORMER, QFORMER_TEXT, ALIGNED = 105_162_240, 185_684_736, 186_705_470  # ALIGNED: with text, heads and ln_vision
TO_T5, T5_XL = 768 * 2048 + 2048, 2_849_757_184
TO_OPT, TO_VICUNA, CONCAT = 768 * 2560 + 2560, 3_149_824, 23_072_768
SCORES = 2 * 1408 + 1408 * 256 + 256 + 256 + 1
GATE = 1024 * 1408 + 1408 + 2 * 1408 * 1408 + 1408

# recipe: (vision, connector, llm without adapters, trainable, visual tokens, optimizer steps)
FACTS = {
    "llava1_stage1": (CLIP_L14, LINEAR_7B, LLAMA_7B, LINEAR_7B, 256, math.ceil(595_000 / 128)),
    "llava1_stage2": (CLIP_L14, LINEAR_7B, LLAMA_7B, LINEAR_7B + LLAMA_7B, 256, math.ceil(3 * 158_000 / 32)),
    "llava15_stage1": (CLIP_L14_336, MLP_7B, LLAMA_7B, MLP_7B, 576, 2181),
    "llava15_stage2": (CLIP_L14_336, MLP_7B, LLAMA_7B, MLP_7B + LLAMA_7B, 576, 5198),
    "llava15_13b_stage1": (CLIP_L14_336, MLP_13B, LLAMA_13B, MLP_13B, 576, 2181),
    "llava15_13b_stage2": (CLIP_L14_336, MLP_13B, LLAMA_13B, MLP_13B + LLAMA_13B, 576, 5198),
    "llava15_lora": (CLIP_L14_336, MLP_7B, LLAMA_7B + LORA_7B, MLP_7B + LORA_7B, 576, 5198),
}

# recipe: (vision, connector, llm, trainable, visual tokens, optimizer steps, warm-up)
QFORMER_FACTS = {
    "blip2_stage1": (VIT_G, QFORMER_TEXT, None, ALIGNED, 0, 250_000, 2000),
    "blip2_stage2_opt": (VIT_G, QFORMER + TO_OPT, OPT_2_7B, 107_133_696, 32, 80_000, 2000),
    "blip2_stage2_flant5": (VIT_G, QFORMER + TO_T5, T5_XL, 106_739_968, 32, 80_000, 2000),
    "instructblip_vicuna7b": (VIT_G, QFORMER_TEXT + TO_VICUNA, LLAMA_7B, 188_837_376, 32, 60_000, 1000),
    "instructblip_flant5xl": (VIT_G, QFORMER_TEXT + TO_T5, T5_XL, 187_262_464, 32, 60_000, 1000),
    "minigpt4_stage1": (VIT_G, QFORMER + TO_VICUNA, LLAMA_7B, TO_VICUNA, 32, 20_000, 5000),
    "minigpt4_stage2": (VIT_G, QFORMER + TO_VICUNA, LLAMA_7B, TO_VICUNA, 32, 400, 200),
    "minigpt4_llama2": (VIT_G, CONCAT, LLAMA_7B, CONCAT, 64, 20_000, 5000),
    "minigpt5_gate": (VIT_G + CLIP_L14 + GATE, QFORMER + TO_VICUNA, LLAMA_7B, GATE + TO_VICUNA, 32, 20_000, 5000),
    "dynamic_qformer": (VIT_G, QFORMER + TO_OPT + SCORES, OPT_2_7B, 107_133_696 + SCORES, 32, 80_000, 2000),
    "hierarchical_qformer": (VIT_G, QFORMER + TO_OPT + 3 * LN_VISION, OPT_2_7B, 107_139_328, 32, 80_000, 2000),
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a dry run must not use the network")

    monkeypatch.setattr("socket.socket.connect", refuse)


@lru_cache(maxsize=1)
def planned(*overrides: str) -> dict[str, Any]:
    return dry_run(compose_config(["dry_run=true", *overrides]))


def test_llava15_total_is_the_published_one() -> None:
    assert CLIP_L14_336 + MLP_7B + LLAMA_7B == 7_062_902_784


@pytest.mark.parametrize("name", sorted(FACTS))
def test_counts_tokens_and_steps_are_exact(name: str) -> None:
    plan = planned(f"recipe={name}")
    vision, connector, llm, trainable, tokens, steps = FACTS[name]
    assert plan["parameters"] == {"vision": vision, "connector": connector, "llm": llm}
    assert plan["total"] == vision + connector + llm
    assert plan["trainable"] == trainable
    assert (plan["visual_tokens"], plan["steps"]) == (tokens, steps)
    assert plan["warmup_steps"] == math.ceil(0.03 * steps)
    assert plan["checkpoint_bytes"] == 3 * 4 * trainable, "weights and AdamW's two states in fp32; nothing frozen"


@pytest.mark.parametrize("name", sorted(QFORMER_FACTS))
def test_counts_of_the_qformer_line_are_exact(name: str) -> None:
    plan = planned(f"recipe={name}")
    vision, connector, llm, trainable, tokens, steps, warmup = QFORMER_FACTS[name]
    parts = plan["parameters"]
    assert (parts["vision"], parts["connector"], parts.get("llm")) == (vision, connector, llm)
    assert plan["trainable"] == trainable
    assert (plan["visual_tokens"], plan["steps"], plan["warmup_steps"]) == (tokens, steps, warmup)


def test_other_sizes_of_the_qformer_line() -> None:
    assert planned("recipe=blip2_stage2_opt", "llm=opt_6_7b")["trainable"] == 108_314_880
    assert planned("recipe=minigpt4_stage1", "llm=vicuna_13b_v15")["trainable"] == 3_937_280


def test_a_device_holds_no_more_rows_than_its_share(capsys: pytest.CaptureFixture[str]) -> None:
    planned.cache_clear()
    planned("recipe=llava15_stage1", "batch.micro=256")
    assert "Predicted for 32 rows" in capsys.readouterr().out


def test_lora_13b() -> None:
    plan = planned("recipe=llava15_lora", "llm=vicuna_13b_v15")
    assert plan["trainable"] == MLP_13B + LORA_13B


def test_linear_projector_13b() -> None:
    plan = planned("recipe=llava1_stage1", "llm=vicuna_13b_v15")
    assert plan["trainable"] == plan["parameters"]["connector"] == 5_248_000


@pytest.mark.parametrize("name", run_few(RECIPES, ("blip2_stage1", "clip_vitb32", "llava15_qlora", "qwen25_vl_3b")))
def test_every_recipe_dry_runs_without_assets(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    start = time.monotonic()
    plan = dry_run(compose_config(["dry_run=true", f"recipe={name}", f"paths.data={tmp_path}"]))
    assert time.monotonic() - start < 30  # the goal is 10 s on an idle machine
    assert plan["recipe"] == name
    assert 0 < plan["trainable"] <= plan["total"] == sum(plan["parameters"].values())
    assert plan["flops_per_sample"] > 0 and plan["steps"] > 0 and plan["cheapest"] is not None
    assert plan["round_trip_tensors"] > 0
    printed = capsys.readouterr().out
    for word in (name, f"{plan['total']:,}", "visual tokens", "optimizer steps", "GiB a device", "a checkpoint"):
        assert word in printed


def test_what_is_still_open_is_noted(capsys: pytest.CaptureFixture[str]) -> None:
    planned.cache_clear()
    planned("recipe=llava1_stage2")
    printed = capsys.readouterr().out
    assert "init_from[0].run is still open" in printed
    assert "llm.weights is still open" in printed


def test_shards_count_more_than_the_published_size(tmp_path: Any) -> None:
    from data_pipelines.shards.manifest import FileInfo, Manifest

    folder = tmp_path / "llava_558k" / "train"
    folder.mkdir(parents=True)
    index = FileInfo(name="index.npz", bytes=0, sha256="")
    Manifest(samples=2560, shards=(), index=index).write(folder)
    plan = planned("recipe=llava15_stage1", f"paths.data={tmp_path}")
    assert (plan["samples"], plan["steps"]) == (2560, 10)
    assert planned("recipe=llava15_stage1", f"paths.data={tmp_path}", "trainer.max_steps=7")["steps"] == 7
    assert planned("recipe=llava15_stage1", f"paths.data={tmp_path}", "data.limit=256")["steps"] == 1


def test_an_encoder_decoder_is_planned_exactly() -> None:
    pair = ["model=prefix_seq2seq", "llm=flant5_xl", "template=seq2seq", "objective.lm.stream=decoder"]
    pair.append("data.pack=null")  # an encoder-decoder takes no packed rows
    plan = planned("recipe=llava1_stage1", *pair)
    assert plan["parameters"] == {"vision": CLIP_L14, "connector": 1024 * 2048 + 2048, "llm": 2_849_757_184}
    assert (plan["trainable"], plan["visual_tokens"]) == (1024 * 2048 + 2048, 256)
    few = planned("recipe=llava1_stage1", *pair, "target.supervised_tokens=1")
    assert plan["flops_per_sample"] > few["flops_per_sample"]  # every learned token takes the head


def test_sgd_needs_no_state() -> None:
    plan = planned("recipe=llava15_stage1", "optim=sgd")
    assert plan["checkpoint_bytes"] == 4 * MLP_7B
    assert plan["memory"]["ddp"]["optimizer"] == 0


def test_memory_decides_the_strategy() -> None:
    assert planned("recipe=llava15_stage1")["cheapest"] == "ddp"
    assert planned("recipe=llava15_stage2")["cheapest"] == "zero1"  # published: zero3
    assert planned("recipe=llava15_stage2", "target.memory_gib=24")["cheapest"] is None
    recomputed = ["recipe=llava15_stage2", "trainer.activation_checkpointing=full"]
    assert planned(*recomputed, "target.memory_gib=24")["cheapest"] == "zero3"
    assert planned(*recomputed, "target.memory_gib=16")["cheapest"] == "zero3_offload"


@pytest.mark.parametrize(("gpus", "chunk", "rows"), [(128, 64, 64), (128, "null", 256), (1, 256, 256), (64, 1024, 512)])
def test_gradient_caching_holds_one_chunk(gpus: int, chunk: int | str, rows: int) -> None:
    overrides = ["recipe=clip_vitb32", f"target.gpus={gpus}", f"model.cache_chunk={chunk}"]
    assert rows_at_once(compose_config(overrides)) == rows


def test_similarities_of_a_large_batch_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    dry_run(compose_config(["dry_run=true", "recipe=clip_vitb32", "target.gpus=1", "target.memory_gib=80"]))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("single ")]
    assert line.split()[6] == "20.0"  # GiB: five matrices of 32,768 squared in fp32
