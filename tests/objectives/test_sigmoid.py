"""The sigmoid loss: by hand, as published at the start of training, as `transformers` computes it, duplicates."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import softplus

from tests.models.llms.test_text_tower import ROWS, siglip
from tests.objectives.test_contrastive import TwoRanks, captions, two_tower
from tests.support.tiny_models import assert_close, batch_of, text_stream
from vlm_train.contracts.objective import StepContext
from vlm_train.data.collate import collate_rows
from vlm_train.data.images.transform import ImageTransform
from vlm_train.errors import ConfigError
from vlm_train.models.families.two_tower import TwoTower
from vlm_train.objectives.pairs import caption_hashes
from vlm_train.objectives.sigmoid import Sigmoid


def biased() -> TwoTower:
    model = two_tower()
    model.logit_bias = torch.nn.Parameter(torch.tensor(-2.0))
    return model


def test_orthogonal_embeddings_at_the_published_start():
    """Scale 10 and bias -10: softplus(10) for the pair and softplus(-10) for each of the others, an image."""
    unit = torch.eye(8)
    model = SimpleNamespace(
        logit_scale=torch.tensor(10.0).log(),
        logit_bias=torch.tensor(-10.0),
        encode_image=lambda media: unit[:4],
        encode_text=lambda stream: unit[4:],
    )
    loss = Sigmoid()(model, captions(), StepContext())["sigmoid"]
    one = math.log1p(math.exp(10)) + 3 * math.log1p(math.exp(-10))
    assert float(loss.sum / loss.count) == pytest.approx(one, rel=1e-6) and loss.count == 4


def test_loss_is_that_of_transformers():
    model, reference = siglip()
    batch = batch_of(text_stream(ROWS), [0, 1, 2])
    normalized = (batch.media.inputs["vision"].values / 255 - model.vision.mean) / model.vision.std
    ids = torch.tensor([row + [1] * (7 - len(row)) for row in ROWS])
    expected = reference(input_ids=ids, pixel_values=normalized, return_loss=True).loss
    loss = Sigmoid()(model, batch, StepContext())["sigmoid"]
    assert_close(loss.sum / loss.count, expected)
    assert_close(loss.metrics["logit_bias"], torch.tensor(-10.0))


@pytest.mark.parametrize("mask_duplicates", [False, True])
@pytest.mark.parametrize("cut", [2, 3])
def test_two_ranks_equal_one(mask_duplicates, cut):
    whole, split = biased(), biased()
    objective = Sigmoid(mask_duplicates=mask_duplicates)
    expected = objective(whole, captions(), StepContext())["sigmoid"].sum
    expected.backward()

    batches = [captions(0, cut), captions(cut, 4)]
    everything = [
        [split.encode_text(b.text["llm"]) for b in batches],
        [caption_hashes(b.text["llm"]) for b in batches],
    ]
    contexts = [StepContext(TwoRanks(rank, [cut, 4 - cut], everything)) for rank in range(2)]
    losses = [objective(split, batch, one)["sigmoid"] for batch, one in zip(batches, contexts, strict=True)]
    total = losses[0].sum + losses[1].sum
    assert_close(total, expected)
    total.backward()
    for (name, a), b in zip(split.named_parameters(), whole.parameters(), strict=True):
        if b.grad is not None and b.grad.abs().max() > 1e-6:
            assert_close(a.grad, b.grad, name, tolerance=3e-5)


def test_equal_captions_are_not_negatives():
    model, batch = biased(), captions()
    logits = model.encode_image(batch.media) @ model.encode_text(batch.text["llm"]).T / 0.07 - 2
    sign = 2 * torch.eye(4) - 1
    losses = softplus(-sign * logits)
    losses[1, 3] = losses[3, 1] = 0
    assert_close(Sigmoid(mask_duplicates=True)(model, batch, StepContext())["sigmoid"].sum, losses.sum())


def test_no_pairs_give_a_zero_that_reaches_every_parameter():
    model = biased()
    empty = collate_rows([], {"vision": ImageTransform(size=(32, 32))})
    loss = Sigmoid(mask_duplicates=True)(model, empty, StepContext())["sigmoid"]
    assert loss.sum == 0 and loss.count == 0 and all(torch.isfinite(value) for value in loss.metrics.values())
    loss.sum.backward()
    unused = model.unused_parameters()
    assert all(p.grad is not None and not p.grad.any() for n, p in model.named_parameters() if n not in unused)


def test_a_model_without_bias_is_refused():
    with pytest.raises(ConfigError, match=r"set model\.init_bias"):
        Sigmoid()(two_tower(), captions(), StepContext())
