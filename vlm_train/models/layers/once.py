"""Passes that several objectives of one batch need are made once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from vlm_train.contracts.batch import Batch
from vlm_train.contracts.family import Family, Outputs

Made = TypeVar("Made")


def cached_on_batch(batch: Batch, owner: Family, name: str, make: Callable[[], Made]) -> Made:
    """What `make` gives, kept with the batch, hence as long as it: the second to ask gets the same.

    `owner` and `name` say what it is. Kept apart by whether gradients are recorded, and whether the model plays its own
    reference.
    """
    key = (id(owner), name, torch.is_grad_enabled(), owner.plays_reference)
    if key not in batch.shared:
        batch.shared[key] = make()
    return batch.shared[key]


def outputs_of(model: Any, batch: Batch, stream: str) -> Outputs:
    """`model(batch, stream)` as `Outputs`. A pass that gives auxiliary values is made once a batch, because one
    objective reads its hidden states, and another one its auxiliary values."""
    kept = (id(model), "outputs", stream, torch.is_grad_enabled(), model.plays_reference)
    if kept not in batch.shared:
        found = model(batch, stream=stream)
        if isinstance(found, Tensor):
            return Outputs(found, {})
        batch.shared[kept] = found
    return batch.shared[kept]
