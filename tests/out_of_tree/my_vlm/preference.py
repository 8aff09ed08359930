"""Direct preference optimization: a chosen answer against a rejected one, both compared with a frozen reference model.

Rafailov et al. 2023, arXiv 2305.18290, equation 7; with label smoothing as in cDPO (Mitchell 2023,
ericmitchell.ai/cdpo.pdf). Legend: M samples of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from vlm_train.contracts.batch import Batch
from vlm_train.contracts.family import PredictsTokens
from vlm_train.contracts.objective import Loss, Objective, StepContext
from vlm_train.errors import ConfigError
from vlm_train.models.layers.passes import outputs_of
from vlm_train.objectives.per_sample import sum_by_segment


class Preference(Objective):
    """`-log sigmoid(beta * margin)` a sample; the margin is that of the log-likelihoods over the reference's.

    A token counts with its loss weight: batch.normalize=token gives DPO's sums, and segments that the data weighs more
    (dense DPO) count more.

    Args:
        beta: how far the model may leave its reference; smaller is farther.
        label_smoothing: share of the pairs whose labels are thought to be swapped, below 1/2.
        reference_columns: columns beside the shards with the reference's log-likelihoods of the chosen and of the
            rejected answers, computed once; then the run has no second model.

    Raises:
        ConfigError: a value outside its range.
    """

    streams = ("llm", "rejected")
    normalized_by = "samples"
    needs_reference = True
    needs = (PredictsTokens,)

    def __init__(
        self, *, beta: float = 0.1, label_smoothing: float = 0.0, reference_columns: Sequence[str] = ()
    ) -> None:
        if beta <= 0 or not 0 <= label_smoothing < 0.5:
            raise ConfigError(
                f"objective: got beta={beta}, label_smoothing={label_smoothing}; allowed: beta above 0, "
                "label_smoothing from 0 to below 0.5"
            )
        if len(reference_columns) not in (0, 2):
            raise ConfigError(
                f"objective: got reference_columns={list(reference_columns)}; allowed: none, or two names"
            )
        self.beta, self.label_smoothing = beta, label_smoothing
        self.columns, self.needs_reference = tuple(reference_columns), not reference_columns

    def __call__(self, model: Any, batch: Batch, context: StepContext) -> dict[str, Loss]:
        """`{preference: Loss}`, and how often and how far the chosen answer is ahead."""
        if self.columns:
            chosen, rejected = (batch.columns[name] for name in self.columns)
            usual = chosen - rejected
        else:
            assert context.reference is not None  # the run has one: `needs_reference`
            with context.reference() as reference:  # nothing in here records gradients
                usual = compare_answers(reference, batch)
        margin = self.beta * (compare_answers(model, batch) - usual)
        losses = -F.logsigmoid(margin) * (1 - self.label_smoothing) - F.logsigmoid(-margin) * self.label_smoothing
        count = losses.new_tensor(float(len(losses)))
        seen = margin.detach()
        metrics = {"margin": seen.sum() / count.clamp(min=1), "ahead": (seen > 0).sum() / count.clamp(min=1)}
        return {"preference": Loss(losses.sum(), count, 1.0, metrics)}


def compare_answers(model: Any, batch: Batch) -> Tensor:
    """`[M]`: log-likelihood of the chosen answer less that of the rejected one."""
    chosen, rejected = (sum_log_likelihoods(model, batch, stream) for stream in Preference.streams)
    return chosen - rejected


def sum_log_likelihoods(model: Any, batch: Batch, stream: str) -> Tensor:
    """`[M]`: of the answers in a stream."""
    text = batch.text[stream]
    index = text.supervised
    logits = model.logits(outputs_of(model, batch, stream).hidden.flatten(0, 1)[index]).float()
    losses = F.cross_entropy(logits, text.labels.flatten()[index], reduction="none")
    return sum_by_segment(batch, text, index, -losses * text.weights.flatten()[index])
