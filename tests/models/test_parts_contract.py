"""Every shipped vision encoder, connector and language model keeps the contract of `vlm_train.contracts.parts`."""

from __future__ import annotations

import io
import pickle
from functools import cache

import hydra
import pytest
import torch

from tests.support.components import component, options
from tests.support.tiny_models import assert_close, text_stream
from vlm_train.build import build_layout
from vlm_train.contracts.layout import GridLayout, MediaSize
from vlm_train.contracts.media import Features, Grid3
from vlm_train.data.images.transform import ImageTransform
from vlm_train.models.llms.blip_text import START_TOKENS, BlipTextModel
from vlm_train.models.llms.text_tower import HFTextTower
from vlm_train.models.vision.example import blank_input

WIDTH = 6  # of the features; those of 3 layers, where a connector reads several
ARGUMENTS = {"vision": {}, "llm": {"vocab_size": 50}}


@cache
def part(group: str, option: str):
    torch.manual_seed(0)
    return hydra.utils.instantiate(component(group, option, tiny=True), **ARGUMENTS[group])


def assert_gradients(module, output, unused=()):
    module.zero_grad()
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    for name, parameter in module.named_parameters():
        if name in unused:
            assert parameter.grad is None, f"{name} is declared unused but learns"
        else:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def assert_state_round_trip(module, other):
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert all(
        torch.equal(a, b) for a, b in zip(module.state_dict().values(), other.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("group", ["vision", "llm"])
def test_as_written_on_meta(group):
    for option in options(group):
        with torch.device("meta"):
            module = hydra.utils.instantiate(component(group, option), **ARGUMENTS[group])
        assert all(parameter.is_meta for parameter in module.parameters()), option


@pytest.mark.parametrize("option", options("vision"))
def test_vision(option):
    vision = part("vision", option)
    images = blank_input(vision, 2)
    images.values.random_(0, 256)
    features = vision.encode(images)
    assert features.grids == images.grids and features.values.shape == (sum(features.lengths), vision.out_dim)
    assert_gradients(vision, features.values, vision.unused_parameters())
    assert_state_round_trip(vision, hydra.utils.instantiate(component("vision", option, tiny=True)))


def assert_views_are_what_they_are_alone(connector, grids):
    """Values and the gradients of the features: a view does not depend on the others of its batch."""
    values = torch.randn(sum(grid.size for grid in grids), WIDTH, requires_grad=True)
    features = Features(values, grids)
    together = connector(features).values
    views = values.split(features.lengths)
    alone = torch.cat([connector(Features(view, (grid,))).values for view, grid in zip(views, grids, strict=True)])
    assert_close(together, alone)
    weight = torch.randn(together.shape)
    ours, expected = (torch.autograd.grad((one * weight).sum(), values)[0] for one in (together, alone))
    assert_close(ours, expected)


@pytest.mark.parametrize("grids", [[(1, 4, 4)] * 2, [(1, 3, 5)] * 2, [(1, 4, 4), (2, 3, 5), (1, 4, 4)]])
@pytest.mark.parametrize("option", options("connector"))
def test_connector(option, grids):
    build = {"in_dim": WIDTH, "out_dim": 10}
    connector = hydra.utils.instantiate(component("connector", option, tiny=True), **build)
    grids = tuple(Grid3(*grid) for grid in grids)
    tokens = connector(Features(torch.randn(sum(grid.size for grid in grids), WIDTH), grids))
    assert tokens.grids == tuple(connector.token_grid(grid) for grid in grids)
    assert tokens.values.shape == (sum(tokens.lengths), 10)
    assert_gradients(connector, tokens.values)
    assert_views_are_what_they_are_alone(connector.eval(), grids)
    assert_state_round_trip(connector, hydra.utils.instantiate(component("connector", option, tiny=True), **build))


@pytest.mark.parametrize("option", options("connector"))
def test_layout_pickles_without_weights(option):
    vision = part("vision", "clip_vit_l14_336")
    connector = hydra.utils.instantiate(component("connector", option, tiny=True), in_dim=WIDTH, out_dim=64)
    image = ImageTransform(size=vision.image_size, patch_grid=vision.patch_grid)
    data = pickle.dumps(GridLayout(image.grids, connector.token_grid))
    assert len(data) < 1500
    (pieces,) = pickle.loads(data)([MediaSize(640, 480)])
    tokens = connector(Features(torch.randn(16, WIDTH), (vision.patch_grid(MediaSize(640, 480)),)))
    assert pieces[0].count == tokens.lengths[0]


def text_towers() -> set[str]:
    """Options that only read captions: no head, no `decode`."""
    return {name for name in options("llm") if component("llm", name)._target_.endswith(HFTextTower.__name__)}


@pytest.mark.parametrize("option", sorted(text_towers()))
def test_text_tower(option):
    tower = part("llm", option)
    assert tower.vocab_size == 50 and len(tower.layers) == 2
    vectors = tower.pooled(text_stream([[5, 6, 7], [8]]))
    assert vectors.shape == (2, tower.dim)
    assert_gradients(tower, vectors, tower.head_parameters())
    assert_state_round_trip(tower, hydra.utils.instantiate(component("llm", option, tiny=True), vocab_size=50))


@pytest.mark.parametrize("option", sorted(set(options("llm")) - text_towers()))
def test_llm(option):
    llm = part("llm", option)
    encodes = isinstance(llm, BlipTextModel)  # it has start tokens, and attention that decoding does not use
    pairs = hasattr(llm, "encode") and not encodes
    rows = 50 + START_TOKENS * encodes
    assert llm.vocab_size == rows and len(llm.layers) == (4 if pairs else 2)
    ids = torch.randint(0, 50, (2, 7))
    embeds = llm.embed(ids)
    positions = torch.arange(7).expand(1, 2, 7)
    reads = {}
    if pairs:
        reads["encoded"] = llm.encode(llm.embed(ids[:, :5]), torch.ones(2, 1, 1, 5, dtype=torch.bool))
    hidden = llm.decode(embeds, positions, None, **reads)
    logits = llm.head(hidden)
    assert embeds.shape == hidden.shape == (2, 7, llm.dim) and logits.shape == (2, 7, rows)
    assert_gradients(llm, logits, [n for n, _ in llm.named_parameters() if encodes and "encoder_attention" in n])
    assert_state_round_trip(llm, hydra.utils.instantiate(component("llm", option, tiny=True), vocab_size=50))


def test_a_family_may_lay_out_its_media_itself():
    class Family(torch.nn.Module):
        def media_layout(self, images):
            return ("its own", images)

    assert build_layout(Family(), {}) == ("its own", {})
