"""Knowledge distillation: a student learns what a frozen teacher says of every next token.

Hinton, Vinyals and Dean 2015, arXiv 1503.02531; the reverse divergence as in MiniLLM (Gu et al. 2023, arXiv
2306.08543, without its sampling). The teacher is the run's `reference.model`, or
what it said before, its K most likely tokens, in a column beside the shards. Legend: S supervised positions, D and E
widths, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vlm_train.contracts.batch import Batch
from vlm_train.contracts.family import PredictsTokens
from vlm_train.contracts.objective import Loss, Objective, StepContext
from vlm_train.errors import ConfigError
from vlm_train.models.layers.passes import call_in_chunks, outputs_of

DIVERGENCES = ("forward", "reverse")


class Distillation(Objective):
    """Divergence of the student's distribution over the next token from the teacher's, on the supervised tokens.

    The heads run on `chunk` positions at a time, and the student's is recomputed in backward.

    Args:
        weight: factor in the total loss; beside `objective=lm`, for example 0.5 and 0.5.
        divergence: `forward`, KL(teacher || student), which covers all that the teacher says; `reverse`, KL(student ||
            teacher), which keeps to what it says most.
        temperature: both logits are divided by it, and the loss is multiplied by its square, so that gradients keep
            their size.
        stream: the token stream that is learned.
        chunk: positions per head call.
        teacher_columns: the column beside the shards, `[teacher]`, that `mode=score columns.scores=teacher` writes;
            then the run has no second model. All tokens but the K are one outcome more, of both distributions, so the
            loss is never more than that of all tokens, and equal to it with K = V. (Renormalizing the K instead would
            let the student put any mass on the others unpunished.) Only `forward`; `temperature` is the column's.

    Raises:
        ConfigError: a value outside its range.
    """

    needs = (PredictsTokens,)
    needs_reference = True

    def __init__(
        self,
        *,
        weight: float = 1.0,
        divergence: Literal["forward", "reverse"] = "forward",
        temperature: float = 1.0,
        stream: str = "llm",
        chunk: int = 1024,
        teacher_columns: Sequence[str] = (),
    ) -> None:
        if divergence not in DIVERGENCES:
            raise ConfigError(f"objective.distill.divergence: got {divergence!r}; allowed: {', '.join(DIVERGENCES)}")
        if temperature <= 0 or chunk < 1:
            raise ConfigError(
                f"objective.distill: got temperature={temperature}, chunk={chunk}; allowed: above 0, and from 1"
            )
        _check_columns(teacher_columns, divergence, stream)
        self.top_tokens, self.needs_reference = tuple(teacher_columns), not teacher_columns
        self.weight, self.divergence, self.temperature = weight, divergence, temperature
        self.stream, self.streams, self.chunk = stream, (stream,), chunk

    def __call__(self, model: Any, batch: Batch, context: StepContext) -> dict[str, Loss]:
        """`{distill: Loss}`: weighted sum over supervised tokens, and how often student and teacher agree."""
        stream = batch.text[self.stream]
        index, weights = stream.supervised, stream.weights.flatten()[stream.supervised]
        compare, told = self._ask_teacher(model, batch, context, index)
        hidden = outputs_of(model, batch, self.stream).hidden.flatten(0, 1)[index]  # [S, D]
        total = agreed = hidden.new_zeros((), dtype=torch.float32)
        losses = []
        for loss, hits in call_in_chunks(compare, (hidden, weights, *told), context, chunk=self.chunk):
            total, agreed = total + loss.sum(), agreed + hits
            losses.append(loss.detach())
        logged = {"agreement": (agreed / max(len(index), 1)).detach()}
        sources = batch.sum_by_source(stream, index, torch.stack([torch.cat(losses), weights], dim=1))
        return {"distill": Loss(total, weights.sum(), self.weight, logged, sources)}

    def _ask_teacher(
        self, model: Any, batch: Batch, context: StepContext, index: Tensor
    ) -> tuple[Callable[..., tuple[Tensor, Tensor]], tuple[Tensor, ...]]:
        """How the student's states are compared, and what is known of the teacher at the positions `index` `[S]`."""
        if self.top_tokens:
            top = batch.top_tokens[self.top_tokens[0]]
            return partial(self._compare_top, model, top.vocab_size), (top.ids, top.logps)
        assert context.reference is not None  # the run has one: `needs_reference`
        with context.reference() as teacher:
            seen = outputs_of(teacher, batch, self.stream).hidden.flatten(0, 1)[index]  # [S, E]
        return partial(self._compare_tokens, model, context.reference), (seen,)

    def _compare_top(
        self, model: Any, vocab_size: int, hidden: Tensor, weights: Tensor, ids: Tensor, told: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same from the teacher's most likely ids `[S, K]` and their log-probabilities `[S, K]`.

        Raises:
            ConfigError: the vocabularies differ.
        """
        logits = model.logits(hidden).float()
        if vocab_size and logits.shape[-1] != vocab_size:
            raise _vocabularies_differ("objective.distill.teacher_columns", vocab_size, logits.shape[-1])
        heated = logits / self.temperature
        total = heated.logsumexp(dim=-1)
        own = heated.gather(1, ids) - total[:, None]  # [S, K]
        losses = (told.exp() * (told - own)).sum(dim=-1)
        if ids.shape[1] < logits.shape[-1]:
            others = heated.scatter(1, ids, float("-inf")).logsumexp(dim=-1) - total
            rest = (1 - told.exp().sum(dim=-1)).clamp(min=0)
            losses = losses + torch.xlogy(rest, rest) - rest * others
        hits = (logits.detach().argmax(dim=-1) == ids[:, 0]).sum().float()
        return losses * self.temperature**2 * weights, hits

    def _compare_tokens(
        self,
        model: Any,
        reference: Callable[[], AbstractContextManager[Any]],
        hidden: Tensor,
        weights: Tensor,
        seen: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Weighted losses `[S]` and number of equal choices, of the student's and the teacher's states `[S, D]`
        and `[S, E]`.

        Raises:
            ConfigError: the vocabularies differ.
        """
        logits = model.logits(hidden).float()
        with reference() as teacher:
            target = teacher.logits(seen).float()
        if logits.shape != target.shape:
            raise _vocabularies_differ("reference.model", target.shape[-1], logits.shape[-1])
        student, told = ((one / self.temperature).log_softmax(dim=-1) for one in (logits, target))
        one, other = (told, student) if self.divergence == "reverse" else (student, told)
        losses = F.kl_div(one, other, reduction="none", log_target=True).sum(dim=-1) * self.temperature**2
        hits = (logits.detach().argmax(dim=-1) == target.argmax(dim=-1)).sum().float()
        return losses * weights, hits


def _vocabularies_differ(setting: str, teacher: int, student: int) -> ConfigError:
    return ConfigError(
        f"{setting}: the teacher has a vocabulary of {teacher} tokens, the student {student}; distillation compares "
        "them token by token"
    )


def _check_columns(columns: Sequence[str], divergence: str, stream: str) -> None:
    """Raises ConfigError for what a teacher's column cannot be."""
    if isinstance(columns, str) or len(columns) > 1:
        got = columns if isinstance(columns, str) else list(columns)
        raise ConfigError(f"objective.distill.teacher_columns: got {got}; allowed: none, or the name of one, [teacher]")
    if columns and (divergence != "forward" or stream != "llm"):
        raise ConfigError(
            f"objective.distill.teacher_columns: got divergence={divergence}, stream={stream}; columns hold the "
            "teacher's most likely tokens of the stream llm, for divergence=forward"
        )
