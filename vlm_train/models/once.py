"""Passes that several objectives of one batch need are made once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from vlm_train.data.batch import Batch

Made = TypeVar("Made")


def once(batch: Batch, owner: object, name: str, make: Callable[[], Made]) -> Made:
    """What `make` gives, kept with the batch, hence as long as it: the second to ask gets the same.

    `owner` and `name` say what it is. Kept apart by whether gradients are recorded.
    """
    key = (id(owner), name, torch.is_grad_enabled())
    if key not in batch.shared:
        batch.shared[key] = make()
    return batch.shared[key]
