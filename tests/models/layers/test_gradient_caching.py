"""Gradient caching: the towers in chunks give the loss and the gradients of all at once, in less memory."""

from __future__ import annotations

import pytest
import torch

from tests.models.llms.test_text_tower import siglip
from tests.objectives.test_contrastive import captions, two_tower
from tests.support.tiny_models import assert_close, batch_of, text_stream
from vlm_train.contracts.batch import Batch
from vlm_train.contracts.objective import StepContext
from vlm_train.errors import ConfigError
from vlm_train.models.families.two_tower import TwoTower
from vlm_train.models.layers.activation_checkpointing import checkpoint_layers
from vlm_train.objectives.contrastive import Contrastive
from vlm_train.objectives.sigmoid import Sigmoid

PAIRS = 12


def many() -> Batch:
    rows = [[5 + n, 40 + n, 60][: 2 + n % 2] + [90] for n in range(PAIRS)]
    return batch_of(text_stream(rows), list(range(PAIRS)))


def loss_and_gradients(model: TwoTower, objective, chunk: int | None):
    model.zero_grad()
    model.cache_chunk = chunk
    (loss,) = objective(model, many(), StepContext()).values()
    loss.sum.backward()
    return loss.sum.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk", [1, 5, 11])
@pytest.mark.parametrize(("make", "objective"), [(two_tower, Contrastive()), (lambda: siglip()[0], Sigmoid())])
def test_chunks_give_the_same_loss_and_gradients(make, objective, chunk):
    model = make()
    loss, gradients = loss_and_gradients(model, objective, None)
    cached, again = loss_and_gradients(model, objective, chunk)
    assert_close(cached, loss, tolerance=1e-6)
    assert again.keys() == gradients.keys()
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert (again[name] - gradient).abs().max() <= 1e-6 * largest, name


def test_goes_with_activation_checkpointing():
    """Layers that forget their activations, inside chunks that do."""
    model = two_tower()
    loss, gradients = loss_and_gradients(model, Contrastive(), None)
    checkpoint_layers([*model.vision.layers, *model.llm.layers])
    cached, again = loss_and_gradients(model, Contrastive(), 5)
    assert_close(cached, loss, tolerance=1e-6)
    largest = max(gradient.abs().max() for gradient in gradients.values())
    assert all((again[name] - gradient).abs().max() <= 1e-6 * largest for name, gradient in gradients.items())


def kept(model: TwoTower, chunk: int | None) -> int:
    """Bytes that backward needs: of every storage saved while the loss is computed."""
    model.cache_chunk = chunk
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = Contrastive()(model, many(), StepContext())["contrastive"].sum  # held: what its graph keeps
    del loss
    return sum(seen.values())


def test_only_embeddings_are_kept_for_backward():
    model = two_tower()
    assert kept(model, 4) < kept(model, None) / 20


def test_backward_holds_one_chunk_at_a_time(monkeypatch):
    """The towers never see more than a chunk: neither in forward nor where backward computes again."""
    model, seen = two_tower(), []
    encode = model.vision.encode
    monkeypatch.setattr(model.vision, "encode", lambda media: seen.append(len(media)) or encode(media))
    loss_and_gradients(model, Contrastive(), 5)
    assert sorted(seen) == sorted([5, 5, 2] * 2)
    seen.clear()
    with torch.no_grad():
        assert_close(model.encode_image(many().media), two_tower().encode_image(many().media))
    assert seen == [5, 5, 2]


def test_a_batch_of_one_chunk_is_computed_once(monkeypatch):
    model, seen = two_tower(), []
    encode = model.vision.encode
    monkeypatch.setattr(model.vision, "encode", lambda media: seen.append(len(media)) or encode(media))
    model.cache_chunk = 4
    Contrastive()(model, captions(), StepContext())["contrastive"].sum.backward()
    assert seen == [4]


def test_a_chunk_of_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"model\.cache_chunk: 0; allowed: 1 or more"):
        TwoTower(vision=two_tower().vision, llm=two_tower().llm, cache_chunk=0)
