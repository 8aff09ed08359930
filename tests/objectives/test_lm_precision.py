"""Where the loss of language modeling is computed in 16 bits, and where it is not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.tiny_models import batch_of, text_stream
from vlm_train.contracts.objective import StepContext
from vlm_train.objectives.lm import LanguageModeling

VOCABULARY, WIDTH = 50, 16


class Head(nn.Module):
    """Hidden states of its own, and a head that writes down the precision of its product."""

    plays_reference = False

    def __init__(self, dtype: torch.dtype, places: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.hidden = nn.Parameter(torch.randn(1, places, WIDTH, generator=generator).to(dtype))
        self.weight = nn.Parameter(torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype))
        self.products: list[torch.dtype] = []

    def forward(self, batch: Any, stream: str = "llm") -> Tensor:
        return self.hidden

    def logits(self, hidden: Tensor) -> Tensor:
        made = hidden @ self.weight.T
        self.products.append(made.dtype)
        return made


def test_the_head_computes_in_the_models_precision_and_the_loss_in_fp32() -> None:
    batch = batch_of(text_stream([[5, 6, 7, 8, 9, 10]]), [])
    stream = batch.text["llm"]
    model = Head(torch.bfloat16, stream.ids.shape[1])
    (loss,) = LanguageModeling(chunk=2)(model, batch, StepContext()).values()
    loss.sum.backward()
    assert set(model.products) == {torch.bfloat16} and loss.sum.dtype == torch.float32
    assert model.weight.grad is not None and model.weight.grad.dtype == torch.bfloat16

    exact = Head(torch.float32, stream.ids.shape[1])
    with torch.no_grad():
        exact.hidden.copy_(model.hidden)
        exact.weight.copy_(model.weight)
    index = stream.supervised
    logits = exact.logits(exact.hidden.flatten(0, 1)[index])
    reference = F.cross_entropy(logits, stream.labels.flatten()[index], reduction="sum")
    reference.backward()
    assert exact.weight.grad is not None and len(index) > 2
    assert abs(loss.sum - reference) <= 1e-2 * reference  # of the 8 bits of a logit
    rounded = model.logits(model.hidden.flatten(0, 1)[index]).float()  # what is lost before the loss, and no more
    assert abs(loss.sum - F.cross_entropy(rounded, stream.labels.flatten()[index], reduction="sum")) <= 1e-5 * loss.sum
    assert (model.weight.grad.float() - exact.weight.grad).abs().max() <= 2e-2 * exact.weight.grad.abs().max()
