"""One rank of two that train a tiny model under DeepSpeed on the CPU and count the bytes that it holds."""

from __future__ import annotations

import json
import os
from typing import Any

import deepspeed
import torch
from torch import nn

SIZES = (64, 64, 128, 64)


def tiny() -> nn.Sequential:
    """Three layers without biases, the first of which is frozen."""
    model = nn.Sequential(*(nn.Linear(*pair, bias=False) for pair in zip(SIZES, SIZES[1:], strict=False)))
    model[0].requires_grad_(False)
    return model


def count(stage: int, precision: str) -> dict[str, int]:
    """Bytes of weights and optimizer states, and of gradients at the most in a step of two micro-batches."""
    model = tiny()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "bf16": {"enabled": precision == "bf16-mixed"},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 10**5, "stage3_param_persistence_threshold": 0},
    }
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    engine, zero, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    row = torch.ones(1, 64, dtype=torch.bfloat16 if precision == "bf16-mixed" else torch.float32)
    held = []
    for _ in range(2):
        engine.backward(engine(row).sum())
        held.append(_gradients(model, zero, stage))
        engine.step()
    masters = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    states = [value for state in zero.optimizer.state.values() for value in state.values()]
    return {
        "weights": sum((p.ds_tensor if stage == 3 else p).nbytes for p in model.parameters()),
        "gradients": max(held),
        "optimizer": _distinct(
            [*masters, *(value for value in states if torch.is_tensor(value) and value.ndim)], model
        ),
    }


def _gradients(model: nn.Module, zero: Any, stage: int) -> int:
    if stage == 3:
        return int(zero.grad_partitions_flat_buffer.nbytes)
    if stage == 2:
        return sum(one.nbytes for group in zero.averaged_gradients.values() for one in group or ())
    return sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)


def _distinct(tensors: list[torch.Tensor], model: nn.Module) -> int:
    """Bytes of tensors that are not the weights themselves."""
    own = {getattr(p, "ds_tensor", p).untyped_storage().data_ptr() for p in model.parameters()}
    return sum(tensor.nbytes for tensor in tensors if tensor.untyped_storage().data_ptr() not in own)


if __name__ == "__main__":
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    cases = [(stage, precision) for precision in ("bf16-mixed", "32-true") for stage in (1, 2, 3)]
    found = {f"zero{stage} {precision}": count(stage, precision) for stage, precision in cases}
    if os.environ["RANK"] == "0":
        print("counted: " + json.dumps(found))
