"""Pixel shuffle connector: neighbouring patches become one token of their width together, then an MLP (InternVL)."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from vlm_train.contracts.media import Features, Grid3, map_grids
from vlm_train.errors import ConfigError
from vlm_train.models.connectors.mlp import make_mlp
from vlm_train.models.weights.connector_names import INTERNVL, INTERNVL_OWN, QWEN_VL, load_connector


def shuffled_grid(grid: Grid3, factor: int) -> Grid3:
    """The token grid after `factor` x `factor` patches became one token."""
    if grid.h % factor or grid.w % factor:
        flat = "; a row of features has no grid: set vision.keep_cls=false" if grid.h == 1 else ""
        raise ConfigError(f"connector.factor: {factor} does not divide the patch grid {grid.h} x {grid.w}{flat}")
    return Grid3(grid.t, grid.h // factor, grid.w // factor)


class PixelShuffleMLP(nn.Module):
    """Width in_dim -> out_dim: `factor` x `factor` neighbours become one token, row by row, then an MLP.

    Args:
        factor: side of the square of patches that becomes a token.
        norm: LayerNorm of the joined token ("joined", InternVL) or of every patch before ("patch", Qwen2-VL), RMSNorm
            of every patch ("patch_rms", Qwen2.5-VL), or null.
        depth: linear layers, with exact GELU between them.
        wide: the first layer keeps the joined width, and the last one changes it (Qwen2-VL).
        bias: of the linear layers.
        eps: of the LayerNorm.
        init_std: the linear layers start as normal numbers of this deviation; null: as torch's Linear.
        weights: the whole model that it is taken from, InternVL, Qwen2-VL or Qwen2.5-VL: a hub name or a local folder.
    """

    def __init__(
        self,
        *,
        in_dim: int,
        out_dim: int,
        factor: int = 2,
        norm: Literal["joined", "patch", "patch_rms"] | None = "joined",
        depth: int = 2,
        wide: bool = False,
        bias: bool = True,
        eps: float = 1e-5,
        init_std: float | None = None,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        self.weights = weights
        if factor < 1:
            raise ConfigError(f"connector.factor: {factor}; allowed: at least 1")
        joined = in_dim * factor**2
        self.factor = factor
        self.token_grid = partial(shuffled_grid, factor=factor)
        of_patch: Any = {"patch": nn.LayerNorm, "patch_rms": nn.RMSNorm}.get(norm or "")
        self.patch_norm = None if of_patch is None else of_patch(in_dim, eps=eps)
        self.norm = nn.LayerNorm(joined, eps=eps) if norm == "joined" else None
        self.layers = make_mlp(joined, out_dim, depth, bias=bias, hidden=joined if wide else out_dim)
        if init_std is not None:
            for layer in self.layers.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=init_std)

    def load_weights(self) -> None:
        """Read `weights`. Raises `AssetError` if they hold no connector of these modules and shapes."""
        if self.weights is not None:
            load_connector(self, self.weights, (INTERNVL, INTERNVL_OWN, QWEN_VL))

    def forward(self, features: Features) -> Features:
        """Patches are joined grid by grid, and projected all at once."""
        if self.patch_norm is not None:
            features = features.map(self.patch_norm)
        tokens = map_grids(features, self._join_neighbors, self.token_grid)
        if self.norm is not None:
            tokens = tokens.map(self.norm)
        return tokens.map(self.layers)

    def _join_neighbors(self, values: Tensor, grid: Grid3) -> Tensor:
        """`[n, P, D]` -> `[n, P / factor^2, factor^2 * D]`."""
        t, h, w = self.token_grid(grid)
        squares = values.unflatten(1, (t, h, self.factor, w, self.factor))  # [n, t, h, f, w, f, D]
        return squares.transpose(3, 4).flatten(4).flatten(1, 3)
