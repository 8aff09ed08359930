"""Native resolution from bytes to loss: images of several sizes in one micro-batch are what each is alone."""

from __future__ import annotations

import io
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.sample import Annotation, Media, MediaItem, Sample, Text, Turn
from tests.data.text.rendering import load
from tests.out_of_tree.my_vlm.native_vit import NativeViT
from tests.support.tiny_models import assert_close, llama_config, tiny_llm
from vlm_train.contracts.batch import Batch
from vlm_train.contracts.media import Features
from vlm_train.contracts.objective import StepContext
from vlm_train.data.collate import Example, collate_rows
from vlm_train.data.images.native import NativeResolution
from vlm_train.data.media_layout import make_layout
from vlm_train.data.processor import Processor
from vlm_train.data.text.tokenizer import byte_level
from vlm_train.errors import BatchError
from vlm_train.models.connectors.concat import ConcatLinear
from vlm_train.models.connectors.mlp import MLP
from vlm_train.models.connectors.pool import PooledMLP
from vlm_train.models.connectors.qformer import QFormerConnector
from vlm_train.models.families.prefix_vlm import PrefixVLM
from vlm_train.objectives.lm import LanguageModeling
from vlm_train.training.meta_batch import meta_batch, visual_tokens

SIZES = [(64, 32), (32, 32), (40, 84), (64, 32)]
QFORMER: dict[str, Any] = {
    "num_query_tokens": 3, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "dropout": 0.0,
}  # fmt: skip
CONNECTORS = {
    "mlp": MLP,
    "concat": ConcatLinear,
    "pool": PooledMLP,
    "qformer": lambda **widths: QFormerConnector(**widths, **QFORMER),
    "selection": lambda **widths: QFormerConnector(**widths, **QFORMER, budget=0.5, score_hidden=8),
}


def make(connector: str = "mlp") -> tuple[PrefixVLM, Processor]:
    torch.manual_seed(0)
    tokenizer, vision = byte_level(), NativeViT(dim=16, depth=2, heads=2, patch_size=8)
    llm = tiny_llm(llama_config(vocab_size=len(tokenizer)))
    joined: Any = CONNECTORS[connector](in_dim=vision.out_dim, out_dim=llm.dim)
    model = PrefixVLM(vision=vision, connector=joined, llm=llm)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    plan = NativeResolution(patch_size=8, patch_grid=vision.patch_grid, min_pixels=256, max_pixels=4096)
    images = {"vision": plan}
    processor = Processor(tokenizer=tokenizer, template=load("qa"), layout=make_layout(model, images), images=images)
    return model, pickle.loads(pickle.dumps(processor))


def picture(width: int, height: int, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def item(processor: Processor, number: int, sizes: list[tuple[int, int]]) -> Example:
    """A sample with an image of every size."""
    media = tuple(MediaItem(name=f"{n}.png", width=w, height=h) for n, (w, h) in enumerate(sizes))
    asks = Turn(role="user", parts=(*(Media(item=n) for n in range(len(sizes))), Text(text="What?")))
    answer = Turn(role="assistant", parts=(Text(text=f"number {number}"),))
    sample = Sample(key=f"s{number}", media=media, annotations=(Annotation(turns=(asks, answer)),))
    views = processor.make_views([picture(*size, 10 * number + n) for n, size in enumerate(sizes)])
    return Example(processor.render(sample), views)


def items(processor: Processor) -> list[Example]:
    """One image each, then two of different sizes, then none."""
    one_each = [item(processor, number, [size]) for number, size in enumerate(SIZES)]
    return [*one_each, item(processor, 4, SIZES[1:3]), item(processor, 5, [])]


def losses_and_gradients(model: PrefixVLM, batches: list[Batch]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    losses = [LanguageModeling()(model, batch, StepContext())["lm"].sum for batch in batches]
    torch.stack(losses).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": torch.stack(losses).sum().detach()}


@pytest.mark.parametrize("connector", CONNECTORS)
def test_mixed_sizes_are_those_of_every_sample_alone(connector: str) -> None:
    model, processor = make(connector)
    samples = items(processor)
    together = losses_and_gradients(model, [collate_rows([[one] for one in samples], processor.images)])
    alone = losses_and_gradients(model, [collate_rows([[one]], processor.images) for one in samples])
    assert together.keys() == alone.keys()
    for name, expected in alone.items():
        if name.endswith(("key.bias", "score.3.bias")):  # zero in exact arithmetic
            assert together[name].abs().max() <= 1e-5 * max(
                one.abs().max() for key, one in alone.items() if key.startswith("connector")
            )
        else:
            assert_close(together[name], expected, name)


def test_packed_rows_take_mixed_sizes() -> None:
    model, processor = make("pool")
    samples = items(processor)
    packed = losses_and_gradients(model, [collate_rows([samples[:3], samples[3:]], processor.images)])
    alone = losses_and_gradients(model, [collate_rows([[one]], processor.images) for one in samples])
    for name, expected in alone.items():
        assert_close(packed[name], expected, name)


def test_it_learns_and_features_are_merged_where_the_layout_says() -> None:
    model, processor = make("pool")
    batch = collate_rows([[one] for one in items(processor)], processor.images)
    grids = [tuple(grid) for grid in batch.media.inputs["vision"].grids]
    assert grids == [(1, 4, 8), (1, 4, 4), (1, 10, 4), (1, 4, 8), (1, 4, 4), (1, 10, 4)]
    assert batch.media.slot_counts == (8, 4, 10, 8, 4, 10)
    slots = batch.text["llm"].slots
    embeds, features = model.embed(batch).flatten(0, 1), model.features(batch)
    assert torch.equal(embeds[slots.index], features.values)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    seen = []
    for _ in range(6):
        loss = LanguageModeling()(model, replace(batch, shared={}), StepContext())["lm"]
        optimizer.zero_grad()
        (loss.sum / loss.count).backward()
        optimizer.step()
        seen.append(float(loss.sum.detach()))
    assert seen == sorted(seen, reverse=True) and seen[-1] < 0.9 * seen[0]


@pytest.mark.parametrize("connector", CONNECTORS)
def test_a_batch_without_images_makes_the_same_calls(connector: str) -> None:
    model, processor = make(connector)
    calls: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    losses_and_gradients(model, [collate_rows([[items(processor)[0]]], processor.images)])
    expected, calls[:] = list(calls), []
    gradients = losses_and_gradients(model, [collate_rows([[items(processor)[5]]], processor.images)])
    assert calls == expected
    for name in (n for n, _ in model.named_parameters() if n.startswith(("vision", "connector"))):
        assert name in gradients and not gradients[name].any(), name


def test_a_mismatch_names_the_item_and_both_numbers() -> None:
    model, processor = make("pool")
    batch = collate_rows([[one] for one in items(processor)[:3]], processor.images)
    connect = model.connector.forward

    def lie(features: Features) -> Features:
        """The second view loses a feature."""
        tokens = connect(features)
        keep = torch.arange(len(tokens.values)) != tokens.lengths[0]
        grids = (tokens.grids[0], tokens.grids[1]._replace(h=1, w=3), *tokens.grids[2:])
        return Features(tokens.values[keep], grids)

    model.connector.forward = lie  # type: ignore[method-assign]
    with pytest.raises(BatchError, match=r"media item 1 \(sample 's1'\) has 3 image features but 4 placeholders"):
        model(batch)
    model.connector.forward = lambda features: Features(connect(features).values[1:], connect(features).grids)
    with pytest.raises(BatchError, match=r"features: 21 values, but their grids hold 22"):
        model(batch)


def test_the_dry_run_takes_an_image_of_a_typical_size() -> None:
    model, _ = make("pool")
    model.to("meta")
    assert visual_tokens(model) == 28 * 28
    batch = meta_batch(model, streams=["llm"], rows=2, text_tokens=8, supervised=4)
    assert model(batch).shape == (2, 28 * 28 + 8, model.llm.dim)
