"""Parts of a package of somebody's own: a preference objective with a reference model, and a mixture with a router."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_train.contracts.batch import Batch
from vlm_train.contracts.family import Outputs, PredictsTokens
from vlm_train.contracts.objective import Loss, Objective, StepContext
from vlm_train.models.families.text_only import TextOnly
from vlm_train.models.layers.passes import outputs_of
from vlm_train.objectives.per_sample import sum_by_segment


class Preference(Objective):
    """Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290, equation 7)."""

    streams = ("llm", "rejected")
    normalized_by = "samples"
    needs_reference = True
    needs = (PredictsTokens,)

    def __init__(self, *, beta: float = 0.1) -> None:
        self.beta = beta

    def __call__(self, model: Any, batch: Batch, context: StepContext) -> dict[str, Loss]:
        chosen, rejected = (log_likelihoods(model, batch, name) for name in self.streams)
        assert context.reference is not None
        with context.reference() as reference:
            base = [log_likelihoods(reference, batch, name) for name in self.streams]
        margin = self.beta * ((chosen - base[0]) - (rejected - base[1]))  # [M]
        losses = -F.logsigmoid(margin)
        count = losses.new_tensor(float(len(losses)))
        metrics = {"margin": margin.detach().sum() / count.clamp(min=1)}
        return {"preference": Loss(losses.sum(), count, 1.0, metrics)}


def log_likelihoods(model: Any, batch: Batch, name: str) -> Tensor:
    """`[M]`: of the answers in the stream `name`."""
    stream = batch.text[name]
    index = stream.supervised
    logits = model.logits(outputs_of(model, batch, name).hidden.flatten(0, 1)[index]).float()
    labels = stream.labels.flatten()[index]
    return sum_by_segment(batch, stream, index, -F.cross_entropy(logits, labels, reduction="none"))


class Routed(TextOnly):
    """A language model whose embeddings pass one of two experts, which a router weighs."""

    def __init__(self, *, llm: Any) -> None:
        super().__init__(llm=llm)
        self.router = nn.Linear(llm.dim, 2)
        self.experts = nn.ModuleList(nn.Linear(llm.dim, llm.dim) for _ in range(2))

    def forward(self, batch: Batch, stream: str = "llm") -> Outputs:
        hidden = super().forward(batch, stream)
        scores = self.router(hidden)  # [B, T, 2]
        mixed = sum(
            share[..., None] * expert(hidden)
            for share, expert in zip(scores.softmax(dim=-1).unbind(dim=-1), self.experts, strict=True)
        )
        return Outputs(hidden + mixed, {"router_logits": scores})


class Balance(Objective):
    """Load balancing (Fedus et al. 2021, arXiv 2101.03961, equation 4), as a sum over tokens."""

    streams = ("llm",)

    def __init__(self, *, weight: float = 0.01) -> None:
        self.weight = weight

    def __call__(self, model: Any, batch: Batch, context: StepContext) -> dict[str, Loss]:
        stream = batch.text["llm"]
        scores = outputs_of(model, batch, "llm").aux["router_logits"]
        shares = scores.softmax(dim=-1).square().sum(dim=-1)  # [B, T], least where both weigh the same
        index = stream.supervised
        values, weights = shares.flatten()[index], stream.weights.flatten()[index]
        each = torch.stack([(values * weights).detach(), weights], dim=1)
        sources = batch.sum_by_source(stream, index, each)
        return {"balance": Loss((values * weights).sum(), weights.sum(), self.weight, {}, sources)}
