"""Media layout: how many placeholder tokens, in which grid, a sample's images and videos take in the text.

A layout is a small picklable object without torch or weights. `build.py` makes it from the parts (the image plan gives
the patch grid, the connector the token grid) and hands it to the data workers; the model checks it per item.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

Grid = tuple[int, int]  # rows, columns

PLACEHOLDER_ID = -200
"""Token id of every placeholder position: outside any vocabulary, so it can never be mistaken for text."""


@dataclass(frozen=True, slots=True)
class MediaSize:
    """What a layout may know of a media item: pixels, and frames and seconds for a video."""

    width: int
    height: int
    frames: int = 1
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Slot:
    """`count` placeholder tokens for media item `item`; `grid` (rows, columns) is their arrangement, if any.

    `Slot(item, 0)` takes no place: it says that the item stands here, for models that read media by cross-attention.
    """

    item: int
    count: int
    grid: Grid | None = None


Piece = str | Slot
"""A literal token (as spelled in the vocabulary) or a run of placeholders."""


class MediaLayout(Protocol):
    """`layout(sizes)` gives, for every media item of one sample, the pieces that stand for it in the text.

    Literals without a slot stand for an item as `Slot(item, 0)` before them would. An item without pieces takes no
    place in the text and is shown to the model all the same. A layout of a model with several position axes also has a
    method `positions`, see `vlm_train.data.streams.Positions`.
    """

    def __call__(self, sizes: Sequence[MediaSize]) -> list[list[Piece]]: ...


def one_view(size: MediaSize) -> int:
    """Every image is one view, and so is every video."""
    del size
    return 1


@dataclass(frozen=True)
class GridLayout:
    """One run of placeholders an item, optionally between literal boundary tokens.

    `patch_grid(size)` is the vision tower's patch grid for a view of an item, `token_grid(grid)` what the connector
    makes of it, and `views(size)` how many views the item has, whose grids stand below each other. All three are
    functions that pickle without weights.
    """

    patch_grid: Callable[[MediaSize], Grid]
    token_grid: Callable[[Grid], Grid]
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    views: Callable[[MediaSize], int] = one_view

    def __call__(self, sizes: Sequence[MediaSize]) -> list[list[Piece]]:
        layouts: list[list[Piece]] = []
        for item, size in enumerate(sizes):
            rows, columns = self.token_grid(self.patch_grid(size))
            rows *= self.views(size)
            layouts.append([*self.before, Slot(item, rows * columns, (rows, columns)), *self.after])
        return layouts


class ViewSizes(Protocol):
    """What makes views: the size in pixels of the view of a media item."""

    def view_size(self, size: MediaSize) -> MediaSize: ...


@dataclass(frozen=True)
class ViewGrid:
    """Patch grid of the view that an image transform makes of a media item."""

    image: ViewSizes
    patch_grid: Callable[[MediaSize], Grid]

    def __call__(self, size: MediaSize) -> Grid:
        return self.patch_grid(self.image.view_size(size))


class NoMedia:
    """Layout of models whose text holds no placeholders (two towers: the image never enters the text)."""

    def __call__(self, sizes: Sequence[MediaSize]) -> list[list[Piece]]:
        return [[] for _ in sizes]
