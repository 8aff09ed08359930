"""A small vision encoder of native resolution, as a package of one's own would bring it (NaViT's kind)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_train.contracts.layout import MediaSize
from vlm_train.contracts.media import Features, Grid3, MediaInput


def count_patches(size: MediaSize, patch_size: int) -> Grid3:
    """The patch grid of a view whose sides are whole patches."""
    return Grid3(1, size.height // patch_size, size.width // patch_size)


class Layer(nn.Module):
    """Attention inside every view, then an MLP."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, hidden: Tensor, lengths: list[int]) -> Tensor:
        """`[F, D]` of views of so many patches each -> `[F, D]`."""
        found = []
        for view in self.qkv(self.norm(hidden)).split(lengths):
            query, key, value = view.unflatten(-1, (3, self.heads, -1)).permute(1, 2, 0, 3)
            found.append(F.scaled_dot_product_attention(query, key, value).transpose(0, 1).flatten(1))
        hidden = hidden + self.out(torch.cat(found))
        return hidden + self.mlp(hidden)


class NativeViT(nn.Module):
    """Flat patches -> linear embedding, learned rows and columns, layers that attend inside a view."""

    def __init__(self, *, dim: int = 16, depth: int = 2, heads: int = 2, patch_size: int = 8, most: int = 64) -> None:
        super().__init__()
        self.image_size, self.patch_size, self.out_dim = None, patch_size, dim
        self.image_mean, self.image_std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
        self.patch_grid = partial(count_patches, patch_size=patch_size)
        self.embed = nn.Linear(3 * patch_size**2, dim)
        self.rows, self.columns = (nn.Parameter(torch.randn(most, dim)) for _ in range(2))
        self.layers = nn.ModuleList(Layer(dim, heads) for _ in range(depth))

    def encode(self, media: MediaInput) -> Features:
        """Features `[F, D]` of flat patches `[F, 3 * p * p]`."""
        places = [self.rows[: g.h, None] + self.columns[None, : g.w] for g in media.grids for _ in range(g.t)]
        hidden = self.embed((media.values.to(self.embed.weight.dtype) / 255 - 0.5) / 0.5)
        hidden = hidden + torch.cat([place.flatten(0, 1) for place in places])
        lengths = [grid.size for grid in media.grids]
        for layer in self.layers:
            hidden = layer(hidden, lengths)
        return Features(hidden, media.grids)

    def unused_parameters(self) -> list[str]:
        """None."""
        return []
