"""Image plans: what one vision encoder is given of an image or a video. Every encoder of a model has its own.

Legend: V views, P patches of all views, C * p * p numbers of a patch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Protocol

import numpy as np

from data_pipelines.media.pictures import Decoder
from vlm_train.contracts.layout import MediaSize, ViewName
from vlm_train.contracts.media import Grid3, MediaShape
from vlm_train.errors import ConfigError


@dataclass(frozen=True)
class Views:
    """What a plan makes of one media item.

    Attributes:
        values: uint8, views of one size `[V, 3, H, W]`, or flat patches, view by view, `[P, C * p * p]`.
        grids: patch grid of every view.
        shape: how the views make up the item.
        patch_frames: frames of a flat patch, `[P, C * frames * p * p]`.
        fields: further arrays by name, which `join_views` joins along their first axis.
        preview: pictures of the views `[3, H, W]`, where `values` holds none.
    """

    values: np.ndarray
    grids: tuple[Grid3, ...]
    shape: MediaShape = MediaShape()
    patch_frames: int = 1
    fields: Mapping[str, np.ndarray] = field(default_factory=dict)
    preview: tuple[np.ndarray, ...] = ()

    def pictures(self) -> list[np.ndarray]:
        """Every view as uint8 `[3, H, W]`, put together from (the first frames of) its patches where they are flat."""
        if self.preview:
            return list(self.preview)
        if self.values.ndim == 4:
            return list(self.values)
        ends = np.cumsum([grid.size for grid in self.grids])[:-1]
        flat = self.values.reshape(len(self.values), 3, self.patch_frames, -1)[:, :, 0]
        return [_picture(patches, grid) for patches, grid in zip(np.split(flat, ends), self.grids, strict=True)]


class ImagePlan(Protocol):
    """How media become what an encoder is given. Picklable: data workers run it. A plan that makes tiles also has a
    method `shape(size)`, which gives the `MediaShape` of an item before its pixels are read. A plan with a method
    `name_views(size)`, the `ViewName` of every view, goes with templates that write text between views.

    Attributes:
        random: whether training makes random choices.
    """

    @property
    def random(self) -> bool: ...

    def grids(self, size: MediaSize) -> tuple[Grid3, ...]:
        """Patch grid of every view of a media item: known before its pixels are read."""
        ...

    def blank(self) -> Views:
        """One small view of zeros, for batches without media."""
        ...

    def __call__(
        self, data: bytes, generator: np.random.Generator | None = None, where: str = "image", *, images: int = 1
    ) -> Views:
        """Decode and transform one image, or the used frames of one video; its first bytes tell which it is.

        Args:
            data: the encoded file.
            generator: source of randomness while training; None: deterministic.
            where: shard and key, for the message.
            images: how many images its sample has.

        Raises:
            BadSample: the bytes are not a sound JPEG, PNG or WebP image, or MP4, WebM or Matroska video, of acceptable
                size.
        """
        ...


MediaViews = Mapping[str, Sequence[Views | None]]
"""Name of an encoder -> its views of every media item of a sample; None: the sample does not show the item."""


def join_fields(items: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The `fields` of several items, every name joined along the first axis. In the other axes, whose sizes may differ,
    smaller ones are filled up with zeros at their ends, as the library's processors do."""
    found: dict[str, np.ndarray] = {}
    for name in dict.fromkeys(name for item in items for name in item):
        arrays = [item[name] for item in items if name in item]
        largest = np.max([array.shape[1:] for array in arrays], axis=0) if arrays[0].ndim > 1 else ()
        padded = []
        for array in arrays:
            missing = [(0, 0), *((0, int(most) - size) for most, size in zip(largest, array.shape[1:], strict=True))]
            padded.append(np.pad(array, missing) if any(end for _, end in missing) else array)
        found[name] = np.concatenate(padded)
    return found


def name_frames(count: int) -> tuple[ViewName, ...]:
    """The names of the views of a video."""
    return tuple(ViewName("frame", number=number) for number in range(1, count + 1))


def name_tiles(rows: int, columns: int) -> tuple[ViewName, ...]:
    """The names of the tiles of an image, row by row."""
    return tuple(ViewName("tile", row, column) for row in range(1, rows + 1) for column in range(1, columns + 1))


def check_decoder(decode: Decoder) -> None:
    """Raise `ConfigError` where simplejpeg is asked for and not installed."""
    if decode == "simplejpeg" and find_spec("simplejpeg") is None:
        raise ConfigError(
            "image.decode: got simplejpeg, which is not installed: pip install 'vlm-train[jpeg]'. "
            "Allowed without it: pillow."
        )


def check_background(background: Sequence[int] | None) -> None:
    """Raise `ConfigError` for what is no color."""
    if background is not None and not (len(background) == 3 and all(0 <= value <= 255 for value in background)):
        raise ConfigError(f"image.background: {[*background]}; allowed: [red, green, blue] of 0 to 255 each, or null")


def collect_pictures(views: MediaViews) -> list[np.ndarray]:
    """Every view `[3, H, W]` of a sample, of one encoder after the other."""
    return [picture for items in views.values() for one in items if one is not None for picture in one.pictures()]


def _picture(patches: np.ndarray, grid: Grid3) -> np.ndarray:
    """`[P, 3, p * p]` of one view -> `[3, H, W]`, its times below each other."""
    side = round(patches.shape[2] ** 0.5)
    image = patches.reshape(grid.t * grid.h, grid.w, 3, side, side).transpose(2, 0, 3, 1, 4)
    return np.ascontiguousarray(image.reshape(3, grid.t * grid.h * side, grid.w * side))
