"""Media between data, vision encoders, connectors and merge: every view has its own number of features.

Legend: N views, P patches of a view, Q features of a view, F features of all views, D width. Grids and counts are known
on the host, so nothing here waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlm_train.errors import BatchError


class Grid3(NamedTuple):
    """How the patches or tokens of a view are arranged: times, rows, columns, joined in this order.

    Features without an arrangement (a class token in front of patches, queries) are one row: `(1, 1, count)`.
    """

    t: int
    h: int
    w: int

    @property
    def size(self) -> int:
        """Patches or tokens of the view."""
        return self.t * self.h * self.w


class MediaShape(NamedTuple):
    """How the views of a media item make it up.

    Attributes:
        width, height: pixels of the image, where its tiles have a margin.
        rows, columns: tiles of the image, row by row behind a view of all of it; 0: there are none.
        frames: views of a video; 0: an image.
        margins: patches at the beginning and the end of a tile that its neighbors show better; (0, 0): tiles do not
            overlap.
    """

    width: int = 0
    height: int = 0
    rows: int = 0
    columns: int = 0
    frames: int = 0
    margins: tuple[int, int] = (0, 0)

    def join_grid(self, tile: Grid3) -> Grid3:
        """The patch grid of the image that overlapping tiles with the grid `tile` make up."""
        margin = sum(self.margins)
        return Grid3(1, self.rows * (tile.h - margin) + margin, self.columns * (tile.w - margin) + margin)


@dataclass(frozen=True)
class MediaInput:
    """What one vision encoder is given of a batch.

    Attributes:
        values: views of one size, uint8 `[N, 3, H, W]`; or flat patches of all views one view after the other,
            `[sum of P, C * p * p]`, whose `grids` say where a view ends; or a family's own values with grids. Never
            empty: a batch without images carries one blank view, so that every rank makes the same tower calls.
        grids: patch grid of every view, the blank one included. Empty: `values` are views, and the encoder knows.
        view_counts: views of each media item, in order; their sum is `views_total`. These views come first.
        shapes: how the views of each media item make it up.
        fields: further tensors by name, those of all items joined along their first axis: what a processor of
            `transformers` makes. `field_counts`: of every name, how many entries each item has there.
    """

    values: Tensor
    grids: tuple[Grid3, ...] = ()
    view_counts: tuple[int, ...] = ()
    shapes: tuple[MediaShape, ...] = ()
    fields: Mapping[str, Tensor] = field(default_factory=dict)
    field_counts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        """Views, the blank one included."""
        return len(self.grids) or len(self.values)

    @property
    def views_total(self) -> int:
        """Views of all media items; without items 0, for the blank view is of none."""
        return sum(self.view_counts)

    @property
    def is_flat(self) -> bool:
        """Whether `values` are patches rather than views."""
        return self.values.ndim != 4

    def split(self, size: int) -> list[MediaInput]:
        """Chunks of `size` views each, the last one shorter. They belong to no media item."""
        firsts = range(0, len(self), size)
        parts = [self.grids[first : first + size] for first in firsts]
        rows = [sum(grid.size for grid in part) for part in parts] if self.is_flat else size
        return [MediaInput(values, grids) for values, grids in zip(self.values.split(rows), parts, strict=True)]


class Features(NamedTuple):
    """Features of views, one view after the other. A tuple, for sharded modules look for tensors in what they return.

    Attributes:
        values: `[F, D]`; several layers of a tower lie beside each other in D.
        grids: of every view; F is the sum of their sizes.
    """

    values: Tensor
    grids: tuple[Grid3, ...]

    @classmethod
    def from_rectangular(cls, values: Tensor, grid: Grid3) -> Features:
        """From `[N, Q, D]`, every view of the same grid."""
        return cls(values.flatten(0, 1), (grid,) * len(values))

    @property
    def lengths(self) -> list[int]:
        """Features of every view. Raises `BatchError` if there are more or fewer values."""
        lengths = [grid.size for grid in self.grids]
        if self.values.shape[0] != sum(lengths):
            raise BatchError(f"features: {self.values.shape[0]} values, but their grids hold {sum(lengths)}")
        return lengths

    def rectangular(self) -> Tensor:
        """`[N, P, D]`, a view of the values. Raises `BatchError` if views differ in their number of features."""
        counts = set(self.lengths)
        if len(counts) > 1:
            raise BatchError(f"features: views of {', '.join(map(str, sorted(counts)))} features are no rectangle")
        return self.values.unflatten(0, (len(self.grids), next(iter(counts), 1)))

    def padded(self) -> tuple[Tensor, Tensor | None]:
        """`[N, longest P, D]` and a mask `[N, longest P]`, True where a feature is; None: all of them are."""
        lengths = self.lengths
        if len(set(lengths)) <= 1:
            return self.rectangular(), None
        ones = torch.ones(self.values.shape[0], dtype=torch.bool, device=self.values.device)
        values, mask = (pad_sequence(one.split(lengths), batch_first=True) for one in (self.values, ones))
        return values, mask

    def mean(self) -> Tensor:
        """`[N, D]`, the mean of every view's features."""
        values, mask = self.padded()
        if mask is None:
            return values.mean(dim=1)
        return values.sum(dim=1) / mask.sum(dim=1, keepdim=True)

    def map(self, function: Callable[[Tensor], Tensor]) -> Features:
        """Apply `function`, which maps `[F, D]` row by row, to all values at once."""
        return self._replace(values=function(self.values))


def map_grids(
    features: Features, function: Callable[[Tensor, Grid3], Tensor], token_grid: Callable[[Grid3], Grid3]
) -> Features:
    """Run `function([n, P, D], grid) -> [n, Q, D']` once for every distinct grid, for n views of it together.

    `function` moves or pools neighbours. Layers with parameters belong behind it, in `Features.map`: ranks see
    different numbers of grids, and sharded layers must run equally often on all of them.
    """
    places: dict[Grid3, list[int]] = {}
    for number, grid in enumerate(features.grids):
        places.setdefault(grid, []).append(number)
    grids = tuple(token_grid(grid) for grid in features.grids)
    if len(places) == 1:
        return Features(function(features.rectangular(), features.grids[0]).flatten(0, 1), grids)
    views = features.values.split(features.lengths)
    mapped: dict[int, Tensor] = {}
    for grid, numbers in places.items():
        mapped |= zip(numbers, function(torch.stack([views[number] for number in numbers]), grid), strict=True)
    return Features(torch.cat([mapped[number] for number in range(len(views))]), grids)
