"""Multi-layer perceptron connector: LLaVA-1.5's `mlpNx_gelu` (llava/model/multimodal_projector/builder.py)."""

from __future__ import annotations

from torch import nn

from vlm_train.contracts.media import Features
from vlm_train.errors import ConfigError
from vlm_train.models.connectors.grids import same_grid


def make_mlp(in_dim: int, out_dim: int, depth: int) -> nn.Sequential:
    """`depth` linear layers with exact GELU between them, the first one changing the width."""
    if depth < 1:
        raise ConfigError(f"connector.depth: needs at least 1 layer, got {depth}")
    layers: list[nn.Module] = [nn.Linear(in_dim, out_dim)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(out_dim, out_dim)]
    return nn.Sequential(*layers)


class MLP(nn.Module):
    """Width in_dim -> out_dim; one token a patch. Initialised as torch's Linear, as in LLaVA."""

    def __init__(self, *, in_dim: int, out_dim: int, depth: int = 2) -> None:
        super().__init__()
        self.token_grid = same_grid
        self.layers = make_mlp(in_dim, out_dim, depth)

    def forward(self, features: Features) -> Features:
        """Patches are projected one by one."""
        return features.map(self.layers)
