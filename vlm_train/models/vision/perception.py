"""The Perception Encoder (arXiv 2504.13181) as PerceptionLM reads it: absolute and 2-D rotary positions, a number of
its first layers, no final norm (core/vision_encoder/pe.py of github.com/facebookresearch/perception_models).

Legend: N views, P patches of a view, L = P plus the class token where there is one, p the side of a patch in pixels, H
heads, C channels a head, D width.
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
from vlm_train.models.layers.drop_path import add_drop_path
from vlm_train.models.vision.hf import fixed_grid
from vlm_train.models.vision.qwen import Positions, find_angles, flatten_kernel, standardize
from vlm_train.models.vision.rice import GeluMLP
from vlm_train.models.weights.hub import read_state

EPS = 1e-5
"""Of all norms."""

SCALES = ("gamma_1", "gamma_2")
"""Names of a layer's scales."""

NAMES = {
    "patch_embed.proj.": "patch_embed.",
    "cls_token": "class_token",
    "pos_embed": "positions",
    "norm_pre.": "norm_pre.",
    "blocks.": "layers.",
}
"""How a name begins in timm, the only one with safetensors -> and here; the rest of it is the same."""
PREFIX = re.compile(r"^(?:model\.)?vision_tower\.(?:timm_model\.)?")
"""Before the names in a whole PerceptionLM."""
NOT_READ = re.compile(r"^(?:norm|fc_norm|attn_pool|head)\.")
"""What only the embedding of a whole image needs."""


class PerceptionVision(nn.Module):
    """Linear patch embedding, class token, positions, LayerNorm, then layers of rotary attention and an MLP. The class
    token is not given out.

    Args:
        dim: D, a multiple of 4 * `heads`.
        depth: layers; those behind them in `weights` are not read.
        heads: H.
        mlp_dim: width inside an MLP.
        patch_size: p.
        image_size: pixels of a side of a view, a multiple of p.
        class_token: one more token, in front of the patches.
        layer_scale: first value of the factors on every channel of a branch; None: there are none.
        drop_path: probability that training leaves out a branch of any layer.
        image_mean, image_std: per channel, of pixels in [0, 1].
        weights: hub name or local folder of a Perception Encoder in timm's names, or of a whole PerceptionLM; positions
            of another size are interpolated. None: random.

    Raises:
        ConfigError: `dim` or `image_size` is no such multiple, or `drop_path` no probability below 1.
    """

    def __init__(
        self,
        *,
        dim: int = 1024,
        depth: int = 23,
        heads: int = 16,
        mlp_dim: int = 4096,
        patch_size: int = 14,
        image_size: int = 448,
        class_token: bool = True,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        weights: str | None = None,
    ) -> None:
        super().__init__()
        if dim % (4 * heads):
            raise ConfigError(f"vision.dim: got {dim}; allowed: a multiple of 4 times the {heads} heads")
        if image_size < patch_size or image_size % patch_size:
            raise ConfigError(f"vision.image_size: got {image_size}; allowed: a multiple of patch_size={patch_size}")
        self.out_dim, self.patch_size, self.channels = dim, patch_size, dim // heads
        self.image_size = (image_size, image_size)
        self.grid = Grid3(1, image_size // patch_size, image_size // patch_size)
        self.patch_grid = partial(fixed_grid, grid=self.grid)
        self.image_mean, self.image_std = tuple(map(float, image_mean)), tuple(map(float, image_std))
        self.weights = weights
        self.patch_embed = nn.Linear(3 * patch_size**2, dim, bias=False)
        self.class_token = nn.Parameter(torch.randn(dim) * dim**-0.5) if class_token else None
        self.positions = nn.Parameter(torch.randn(class_token + self.grid.size, dim) * dim**-0.5)
        self.norm_pre = nn.LayerNorm(dim, eps=EPS)
        self.layers = nn.ModuleList(PerceptionLayer(dim, heads, mlp_dim, layer_scale) for _ in range(depth))
        add_drop_path(self.layers, drop_path, setting="vision.drop_path", growing=False)

    def encode(self, media: MediaInput) -> Features:
        """Features `[N * P, D]` of uint8 views `[N, 3, H, W]`."""
        patches = cut_patches(media.values, self.patch_size)
        pixels = standardize(patches.flatten(0, 1), self.patch_embed.weight, self.image_mean, self.image_std)
        hidden = self.patch_embed(pixels).unflatten(0, patches.shape[:2])
        if self.class_token is not None:
            hidden = torch.cat([self.class_token.expand(len(hidden), 1, -1), hidden], dim=1)
        hidden = self.norm_pre(hidden + self.positions)
        rotations = self._find_rotations(hidden.device)
        for layer in self.layers:
            hidden = layer(hidden, rotations)
        return Features.from_rectangular(hidden[:, hidden.shape[1] - self.grid.size :], self.grid)

    def forward(self, media: MediaInput) -> Features:
        """The same as `encode`."""
        return self.encode(media)

    def load_weights(self) -> None:
        """Read `weights`. Raises `AssetError` if they are not those of this architecture."""
        if self.weights is None:
            return
        own = self.state_dict()
        state = self._name_ours(read_state(self.weights, setting="vision.weights", wanted=_is_tower))
        if not any(name.endswith(SCALES) for name in state):  # the plain encoder has none: they start as said here
            state = {name: value for name, value in own.items() if name.endswith(SCALES)} | state
        if "positions" in state:
            state["positions"] = resize_positions(state["positions"], len(self.positions), self.class_token is not None)
        try:
            self.load_state_dict(state)
        except RuntimeError as error:
            raise AssetError(f"vision.weights: {self.weights!r} does not fit the encoder: {error}") from error

    def _name_ours(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's tensors of this encoder under our names; names that nothing stands for stay, to be refused."""
        named = {}
        for name, value in state.items():
            name = PREFIX.sub("", name)
            for theirs, ours in NAMES.items():
                if name.startswith(theirs):
                    name = ours + name.removeprefix(theirs)
            if (layer := re.match(r"layers\.(\d+)\.", name)) and int(layer[1]) >= len(self.layers):
                continue
            if not NOT_READ.match(name):
                alone = name in ("class_token", "positions")  # [1, .., D] there
                named[name] = value.reshape(-1, value.shape[-1]) if alone else flatten_kernel(value)
        if "class_token" in named:
            named["class_token"] = named["class_token"][0]
        return named

    def _find_rotations(self, device: torch.device) -> Positions:
        """Cosines and sines `[L, C]` of columns, then rows; a class token stands at (0, 0), patches begin at (1, 1)."""
        first = 0 if self.class_token is None else 1
        sides = (torch.arange(first, side + first, device=device) for side in self.grid[1:])
        rows, columns = torch.meshgrid(*sides, indexing="ij")
        places = F.pad(torch.stack([columns, rows], dim=-1).flatten(0, 1), (0, 0, first, 0))
        angles = find_angles(places, self.channels).repeat_interleave(2, dim=-1)
        return angles.cos(), angles.sin()


class PerceptionLayer(nn.Module):
    """Attention, then an MLP, each behind a norm and, with `layer_scale`, before a factor on every channel."""

    gamma_1: Tensor | None
    gamma_2: Tensor | None

    def __init__(self, dim: int, heads: int, mlp_dim: int, layer_scale: float | None) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=EPS) for _ in range(2))
        self.attn, self.mlp = RotaryAttention(dim, heads), GeluMLP(dim, mlp_dim)
        for name in SCALES:
            start = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))
            self.register_parameter(name, start)

    def forward(self, hidden_states: Tensor, rotations: Positions) -> Tensor:
        """`[N, L, D]` -> `[N, L, D]`."""
        hidden_states = hidden_states + _scale(self.attn(self.norm1(hidden_states), rotations), self.gamma_1)
        return hidden_states + _scale(self.mlp(self.norm2(hidden_states)), self.gamma_2)


def _scale(branch: Tensor, factors: Tensor | None) -> Tensor:
    return branch if factors is None else branch * factors


class RotaryAttention(nn.Module):
    """Every token attends to all of its view; neighbouring channels of queries and keys are rotated together."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.proj.bias)

    def forward(self, hidden_states: Tensor, rotations: Positions) -> Tensor:
        """`[N, L, D]` -> `[N, L, D]`."""
        states = self.qkv(hidden_states).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [3, N, H, L, C]
        query, key, value = states.unbind(0)
        query, key = (_rotate_pairs(one, rotations) for one in (query, key))
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def _rotate_pairs(states: Tensor, rotations: Positions) -> Tensor:
    """Rotate `[N, H, L, C]` in fp32."""
    cosines, sines = rotations
    first, second = states.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return (states.float() * cosines + turned * sines).to(states.dtype)


def cut_patches(views: Tensor, side: int) -> Tensor:
    """`[N, 3, H, W]` -> flat patches `[N, P, 3 * p * p]`, row by row."""
    rows, columns = views.shape[2] // side, views.shape[3] // side
    tiles = views.unflatten(3, (columns, side)).unflatten(2, (rows, side))  # [N, 3, rows, p, columns, p]
    return tiles.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def resize_positions(positions: Tensor, count: int, class_token: bool) -> Tensor:
    """Positions `[L, D]` of a square grid as `count` of them, bilinearly (apps/plm/interpolate_PE_pos_embed.py); as
    they are where they are of no square."""
    first = positions[: int(class_token)]
    have, want = (round((one - len(first)) ** 0.5) for one in (len(positions), count))
    if have == want or have**2 + len(first) != len(positions):
        return positions
    image = positions[len(first) :].unflatten(0, (have, have)).movedim(-1, 0)[None]
    image = F.interpolate(image.float(), (want, want), mode="bilinear", align_corners=False)[0]
    return torch.cat([first, image.flatten(1).T.to(positions.dtype)])


def _is_tower(name: str) -> bool:
    """Whether a checkpoint's tensor is the encoder's: all of timm's, of a whole PerceptionLM those below its tower."""
    return bool(PREFIX.match(name)) or not name.startswith(("model.", "language_model.", "lm_head", "multi_modal_"))
