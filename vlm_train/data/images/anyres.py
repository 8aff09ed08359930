"""AnyRes: every image as one view of all of it, and as tiles at the resolution that fits it best (LLaVA-NeXT)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from data_pipelines.media.pictures import WHITE, Decoder, decode_picture
from data_pipelines.media.video import is_video
from vlm_train.contracts.layout import MediaSize
from vlm_train.contracts.media import Grid3, MediaShape
from vlm_train.data.images.plan import Views
from vlm_train.data.images.tiles import TileGrid, cut_tiles, resize_picture, stack_views
from vlm_train.data.images.transform import ImageTransform, Resizer, one_patch
from vlm_train.data.images.video import decode_frames
from vlm_train.errors import ConfigError


class AnyRes:
    """The image in the size of one view, its aspect ignored, then tiles of that size: the image with its aspect kept,
    in the middle of black, in the grid of `grids` that leaves most of its pixels and the least black. Every used frame
    of a video is one view of all of it. Nothing is random.

    Pixels are those of `LlavaNextImageProcessor` of `transformers` on Pillow (llava/mm_utils.py, process_anyres_image).

    Args:
        size: (height, width) in pixels of the tower's view; given by `build.py`.
        mean: per-channel mean in [0, 1] of the tower; given by `build.py`.
        patch_grid: the tower's patch grid of a view; given by `build.py`.
        grids: allowed grids of tiles, [rows, columns] each, the first of several equal ones taken; or one number n:
            all from 1 x 1 to n x n.
        decode: "pillow" or "simplejpeg", as in `ImageTransform`.
        resize: "pillow" or "torch", likewise.
        tile_several: false: an image of a sample with several is one view, padded to a square of the tower's mean
            color, as LLaVA-OneVision takes them.
        background: the color behind transparent pictures, 0 to 255 for red, green and blue; null: whatever color the
            file has there, black mostly.
        frames: most frames of a video that are used, evenly spaced.
    """

    random = False

    def __init__(
        self,
        *,
        size: tuple[int, int],
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        patch_grid: Callable[[MediaSize], Grid3] = one_patch,
        grids: Sequence[Sequence[int]] | int = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)),
        decode: Decoder = "pillow",
        resize: Resizer = "pillow",
        background: Sequence[int] | None = WHITE,
        tile_several: bool = True,
        frames: int = 8,
    ) -> None:
        self.padded = ImageTransform(
            mode="pad",
            size=size,
            mean=mean,
            patch_grid=patch_grid,
            decode=decode,
            resize=resize,
            background=background,
            frames=frames,
        )
        self.size, self.view_grid = size, self.padded.view_grid
        self.tile_grids, self.tile_several = _list_tile_grids(grids), tile_several
        self.decode, self.resize, self.frames = decode, resize, frames
        self.background = self.padded.background

    def shape(self, size: MediaSize) -> MediaShape:
        """How the views of an item make it up."""
        if size.is_video:
            return MediaShape(frames=min(size.frames, self.frames))
        if size.images > 1 and not self.tile_several:
            return MediaShape()
        rows, columns = choose_tile_grid((size.width, size.height), self.size, self.tile_grids)
        return MediaShape(width=size.width, height=size.height, rows=rows, columns=columns)

    def grids(self, size: MediaSize) -> tuple[Grid3, ...]:
        """Patch grids of the views of an image (all of it, then the tiles) or a video (one a used frame)."""
        shape = self.shape(size)
        return (self.view_grid,) * (shape.frames or 1 + shape.rows * shape.columns)

    def blank(self) -> Views:
        """A black view."""
        return Views(np.zeros((1, 3, *self.size), np.uint8), (self.view_grid,))

    def __call__(
        self, data: bytes, generator: np.random.Generator | None = None, where: str = "image", *, images: int = 1
    ) -> Views:
        """The views `[V, 3, H, W]` of an image or a video, see `ImagePlan`."""
        height, width = self.size
        if is_video(data):
            frames = decode_frames(data, count=self.frames, where=where)
            views = [resize_picture(frame, width, height, self.resize) for frame in frames]
            return self._make_views(views, MediaShape(frames=len(views)))
        if images > 1 and not self.tile_several:
            return self.padded(data, None, where)
        picture, (w, h) = decode_picture(data, where, decode=self.decode, background=self.background)
        shape = self.shape(MediaSize(width=w, height=h))
        rows, columns = shape.rows, shape.columns
        canvas = np.zeros((rows * height, columns * width, 3), np.uint8)
        inner_width, inner_height = fit_inside((w, h), (columns * width, rows * height))
        top, left = (canvas.shape[0] - inner_height) // 2, (canvas.shape[1] - inner_width) // 2
        image = resize_picture(picture, inner_width, inner_height, self.resize)
        canvas[top : top + inner_height, left : left + inner_width] = image
        whole = resize_picture(picture, width, height, self.resize)
        return self._make_views([whole, *cut_tiles(canvas, rows, columns)], shape)

    def _make_views(self, pictures: Sequence[np.ndarray], shape: MediaShape) -> Views:
        return Views(stack_views(pictures), (self.view_grid,) * len(pictures), shape)


def choose_tile_grid(size: tuple[int, int], view: tuple[int, int], grids: Sequence[TileGrid]) -> TileGrid:
    """The grid whose tiles (`view`: height, width) keep most pixels of an image of `size` (width, height), and of those
    the one with the fewest pixels of margin; the first of several."""
    (width, height), (view_height, view_width) = size, view

    def judge_grid(grid: TileGrid) -> tuple[int, int]:
        whole_width, whole_height = grid[1] * view_width, grid[0] * view_height
        scale = min(whole_width / width, whole_height / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - whole_width * whole_height

    return max(grids, key=judge_grid)


def fit_inside(size: tuple[int, int], frame: tuple[int, int]) -> tuple[int, int]:
    """Width and height of an image of `size` (width, height) that is scaled to touch two sides of a frame."""
    (width, height), (most_width, most_height) = size, frame
    by_width, by_height = most_width / width, most_height / height
    if by_width < by_height:
        return most_width, min(math.ceil(height * by_width), most_height)
    return min(math.ceil(width * by_height), most_width), most_height


def _list_tile_grids(grids: Sequence[Sequence[int]] | int) -> tuple[TileGrid, ...]:
    """Raises `ConfigError` for what are no grids."""
    if isinstance(grids, int):
        found = [(rows, columns) for rows in range(1, grids + 1) for columns in range(1, grids + 1)]
    else:
        found = [(one[0], one[1]) if len(one) == 2 else (0, 0) for one in grids]
    if not found or any(min(grid) < 1 for grid in found):
        raise ConfigError(f"image.grids: {grids}; allowed: a list of [rows, columns] of at least 1 each, or one number")
    return tuple(found)
