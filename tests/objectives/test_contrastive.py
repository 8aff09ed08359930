"""Contrastive: InfoNCE by hand, two ranks equal one, duplicates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support.tiny_models import assert_close, batch_of, text_stream, tiny_llm, tiny_vision, with_views
from vlm_train.contracts.batch import Batch, MediaBatch
from vlm_train.contracts.media import MediaInput
from vlm_train.contracts.objective import StepContext
from vlm_train.data.collate import collate_rows
from vlm_train.data.images.transform import ImageTransform
from vlm_train.errors import BatchError
from vlm_train.models.families.two_tower import TwoTower
from vlm_train.objectives.contrastive import Contrastive
from vlm_train.objectives.pairs import caption_hashes

ROWS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [8, 9]]


def two_tower() -> TwoTower:
    torch.manual_seed(0)
    vision = tiny_vision(layer=-1, keep_cls=True, final_norm=True)
    return TwoTower(vision=vision, llm=tiny_llm(), embed_dim=12)


def captions(first: int = 0, last: int = 4) -> Batch:
    whole = batch_of(text_stream(ROWS), [0, 1, 2, 3])
    stream = text_stream(ROWS[first:last])
    pixels = whole.media.inputs["vision"].values[first:last]
    count = last - first
    media = MediaBatch(
        inputs={"vision": MediaInput(pixels, view_counts=(1,) * count)},
        slot_counts=(0,) * count,
        row=torch.arange(count),
    )
    return Batch(text={"llm": stream}, media=media)


def test_loss_is_symmetric_info_nce():
    model, batch = two_tower(), captions()
    image, text = model.encode_image(batch.media), model.encode_text(batch.text["llm"])
    logits = (image @ text.T) / 0.07
    by_hand = -(logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()).sum() / 2
    loss = Contrastive()(model, batch, StepContext())["contrastive"]
    assert_close(loss.sum, by_hand)
    assert loss.count == 4
    assert_close(loss.metrics["logit_scale"], torch.tensor(1 / 0.07))


def test_images_in_another_order_than_their_texts():
    model, batch = two_tower(), captions()
    order = torch.tensor([2, 0, 3, 1])
    shuffled = with_views(batch, batch.media.inputs["vision"].values[order])
    shuffled = replace(shuffled, media=replace(shuffled.media, row=order))
    losses = [Contrastive()(model, b, StepContext())["contrastive"].sum for b in (batch, shuffled)]
    assert_close(losses[1], losses[0])


class TwoRanks:
    """A gather of two ranks in one process: what the other one sends is known beforehand."""

    def __init__(self, rank, sizes, everything):
        self.rank, self._sizes, self.calls = rank, sizes, iter(everything)

    def sizes(self, rows):
        assert rows == self._sizes[self.rank]
        return self._sizes

    def __call__(self, tensor, sizes, *, with_grad):
        parts = list(next(self.calls))
        parts[self.rank] = tensor
        return torch.cat(parts)


@pytest.mark.parametrize("mask_duplicates", [False, True])
@pytest.mark.parametrize("cut", [2, 3])
def test_two_ranks_equal_one(mask_duplicates, cut):
    whole, split = two_tower(), two_tower()
    objective = Contrastive(mask_duplicates=mask_duplicates)
    expected = objective(whole, captions(), StepContext())["contrastive"].sum
    expected.backward()

    batches = [captions(0, cut), captions(cut, 4)]
    everything = [
        [split.encode_image(b.media) for b in batches],
        [split.encode_text(b.text["llm"]) for b in batches],
        [caption_hashes(b.text["llm"]) for b in batches],
    ]
    contexts = [StepContext(TwoRanks(rank, [cut, 4 - cut], everything)) for rank in range(2)]
    losses = [objective(split, batch, one)["contrastive"] for batch, one in zip(batches, contexts, strict=True)]
    assert_close(losses[0].sum + losses[1].sum, expected)
    (losses[0].sum + losses[1].sum).backward()
    for (name, a), b in zip(split.named_parameters(), whole.named_parameters(), strict=True):
        if b[1].grad is not None and b[1].grad.abs().max() > 1e-6:
            assert_close(a.grad, b[1].grad, name, tolerance=3e-5)


def test_no_pairs_give_a_zero_that_reaches_every_parameter():
    model = two_tower()
    empty = collate_rows([], {"vision": ImageTransform(size=(32, 32))})
    loss = Contrastive(mask_duplicates=True)(model, empty, StepContext())["contrastive"]
    assert loss.sum == 0 and loss.count == 0 and all(torch.isfinite(value) for value in loss.metrics.values())
    loss.sum.backward()
    unused = model.unused_parameters()
    assert all(p.grad is not None and not p.grad.any() for n, p in model.named_parameters() if n not in unused)


def test_equal_captions_are_not_negatives():
    model, batch = two_tower(), captions()
    image, text = model.encode_image(batch.media), model.encode_text(batch.text["llm"])
    logits = (image @ text.T) / 0.07
    logits[1, 3] = logits[3, 1] = float("-inf")
    by_hand = -(logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()).sum() / 2
    assert_close(Contrastive(mask_duplicates=True)(model, batch, StepContext())["contrastive"].sum, by_hand)


def test_caption_hash_ignores_padding_but_not_order():
    hashes = caption_hashes(text_stream(ROWS + [[9, 8], [5, 6, 7, 7]]))
    assert hashes[1] == hashes[3] and len(set(hashes.tolist())) == 5
    assert caption_hashes(text_stream([ROWS[1]]))[0] == hashes[1]
    assert caption_hashes(text_stream(ROWS, left=True))[1] == hashes[1]


def test_a_text_without_image_is_refused():
    batch = Batch(text={"llm": text_stream(ROWS)}, media=captions(0, 3).media)
    with pytest.raises(BatchError, match="3 views of 3 images for 4 texts"):
        Contrastive()(two_tower(), batch, StepContext())
