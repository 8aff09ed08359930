"""Multi-layer perceptron connector: LLaVA-1.5's `mlpNx_gelu` (llava/model/multimodal_projector/builder.py)."""

from __future__ import annotations

from torch import nn

from vlm_train.contracts.media import Features
from vlm_train.errors import ConfigError
from vlm_train.models.connectors.grids import same_grid
from vlm_train.models.weights.connector_names import LLAVA, LLAVA_OWN, load_connector


def make_mlp(in_dim: int, out_dim: int, depth: int, *, bias: bool = True, hidden: int | None = None) -> nn.Sequential:
    """`depth` linear layers with exact GELU between them; `hidden` is the width between them, None: `out_dim`."""
    if depth < 1:
        raise ConfigError(f"connector.depth: needs at least 1 layer, got {depth}")
    widths = [in_dim, *[hidden or out_dim] * (depth - 1), out_dim]
    layers: list[nn.Module] = [nn.Linear(widths[0], widths[1], bias=bias)]
    for one, following in zip(widths[1:], widths[2:], strict=False):
        layers += [nn.GELU(), nn.Linear(one, following, bias=bias)]
    return nn.Sequential(*layers)


class MLP(nn.Module):
    """Width in_dim -> out_dim; one token a patch. Initialised as torch's Linear, as in LLaVA.

    Args:
        depth: linear layers, with exact GELU between them.
        weights: the LLaVA that it is taken from, a hub name or a local folder.
    """

    def __init__(self, *, in_dim: int, out_dim: int, depth: int = 2, weights: str | None = None) -> None:
        super().__init__()
        self.weights = weights
        self.token_grid = same_grid
        self.layers = make_mlp(in_dim, out_dim, depth)

    def load_weights(self) -> None:
        """Read `weights`. Raises `AssetError` if they hold no MLP of this depth and width."""
        if self.weights is not None:
            load_connector(self, self.weights, (LLAVA, LLAVA_OWN))

    def forward(self, features: Features) -> Features:
        """Patches are projected one by one."""
        return features.map(self.layers)
