"""Two vision towers behind one gate: features of both, mixed patch by patch and channel by channel.

Legend: N views, P patches, D / E widths of the first and the second tower, H W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_train.contracts.layout import MediaSize
from vlm_train.contracts.media import Features, MediaInput
from vlm_train.errors import ConfigError
from vlm_train.models.vision.hf import HFVision


class GatedVision(nn.Module):
    """`g * f1 + (1 - g) * f2` with `g = sigmoid(W [f1; f2])`: a vision encoder with the first tower's grid and width.

    The second tower sees the same view, resized where its resolution differs; its features are projected to width D and
    resampled to the first's grid where it has another. Towers keep their patches only. The gate starts at g = 1/2.

    Args:
        first, second: towers, each with its own weights.
    """

    def __init__(self, *, first: HFVision, second: HFVision) -> None:
        super().__init__()
        for name, tower in (("first", first), ("second", second)):
            if tower.keep_cls:
                raise ConfigError(
                    f"vision.{name}.keep_cls: true; allowed: false, since the gate mixes patches by place"
                )
        self.first, self.second = first, second
        self.image_size = self.first.image_size
        self.image_mean, self.image_std = self.first.image_mean, self.first.image_std
        self.patch_grid = self.first.patch_grid
        self.out_dim = self.first.out_dim
        self.project = nn.Linear(self.second.out_dim, self.out_dim)
        self.gate = nn.Linear(2 * self.out_dim, self.out_dim)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks of both towers, for activation checkpointing."""
        return nn.ModuleList([*self.first.layers, *self.second.layers])

    def encode(self, media: MediaInput) -> Features:
        """Features `[N * P, D]` of uint8 views `[N, 3, H, W]`."""
        first = self.first.encode(media)
        second = self.second.encode(MediaInput(self._resize_pixels(media.values)))
        one, two = first.rectangular(), self._to_grid(self.project(second.rectangular()))
        gate = torch.sigmoid(self.gate(torch.cat([one, two], dim=-1)))
        return Features((gate * one + (1 - gate) * two).flatten(0, 1), first.grids)

    def forward(self, media: MediaInput) -> Features:
        """The same as `encode`."""
        return self.encode(media)

    def unused_parameters(self) -> list[str]:
        """Names of parameters that `encode` never reads, of both towers."""
        towers = (("first", self.first), ("second", self.second))
        return [f"{name}.{parameter}" for name, tower in towers for parameter in tower.unused_parameters()]

    @property
    def weights(self) -> list[str]:
        """What the towers load."""
        return [tower.weights for tower in (self.first, self.second) if tower.weights]

    def load_weights(self) -> None:
        """Read the weights of both towers. Raises `AssetError` if they are not those of their architectures."""
        for tower in (self.first, self.second):
            if tower.weights:
                tower.load_weights()

    def _resize_pixels(self, pixels: Tensor) -> Tensor:
        size = self.second.image_size
        if tuple(pixels.shape[-2:]) == size:
            return pixels
        return F.interpolate(pixels.float(), size, mode="bicubic", antialias=True).clamp(0, 255)

    def _to_grid(self, features: Tensor) -> Tensor:
        wanted, own = (tower.patch_grid(MediaSize(*reversed(tower.image_size))) for tower in (self.first, self.second))
        if wanted == own:
            return features
        image = features.transpose(1, 2).unflatten(2, own[1:])
        return F.interpolate(image, wanted[1:], mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
