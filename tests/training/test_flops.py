"""The FLOP formula against torch's own counter at full size, on the meta device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from torch.utils.flop_counter import FlopCounterMode

from vlm_train.build import build_model
from vlm_train.config.compose import compose_config
from vlm_train.contracts.objective import StepContext
from vlm_train.dryrun.report import without_assets
from vlm_train.training.flops import Flops, count_flops
from vlm_train.training.meta_batch import meta_batch
from vlm_train.training.params import apply_policy
from vlm_train.training.trace import trace_step

FULL_SIZE = ["llava1_stage1", "llava1_stage2", "llava15_stage1", "llava15_stage2", "llava15_lora"]
TEXT, SUPERVISED = 184, 40


def model_of(*overrides: str) -> tuple[Any, Any]:
    cfg, _ = without_assets(compose_config(["dry_run=true", *overrides]))
    model = build_model(cfg, meta=True)
    apply_policy(model, cfg.params.rules, weight_decay=0.0, unused=model.unused_parameters())
    return cfg, model


def counted(cfg: Any, model: Any) -> tuple[float, float, float]:
    """Forward and backward FLOPs by `FlopCounterMode`, and those of one forward of the head, which is recomputed."""
    objective = instantiate(cfg.objective.lm)
    batch = meta_batch(model, streams=["llm"], rows=1, text_tokens=TEXT, supervised=SUPERVISED)
    with FlopCounterMode(display=False) as forward, torch.device("meta"):
        loss = objective(model, batch, StepContext())["lm"].sum
    with FlopCounterMode(display=False) as backward, torch.device("meta"):
        loss.backward()
    head = 2.0 * SUPERVISED * model.llm.dim * model.llm.vocab_size
    return forward.get_total_flops(), backward.get_total_flops(), head


@pytest.mark.parametrize("name", FULL_SIZE)
def test_agrees_with_the_counter_within_a_percent(name: str) -> None:
    cfg, model = model_of(f"recipe={name}")
    seen = trace_step(cfg, model, text_tokens=TEXT, supervised=SUPERVISED)
    parts = count_flops(seen.products, causal_share=1.0)  # the counter counts attention in full
    forward, backward, head = counted(cfg, model)
    assert sum(part.forward for part in parts.values()) == pytest.approx(forward, rel=0.01)
    ours = sum(part.input_grad + part.weight_grad for part in parts.values())
    assert ours + head == pytest.approx(backward, rel=0.01)


def test_a_frozen_tower_has_no_backward_and_a_frozen_llm_no_weight_gradients() -> None:
    cfg, model = model_of("recipe=llava15_stage1")
    parts = count_flops(trace_step(cfg, model, text_tokens=TEXT, supervised=SUPERVISED).products)
    assert (parts["vision"].input_grad, parts["vision"].weight_grad) == (0, 0)
    assert parts["llm"].weight_grad == 0 < parts["llm"].input_grad
    counted(cfg, model)
    assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith("connector."))


# Arithmetic from the published configurations: 23 of CLIP's 24 layers; 2N and 2N more where a gradient passes or a
# weight learns. The published-shape totals were computed apart from this code.
@pytest.mark.parametrize(
    ("recipe", "text", "supervised", "tflop"),
    [("llava15_stage1", 44, 40, 16.7), ("llava15_stage2", 184, 120, 30.6), ("llava15_stage2", 324, 220, 36.2)],
)
def test_tflop_per_sample(recipe: str, text: int, supervised: int, tflop: float) -> None:
    cfg, model = model_of(f"recipe={recipe}")
    parts = count_flops(trace_step(cfg, model, text_tokens=text, supervised=supervised).products)
    assert sum(part.total for part in parts.values()) / 1e12 == pytest.approx(tflop, rel=0.01)
    assert parts["vision"].forward / 1e12 == pytest.approx(0.365, rel=0.01)


def test_a_packed_row_has_as_many_pictures_as_samples() -> None:
    cfg, model = model_of("recipe=llava15_stage1")
    one, three = (trace_step(cfg, model, text_tokens=n * 44, supervised=n * 40, images=n) for n in (1, 3))
    of_one, of_three = (count_flops(seen.products) for seen in (one, three))
    assert of_three["vision"].forward == 3 * of_one["vision"].forward
    assert of_three["connector"].total == 3 * of_one["connector"].total


def test_a_gradient_passing_costs_the_same_again() -> None:
    part = Flops(forward=2.0, input_grad=2.0, weight_grad=2.0)
    assert part.total == 6.0
    assert replace(part, weight_grad=0.0).total == 4.0
