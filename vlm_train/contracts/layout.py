"""Media layout: how many placeholder tokens, in which grid, a sample's images and videos take in the text.

A layout is a small picklable object without torch or weights. `build.py` makes it from the parts (the image plan gives
the patch grid, the connector the token grid) and hands it to the data workers; the model checks it per item.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from vlm_train.contracts.media import Grid3, MediaShape

PLACEHOLDER_ID = -200
"""Token id of every placeholder position: outside any vocabulary, so it can never be mistaken for text."""


@dataclass(frozen=True, slots=True)
class MediaSize:
    """What a layout may know of a media item: pixels, and frames and seconds for a video; and how many `images`
    its sample has."""

    width: int
    height: int
    frames: int = 1
    seconds: float = 0.0
    images: int = 1

    @property
    def is_video(self) -> bool:
        """Whether it is a video."""
        return self.frames > 1 or self.seconds > 0


class ViewName(NamedTuple):
    """Which view of a media item one is.

    Attributes:
        kind: "whole" (all of an image), "tile" or "frame".
        row, column: of a tile, from 1.
        number: of a view of a video, from 1: a frame, or as many as a patch of the encoder holds.
    """

    kind: Literal["whole", "tile", "frame"]
    row: int = 0
    column: int = 0
    number: int = 0


@dataclass(frozen=True, slots=True)
class Slot:
    """A run of placeholders. `Slot(item, 0)` takes no place: it says that the item stands here, for models that read
    media by cross-attention.

    Attributes:
        item: the media item whose features they receive.
        count: placeholders.
        grid: their arrangement, if any.
        seconds: how long the video lasts that `grid.t` divides; None: an image.
        view: the one view of the item that they show; None: all of it.
    """

    item: int
    count: int
    grid: Grid3 | None = None
    seconds: float | None = None
    view: ViewName | None = None


Piece = str | Slot
"""A literal token (as spelled in the vocabulary) or a run of placeholders."""


class MediaLayout(Protocol):
    """`layout(sizes)` gives, for every media item of one sample, the pieces that stand for it in the text.

    Literals without a slot stand for an item as `Slot(item, 0)` before them would. An item without pieces takes no
    place in the text and is shown to the model all the same. A layout of a model with several position axes also has a
    method `positions`, see `vlm_train.data.text.streams.Positions`. A layout of a model in which the media of a sample
    see each other in both directions has an attribute `both_ways`: the literal tokens that do so beside placeholders.
    """

    def __call__(self, sizes: Sequence[MediaSize]) -> list[list[Piece]]: ...


@dataclass(frozen=True)
class GridLayout:
    """One run of placeholders an item, optionally between literal boundary tokens. Views of several shapes are laid in
    one row. With `name_views` every view has a run of its own, and a template can write text between them.

    `patch_grids(size)` are the patch grids of an item's views, as its image plan makes them, and `name_views(size)`
    their names; `token_grid(grid)` is what the connector makes of each. All are functions that pickle without weights.
    """

    patch_grids: Callable[[MediaSize], Sequence[Grid3]]
    token_grid: Callable[[Grid3], Grid3]
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    name_views: Callable[[MediaSize], Sequence[ViewName]] | None = None

    def __call__(self, sizes: Sequence[MediaSize]) -> list[list[Piece]]:
        layouts: list[list[Piece]] = []
        for item, size in enumerate(sizes):
            grids = [self.token_grid(one) for one in self.patch_grids(size)]
            seconds = size.seconds or None
            if self.name_views is not None:
                views = zip(grids, self.name_views(size), strict=True)
                slots = [Slot(item, grid.size, grid, seconds, view) for grid, view in views]
                layouts.append([*self.before, *slots, *self.after])
                continue
            count = sum(grid.size for grid in grids)
            joined = Grid3(1, 1, count)
            if len(shapes := {(grid.h, grid.w) for grid in grids}) == 1:  # one view after the other, as frames are
                joined = Grid3(sum(grid.t for grid in grids), *shapes.pop())
            layouts.append([*self.before, Slot(item, count, joined, seconds), *self.after])
        return layouts


@dataclass(frozen=True)
class StitchedLayout:
    """One run of placeholders an item: as many as the stitcher makes of the tokens of its views.

    `patch_grids` and `token_grid` as in `GridLayout`; `shape(size)` tells how an item is made up of its views, and
    `count_tokens(shape, grids)` how many tokens a stitcher makes of them.
    """

    patch_grids: Callable[[MediaSize], Sequence[Grid3]]
    token_grid: Callable[[Grid3], Grid3]
    shape: Callable[[MediaSize], MediaShape]
    count_tokens: Callable[[MediaShape, Sequence[Grid3]], int]

    def __call__(self, sizes: Sequence[MediaSize]) -> list[list[Piece]]:
        layouts: list[list[Piece]] = []
        for item, size in enumerate(sizes):
            grids = [self.token_grid(grid) for grid in self.patch_grids(size)]
            layouts.append([Slot(item, self.count_tokens(self.shape(size), grids), seconds=size.seconds or None)])
        return layouts


LOW_RES_START, IMAGE_START, IMAGE_END, ROW_END = "<low_res_im_start>", "<im_start>", "<im_end>", "<im_col>"
FRAME_START, FRAME_END = "<frame_start>", "<frame_end>"


@dataclass(frozen=True)
class CropLayout:
    """An image as Molmo2 lays it: the view of all of it between marks, then the image that its overlapping tiles make
    up, between marks and with one behind every row. Every frame of a video, and every view of an image without tiles,
    stands between marks.

    `patch_grids`, `shape` and `token_grid` as in `StitchedLayout`; `frame_grid` is what the connector makes of the
    patch grid of a frame.
    """

    patch_grids: Callable[[MediaSize], Sequence[Grid3]]
    shape: Callable[[MediaSize], MediaShape]
    token_grid: Callable[[Grid3], Grid3]
    frame_grid: Callable[[Grid3], Grid3]
    both_ways: tuple[str, ...] = (LOW_RES_START, IMAGE_START, IMAGE_END, ROW_END, FRAME_START, FRAME_END)

    def __call__(self, sizes: Sequence[MediaSize]) -> list[list[Piece]]:
        return [self._lay_out(item, size) for item, size in enumerate(sizes)]

    def _lay_out(self, item: int, size: MediaSize) -> list[Piece]:
        grids, shape = self.patch_grids(size), self.shape(size)
        if shape.frames:
            pieces = list[Piece]()
            for grid in map(self.frame_grid, grids):
                pieces += [FRAME_START, Slot(item, grid.size, grid, size.seconds / len(grids)), FRAME_END]
            return pieces
        if not shape.rows:
            slots = [Slot(item, grid.size, grid) for grid in map(self.token_grid, grids)]
            return [piece for slot in slots for piece in (LOW_RES_START, slot, IMAGE_END)]
        whole, image = self.token_grid(grids[0]), self.token_grid(shape.join_grid(grids[0]))
        row: list[Piece] = [Slot(item, image.w, Grid3(1, 1, image.w)), ROW_END]
        return [LOW_RES_START, Slot(item, whole.size, whole), IMAGE_END, IMAGE_START, *row * image.h, IMAGE_END]


def untiled_shape(size: MediaSize) -> MediaShape:
    """The shape of an item under plans that make no tiles."""
    return MediaShape(frames=size.frames if size.is_video else 0)


class NoMedia:
    """Layout of models whose text holds no placeholders (two towers: the image never enters the text)."""

    def __call__(self, sizes: Sequence[MediaSize]) -> list[list[Piece]]:
        return [[] for _ in sizes]
