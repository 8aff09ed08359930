"""The random weights that CLIP's training started from: `clip/model.py` (github.com/openai/CLIP).

Those of `transformers` differ: positions of text twice as wide, the attention's spreads swapped, other image towers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


@torch.no_grad()
def init_text(model: Any) -> None:
    """Give a `CLIPTextModel` its published spreads; biases are torch's own."""
    _as_torch(model)
    config = model.config
    inner, outer = config.hidden_size**-0.5, (2 * config.hidden_size * config.num_hidden_layers) ** -0.5
    spreads = {"token_embedding": 0.02, "position_embedding": 0.01, "fc1": (2 * config.hidden_size) ** -0.5}
    spreads |= {"q_proj": inner, "k_proj": inner, "v_proj": inner, "out_proj": outer, "fc2": outer}
    for name, module in model.named_modules():
        if (spread := spreads.get(name.rpartition(".")[2])) is not None:
            nn.init.normal_(module.weight, std=spread)


@torch.no_grad()
def init_vision(model: Any) -> None:
    """Give a `CLIPVisionModel` its published weights: torch's own, but for the class token and the positions."""
    _as_torch(model)
    for module in model.modules():
        if hasattr(module, "class_embedding"):
            for parameter in (module.class_embedding, module.position_embedding.weight):
                nn.init.normal_(parameter, std=model.config.hidden_size**-0.5)


def _as_torch(model: Any) -> None:
    """Weights and biases of layers as torch's own modules have them, attention's as one `nn.MultiheadAttention`."""
    bound = (6 / (4 * model.config.hidden_size)) ** 0.5  # Xavier, of one matrix [3 D, D] for queries, keys and values
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.reset_parameters()
        kind = name.rpartition(".")[2]
        if kind in ATTENTION[:3]:
            nn.init.uniform_(module.weight, -bound, bound)
        if kind in ATTENTION:
            nn.init.zeros_(module.bias)
