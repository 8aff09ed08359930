"""The plan of a run: what it trains, computes, holds in memory, takes in steps and leaves on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn

from vlm_train.dryrun.flops import Flops, count
from vlm_train.dryrun.length import Disk, Length, disk, length
from vlm_train.dryrun.memory import RUNTIME, RUNTIME_CPU, STRATEGIES, Needs, Peak, peak
from vlm_train.dryrun.trace import Trace, blocks, meta_batch, trace, visual_tokens
from vlm_train.dryrun.twin import round_trip
from vlm_train.objectives.base import identity_gather
from vlm_train.params import Policy, apply_policy, unused_parameters


@dataclass(frozen=True)
class Plan:
    """Everything a dry run finds out."""

    recipe: str
    policy: Policy
    visual_tokens: int
    flops: dict[str, Flops]
    peaks: dict[str, Peak]
    peaks_checkpointed: dict[str, Peak]
    length: Length
    disk: Disk
    round_trip: int


def make_plan(cfg: DictConfig, model: Any) -> Plan:
    """The plan of a model on the meta device."""
    policy = apply_policy(
        model,
        cfg.params.rules,
        weight_decay=cfg.optim.weight_decay,
        decay_norms_and_biases=cfg.params.decay_norms_and_biases,
        unused=unused_parameters(model),
    )
    visual = visual_tokens(model)
    typical = trace_step(cfg, model, text_tokens=cfg.target.text_tokens, supervised=cfg.target.supervised_tokens)
    longest = cfg.data.get("pack") or cfg.data.get("max_length") or visual + cfg.target.text_tokens
    if not cfg.trainer.precision.startswith("32"):
        model.to(torch.bfloat16)
    biggest = trace_step(cfg, model, text_tokens=max(longest - visual, 1), supervised=max(longest - visual, 1))
    states = optimizer_states(cfg)
    return Plan(
        recipe=cfg.recipe_name,
        policy=policy,
        visual_tokens=visual,
        flops=count(typical.products),
        peaks=_peaks(cfg, model, policy, biggest.activations, states),
        peaks_checkpointed=_peaks(cfg, model, policy, biggest.checkpointed, states),
        length=length(cfg, visual + cfg.target.text_tokens),
        disk=disk(cfg, policy.trainable, states),
        round_trip=round_trip(cfg),
    )


def trace_step(cfg: DictConfig, model: nn.Module, *, text_tokens: int, supervised: int) -> Trace:
    """Trace the losses of one sample."""
    objectives = [instantiate(node) for node in cfg.objective.values() if node is not None]
    streams = [getattr(objective, "text", objective.stream) for objective in objectives]
    batch = meta_batch(model, streams=streams, rows=1, text_tokens=text_tokens, supervised=supervised)

    def forward() -> list[Any]:
        return [objective(model, batch, identity_gather) for objective in objectives]

    with torch.device("meta"):
        return trace(model, forward)


def optimizer_states(cfg: DictConfig) -> int:
    """Numbers that the optimizer keeps per parameter, found by letting it step once."""
    parameter = nn.Parameter(torch.zeros(64))
    parameter.grad = torch.zeros(64)
    optimizer = instantiate(cfg.optim, params=[{"params": [parameter]}], _convert_="all")
    optimizer.step()
    return sum(value.numel() for value in optimizer.state[parameter].values() if value.numel() == 64) // 64


def _peaks(cfg: DictConfig, model: nn.Module, policy: Policy, activations: int, states: int) -> dict[str, Peak]:
    sizes = [sum(p.numel() for p in block.parameters()) for part in model.children() for block in blocks(part)]
    needs = Needs(
        parameters=policy.total,
        trainable=policy.trainable,
        largest_layer=max(sizes, default=policy.total),
        states=states,
        precision=cfg.trainer.precision,
        activations=activations * cfg.batch.micro,
        logits=_logits(cfg, model),
    )
    runtime = RUNTIME_CPU if cfg.trainer.accelerator == "cpu" else RUNTIME
    return {strategy: peak(strategy, needs, cfg.target.gpus, runtime) for strategy in STRATEGIES}


def _logits(cfg: DictConfig, model: Any) -> int:
    """Bytes of one chunk of logits in 16 bits, its fp32 copy, and the gradients of both."""
    chunk = max((node.get("chunk") or 0 for node in cfg.objective.values() if node is not None), default=0)
    return chunk * model.llm.vocab_size * (2 + 4 + 4 + 2) if chunk else 0
