"""The head of a language model on some positions at a time, so that the logits of a whole batch are never held.

Legend: S positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlm_train.contracts.objective import StepContext

Result = TypeVar("Result")


def call_in_chunks(
    compute: Callable[..., Result], tensors: Sequence[Tensor], context: StepContext, *, chunk: int
) -> list[Result]:
    """What `compute` gives of at most `chunk` positions of every tensor `[S, ...]`, piece by piece; it is computed
    again in backward. No positions still make one call, so that a batch without targets reaches the same parameters.
    Ranks that gather the head at every call make as many calls as the one with the most positions.
    """
    pieces = max(1, -(-context.most_of_ranks(len(tensors[0])) // chunk))
    if torch.is_grad_enabled():
        compute = partial(checkpoint, compute, use_reentrant=False, preserve_rng_state=False)
    return [compute(*part) for part in zip(*(tensor.tensor_split(pieces) for tensor in tensors), strict=True)]
