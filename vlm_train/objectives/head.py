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

Result = TypeVar("Result")


def call_in_chunks(
    compute: Callable[..., Result], tensors: Sequence[Tensor], *, chunk: int, chunks: int | None = None
) -> list[Result]:
    """What `compute` gives of at most `chunk` positions of every tensor `[S, ...]`, piece by piece; it is computed
    again in backward. No positions still make one call, so that a batch without targets reaches the same parameters.

    Args:
        chunks: a fixed number of calls instead. ZeRO-3 and FSDP2 gather the head at every call, so ranks must agree.
    """
    pieces = chunks or max(1, -(-len(tensors[0]) // chunk))
    if torch.is_grad_enabled():
        compute = partial(checkpoint, compute, use_reentrant=False, preserve_rng_state=False)
    return [compute(*part) for part in zip(*(tensor.tensor_split(pieces) for tensor in tensors), strict=True)]
