"""Knowledge distillation: a student learns what a frozen teacher says of every next token.

Hinton, Vinyals and Dean 2015, arXiv 1503.02531; the reverse divergence as in MiniLLM (Gu et al. 2023, arXiv
2306.08543, without its sampling). The teacher is the run's `reference.model`. Legend: S supervised positions, D and E
widths, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
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
    ) -> None:
        if divergence not in DIVERGENCES:
            raise ConfigError(f"objective.distill.divergence: got {divergence!r}; allowed: {', '.join(DIVERGENCES)}")
        if temperature <= 0 or chunk < 1:
            raise ConfigError(
                f"objective.distill: got temperature={temperature}, chunk={chunk}; allowed: above 0, and from 1"
            )
        self.weight, self.divergence, self.temperature = weight, divergence, temperature
        self.stream, self.streams, self.chunk = stream, (stream,), chunk

    def __call__(self, model: Any, batch: Batch, context: StepContext) -> dict[str, Loss]:
        """`{distill: Loss}`: weighted sum over supervised tokens, and how often student and teacher agree."""
        assert context.reference is not None  # the run has one: `needs_reference`
        stream = batch.text[self.stream]
        index, weights = stream.supervised, stream.weights.flatten()[stream.supervised]
        with context.reference() as teacher:
            seen = outputs_of(teacher, batch, self.stream).hidden.flatten(0, 1)[index]  # [S, E]
        hidden = outputs_of(model, batch, self.stream).hidden.flatten(0, 1)[index]  # [S, D]
        total = agreed = hidden.new_zeros((), dtype=torch.float32)
        losses = []
        compare = partial(self._compare_tokens, model, context.reference)
        for loss, hits in call_in_chunks(compare, (hidden, seen, weights), context, chunk=self.chunk):
            total, agreed = total + loss.sum(), agreed + hits
            losses.append(loss.detach())
        logged = {"agreement": (agreed / max(len(index), 1)).detach()}
        sources = batch.sum_by_source(stream, index, torch.stack([torch.cat(losses), weights], dim=1))
        return {"distill": Loss(total, weights.sum(), self.weight, logged, sources)}

    def _compare_tokens(
        self,
        model: Any,
        reference: Callable[[], AbstractContextManager[Any]],
        hidden: Tensor,
        seen: Tensor,
        weights: Tensor,
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
            raise ConfigError(
                f"reference.model: the teacher has a vocabulary of {target.shape[-1]} tokens, the student "
                f"{logits.shape[-1]}; distillation compares them token by token"
            )
        student, told = ((one / self.temperature).log_softmax(dim=-1) for one in (logits, target))
        one, other = (told, student) if self.divergence == "reverse" else (student, told)
        losses = F.kl_div(one, other, reduction="none", log_target=True).sum(dim=-1) * self.temperature**2
        hits = (logits.detach().argmax(dim=-1) == target.argmax(dim=-1)).sum().float()
        return losses * weights, hits
