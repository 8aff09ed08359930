"""TwoTower: CLIP's image embedding, pooling, padding, temperature."""

from __future__ import annotations

import math

import pytest
import torch

from tests.support.tiny_models import assert_close, batch_of, llama_config, text_stream, tiny_llm, tiny_vision
from vlm_train.errors import ConfigError
from vlm_train.models.families.two_tower import TwoTower

ROWS = [[5, 6, 7, 8], [9, 10]]


def two_tower(**arguments) -> TwoTower:
    torch.manual_seed(0)
    vision = tiny_vision(layer=-1, keep_cls=True, final_norm=True)
    return TwoTower(vision=vision, llm=tiny_llm(), embed_dim=12, **arguments)


def test_image_embedding_is_clips():
    model, batch = two_tower(), batch_of(text_stream(ROWS), [0, 1])
    mean, std = model.vision.mean, model.vision.std
    pooled = model.vision.model((batch.media.inputs["vision"].values / 255 - mean) / std).pooler_output
    expected = pooled @ model.image_projection.weight.T
    assert_close(model.encode_image(batch.media), expected / expected.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("left", [False, True])
def test_text_embedding_is_the_last_real_token(left):
    model = two_tower()
    together = model.encode_text(text_stream(ROWS, left=left))
    for index, row in enumerate(ROWS):
        assert_close(together[index], model.encode_text(text_stream([row]))[0])
    assert_close(together.norm(dim=-1), torch.ones(2))


def test_mean_pooling_averages_the_patches():
    vision = tiny_vision(layer=-1)
    model = TwoTower(vision=vision, llm=tiny_llm(), embed_dim=12, pooling="mean")
    media = batch_of(text_stream(ROWS), [0, 1]).media
    expected = model.image_projection(vision.encode(media.inputs["vision"]).rectangular().mean(dim=1))
    assert_close(model.encode_image(media), expected / expected.norm(dim=-1, keepdim=True))


def test_clamp_bounds_the_scale():
    model = two_tower(init_temperature=0.001, max_scale=100.0)
    model.clamp_()
    assert model.logit_scale.item() == pytest.approx(math.log(100.0))


def test_a_frozen_scale_stays_beyond_its_bound():
    """CLIP's published scale is 4.6052, a little above ln 100."""
    model = two_tower(init_temperature=0.001, max_scale=100.0)
    model.logit_scale.requires_grad_(False)
    model.clamp_()
    assert model.logit_scale.item() == pytest.approx(math.log(1000.0))


def test_bad_pooling_is_refused():
    with pytest.raises(ConfigError, match="allowed: cls, mean"):
        two_tower(pooling="max")
    with pytest.raises(ConfigError, match="vision.keep_cls=true"):
        TwoTower(vision=tiny_vision(), llm=tiny_llm(), pooling="cls")


@pytest.mark.parametrize("tied", [False, True])
def test_unused_parameters_are_exactly_those_without_gradient(tied):
    vision = tiny_vision(layer=-1, keep_cls=True, final_norm=True)
    model = TwoTower(vision=vision, llm=tiny_llm(llama_config(tie_word_embeddings=tied)), embed_dim=12)
    batch = batch_of(text_stream(ROWS), [0, 1])
    logits = model.logit_scale.exp() * model.encode_image(batch.media) @ model.encode_text(batch.text["llm"]).T
    logits.diagonal().sum().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert set(model.unused_parameters()) == without
