"""The NaFlex vision encoder of SigLIP 2: native aspect ratio, learned positions resized to every view's grid (arXiv
2502.14786; `Siglip2VisionModel` of `transformers`, whose names of weights are kept).

Legend: F patches of all views one view after the other, p the side of a patch in pixels, H heads, C channels a head,
D width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_train.contracts.media import Features, Grid3, MediaInput
from vlm_train.errors import AssetError, ConfigError
from vlm_train.models.layers.attention import PACKED
from vlm_train.models.layers.both_ways import WholeSequences, attend_both_ways, check_attention, pack_lengths
from vlm_train.models.vision.qwen import count_patches, init_linear_layers, standardize
from vlm_train.models.weights.hub import read_state

EPS = 1e-6
"""Of all norms."""
ENCODER = re.compile(r"^(?:model\.)?(?:vision_tower\.)?(?:vision_model\.)?(?=embeddings\.|encoder\.|post_layernorm\.)")
"""The encoder's weights in checkpoints of it alone, of a whole SigLIP 2, or of a model that holds one; not its pooling
head."""


class NaflexVision(nn.Module):
    """Linear patch embedding, learned positions, layers that attend inside a view (a frame of a video), LayerNorm.

    Args:
        dim: D, a multiple of `heads`.
        depth: layers.
        heads: H.
        mlp_dim: width inside an MLP.
        patch_size: p.
        num_patches: learned positions, those of a square grid.
        image_mean, image_std: per channel, of pixels in [0, 1].
        weights: hub name or local folder of the encoder or of a model that holds it; None: random.
        attention: `packed`, `flash` or `flex`, see `WholeSequences`.

    Raises:
        ConfigError: `dim` is no such multiple, or `num_patches` no square.
    """

    image_size = None
    frames_per_patch = 1

    def __init__(
        self,
        *,
        dim: int = 1152,
        depth: int = 27,
        heads: int = 16,
        mlp_dim: int = 4304,
        patch_size: int = 16,
        num_patches: int = 256,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        weights: str | None = None,
        attention: str = PACKED,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise ConfigError(f"vision.dim: got {dim}; allowed: a multiple of the {heads} heads")
        if round(num_patches**0.5) ** 2 != num_patches:
            raise ConfigError(f"vision.num_patches: got {num_patches}; allowed: a square, as 256 = 16 x 16")
        self.out_dim, self.patch_size = dim, patch_size
        self.patch_grid = partial(count_patches, patch_size=patch_size, frames_per_patch=1)
        self.image_mean, self.image_std = tuple(map(float, image_mean)), tuple(map(float, image_std))
        self.weights, self.attention = weights, check_attention(attention)
        self.patch_embedding = nn.Linear(3 * patch_size**2, dim)
        self.position_embedding = GridPositions(num_patches, dim)
        self.layers = nn.ModuleList(NaflexLayer(dim, heads, mlp_dim) for _ in range(depth))
        self.post_layernorm = nn.LayerNorm(dim, eps=EPS)
        init_linear_layers(self)
        nn.init.normal_(self.position_embedding.weight, std=dim**-0.5)

    def encode(self, media: MediaInput) -> Features:
        """uint8 patches `[F, 3 * p * p]` -> features `[F, D]` with the same grids."""
        pixels = standardize(media.values, self.patch_embedding.weight, self.image_mean, self.image_std)
        pixels = pixels.unflatten(1, (3, -1)).transpose(1, 2).flatten(1)  # channels last, as the weights have them
        hidden = self.patch_embedding(pixels) + self.position_embedding(media.grids)
        frames = [grid.h * grid.w for grid in media.grids for _ in range(grid.t)]
        sequences = pack_lengths(frames, hidden.device, self.attention)
        for layer in self.layers:
            hidden = layer(hidden, sequences)
        return Features(self.post_layernorm(hidden), media.grids)

    def forward(self, media: MediaInput) -> Features:
        """The same as `encode`."""
        return self.encode(media)

    def load_weights(self) -> None:
        """Read `weights`. Raises `AssetError` if they are not those of this architecture."""
        if self.weights is None:
            return
        state = read_state(self.weights, setting="vision.weights", wanted=lambda name: bool(ENCODER.match(name)))
        try:
            self.load_state_dict({name_ours(name): value for name, value in state.items()})
        except RuntimeError as error:
            raise AssetError(f"vision.weights: {self.weights!r} does not fit the encoder: {error}") from error


class GridPositions(nn.Embedding):
    """Learned positions of a square grid, resized to others (bilinear, with antialiasing) in 32 bits."""

    def forward(self, grids: Sequence[Grid3]) -> Tensor:  # type: ignore[override]
        """Positions `[F, D]` of the patches of views; those of every time of a grid are the same."""
        side = round(self.num_embeddings**0.5)
        table = self.weight.float().view(1, side, side, -1).permute(0, 3, 1, 2)
        resized = {
            (h, w): F.interpolate(table, (h, w), mode="bilinear", align_corners=False, antialias=True)
            for h, w in {(grid.h, grid.w) for grid in grids}
        }
        flat = {size: one[0].flatten(1).t().to(self.weight.dtype) for size, one in resized.items()}
        return torch.cat([flat[grid.h, grid.w] for grid in grids for _ in range(grid.t)])


class NaflexLayer(nn.Module):
    """Attention, then an MLP, each behind a norm."""

    def __init__(self, dim: int, heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(dim, eps=EPS) for _ in range(2))
        self.self_attn = SelfAttention(dim, heads)
        self.mlp = TanhMLP(dim, mlp_dim)

    def forward(self, hidden_states: Tensor, sequences: WholeSequences) -> Tensor:
        """`[F, D]` -> `[F, D]`."""
        hidden_states = hidden_states + self.self_attn(self.layer_norm1(hidden_states), sequences)
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class SelfAttention(nn.Module):
    """Attention inside sequences, without padding."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, hidden: Tensor, sequences: WholeSequences) -> Tensor:
        """`[F, D]` -> `[F, D]`."""
        query, key, value = (
            project(hidden).unflatten(-1, (self.heads, -1)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(attend_both_ways(query, key, value, sequences).flatten(1))


class TanhMLP(nn.Module):
    """Two linear layers with GELU by tanh between them."""

    def __init__(self, dim: int, mlp_dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, mlp_dim), nn.Linear(mlp_dim, dim)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[F, D]` -> `[F, D]`."""
        return self.fc2(F.gelu(self.fc1(hidden), approximate="tanh"))


def name_ours(name: str) -> str:
    """Our name of a checkpoint's tensor."""
    return ENCODER.sub("", name).removeprefix("embeddings.").removeprefix("encoder.")


def name_theirs(key: str) -> str:
    """The name in `Siglip2VisionModel` of our tensor."""
    if key.startswith(("patch_embedding.", "position_embedding.")):
        return f"embeddings.{key}"
    return f"encoder.{key}" if key.startswith("layers.") else key
