"""The random weights that CLIP's training started from: `clip/model.py` (github.com/openai/CLIP).

Those of `transformers` differ: positions of text twice as wide, the attention's spreads swapped, other image towers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


@torch.no_grad()
def init_text(model: Any) -> None:
    """Give a `CLIPTextModel` its published spreads."""
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
    width = model.config.hidden_size
    for name, module in model.named_modules():
        kind = name.rpartition(".")[2]
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.reset_parameters()
        if kind in ("q_proj", "k_proj", "v_proj"):  # one matrix [3 D, D] to torch's attention
            nn.init.uniform_(module.weight, -((6 / (4 * width)) ** 0.5), (6 / (4 * width)) ** 0.5)
        if kind in ("q_proj", "k_proj", "v_proj", "out_proj"):
            nn.init.zeros_(module.bias)
        if kind == "position_embedding":
            nn.init.normal_(module.weight, std=width**-0.5)
        if hasattr(module, "class_embedding"):
            nn.init.normal_(module.class_embedding, std=width**-0.5)
