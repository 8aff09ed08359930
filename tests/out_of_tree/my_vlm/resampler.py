"""A connector with a fixed number of tokens a view, whatever its grid: the Perceiver resampler of Flamingo.

Alayrac et al. 2022, arXiv 2204.14198, section 3.1. Legend: N views, P patches of the longest view, Q tokens, H heads,
D width.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_train.contracts.media import Features, Grid3
from vlm_train.errors import ConfigError


def resampled_grid(grid: Grid3, tokens: int) -> Grid3:
    """The token grid of a view: a row of `tokens`, for they have no arrangement."""
    del grid
    return Grid3(1, 1, tokens)


class Resampler(nn.Module):
    """Learned queries read the patches of a view in `depth` layers.

    Args:
        in_dim, out_dim: widths of the features and of the language model, from the other parts.
        tokens: Q.
        depth: layers.
        heads: H, a divisor of `out_dim`.

    Raises:
        ConfigError: `heads` does not divide `out_dim`.
    """

    def __init__(self, *, in_dim: int, out_dim: int, tokens: int = 64, depth: int = 2, heads: int = 8) -> None:
        super().__init__()
        if out_dim % heads:
            raise ConfigError(f"connector.heads: got {heads}; allowed: a divisor of the width {out_dim}")
        self.token_grid = partial(resampled_grid, tokens=tokens)
        self.project = nn.Linear(in_dim, out_dim)
        self.queries = nn.Parameter(torch.randn(tokens, out_dim) * out_dim**-0.5)
        self.layers = nn.ModuleList(ResamplerLayer(out_dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, features: Features) -> Features:
        """Views of different sizes are padded to the longest, and what pads them is masked."""
        patches, mask = features.map(self.project).padded()
        tokens = self.queries.expand(len(patches), -1, -1)
        for layer in self.layers:
            tokens = layer(tokens, patches, mask)
        return Features.from_rectangular(self.norm(tokens), Grid3(1, 1, tokens.shape[1]))


class ResamplerLayer(nn.Module):
    """Queries attend to the patches and to each other, then pass an MLP."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_queries, self.norm_patches = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key_value = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, tokens: Tensor, patches: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens `[N, Q, D]`, patches `[N, P, D]`, mask `[N, P]` (True where a patch is) -> `[N, Q, D]`."""
        asking = self.norm_queries(tokens)
        read = torch.cat([self.norm_patches(patches), asking], dim=1)
        key, value = self.key_value(read).chunk(2, dim=-1)
        query, key, value = (
            one.unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in (self.query(asking), key, value)
        )
        if mask is not None:
            mask = F.pad(mask, (0, tokens.shape[1]), value=True)[:, None, None]
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        tokens = tokens + self.out(found.transpose(1, 2).flatten(2))
        return tokens + self.mlp(tokens)
