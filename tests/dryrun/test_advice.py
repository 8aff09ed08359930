"""Which strategy a dry run names for hardware that is not here, and what it says when nothing fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf, open_dict

from vlm_train.build import build_model
from vlm_train.config.compose import compose_config
from vlm_train.dryrun import advice
from vlm_train.dryrun.advice import Advice, advise_run, configured_strategy
from vlm_train.dryrun.memory import GIB, NF4
from vlm_train.dryrun.plan import Plan, make_plan
from vlm_train.dryrun.report import format_plan, without_assets

Planned = tuple[DictConfig, Plan]

UNPACKED = ("recipe=llava15_stage2", "data.pack=null", "batch.micro=16", "trainer.activation_checkpointing=full")


def planned(*overrides: str) -> Planned:
    cfg, _ = without_assets(compose_config(["dry_run=true", *overrides]))
    return cfg, make_plan(cfg, build_model(cfg, meta=True))


@pytest.fixture(scope="module")
def full() -> Planned:
    """LLaVA-1.5-7B, stage 2: 16 rows of 2048 tokens, with activation checkpointing; the whole language model learns."""
    return planned(*UNPACKED, "strategy=auto")


def given(one: Planned, **target: Any) -> tuple[Advice, str]:
    """The advice for a target, and what is printed of it."""
    cfg = one[0].copy()
    for key, value in target.items():
        cfg.target[key] = value
    printed = next(part for part in format_plan(cfg, one[1]) if part.startswith("GiB a"))
    assert max(map(len, printed.splitlines())) <= 110
    return advise_run(cfg, one[1]), printed


def test_gpus_that_are_not_here(full: Planned) -> None:
    found, printed = given(full, gpus=8, memory_gib=80)
    assert found.best == "zero1" and "Cheapest that fits: zero1 (strategy=zero1)" in printed
    assert not found.fits and "strategy=auto (here ddp) does not fit: 156 of 80 GiB" in printed
    assert given(full, gpus=8, memory_gib=48)[0].best == "zero2"
    assert given(full, gpus=8, memory_gib=40)[0].best == "zero3"
    assert given(full, gpus=64, memory_gib=320)[0].best == "ddp"
    assert not found.suggestions and "What helps" not in printed


def test_offload_needs_room_on_the_cpu(full: Planned) -> None:
    assert given(full, gpus=1, memory_gib=24)[0].best == "zero3_offload"
    assert given(full, gpus=1, memory_gib=24, cpu_gib=160)[0].best == "fsdp2_offload"
    assert given(full, gpus=1, memory_gib=24, cpu_gib=64)[0].best is None, "the optimizer stays on the CPU"
    assert given(full, gpus=16, memory_gib=24, cpu_gib=180)[0].best == "zero3_offload", "two nodes share it"
    found, printed = given(full, gpus=1, memory_gib=24, cpu_gib=2)
    assert found.best is None and "Nothing fits." in printed


def test_smaller_micro_batches_come_before_offload(full: Planned) -> None:
    found, printed = given(full, gpus=8, memory_gib=24)
    assert found.best == "zero3_offload"
    assert [(one.flag, one.strategy, one.fits) for one in found.suggestions] == [("batch.micro=4", "zero3", True)]
    assert found.suggestions[0].peak.total <= 24 * GIB
    assert "What avoids offloading" in printed and "fits with strategy=zero3" in printed


def test_checkpointing_comes_first(full: Planned) -> None:
    cfg, plan = planned(*UNPACKED, "trainer.activation_checkpointing=none")
    assert plan.needs.activations == 16 * plan.activations["none"]
    assert plan.activations == full[1].activations
    found, printed = given((cfg, plan), gpus=8, memory_gib=48)
    assert [one.flag for one in found.suggestions] == ["trainer.activation_checkpointing=full"]
    assert found.suggestions[0].strategy == "zero2" and found.best is None
    assert "trainer.activation_checkpointing=none: 183 GiB; selective 106 GiB, full 14.9 GiB." in printed


def test_memory_is_that_of_all_pictures_of_a_row() -> None:
    one, packed = (planned("recipe=llava15_stage2", "params=all", f"data.pack={n}")[1] for n in (2048, 8192))
    assert packed.activations["none"] == pytest.approx(4 * one.activations["none"], rel=0.1)


def test_shorter_rows_come_after_recomputed_layers() -> None:
    cfg, plan = planned("recipe=llava15_stage2", "strategy=zero3", "data.pack=32768")
    assert plan.needs.activations == plan.activations["none"]
    found, printed = given((cfg, plan), gpus=8, memory_gib=24)
    assert [one.flag for one in found.suggestions] == ["trainer.activation_checkpointing=full", "data.pack=2048"]
    assert found.suggestions[1].fits and "data.pack=2048" in printed
    row = found.suggestions[1].peak.activations
    assert row == plan.activations["full"] * 2048 // 32768
    cfg.batch.samples, cfg.batch.tokens = None, 32768 * 64
    flags = [one.flag for one in given((cfg, plan), gpus=8, memory_gib=20)[0].suggestions]
    assert "data.pack=2048" not in flags, "rows decide what such a step learns"


def test_adapters_come_last(full: Planned, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "peft").mkdir()
    (tmp_path / "strategy").mkdir()
    (tmp_path / "peft" / "lora.yaml").write_text("rank: 16")
    monkeypatch.setattr(advice, "config_dir", lambda: tmp_path)
    found, _ = given(full, gpus=1, memory_gib=18.5, cpu_gib=4)
    assert [one.flag for one in found.suggestions] == ["batch.micro=1", "peft=lora"]
    assert found.suggestions[-1].strategy == "zero1" and found.suggestions[-1].fits
    (tmp_path / "peft" / "qlora.yaml").write_text("rank: 16")
    found, printed = given(full, gpus=1, memory_gib=10, cpu_gib=1)
    assert [one.flag for one in found.suggestions] == ["batch.micro=1", "peft=lora", "peft=qlora"]
    assert found.suggestions[-1].fits and "not yet" in printed
    learned = 16 * full[1].llm.per_rank
    assert learned == 39_976_960, "LoRA of rank 16 on all linear layers of a 7B Llama"


def test_a_contrast_of_samples_is_not_cut(full: Planned) -> None:
    cfg, plan = full[0].copy(), full[1]
    with open_dict(cfg):
        cfg.objective = {"contrastive": {"_target_": "vlm_train.objectives.contrastive.Contrastive"}}
    cfg.target.gpus, cfg.target.memory_gib = 8, 24
    assert not any("micro" in one.flag for one in advise_run(cfg, plan).suggestions)


def test_the_configured_strategy_is_known_by_its_option(
    full: Planned, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "strategy").mkdir()
    options = {
        "auto": None,
        "ddp": {"_target_": "a.ddp"},
        "zero2": {"_target_": "a.zero", "stage": 2, "buckets": {"reduce": 5}},
        "zero2_offload": {"_target_": "a.zero", "stage": 2, "buckets": {"reduce": 5}, "offload": "cpu"},
        "zero3": {"_target_": "a.zero", "stage": 3, "buckets": {"reduce": 5}},
    }
    for name, node in options.items():
        OmegaConf.save(
            {"strategy": node} if node is None or name == "ddp" else node, tmp_path / f"strategy/{name}.yaml"
        )
    monkeypatch.setattr(advice, "config_dir", lambda: tmp_path)
    cfg = full[0].copy()
    for name, node in options.items():
        with open_dict(cfg):
            cfg.strategy = node
        assert configured_strategy(cfg) == {"auto": "ddp"}.get(name, name)
    with open_dict(cfg):
        cfg.strategy = options["zero3"] | {"buckets": {"reduce": 7}}
    assert configured_strategy(cfg) == "zero3", "with another value"
    _, printed = given((cfg, full[1]), gpus=8, memory_gib=24)
    assert "The run's own strategy=zero3 does not fit: 31.7 of 24 GiB a device." in printed
    with open_dict(cfg):
        cfg.strategy = {"_target_": "somebody.elses"}
    assert configured_strategy(cfg) is None


def test_a_quantized_base_is_stored_small() -> None:
    _, plan = planned("recipe=llava15_qlora")
    linears = 32 * (4 * 4096**2 + 3 * 4096 * 11008)  # all of Vicuna-7B's but the head
    assert plan.needs.quantized == linears
    assert plan.needs.quantized_bytes == pytest.approx(linears * NF4, rel=1e-3)
    assert plan.needs.halved <= plan.needs.parameters - linears, "what has 4 bits is not kept in 16"
