"""Next-token loss on the supervised positions only, without ever holding the logits of a whole batch.

Legend: B rows, T tokens, S supervised positions, D width, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlm_train.contracts.batch import Batch
from vlm_train.contracts.family import PredictsTokens
from vlm_train.contracts.objective import Loss, Objective, StepContext
from vlm_train.errors import ConfigError
from vlm_train.models.layers.passes import call_in_chunks, outputs_of


class LanguageModeling(Objective):
    """Cross entropy of `model(batch) -> hidden [B, T, D]` against the stream's labels.

    The head runs on `chunk` positions at a time and is recomputed in backward, so logits take at most `chunk` x V.

    Args:
        weight: factor in the total loss.
        stream: the token stream that is learned and that normalizes the loss.
        chunk: positions per head call.
        label_smoothing: share of every target that is spread evenly over the whole vocabulary, as torch's
            `cross_entropy` does.
        z_loss: factor on the square of the logits' log-sum-exp, which is added to every token's loss and keeps logits
            from growing (PaLM, arXiv 2204.02311, section 5; Molmo2). It counts in the loss that is logged and
            validated; its mean without the factor is logged as `z`.
        name: of its lines in the log, where several objectives are at work.
    """

    needs = (PredictsTokens,)

    def __init__(
        self,
        *,
        weight: float = 1.0,
        stream: str = "llm",
        chunk: int = 1024,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        name: str = "lm",
    ) -> None:
        if chunk < 1:
            raise ConfigError(f"objective.lm.chunk: got {chunk}; allowed: from 1")
        if z_loss < 0:
            raise ConfigError(f"objective.lm.z_loss: got {z_loss}; allowed: 0 or more")
        self.weight = weight
        self.stream = stream
        self.streams = (stream,)
        self.chunk = chunk
        self.label_smoothing, self.z_loss, self.name = label_smoothing, z_loss, name

    def __call__(self, model: Any, batch: Batch, context: StepContext) -> dict[str, Loss]:
        """`{name: Loss}`: weighted sum over supervised tokens, count = sum of their weights."""
        stream = batch.text[self.stream]
        index = stream.supervised
        hidden = outputs_of(model, batch, self.stream).hidden.flatten(0, 1)[index]  # [S, D]
        labels, weights = stream.labels.flatten()[index], stream.weights.flatten()[index]
        # A batch without supervised tokens still runs the head once: its loss is 0, attached to the graph.
        total = correct = squares = hidden.new_zeros((), dtype=torch.float32)
        losses = []
        compute = partial(_token_loss, model, self.label_smoothing, self.z_loss)
        for loss, hits, square in call_in_chunks(compute, (hidden, labels, weights), context, chunk=self.chunk):
            total, correct, squares = total + loss.sum(), correct + hits, squares + square
            losses.append(loss.detach())
        logged = {"accuracy": (correct / max(len(index), 1)).detach()}
        if self.z_loss:
            logged["z"] = squares / max(len(index), 1)
        sources = batch.sum_by_source(stream, index, torch.stack([torch.cat(losses), weights], dim=1))
        return {self.name: Loss(total, weights.sum(), self.weight, logged, sources)}


def _token_loss(
    model: Any, smoothing: float, z_loss: float, hidden: Tensor, labels: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted losses `[S]`, number of correct predictions, and sum of the squared log-sum-exps (0 without z-loss), of
    `[S, D]` hidden states."""
    logits = model.logits(hidden).float()
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    squares = weights.new_zeros(())
    if z_loss:
        square = logits.logsumexp(dim=-1).square()
        losses, squares = losses + z_loss * square, square.detach().sum()
    hits = (logits.detach().argmax(dim=-1) == labels).sum().float()
    return losses * weights, hits, squares
