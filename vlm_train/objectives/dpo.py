"""Preference tuning: a chosen answer against a rejected one, both compared with a frozen reference model.

DPO (Rafailov et al. 2023, arXiv 2305.18290, equation 7), with the settings of TRL's `DPOConfig` under their names; the
preference and quality losses of MPO (Wang et al. 2024, arXiv 2411.10442, equations 2 to 5); dense DPO of RLHF-V (Yu et
al. 2023, arXiv 2312.00849, equation 4). Legend: M samples of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlm_train.contracts.batch import Batch
from vlm_train.contracts.family import PredictsTokens
from vlm_train.contracts.objective import Loss, Objective, StepContext
from vlm_train.errors import ConfigError
from vlm_train.objectives.answers import ANSWERS, score_answers
from vlm_train.objectives.per_sample import sum_samples_by_source

LOSS_TYPES = ("sigmoid", "sigmoid_norm", "robust", "bco_pair")
SMOOTHED = ("sigmoid", "sigmoid_norm", "robust")


class DirectPreference(Objective):
    """Losses of pairs of answers. The reward of an answer is beta (log p - log p of the reference).

    Every loss is a sum over samples, so neither micro-batches, packing nor ranks change it. What MPO and
    LLaVA-OneVision add, next-token loss on the chosen answers, is `LanguageModeling` beside this one: it reads the same
    pass of the model, and divides by the tokens of the whole step, as TRL's `sft` does within its micro-batch.

    A token counts with its loss weight. batch.normalize=token, which is required, leaves it 1; segments that the data
    weighs more (dense DPO) count more, for the model and its reference alike.

    Args:
        beta: how far the model may leave its reference; smaller is farther.
        label_smoothing: share of the pairs that are thought to be swapped. `sigmoid` expects them (cDPO, Mitchell 2023,
            ericmitchell.ai/cdpo.pdf), `robust` subtracts them (Chowdhury et al. 2024, arXiv 2403.00409).
        loss_type: what is learned. `sigmoid`: -log sigmoid of the margin between the rewards; `sigmoid_norm`: of
            log-likelihoods divided by their answer's length; `robust`; `bco_pair`: a chosen reward is above 0 and a
            rejected one below (without BCO's running mean of rewards, as in TRL 1.16).
        loss_weights: factor of every loss in the total; empty: 1 each.
        gamma: weight of tokens in segments that the data weighs (RLHF-V: 5); 1: plain DPO; None: the data's weights.
        reference_free: compare with nothing: the reference gives every answer the same likelihood.
        reference_columns: columns beside the shards with the reference's log-likelihoods of the chosen and of the
            rejected answers, as `mode=score columns.scores=answers` writes them; then the run has no second model.
        chunk: positions per head call.

    Raises:
        ConfigError: a value outside its range.
    """

    streams = ANSWERS
    normalized_by = "samples"
    needs = (PredictsTokens,)
    weight_rules = ("token",)

    def __init__(
        self,
        *,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        loss_type: Sequence[str] = ("sigmoid",),
        loss_weights: Sequence[float] = (),
        gamma: float | None = None,
        reference_free: bool = False,
        reference_columns: Sequence[str] = (),
        chunk: int = 1024,
    ) -> None:
        weights = tuple(loss_weights) or (1.0,) * len(loss_type)
        _check_pairs(beta, label_smoothing, loss_type, weights)
        _check_tokens(gamma, chunk)
        _check_reference(reference_free, reference_columns)
        self.beta, self.label_smoothing, self.weights = beta, label_smoothing, dict(zip(loss_type, weights))
        self.gamma = gamma
        self.reading: dict[str, Any] = {"gamma": gamma, "chunk": chunk}
        self.reference_free, self.columns = reference_free, tuple(reference_columns)
        self.needs_reference = not (reference_free or self.columns)

    def __call__(self, model: Any, batch: Batch, context: StepContext) -> dict[str, Loss]:
        """`{loss type: Loss}`; the first has the rewards of the answers as its metrics."""
        answers = [score_answers(model, batch, stream, context, **self.reading) for stream in ANSWERS]
        usual = self._score_by_reference(batch, context)
        ratios = [own - other for (own, _), other in zip(answers, usual, strict=True)]  # [M] each
        found = self._compute_losses(ratios, [length for _, length in answers])
        count = ratios[0].new_tensor(float(len(ratios[0])))
        metrics = self._describe_rewards([ratio.detach() for ratio in ratios], [own.detach() for own, _ in answers])
        losses: dict[str, Loss] = {}
        for name, each in found.items():
            pairs = torch.stack([each.detach(), torch.ones_like(each)], dim=1)
            sources = sum_samples_by_source(batch, pairs)
            losses[name] = Loss(each.sum(), count, self.weights[name], {} if losses else metrics, sources)
        return losses

    def _score_by_reference(self, batch: Batch, context: StepContext) -> Sequence[Tensor | float]:
        """The reference's log-likelihoods `[M]` of both answers."""
        if self.reference_free:
            return 0.0, 0.0
        if self.columns:
            return [batch.columns[name] for name in self.columns]
        assert context.reference is not None  # the run has one: `needs_reference`
        with context.reference() as reference:  # nothing in here records gradients
            return [score_answers(reference, batch, stream, context, **self.reading)[0] for stream in ANSWERS]

    def _compute_losses(self, ratios: Sequence[Tensor], lengths: Sequence[Tensor]) -> dict[str, Tensor]:
        """Every loss `[M]`, from the log-likelihoods of both answers over the reference's, and their lengths."""
        chosen, rejected = (self.beta * ratio for ratio in ratios)
        means = [self.beta * ratio / length.clamp(min=1e-8) for ratio, length in zip(ratios, lengths, strict=True)]
        made = {
            "sigmoid": lambda: self._compute_sigmoid_loss(chosen - rejected),
            "sigmoid_norm": lambda: self._compute_sigmoid_loss(means[0] - means[1]),
            "robust": lambda: self._compute_sigmoid_loss(chosen - rejected, -1) / (1 - 2 * self.label_smoothing),
            "bco_pair": lambda: -F.logsigmoid(chosen) - F.logsigmoid(-rejected),
        }
        return {name: made[name]() for name in self.weights}

    def _compute_sigmoid_loss(self, margin: Tensor, sign: int = 1) -> Tensor:
        """`[M]`: the sigmoid loss of margins, some pairs of which are swapped."""
        share = self.label_smoothing
        return -F.logsigmoid(margin) * (1 - share) - sign * F.logsigmoid(-margin) * share

    def _describe_rewards(self, ratios: Sequence[Tensor], likelihoods: Sequence[Tensor]) -> dict[str, Tensor]:
        """Means over the samples, under TRL's names."""
        chosen, rejected = (self.beta * ratio for ratio in ratios)
        each: Mapping[str, Tensor] = {
            "rewards_chosen": chosen,
            "rewards_rejected": rejected,
            "rewards_margins": chosen - rejected,
            "rewards_accuracies": (chosen > rejected).float(),
            "logps_chosen": likelihoods[0],
            "logps_rejected": likelihoods[1],
        }
        return {name: values.sum() / max(len(values), 1) for name, values in each.items()}


def _check_pairs(beta: float, label_smoothing: float, loss_type: Sequence[str], weights: Sequence[float]) -> None:
    """Raises ConfigError for what `loss_type` and its numbers cannot be."""
    if not beta > 0:
        raise ConfigError(f"objective.dpo.beta: got {beta}; allowed: above 0")
    if not 0 <= label_smoothing < 0.5:
        raise ConfigError(f"objective.dpo.label_smoothing: got {label_smoothing}; allowed: from 0 to below 0.5")
    if isinstance(loss_type, str) or not loss_type or not set(loss_type) <= set(LOSS_TYPES):
        got = loss_type if isinstance(loss_type, str) else list(loss_type)
        raise ConfigError(f"objective.dpo.loss_type: got {got}; allowed: a list of {', '.join(LOSS_TYPES)}")
    if len(set(loss_type)) < len(loss_type):
        raise ConfigError(f"objective.dpo.loss_type: got {list(loss_type)}; allowed: every loss once")
    if len(weights) != len(loss_type) or not all(weight >= 0 for weight in weights):
        allowed = f"{len(loss_type)} numbers from 0 on, one for each of loss_type, or none"
        raise ConfigError(f"objective.dpo.loss_weights: got {list(weights)}; allowed: {allowed}")
    if label_smoothing and not set(loss_type) & set(SMOOTHED):
        raise ConfigError(
            f"objective.dpo.label_smoothing: got {label_smoothing}, which {', '.join(loss_type)} does not read; "
            f"allowed: 0, or a loss_type of {', '.join(SMOOTHED)}"
        )


def _check_tokens(gamma: float | None, chunk: int) -> None:
    """Raises ConfigError for what the settings about tokens cannot be."""
    if gamma is not None and not gamma > 0:
        raise ConfigError(f"objective.dpo.gamma: got {gamma}; allowed: above 0, or null for the data's own weights")
    if chunk < 1:
        raise ConfigError(f"objective.dpo.chunk: got {chunk}; allowed: from 1")


def _check_reference(reference_free: bool, columns: Sequence[str]) -> None:
    """Raises ConfigError for what the settings about the reference cannot be."""
    if isinstance(columns, str) or len(columns) not in (0, 2):
        got = columns if isinstance(columns, str) else list(columns)
        raise ConfigError(
            f"objective.dpo.reference_columns: got {got}; allowed: none, or the names of two, [chosen_logp, "
            "rejected_logp]"
        )
    if reference_free and columns:
        raise ConfigError("objective.dpo.reference_free: got true with reference_columns; allowed: one of them")
