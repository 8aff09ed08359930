"""Images as the processor of a whole model of `transformers` makes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from data_pipelines.media.pictures import WHITE, Picture, decode_picture
from data_pipelines.media.video import is_video
from vlm_train.contracts.layout import MediaSize
from vlm_train.contracts.media import Grid3, MediaInput, MediaShape
from vlm_train.data.images.plan import Views, check_background, join_fields
from vlm_train.data.images.video import decode_frames
from vlm_train.errors import ConfigError
from vlm_train.models.hf_vlm.processor import LibraryProcessor
from vlm_train.models.hf_vlm.shapes import place_fields

BLANK = MediaSize(width=32, height=32)
PREVIEW = 224
"""Longer side of the picture that stands for an image in reports."""


class LibraryPlan:
    """One view of every image, whose grid counts its tokens: pixels and all else are `fields`, by the library's names.
    Nothing is random. A video is its used frames, each an image.

    Args:
        processor: that of the model; given by `build.py`.
        frames: most frames of a video that are used, evenly spaced.
        background: the color behind transparent pictures, 0 to 255 for red, green and blue; null: whatever color the
            file has there, black mostly.
    """

    random = False

    def __init__(
        self, *, processor: LibraryProcessor, frames: int = 8, background: Sequence[int] | None = WHITE
    ) -> None:
        check_background(background)
        if frames < 1:
            raise ConfigError(f"image.frames: {frames}; allowed: at least 1")
        self.processor, self.frames = processor, frames
        self.background = None if background is None else tuple(background)

    def count_frames(self, size: MediaSize) -> int:
        """Used frames of a video; 1 of an image."""
        return min(self.frames, size.frames) if size.is_video else 1

    def grids(self, size: MediaSize) -> tuple[Grid3, ...]:
        """One view, as many tokens as stand in the text."""
        return (Grid3(1, 1, self.processor.count_tokens(size) * self.count_frames(size)),)

    def shape(self, size: MediaSize) -> MediaShape:
        """Frames of a video."""
        return MediaShape(frames=self.count_frames(size) if size.is_video else 0)

    def blank(self) -> Views:
        """A small black image."""
        return self._prepare([Image.new("RGB", (BLANK.width, BLANK.height))], MediaShape())

    def blank_input(self, size: MediaSize, count: int) -> MediaInput:
        """`count` black images of one size; pixels on the default device, all else where it can be read."""
        device = torch.get_default_device().type
        with torch.device("cpu"):
            fields, _ = self.processor.prepare(Image.new("RGB", (size.width, size.height)))
            joined = place_fields(join_fields([fields] * count), device)
        counts = {name: (len(one),) * count for name, one in fields.items()}
        values = torch.zeros(count, 3, 1, 1, dtype=torch.uint8)
        return MediaInput(values, self.grids(size) * count, (1,) * count, fields=joined, field_counts=counts)

    def __call__(
        self, data: bytes, generator: np.random.Generator | None = None, where: str = "image", *, images: int = 1
    ) -> Views:
        """What the model is given of an image or a video, see `ImagePlan`."""
        if is_video(data):
            frames = decode_frames(data, count=self.frames, where=where)
            return self._prepare(list(frames), MediaShape(frames=len(frames)))
        picture, _ = decode_picture(data, where, background=self.background)
        return self._prepare([picture], MediaShape())

    def _prepare(self, pictures: Sequence[Picture], shape: MediaShape) -> Views:
        made = [self.processor.prepare(picture) for picture in pictures]
        count = sum(ids.count(self.processor.image_id) for _, ids in made)
        return Views(
            values=np.zeros((1, 3, 1, 1), np.uint8),  # pixels are among the fields
            grids=(Grid3(1, 1, count),),
            shape=shape,
            fields=join_fields([fields for fields, _ in made]),
            preview=tuple(_shrink(picture) for picture in pictures),
        )


def _shrink(picture: Picture) -> np.ndarray:
    """A picture `[3, H, W]` small enough to be shown."""
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    scale = min(1.0, PREVIEW / max(image.size))
    small = image.resize([max(1, round(side * scale)) for side in image.size])
    return np.asarray(small).transpose(2, 0, 1)
