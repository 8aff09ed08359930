"""Random weights of CLIP are those that its own code makes (clip/model.py), layer by layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.models.llms.test_text_tower import text_config
from tests.support.tiny_models import clip_config, siglip_config, tiny_vision
from vlm_train.errors import ConfigError
from vlm_train.models.llms.text_tower import HFTextTower

WIDTH, DEPTH = 128, 8


def assert_spreads(spreads: dict[nn.Module, float]) -> None:
    for module, spread in spreads.items():
        assert module.weight.std().item() == pytest.approx(spread, rel=0.08)


def test_text():
    torch.manual_seed(0)
    tower = HFTextTower(config=text_config(hidden_size=WIDTH, num_hidden_layers=DEPTH))
    embeddings, layer = tower.tower.embeddings, tower.layers[0]
    spreads = {embeddings.token_embedding: 0.02, embeddings.position_embedding: 0.01}
    spreads |= {layer.self_attn.q_proj: WIDTH**-0.5, layer.self_attn.out_proj: WIDTH**-0.5 * (2 * DEPTH) ** -0.5}
    spreads |= {layer.mlp.fc1: (2 * WIDTH) ** -0.5, layer.mlp.fc2: WIDTH**-0.5 * (2 * DEPTH) ** -0.5}
    assert_spreads(spreads)
    assert not layer.self_attn.q_proj.bias.any() and layer.mlp.fc1.bias.std() > 0.01


def test_vision():
    """Against torch's own modules, which that code is made of."""
    torch.manual_seed(0)
    config = clip_config(hidden_size=WIDTH, intermediate_size=4 * WIDTH, patch_size=4)
    tower = tiny_vision(config, init="clip").tower
    embeddings, layer = tower.embeddings, tower.encoder.layers[0]
    attention, fc1 = nn.MultiheadAttention(WIDTH, 4), nn.Linear(WIDTH, 4 * WIDTH)
    spreads = {
        layer.self_attn.q_proj: attention.in_proj_weight.std().item(),
        layer.self_attn.out_proj: attention.out_proj.weight.std().item(),
        layer.mlp.fc1: fc1.weight.std().item(),
        layer.mlp.fc2: nn.Linear(4 * WIDTH, WIDTH).weight.std().item(),
        embeddings.patch_embedding: nn.Conv2d(3, WIDTH, 4, 4, bias=False).weight.std().item(),
        embeddings.position_embedding: WIDTH**-0.5,
    }
    assert_spreads(spreads)
    assert embeddings.class_embedding.std().item() == pytest.approx(WIDTH**-0.5, rel=0.2)
    assert not layer.self_attn.q_proj.bias.any() and not layer.self_attn.out_proj.bias.any()
    assert layer.mlp.fc1.bias.std().item() == pytest.approx(fc1.bias.std().item(), rel=0.2)


@pytest.mark.parametrize(("config", "init"), [(siglip_config(), "clip"), (clip_config(), "random")])
def test_other_weights_are_refused(config, init):
    with pytest.raises(ConfigError, match=rf"vision\.init: '{init}'; allowed: library; clip for clip_vision_model"):
        tiny_vision(config, init=init)
