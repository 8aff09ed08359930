"""The vision encoders of Qwen2-VL and Qwen2.5-VL: native resolution, 2-D rotary positions, attention inside frames or
windows of them (arXiv 2409.12191, arXiv 2502.13923).

Legend: F patches of all views one view after the other, T frames of a patch, p its side in pixels, H heads, C channels
a head, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_train.contracts.layout import MediaSize
from vlm_train.contracts.media import Features, Grid3, MediaInput
from vlm_train.errors import AssetError, ConfigError
from vlm_train.models.layers.attention import PACKED
from vlm_train.models.layers.both_ways import WholeSequences, attend_both_ways, check_attention, pack_lengths
from vlm_train.models.weights.hub import read_state

EPS = 1e-6
"""Of all norms."""
THETA = 10000.0
"""Base of the rotations."""
PREFIXES = ("visual.", "model.visual.")
"""Before the encoder's names in checkpoints of the whole model, older and newer."""

Positions = tuple[Tensor, Tensor]
"""Cosines and sines of the rotations, `[F, 1, C]` each."""


def count_patches(size: MediaSize, patch_size: int, frames_per_patch: int) -> Grid3:
    """The patch grid of a view whose sides are whole patches, as the image plan makes them."""
    return Grid3(-(-size.frames // frames_per_patch), size.height // patch_size, size.width // patch_size)


class QwenVision(nn.Module):
    """Linear patch embedding, then layers that attend inside every frame (pair), or inside windows of it.

    Args:
        dim: D, a multiple of 4 * `heads`.
        depth: layers.
        heads: H.
        mlp_dim: width inside an MLP.
        patch_size: p.
        frames_per_patch: T; an image is T equal frames.
        norm: LayerNorm ("layer", Qwen2-VL) or RMSNorm ("rms", Qwen2.5-VL).
        gated: MLPs with a SiLU gate (Qwen2.5-VL); false: two layers with quick GELU.
        window: side of a window in pixels, inside which most layers attend (Qwen2.5-VL); null: none.
        full_layers: those that attend inside whole frames all the same.
        image_mean, image_std: per channel, of pixels in [0, 1].
        weights: hub name or local folder of a whole model, whose encoder is read; None: random.
        attention: `packed`, `flash` or `flex`, see `WholeSequences`.
        init_std: deviation of random weights; a narrow encoder from scratch needs more than Qwen's 0.02.

    Raises:
        ConfigError: `dim` is no such multiple, `window` is not whole patches, or a layer does not exist.
    """

    image_size = None

    def __init__(
        self,
        *,
        dim: int = 1280,
        depth: int = 32,
        heads: int = 16,
        mlp_dim: int = 5120,
        patch_size: int = 14,
        frames_per_patch: int = 2,
        norm: Literal["layer", "rms"] = "layer",
        gated: bool = False,
        window: int | None = None,
        full_layers: Sequence[int] = (),
        image_mean: Sequence[float],
        image_std: Sequence[float],
        weights: str | None = None,
        attention: str = PACKED,
        init_std: float = 0.02,
    ) -> None:
        super().__init__()
        if dim % (4 * heads):
            raise ConfigError(f"vision.dim: got {dim}; allowed: a multiple of 4 times the {heads} heads")
        if window is not None and window % patch_size:
            raise ConfigError(f"vision.window: got {window}; allowed: a multiple of vision.patch_size={patch_size}")
        if wrong := [layer for layer in full_layers if not 0 <= layer < depth]:
            raise ConfigError(f"vision.full_layers: got {wrong[0]}; allowed: 0 to {depth - 1}")
        self.out_dim, self.patch_size, self.frames_per_patch = dim, patch_size, frames_per_patch
        self.channels = dim // heads
        self.window = None if window is None else window // patch_size
        self.full_layers = frozenset(full_layers if window is not None else range(depth))
        self.patch_grid = partial(count_patches, patch_size=patch_size, frames_per_patch=frames_per_patch)
        self.image_mean = (float(image_mean[0]), float(image_mean[1]), float(image_mean[2]))
        self.image_std = (float(image_std[0]), float(image_std[1]), float(image_std[2]))
        self.weights, self.attention = weights, check_attention(attention)
        make_norm = partial(nn.LayerNorm if norm == "layer" else nn.RMSNorm, dim, eps=EPS)
        make_mlp = partial(GatedMLP if gated else QuickMLP, dim, mlp_dim)
        self.patch_embed = nn.Linear(3 * frames_per_patch * patch_size**2, dim, bias=False)
        self.layers = nn.ModuleList(QwenLayer(dim, heads, make_norm, make_mlp) for _ in range(depth))
        init_linear_layers(self, init_std)

    def encode(self, media: MediaInput) -> Features:
        """uint8 patches `[F, 3 * T * p * p]` -> features `[F, D]` with the same grids."""
        hidden = self.patch_embed(standardize(media.values, self.patch_embed.weight, self.image_mean, self.image_std))
        order = arrange_patches(media.grids, self.window)
        places = order.places.to(hidden.device, non_blocking=True)
        if order.permutation is not None:
            index = order.permutation.to(hidden.device, non_blocking=True)
            hidden = hidden.index_select(0, index)
        positions = rotate_by(find_angles(places, self.channels))
        frames = pack_lengths(order.frames, hidden.device, self.attention)
        windows = frames if self.window is None else pack_lengths(order.windows, hidden.device, self.attention)
        for number, layer in enumerate(self.layers):
            hidden = layer(hidden, positions, frames if number in self.full_layers else windows)
        if order.permutation is not None:
            hidden = torch.empty_like(hidden).index_copy(0, index, hidden)
        return Features(hidden, media.grids)

    def forward(self, media: MediaInput) -> Features:
        """The same as `encode`."""
        return self.encode(media)

    def load_weights(self) -> None:
        """Read `weights`. Raises `AssetError` if they are not those of this architecture."""
        if self.weights is not None:
            load_encoder(self, self.weights)


class PatchOrder(NamedTuple):
    """The order in which layers see the patches, and which of them see each other.

    Attributes:
        permutation: `[F]`, the number of every patch in the order of the views; None: that order.
        places: `[F, 2]`, row and column of every patch in its frame.
        frames: patches of every frame (pair).
        windows: patches of every window.
    """

    permutation: Tensor | None
    places: Tensor
    frames: list[int]
    windows: list[int]


def arrange_patches(grids: Sequence[Grid3], window: int | None) -> PatchOrder:
    """Patches frame by frame; with `window` (a side in patches) window by window in every frame. On the CPU."""
    places, index, frames, windows, first = [], [], [], [], 0
    for t, h, w in grids:
        rows, columns = (torch.arange(side, device="cpu") for side in (h, w))  # also where a model is only traced
        rows, columns = rows.repeat_interleave(w), columns.repeat(h)
        frame = torch.stack([rows, columns], dim=1)
        frames += [h * w] * t
        order = torch.arange(h * w, device="cpu")
        sizes = [h * w]
        if window is not None:
            across = -(-w // window)
            number = rows // window * across + columns // window
            order, sizes = number.argsort(stable=True), number.bincount().tolist()
        windows += sizes * t
        places.append(frame[order].repeat(t, 1))
        index += [order + first + number * h * w for number in range(t)]
        first += t * h * w
    return PatchOrder(None if window is None else torch.cat(index), torch.cat(places), frames, windows)


def find_angles(places: Tensor, channels: int) -> Tensor:
    """Angles `[F, C / 2]` of patches at `places` `[F, 2]`: the first half is the row's, the second the column's."""
    frequencies = THETA ** -(torch.arange(0, channels // 2, 2, device=places.device) / (channels // 2))
    return (places[..., None] * frequencies).flatten(1)


def rotate_by(angles: Tensor) -> Positions:
    """Rotations by `angles` `[F, C / 2]`, of both halves of the channels alike."""
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def standardize(patches: Tensor, weight: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 patches `[F, 3 * T * p * p]` as the numbers that an embedding with `weight` takes, channel by channel."""
    shift, scale = (weight.new_tensor(one).view(3, 1) for one in (mean, std))
    pixels = patches.unflatten(1, (3, -1)).to(weight.dtype) / 255
    return ((pixels - shift) / scale).flatten(1)


def init_linear_layers(module: nn.Module, std: float = 0.02) -> None:
    """Weights of this deviation (`transformers` starts with 0.02), and no bias."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class QwenLayer(nn.Module):
    """Attention, then an MLP, each behind a norm."""

    def __init__(
        self, dim: int, heads: int, make_norm: Callable[[], nn.Module], make_mlp: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = make_norm(), make_norm()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = make_mlp()

    def forward(self, hidden_states: Tensor, positions: Positions, sequences: WholeSequences) -> Tensor:
        """`[F, D]` -> `[F, D]`."""
        query, key, value = self.qkv(self.norm1(hidden_states)).unflatten(-1, (3, self.heads, -1)).unbind(1)
        query, key = (_rotate(one, positions) for one in (query, key))
        attended = attend_both_ways(query, key, value, sequences).flatten(1)
        hidden_states = hidden_states + self.proj(attended)
        return hidden_states + self.mlp(self.norm2(hidden_states))


def _rotate(states: Tensor, positions: Positions) -> Tensor:
    """Rotate `[F, H, C]` in fp32."""
    cosines, sines = positions
    first, second = states.float().chunk(2, dim=-1)
    return (states.float() * cosines + torch.cat([-second, first], dim=-1) * sines).to(states.dtype)


class QuickMLP(nn.Module):
    """Two linear layers with quick GELU between them."""

    def __init__(self, dim: int, mlp_dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, mlp_dim), nn.Linear(mlp_dim, dim)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[F, D]` -> `[F, D]`."""
        hidden = self.fc1(hidden)
        return self.fc2(hidden * torch.sigmoid(1.702 * hidden))


class GatedMLP(nn.Module):
    """A linear layer times another one's SiLU, then a third."""

    def __init__(self, dim: int, mlp_dim: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(dim, mlp_dim), nn.Linear(dim, mlp_dim)
        self.down_proj = nn.Linear(mlp_dim, dim)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[F, D]` -> `[F, D]`."""
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


def _is_ours(name: str) -> bool:
    """Whether a checkpoint's tensor is the encoder's, without the merger, which is a connector here."""
    return name.startswith(PREFIXES) and ".merger." not in name


def name_ours(key: str) -> str:
    """Our name of a checkpoint's tensor."""
    key = key.removeprefix("model.").removeprefix("visual.").replace("patch_embed.proj.", "patch_embed.")
    return key.replace("blocks.", "layers.", 1).replace(".attn.", ".")


def name_theirs(key: str) -> str:
    """The checkpoint's name, without a prefix, of our tensor."""
    if key.startswith("patch_embed."):
        return key.replace("patch_embed.", "patch_embed.proj.")
    key = key.replace("layers.", "blocks.", 1)
    return key.replace(".qkv.", ".attn.qkv.").replace(".proj.", ".attn.proj.")


def flatten_kernel(value: Tensor) -> Tensor:
    """The kernel of a convolution over patches, `[D, 3, T, p, p]` or `[D, 3, p, p]`, as the matrix that computes the
    same."""
    return value.flatten(1) if value.ndim >= 4 else value


def load_encoder(encoder: nn.Module, source: str) -> None:
    """Read an encoder out of the checkpoint of a whole model. Raises `AssetError` if it is of another architecture."""
    state = read_state(source, setting="vision.weights", wanted=_is_ours)
    try:
        encoder.load_state_dict({name_ours(key): flatten_kernel(value) for key, value in state.items()})
    except RuntimeError as error:
        raise AssetError(f"vision.weights: {source!r} does not fit the encoder: {error}") from error
