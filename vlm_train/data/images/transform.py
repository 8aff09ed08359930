"""Image and video bytes -> the uint8 views that a vision tower sees. Normalization happens on the device, in the tower.

Any random choice comes from the given generator, so that it depends on the sample's address only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from PIL import Image

from data_pipelines.media.pictures import WHITE, Decoder, Picture, decode_picture
from data_pipelines.media.video import is_video
from vlm_train.contracts.layout import MediaSize, ViewName
from vlm_train.contracts.media import Grid3, MediaShape
from vlm_train.data.images.plan import Views, check_background, check_decoder, name_frames
from vlm_train.data.images.rand_augment import LEVELS, distort_image, draw_distortions
from vlm_train.data.images.resize import MOST_PIXELS, resized_part
from vlm_train.data.images.torch_resize import resize_by_torch
from vlm_train.data.images.video import decode_frames
from vlm_train.errors import ConfigError

Mode = Literal["crop", "pad", "resize"]
Resizer = Literal["pillow", "torch"]

ASPECTS, TRIES = (3 / 4, 4 / 3), 10
"""Width over height of a random part, and how often one is drawn that fits, before the middle is taken."""

Rectangle = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels."""


def one_patch(size: MediaSize) -> Grid3:
    """A view that its encoder does not cut into patches."""
    del size
    return Grid3(1, 1, 1)


class ImageTransform:
    """One square or rectangular view of every image, and of every used frame of a video.

    Args:
        mode: "crop": shortest side to the tower's size, centre crop, as the CLIP processor does; "pad": expand to a
            square of the tower's mean colour, then resize (LLaVA-1.5, `expand2square`); "resize": both sides, aspect
            ignored.
        size: (height, width) in pixels of the tower's view; given by `build.py`.
        mean: per-channel mean in [0, 1] of the tower, the padding colour; given by `build.py`.
        patch_grid: the tower's patch grid of a view; given by `build.py`.
        flip: mirror at random with probability 0.5 while training; all frames of a video alike.
        random_resized_crop: [least, most] share of the image's area while training: a random part of it, of an aspect
            ratio between 3 : 4 and 4 : 3, is resized instead; the same part of all frames. None: the whole image.
        rand_augment: {num_ops, magnitude}: so many random distortions at a level of 10 while training, see
            `vlm_train.data.images.rand_augment`; None: none.
        jpeg_draft: let the JPEG decoder scale by 1/2, 1/4 or 1/8, never below what the resize makes of the image.
            Faster for images of twice that size and more, but other pixels. Differences of 255 seen at 1024 x 768 and
            2048 x 1536 -> 336: noise with the spectrum of photographs 1 to 2 on average, at most 13; small text 4 to 7,
            at most 56.
        decode: "pillow"; "simplejpeg": ordinary JPEG files by that package, to the same pixels, faster with
            `resize="torch"`. Pillow decodes the others, and those that `jpeg_draft` may scale.
        resize: "pillow": to the bit what the CLIP processor of `transformers` makes on Pillow; "torch": faster, and all
            but the same pixels, see `torch_resize`.
        upright: turn pictures as their Exif orientation says; false: as they are stored, as LLaVA's code trains them.
        background: the color behind transparent pictures, 0 to 255 for red, green and blue; null: whatever color the
            file has there, black mostly, as in LLaVA's code.
        frames: most frames of a video that are used, evenly spaced.
    """

    def __init__(
        self,
        *,
        mode: Mode = "crop",
        size: tuple[int, int],
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        patch_grid: Callable[[MediaSize], Grid3] = one_patch,
        flip: bool = False,
        random_resized_crop: Sequence[float] | None = None,
        rand_augment: Mapping[str, int] | None = None,
        jpeg_draft: bool = False,
        decode: Decoder = "pillow",
        resize: Resizer = "pillow",
        upright: bool = True,
        background: Sequence[int] | None = WHITE,
        frames: int = 8,
    ) -> None:
        if frames < 1:
            raise ConfigError(f"image.frames: {frames}; allowed: at least 1")
        area = random_resized_crop
        if area is not None and not (len(area) == 2 and 0 < area[0] <= area[1] <= 1):
            raise ConfigError(
                f"image.random_resized_crop: {[*area]}; allowed: [least, most] with 0 < least <= most <= 1, or null"
            )
        if rand_augment is not None and not (
            {*rand_augment} == {"num_ops", "magnitude"}
            and rand_augment["num_ops"] >= 1
            and 0 <= rand_augment["magnitude"] <= LEVELS
        ):
            raise ConfigError(
                f"image.rand_augment: {dict(rand_augment)}; allowed: {{num_ops: 1 or more, magnitude: 0 to {LEVELS}}}, "
                "or null"
            )
        check_background(background)
        check_decoder(decode)
        self.mode = mode
        self.size = size
        self.view_grid = patch_grid(MediaSize(width=size[1], height=size[0]))
        self.fill = tuple(int(channel * 255) for channel in mean)
        self.flip = flip
        self.random_resized_crop, self.rand_augment = random_resized_crop, rand_augment
        self.jpeg_draft, self.decode, self.resize = jpeg_draft, decode, resize
        self.upright, self.background = upright, None if background is None else tuple(background)
        self.frames = frames

    @property
    def random(self) -> bool:
        """Whether training makes random choices."""
        return self.flip or self.random_resized_crop is not None or self.rand_augment is not None

    def grids(self, size: MediaSize) -> tuple[Grid3, ...]:
        """Patch grids of the views of an image (one) or a video (one a used frame)."""
        return (self.view_grid,) * min(size.frames, self.frames)

    def name_views(self, size: MediaSize) -> tuple[ViewName, ...]:
        """Which view of an image or a video each of `grids` is."""
        return name_frames(min(size.frames, self.frames)) if size.is_video else (ViewName("whole"),)

    def blank(self) -> Views:
        """A black view."""
        return Views(np.zeros((1, 3, *self.size), np.uint8), (self.view_grid,))

    def __call__(
        self, data: bytes, generator: np.random.Generator | None = None, where: str = "image", *, images: int = 1
    ) -> Views:
        """The views `[V, 3, H, W]` of an image or a video, see `ImagePlan`."""
        crop = self.random_resized_crop if generator is not None else None
        draft = self._resized_size if self.jpeg_draft and crop is None else None  # a part is cut from all pixels
        pictures: Sequence[Picture]
        if is_video(data):
            frames = decode_frames(data, count=self.frames, where=where)
            pictures, size = [*frames], (frames.shape[2], frames.shape[1])
        else:
            picture, size = decode_picture(
                data, where, decode=self.decode, draft=draft, upright=self.upright, background=self.background
            )
            pictures = [picture]
        mirror, part, distortions = False, None, list[tuple[str, float]]()
        if generator is not None:
            mirror = self.flip and generator.random() < 0.5
            part = random_part(size, crop, generator) if crop else None
            if self.rand_augment:
                distortions = draw_distortions(**self.rand_augment, generator=generator)
        resized = self._resized_size(*size)
        views = [self._make_view(image, resized, mirror, part, distortions) for image in pictures]
        shape = MediaShape(frames=len(views) if is_video(data) else 0)
        return Views(np.stack(views) if len(views) > 1 else views[0][None], (self.view_grid,) * len(views), shape)

    def _make_view(
        self,
        image: Picture,
        resized: tuple[int, int],
        mirror: bool,
        part: Rectangle | None,
        distortions: Sequence[tuple[str, float]],
    ) -> np.ndarray:
        """`[3, H, W]` of one decoded image (`[H, W, 3]`, or Pillow's), or of a part of it, after the distortions that
        were drawn."""
        height, width = self.size
        whole, corner = (width, height), (0, 0)
        if part is None and self.mode == "crop":
            whole, corner = resized, ((resized[0] - width) // 2, (resized[1] - height) // 2)
        if self.resize == "torch" and whole[0] * whole[1] <= MOST_PIXELS:
            source = self._choose_source(np.asarray(image), resized, part)
            pixels = resize_by_torch(source, whole, corner, (width, height))
            if not (mirror or distortions):
                return pixels
            image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        else:
            if isinstance(image, np.ndarray):
                image = Image.fromarray(image)
            if part is not None:
                image = image.crop(part)
            elif self.mode == "pad":
                if max(image.size) ** 2 > MOST_PIXELS:
                    image = image.resize((max(1, resized[0]), max(1, resized[1])), Image.Resampling.BICUBIC)
                image = _expand_to_square(image, self.fill)
            if whole == (width, height):
                image = image.resize(whole, Image.Resampling.BICUBIC)
            else:
                image = resized_part(image, whole, corner, (width, height))
        if mirror:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if distortions:
            image = distort_image(image, distortions)
        planes = b"".join(image.tobytes("raw", channel) for channel in "RGB")
        return np.frombuffer(planes, np.uint8).reshape(3, *image.size[::-1])

    def _choose_source(self, pixels: np.ndarray, resized: tuple[int, int], part: Rectangle | None) -> np.ndarray:
        """What of an image `[H, W, 3]` is resized: a part, or all of it, or that in the middle of a square."""
        if part is not None:
            left, top, right, bottom = part
            return pixels[top:bottom, left:right]
        if self.mode != "pad":
            return pixels
        if max(pixels.shape) ** 2 > MOST_PIXELS:
            size = (max(1, resized[0]), max(1, resized[1]))
            pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
        h, w, _ = pixels.shape
        side = max(h, w)
        square = np.full((side, side, 3), self.fill, np.uint8)
        square[(side - h) // 2 :, (side - w) // 2 :][:h, :w] = pixels
        return square

    def _resized_size(self, w: int, h: int) -> tuple[int, int]:
        """Width and height that the resize makes of an image of `w` x `h` pixels: before the crop, without padding."""
        height, width = self.size
        if self.mode == "crop":  # rounded as the CLIP processor rounds
            short = min(height, width)
            return (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
        if self.mode == "pad":
            return math.ceil(width * w / max(w, h)), math.ceil(height * h / max(w, h))
        return width, height


def random_part(size: tuple[int, int], area: Sequence[float], generator: np.random.Generator) -> Rectangle:
    """A part of an image of `size` (width, height) with a share `area` [least, most] of its area, as torchvision's
    RandomResizedCrop draws it. Where none fits, the largest one in the middle of an allowed aspect ratio."""
    (w, h), (least, most), (narrow, wide) = size, area, ASPECTS
    for _ in range(TRIES):
        wanted = w * h * generator.uniform(least, most)
        aspect = math.exp(generator.uniform(math.log(narrow), math.log(wide)))
        width, height = round(math.sqrt(wanted * aspect)), round(math.sqrt(wanted / aspect))
        if 0 < width <= w and 0 < height <= h:
            left, top = int(generator.integers(w - width + 1)), int(generator.integers(h - height + 1))
            return left, top, left + width, top + height
    width, height = min(w, max(1, round(h * wide))), min(h, max(1, round(w / narrow)))
    left, top = (w - width) // 2, (h - height) // 2
    return left, top, left + width, top + height


def _expand_to_square(image: Image.Image, fill: tuple[int, ...]) -> Image.Image:
    """Centre the image on a square of colour `fill`."""
    w, h = image.size
    if w == h:
        return image
    side = max(w, h)
    square = Image.new("RGB", (side, side), fill)
    square.paste(image, ((side - w) // 2, (side - h) // 2))
    return square
