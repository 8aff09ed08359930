"""`attention=flex`: its gradients by a reference that is written out (FlexAttention has none on the CPU), its results
by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.data.text.rendering import assistant, sample, user
from tests.models.layers.test_flash import Reference, reference  # noqa: F401
from tests.models.layers.test_packed import (
    BRANCHED,
    PACKS,
    SAMPLES,
    batch_of,
    items_of,
    tiny_model,
    token_losses,
    with_image_blocks,
)
from tests.models.vision import test_naflex, test_qwen, test_rice
from tests.support.tiny_models import assert_close, tiny_llm, tiny_vision
from vlm_train.data.collate import Example
from vlm_train.errors import ConfigError
from vlm_train.models.layers import attention, block_sparse, both_ways, flex

TOWERS = {
    "qwen2": lambda **options: (test_qwen.ours("qwen2_vl", **options), test_qwen.media()),
    "qwen25": lambda **options: (test_qwen.ours("qwen2_5_vl", **options), test_qwen.media()),
    "rice": lambda **options: (test_rice.ours(**options), test_rice.media()),
    "naflex": lambda **options: (test_naflex.ours(**options), test_naflex.media()),
}


class DenseReference:
    """Stands in for FlexAttention: the whole mask that a `BlockMask` stands for, and its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, block_mask: Any, scale: float | None, enable_gqa: bool
    ) -> Tensor:
        self.calls.append(tuple(q.shape))
        places = torch.arange(q.shape[2])
        mask = block_mask.mask_mod(torch.tensor(0), torch.tensor(0), places[:, None], places[None])
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=enable_gqa)


def let_it_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU too."""
    for module in (attention, flex, both_ways):
        monkeypatch.setattr(module, "blocks_run", lambda tensor: True)


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> DenseReference:
    found = DenseReference()
    let_it_run(monkeypatch)
    monkeypatch.setattr(block_sparse, "flex_attention", found)
    monkeypatch.setattr(block_sparse, "LEAST_CHANNELS", 1)
    return found


def mixed_items(model: Any) -> list[Example]:
    """Causal samples, one with branches, and one whose image is a block."""
    items = items_of(model, [SAMPLES[0], BRANCHED, *SAMPLES[2:]])
    return [items[0], items[1], with_image_blocks(items[2]), *items[3:]]


@pytest.mark.parametrize("llm", ["llama", "mistral window", "gemma3 mixed"])
def test_losses_and_gradients_are_those_of_packed(llm: str, dense: DenseReference) -> None:
    losses, gradients = [], []
    for way in ("flex", "packed"):
        model = tiny_model(llm, way)
        found = token_losses(model, batch_of(mixed_items(model), PACKS))
        found.sum().backward()
        losses.append(found.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        if way == "flex":
            assert len(dense.calls) == 2 * 2  # of both layers: causal sequences, and those with groups
    assert_close(losses[0], losses[1])
    assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("llm", ["llama", "mistral window"])
@pytest.mark.parametrize("by_itself", [False, True])
def test_nothing_leaks_into_other_samples(llm: str, by_itself: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    let_it_run(monkeypatch)
    if not by_itself:
        monkeypatch.setattr(block_sparse, "flex_attention", DenseReference())
        monkeypatch.setattr(block_sparse, "LEAST_CHANNELS", 1)
    model = tiny_model(llm, "flex").eval()
    before = mixed_items(model)
    other = sample((user("Where", 0), assistant("In bed")), media=1)  # as long as the first
    changed = [items_of(model, [other])[0], *before[1:]]
    changed[0] = replace(
        changed[0], views={"vision": [replace(one, values=255 - one.values) for one in changed[0].views["vision"]]}
    )
    hidden = []
    with torch.no_grad():
        for items in (before, changed):
            batch = batch_of(items, PACKS)
            hidden.append(model(batch))
    differs = (hidden[0] != hidden[1]).any(dim=-1)
    own = torch.zeros_like(differs)
    own[0] = batch.text["llm"].segment_ids[0] == 1
    assert not (differs & ~own).any() and differs[own].sum() > 10


def test_flex_attention_gives_what_packed_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of 16 channels, which it takes; without gradients it runs on the CPU."""
    let_it_run(monkeypatch)
    wide = {"hidden_size": 64, "head_dim": 16}
    monkeypatch.setattr("tests.models.layers.test_packed.SMALL", tiny_sizes() | wide)
    with torch.no_grad():
        found = []
        for way in ("flex", "packed"):
            model = tiny_model("llama", way).eval()
            found.append(token_losses(model, batch_of(mixed_items(model), PACKS)))
    assert_close(*found)


def tiny_sizes() -> dict[str, Any]:
    from tests.models.layers.test_packed import SMALL

    return dict(SMALL)


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("way", ["flex", "flash"])
def test_towers_compute_what_they_do_under_packed(
    tower: str,
    way: str,
    dense: DenseReference,
    reference: Reference,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Frames, and windows of them, by themselves: features and gradients."""
    monkeypatch.setattr(both_ways, "find_problem", lambda query, value: None)
    monkeypatch.setattr(both_ways, "load_kernels", lambda: reference_kernels(reference))
    features, gradients = [], []
    for one in (way, "packed"):
        encoder, shown = TOWERS[tower](attention=one)
        found = encoder.encode(shown).values
        found.square().sum().backward()
        features.append(found.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None]))
    assert_close(*features)
    assert_close(*gradients)
    calls = dense.calls if way == "flex" else [call for call in reference.calls if call["kind"] == "varlen"]
    assert len(calls) == len(encoder.layers)


def reference_kernels(reference: Reference) -> Any:  # noqa: F811
    from vlm_train.models.layers.flash import FlashKernels

    return FlashKernels(2, reference.dense, reference.varlen)


@pytest.mark.parametrize("tower", TOWERS)
def test_views_by_flex_attention_itself(tower: str, monkeypatch: pytest.MonkeyPatch) -> None:
    let_it_run(monkeypatch)
    with torch.no_grad():
        found = []
        for way in ("flex", "packed"):
            encoder, shown = TOWERS[tower](attention=way)
            found.append(encoder.encode(shown).values)
    assert_close(*found)


def test_training_where_it_does_not_run_is_refused() -> None:
    model = tiny_model("llama", "flex")
    batch = batch_of(items_of(model, SAMPLES), PACKS)
    with pytest.raises(ConfigError, match=r"attention=flex: got tensors on cpu.* allowed: a CUDA device, or choose"):
        token_losses(model, batch)
    for way in ("flex", "flash"):
        encoder, shown = test_rice.ours(), test_rice.media()
        encoder.attention = way
        with pytest.raises(ConfigError, match=rf"vision.attention={way}: got tensors on cpu.*vision.attention=packed"):
            encoder.encode(shown)


def test_evaluation_runs_everywhere() -> None:
    with torch.no_grad():
        found = [
            token_losses(model, batch_of(items_of(model, SAMPLES), PACKS))
            for model in (tiny_model("llama", "flex").eval(), tiny_model("llama", "packed").eval())
        ]
    assert torch.equal(*found)
    encoder, shown = TOWERS["qwen2"](attention="flex")
    with torch.no_grad():
        assert encoder.encode(shown).values.isfinite().all()


def test_wrong_names_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"vision.attention: 'sdpa'; allowed: packed, flash, flex"):
        test_rice.ours(attention="sdpa")
    with pytest.raises(ConfigError, match=r"llm.attention: 'paged'; allowed: packed, flash, flex, sdpa, eager"):
        tiny_llm(attention="paged")
    with pytest.raises(ConfigError, match=r"vision.attention: 'flex'; allowed: flash, sdpa, eager"):
        tiny_vision(attention="flex")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_losses_and_gradients_are_those_of_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.models.layers.test_packed.SMALL", tiny_sizes() | {"hidden_size": 64, "head_dim": 16})
    found = []
    for way in ("flex", "packed"):
        model = tiny_model("llama", way)
        batch = batch_of(mixed_items(model), PACKS).to("cuda")
        losses = token_losses(model.cuda(), batch)
        losses.sum().backward()
        found.append(torch.cat([losses.detach(), *(p.grad.flatten() for p in model.llm.parameters())]))
    assert_close(*found, 1e-4)
