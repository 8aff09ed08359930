"""The vision encoder of LLaVA-OneVision-1.5: RICE-ViT at native resolution, 2-D rotary positions, one class token a
frame (arXiv 2507.20025, arXiv 2509.23661; ds/llavaonevision1_5/modeling_llavaonevision1_5.py of
github.com/EvolvingLMMs-Lab/LLaVA-OneVision-1.5).

Legend: F patches of all views one view after the other, p the side of a patch in pixels, H heads, C channels a head,
D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_train.contracts.media import Features, MediaInput
from vlm_train.errors import ConfigError
from vlm_train.models.layers.attention import PACKED
from vlm_train.models.layers.both_ways import check_attention, pack_lengths
from vlm_train.models.vision.qwen import (
    QuickMLP,
    QwenLayer,
    arrange_patches,
    count_patches,
    find_angles,
    init_linear_layers,
    load_encoder,
    rotate_by,
    standardize,
)


class RiceVision(nn.Module):
    """Linear patch embedding, a class token before the patches of every frame, LayerNorm, then layers that attend
    inside the frame. The class token is rotated by angles of its own and is not given out.

    Args:
        dim: D, a multiple of 4 * `heads`.
        depth: layers.
        heads: H.
        mlp_dim: width inside an MLP.
        patch_size: p.
        eps: of all norms.
        image_mean, image_std: per channel, of pixels in [0, 1].
        weights: hub name or local folder of a whole LLaVA-OneVision-1.5, whose encoder is read; None: random.
        attention: `packed`, `flash` or `flex`, see `WholeSequences`.

    Raises:
        ConfigError: `dim` is no such multiple.
    """

    image_size = None
    frames_per_patch = 1

    def __init__(
        self,
        *,
        dim: int = 1024,
        depth: int = 24,
        heads: int = 16,
        mlp_dim: int = 4096,
        patch_size: int = 14,
        eps: float = 1e-5,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        weights: str | None = None,
        attention: str = PACKED,
    ) -> None:
        super().__init__()
        if dim % (4 * heads):
            raise ConfigError(f"vision.dim: got {dim}; allowed: a multiple of 4 times the {heads} heads")
        self.out_dim, self.patch_size, self.channels = dim, patch_size, dim // heads
        self.patch_grid = partial(count_patches, patch_size=patch_size, frames_per_patch=1)
        self.image_mean, self.image_std = tuple(map(float, image_mean)), tuple(map(float, image_std))
        self.weights, self.attention = weights, check_attention(attention)
        self.patch_embed = nn.Linear(3 * patch_size**2, dim, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(dim) * dim**-0.5)
        self.class_pos_emb = nn.Parameter(torch.randn(1, self.channels // 2))
        make_norm = partial(nn.LayerNorm, dim, eps=eps)
        self.pre_layernorm = make_norm()
        make_mlp = partial(GeluMLP, dim, mlp_dim)
        self.layers = nn.ModuleList(QwenLayer(dim, heads, make_norm, make_mlp) for _ in range(depth))
        init_linear_layers(self)

    def encode(self, media: MediaInput) -> Features:
        """uint8 patches `[F, 3 * p * p]` -> features `[F, D]` with the same grids."""
        hidden = self.patch_embed(standardize(media.values, self.patch_embed.weight, self.image_mean, self.image_std))
        order = arrange_patches(media.grids, None)
        places = order.places.to(hidden.device, non_blocking=True)
        # 0 stands for the class token, 1 for the first patch
        index, kept = (one.to(hidden.device, non_blocking=True) for one in place_class_tokens(order.frames))
        hidden = torch.cat([self.class_embedding[None], hidden]).index_select(0, index)
        angles = torch.cat([self.class_pos_emb, find_angles(places, self.channels)]).index_select(0, index)
        positions = rotate_by(angles)
        sequences = pack_lengths([length + 1 for length in order.frames], hidden.device, self.attention)
        hidden = self.pre_layernorm(hidden)
        for layer in self.layers:
            hidden = layer(hidden, positions, sequences)
        return Features(hidden.index_select(0, kept), media.grids)

    def forward(self, media: MediaInput) -> Features:
        """The same as `encode`."""
        return self.encode(media)

    def load_weights(self) -> None:
        """Read `weights`. Raises `AssetError` if they are not those of this architecture."""
        if self.weights is not None:
            load_encoder(self, self.weights)


def place_class_tokens(frames: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A class token before the patches of every frame. On the CPU.

    Args:
        frames: patches of every frame; F together.

    Returns:
        index `[F + frames]`: 0 at a class token, 1 + the number of the patch elsewhere; kept `[F]`: where patches are.
    """
    numbers = torch.arange(1, sum(frames) + 1, device="cpu").split(list(frames))
    index = torch.cat([F.pad(one, (1, 0)) for one in numbers])
    return index, index.nonzero()[:, 0]


class GeluMLP(QuickMLP):
    """Two linear layers with exact GELU between them."""

    def forward(self, hidden: Tensor) -> Tensor:
        """`[F, D]` -> `[F, D]`."""
        return self.fc2(F.gelu(self.fc1(hidden)))
