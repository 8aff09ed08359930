"""ITC, ITM and ITG: by hand, on two ranks, without pairs, and how often the model runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.models.layers.test_qformer import QUERIES, pairs, tiny_blip2
from tests.support.tiny_models import assert_close
from tests.support.two_ranks import on_ranks
from vlm_train.contracts.batch import Batch, Window
from vlm_train.contracts.objective import Loss, StepContext
from vlm_train.data.collate import collate_rows
from vlm_train.data.images.transform import ImageTransform
from vlm_train.errors import ConfigError
from vlm_train.models.families.blip2_qformer import Blip2QFormerModel
from vlm_train.objectives.itc import ITC
from vlm_train.objectives.itm import ITM
from vlm_train.objectives.lm import LanguageModeling

ROWS = [[5, 6, 7, 40], [8, 9, 40], [10, 11, 12, 13, 40], [8, 9, 40], [14, 15, 40]]
WINDOW = Window(step=3, micro=0, micro_count=1, sums={})


def part(first: int = 0, last: int = 5) -> Batch:
    whole = pairs(ROWS)
    batch = pairs(ROWS[first:last])
    batch.media.inputs["vision"].values[:] = whole.media.inputs["vision"].values[first:last]
    return replace(batch, window=WINDOW, media=replace(batch.media, keys=whole.media.keys[first:last]))


def losses(
    objectives: list[Any], model: Blip2QFormerModel, batch: Batch, context: StepContext | None = None
) -> dict[str, Loss]:
    return {name: loss for one in objectives for name, loss in one(model, batch, context or StepContext()).items()}


def all_three(**options: Any) -> list[Any]:
    return [ITC(gather_grad=True, mask_duplicates=True, **options), ITM(mask_duplicates=True), LanguageModeling()]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_contrast_is_the_cross_entropy_of_the_nearest_query(smoothing: float) -> None:
    model, batch = tiny_blip2().eval(), part()
    image, text = model.image_vectors(batch), model.text_vectors(batch)
    logits = torch.stack([(image @ one).amax(dim=1) for one in text], dim=1) / 0.07  # [images, texts]
    target = torch.arange(5)
    both = [F.cross_entropy(one, target, label_smoothing=smoothing, reduction="sum") for one in (logits, logits.T)]
    loss = ITC(label_smoothing=smoothing)(model, batch, StepContext())["itc"]
    assert_close(loss.sum, (both[0] + both[1]) / 2)
    assert loss.count == 5 and loss.metrics["temperature"] == pytest.approx(0.07)


@pytest.mark.parametrize("cut", [2, 3])
def test_two_ranks_equal_one(cut: int) -> None:
    whole, split = tiny_blip2().eval(), tiny_blip2().eval()
    expected = losses(all_three(), whole, part())
    sum(loss.sum for loss in expected.values()).backward()
    found = on_ranks(lambda b, g: losses(all_three(), split, b, g), [part(0, cut), part(cut, 5)])
    for name, loss in expected.items():
        assert_close(found[0][name].sum + found[1][name].sum, loss.sum, name)
    sum(loss.sum for one in found for loss in one.values()).backward()
    for (name, a), b in zip(split.named_parameters(), whole.parameters(), strict=True):
        if b.grad is not None and b.grad.abs().max() > 1e-5:
            assert_close(a.grad, b.grad, name, tolerance=3e-5)


@pytest.mark.parametrize("parts", [[(0, 5)], [(0, 2), (2, 5)], [(0, 4), (4, 5)]])
def test_as_published_what_is_compared_with_gets_no_gradient_on_any_number_of_ranks(parts: list[Any]) -> None:
    """The value is the same; an image and a text learn from their own side of the comparisons alone."""
    whole = tiny_blip2().eval()
    image, text = whole.image_vectors(part()), whole.text_vectors(part())
    to_text = torch.einsum("bqe,ge->bgq", image, text.detach()).amax(dim=-1) / whole.temperature
    to_image = torch.einsum("be,gqe->bgq", text, image.detach()).amax(dim=-1) / whole.temperature
    own = torch.arange(5)
    both = [F.cross_entropy(one, own, label_smoothing=0.1, reduction="sum") for one in (to_text, to_image)]
    expected = (both[0] + both[1]) / 2
    expected.backward()
    split = tiny_blip2().eval()
    batches = [part(*one) for one in parts]
    if len(batches) > 1:
        found = on_ranks(lambda b, g: ITC()(split, b, g)["itc"].sum, batches)
    else:
        found = [ITC()(split, batches[0], StepContext())["itc"].sum]
    assert_close(torch.stack(list(found)).sum(), expected)
    torch.stack(list(found)).sum().backward()
    for (name, a), b in zip(split.named_parameters(), whole.parameters(), strict=True):
        if b.grad is not None and b.grad.abs().max() > 1e-5:
            assert_close(a.grad, b.grad, name, tolerance=3e-5)


class Recorded:
    """Notes what is matched."""

    def __init__(self, model: Blip2QFormerModel) -> None:
        self.asked: list[tuple[Tensor, Tensor]] = []
        match = model.match

        def noted(context: Any, ids: Tensor, token_mask: Tensor) -> Tensor:
            self.asked.append((context[0], ids))
            return match(context, ids, token_mask)

        model.match = noted  # type: ignore[method-assign]


@pytest.mark.parametrize("cut", [2, 4])
def test_local_negatives_are_those_of_a_rank_by_itself(cut: int) -> None:
    model, parts = tiny_blip2().eval(), [(0, cut), (cut, 5)]  # cut 4 leaves one pair alone
    split = on_ranks(lambda b, g: ITM(local=True)(model, b, g)["itm"], [part(*one) for one in parts])
    for found, one in zip(split, parts, strict=True):
        alone = ITM()(model, part(*one), StepContext())["itm"]
        assert_close(found.sum, alone.sum)
        assert found.count == alone.count


def test_wrong_pairs_are_wrong_and_hard() -> None:
    """Never the pair itself nor, if asked, an equal caption; and drawn in proportion to the similarity."""
    model = tiny_blip2().eval()
    with torch.no_grad():
        model.temperature.fill_(0.0025)  # so sharp that the nearest is drawn
    batch = part()
    recorded = Recorded(model)
    loss = ITM(mask_duplicates=True)(model, batch, StepContext())["itm"]
    (context, ids) = recorded.asked[0]
    own = model.image_keys_values(batch)[0]
    texts, images = batch.text["llm"].ids, own.flatten(1)
    assert torch.equal(ids[:5], texts) and torch.equal(ids[10:], texts)
    assert torch.equal(context[:10].flatten(1), torch.cat([images, images]))
    similar = torch.einsum("bqe,ge->bgq", model.image_vectors(batch), model.text_vectors(batch)).amax(-1)
    closed = torch.eye(5, dtype=torch.bool)
    closed[1, 3] = closed[3, 1] = True
    nearest = similar.masked_fill(closed, -9).argmax(dim=1)
    assert torch.equal(ids[5:10], texts[nearest])
    nearest = similar.T.masked_fill(closed, -9).argmax(dim=1)
    assert torch.equal(context[10:].flatten(1), images[nearest])
    assert loss.count == 5 and 0 <= loss.metrics["accuracy"] <= 1


def test_draws_follow_the_softmax_and_the_step() -> None:
    model, drawn = tiny_blip2().eval(), []
    batch = part()
    for step in range(300):
        recorded = Recorded(model)
        ITM()(model, replace(batch, window=replace(WINDOW, step=step)), StepContext())
        drawn.append(recorded.asked[0][1][5])
    image, text = model.image_vectors(batch)[0], model.text_vectors(batch)
    logits = (image @ text.T).amax(dim=0) / 0.07
    logits[0] = float("-inf")
    share = torch.stack([(torch.stack(drawn) == one).all(dim=1).float().mean() for one in batch.text["llm"].ids])
    expected = logits.softmax(0)
    expected[[1, 3]] = expected[1] + expected[3]  # equal captions
    assert (share - expected).abs().max() < 0.1 and share[0] == 0


def test_a_floor_keeps_unlikely_negatives_possible() -> None:
    """BLIP draws by softmax + 1e-4, the own pair in the softmax but not drawn."""
    model, batch = tiny_blip2().eval(), part()
    with torch.no_grad():
        model.temperature.fill_(0.0025)
    image, text = model.image_vectors(batch)[0], model.text_vectors(batch)
    weights = ((image @ text.T).amax(dim=0) / 0.0025).softmax(dim=0) + 0.05
    weights[0] = 0.0
    drawn = []
    for step in range(400):
        recorded = Recorded(model)
        ITM(floor=0.05)(model, replace(batch, window=replace(WINDOW, step=step)), StepContext())
        drawn.append(recorded.asked[0][1][5])
    share = torch.stack([(torch.stack(drawn) == one).all(dim=1).float().mean() for one in batch.text["llm"].ids])
    expected = weights / weights.sum()
    expected[[1, 3]] = expected[1] + expected[3]  # equal captions
    assert (share - expected).abs().max() < 0.08 and share[0] == 0 and share.min() == 0 and (share[1:] > 0).all()
    with pytest.raises(ConfigError, match="floor"):
        ITM(floor=-1.0)


def test_no_pairs_and_no_negatives() -> None:
    model = tiny_blip2().eval()
    empty = replace(collate_rows([], {"vision": ImageTransform(size=(32, 32))}), window=WINDOW)
    for name, loss in losses(all_three(), model, empty).items():
        assert loss.sum == 0 and loss.count == 0, name
        assert all(torch.isfinite(value) for value in loss.metrics.values())
    alone = losses(all_three(), model, replace(pairs(ROWS[:1]), window=WINDOW))
    assert all(torch.isfinite(loss.sum) for loss in alone.values())
    logits = model.match(
        model.image_keys_values(pairs(ROWS[:1])), torch.tensor([ROWS[0]]), torch.ones(1, 4, dtype=torch.bool)
    )
    assert_close(alone["itm"].sum, F.cross_entropy(logits, torch.tensor([1])))  # only its own pair is asked


def test_no_pass_is_made_twice() -> None:
    """A pair costs one image in the tower and in the keys and values of cross-attention, and 4 Q + 5 T tokens in the
    Q-Former: Q for the queries alone, T for ITC, T for ITG, 3 (Q + T) for ITM."""
    model = tiny_blip2().eval()
    batch = replace(pairs([[5, 6, 7, 40]] * 3), window=WINDOW)
    images, tokens, read = [], [], []
    model.vision.tower.embeddings.register_forward_hook(lambda m, args, out: images.append(len(args[0])))
    layer = model.connector.qformer.blocks[0]
    layer.register_forward_hook(lambda m, args, out: tokens.append(args[0].shape[0] * args[0].shape[1]))
    layer.cross.key.register_forward_hook(lambda m, args, out: read.append(len(args[0])))
    losses(all_three(), model, batch)
    assert images == [3] and read == [3]
    assert sum(tokens) == 3 * (4 * QUERIES + 5 * 4)


@torch.no_grad()
def test_products_are_those_of_the_formula() -> None:
    """All products of a forward pass of the three objectives, counted, against 2 x inputs x weights."""
    model = tiny_blip2().eval()
    b, length, dim, patches = 3, 4, 32, 5
    batch = replace(pairs([[5, 6, 7, 40]] * b), window=WINDOW)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # others are not counted on a CPU
        losses(all_three(), model, batch)
        total = counter.get_total_flops()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.vision.encode(batch.media.inputs["vision"])
        tower = counter.get_total_flops()
    self_attention, ffn, cross = 4 * dim * dim, 2 * dim * 64, 2 * dim * dim
    asked, read = b * 4 * QUERIES, b * 5 * length
    linear = 3 * (asked + read) * (self_attention + ffn) + 2 * asked * cross + 2 * b * patches * 2 * 24 * dim
    heads = b * (QUERIES + 1) * dim * 12 + 3 * b * QUERIES * dim * 2 + b * (length - 1) * (dim * dim + dim * 50)
    both = QUERIES + length
    seen = QUERIES**2 + length**2 + length * both + 3 * both**2
    attention = 3 * b * 2 * seen * dim + 2 * b * 4 * QUERIES * patches * 2 * dim
    similar = 2 * 2 * b * b * QUERIES * 12
    assert total - tower == 2 * (linear + heads + attention + similar)
