"""Log-likelihoods of the answers of a batch, which preference objectives compare and `mode=score` writes.

Legend: S supervised positions, D width, M samples of the batch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlm_train.contracts.batch import Batch
from vlm_train.contracts.objective import StepContext
from vlm_train.models.layers.passes import call_in_chunks, outputs_of
from vlm_train.objectives.per_sample import sum_by_segment

ANSWERS = ("llm", "rejected")
"""The streams of the chosen and of the rejected answers."""


def score_answers(
    model: Any, batch: Batch, stream: str, context: StepContext, *, gamma: float | None = None, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """`[M]` log-likelihoods of the answers in a stream, and `[M]` their lengths: sums over tokens of w log p, and of w.

    w is a token's loss weight: 1, or what the data weighs a segment with.

    Args:
        gamma: the weight of all tokens that the data weighs otherwise than with 1 (dense DPO); None: the data's.
        chunk: positions per head call.
    """
    text = batch.text[stream]
    index = text.supervised
    hidden = outputs_of(model, batch, stream).hidden.flatten(0, 1)[index]  # [S, D]
    labels, weights = text.labels.flatten()[index], text.weights.flatten()[index]
    if gamma is not None:
        weights = weights.where(weights == 1, gamma)
    found = call_in_chunks(partial(_log_likelihoods, model), (hidden, labels), context, chunk=chunk)
    likelihoods = torch.cat(found) * weights
    return sum_by_segment(batch, text, index, likelihoods), sum_by_segment(batch, text, index, weights)


def _log_likelihoods(model: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    """`[S]`, of the labels, from hidden states `[S, D]`."""
    return -F.cross_entropy(model.logits(hidden).float(), labels, reduction="none")
