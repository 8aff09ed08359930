"""A vision encoder of native resolution: every picture at its own size, as flat patches with a grid.

In the manner of NaViT (Dehghani et al. 2023, arXiv 2307.06304). Legend: F patches of all views one view after the
other, H heads, D width.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_train.contracts.layout import MediaSize
from vlm_train.contracts.media import Features, Grid3, MediaInput
from vlm_train.errors import ConfigError


def count_patches(size: MediaSize, patch_size: int) -> Grid3:
    """The patch grid of a view whose sides are whole patches, as the image plan makes them."""
    return Grid3(1, size.height // patch_size, size.width // patch_size)


class NativeViT(nn.Module):
    """Linear patch embedding, fixed positions for any grid, layers that attend inside a view.

    Args:
        dim: D, a multiple of 4 and of `heads`.
        depth: layers.
        heads: H.
        patch_size: side of a patch in pixels.

    Raises:
        ConfigError: `dim` is no such multiple.
    """

    image_size = None  # native: the image plan hands over flat patches
    image_mean = image_std = (0.5, 0.5, 0.5)

    def __init__(self, *, dim: int = 768, depth: int = 12, heads: int = 12, patch_size: int = 14) -> None:
        super().__init__()
        if dim % 4 or dim % heads:
            raise ConfigError(f"vision.dim: got {dim}; allowed: a multiple of 4 and of the {heads} heads")
        self.out_dim, self.patch_size = dim, patch_size
        self.patch_grid = partial(count_patches, patch_size=patch_size)
        self.embed = nn.Linear(3 * patch_size**2, dim)
        self.layers = nn.ModuleList(NativeLayer(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def encode(self, media: MediaInput) -> Features:
        """uint8 patches `[F, 3 * p * p]` -> features `[F, D]` with the same grids."""
        pixels = media.values.to(self.embed.weight.dtype) / 255
        hidden = self.embed((pixels - self.image_mean[0]) / self.image_std[0])
        places = [embed_positions(grid, self.out_dim, hidden.device) for grid in media.grids]
        hidden = hidden + torch.cat(places).to(hidden.dtype)
        lengths = [grid.size for grid in media.grids]
        for layer in self.layers:
            hidden = layer(hidden, lengths)
        return Features(self.norm(hidden), media.grids)


class NativeLayer(nn.Module):
    """Attention inside every view, then an MLP."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, hidden: Tensor, lengths: list[int]) -> Tensor:
        """`[F, D]` of views of so many patches each -> `[F, D]`. Weights run once, whatever the number of views."""
        found = []
        for view in self.qkv(self.norm(hidden)).split(lengths):
            query, key, value = view.unflatten(-1, (3, self.heads, -1)).permute(1, 2, 0, 3)
            found.append(F.scaled_dot_product_attention(query, key, value).transpose(0, 1).flatten(1))
        hidden = hidden + self.out(torch.cat(found))
        return hidden + self.mlp(hidden)


def embed_positions(grid: Grid3, dim: int, device: torch.device) -> Tensor:
    """`[t * h * w, dim]`: sines and cosines of the row in the first half, of the column in the second."""
    frequencies = 10000 ** -(torch.arange(dim // 4, device=device) / (dim // 4))

    def embed_line(length: int) -> Tensor:
        angles = torch.arange(length, device=device)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    rows = embed_line(grid.h)[:, None].expand(-1, grid.w, -1)
    columns = embed_line(grid.w).expand(grid.h, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1).repeat(grid.t, 1)
