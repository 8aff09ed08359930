"""A picture file as what it shows: opened under limits, upright, in 8-bit RGB."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from PIL import Image

from data_pipelines.errors import BadSample
from data_pipelines.media.formats import describe_format

FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
"""The formats that are read, and the file name extension each is stored under."""
MAX_SIDE = 65_535
"""Pixels of a side, as JPEG itself allows: what a resize needs grows with it, however thin the picture is."""
MAX_EXIF = 16
"""Exif segments of a JPEG file: Pillow copies all of them for each, at every look."""
WHITE = (255, 255, 255)
JPEG_START = b"\xff\xd8\xff"

Decoder = Literal["pillow", "simplejpeg"]
Picture = Image.Image | np.ndarray
"""8-bit RGB, `[H, W, 3]` where it is an array."""

ORIENTATION = 0x0112  # the Exif tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture of each Exif orientation upright."""
SWAPPING = (5, 6, 7, 8)  # width and height
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning)
"""What Pillow raises for a damaged or too large file."""


def open_picture(data: bytes) -> Image.Image:
    """The picture of a file, not decoded yet; its `format` is one of `FORMATS`. Raises `BadSample`."""
    if data.startswith(JPEG_START) and (count := _count_exif(data)) > MAX_EXIF:
        raise BadSample(f"JPEG with more than {count - 1} Exif segments; at most {MAX_EXIF} are read", kind="image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's texts name neither file nor sample
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=tuple(FORMATS))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadSample(f"image too large: {error}", kind="image") from error
    except UNREADABLE as error:
        found = describe_format(data)
        said = f"not a readable image: damaged {found}{_explain_damage(error)}"
        if found not in FORMATS:
            said = f"found {found}; pictures are read from {', '.join(FORMATS)}"
        raise BadSample(said, kind="image") from error
    if image.format == "MPO":  # a JPEG file with further pictures behind the first
        image.format = "JPEG"
    if max(image.size) > MAX_SIDE:
        size = f"{image.width} x {image.height}"
        raise BadSample(f"image of {size} pixels; a side has at most {MAX_SIDE} pixels", kind="image")
    return image


def _explain_damage(error: Exception) -> str:
    """What Pillow says of a damaged file, unless it only names an address in memory."""
    return "" if " object at 0x" in str(error) else f": {error}"


def _count_exif(data: bytes) -> int:
    """The Exif segments before the pixels of a JPEG file, counted up to one more than are read."""
    count, place, ends = 0, 2, (b"", b"\xda")
    while data[place : place + 1] == b"\xff" and data[place + 1 : place + 2] not in ends and count <= MAX_EXIF:
        if data[place + 1] in (0xFF, 0x01) or 0xD0 <= data[place + 1] <= 0xD8:  # fill bytes and markers without length
            place += 1 if data[place + 1] == 0xFF else 2
            continue
        count += data[place + 1] == 0xE1 and data[place + 4 : place + 8] == b"Exif"
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return count


def read_orientation(image: Image.Image) -> int:
    """The Exif orientation of an opened picture, 1 (upright) to 8. One that stands behind a PNG's pixels, where no
    reader of headers comes, counts as upright."""
    if "exif" not in image.info:
        return 1
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except (*UNREADABLE, struct.error, TypeError, KeyError, IndexError):
        return 1
    return found if found in TURNS else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height in pixels of an opened picture as it is shown."""
    width, height = image.size
    return (height, width) if read_orientation(image) in SWAPPING else (width, height)


def turn_upright(image: Image.Image, orientation: int) -> Image.Image:
    """A decoded picture as it is shown, by its Exif orientation."""
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def to_rgb(image: Image.Image, background: Sequence[int] | None = WHITE) -> Image.Image:
    """A decoded picture in 8-bit RGB: 16 bits are scaled, and what is transparent shows the color `background`; None:
    whatever color stands there in the file, black mostly."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        values, clear = np.asarray(image), image.info.get("transparency")
        gray = Image.fromarray(((values.clip(0, 65535).astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")
        if background is not None and isinstance(clear, int):
            gray.paste(tuple(background), mask=Image.fromarray((values == clear).astype(np.uint8) * 255))
        return gray
    if background is None or not image.has_transparency_data:
        return image.convert("RGB")
    shown = Image.new("RGBA", image.size, (*background, 255))
    shown.alpha_composite(image.convert("RGBA"))
    return shown.convert("RGB")


def decode_picture(
    data: bytes,
    where: str = "image",
    *,
    decode: Decoder = "pillow",
    draft: Callable[[int, int], tuple[int, int]] | None = None,
    upright: bool = True,
    background: Sequence[int] | None = WHITE,
) -> tuple[Picture, tuple[int, int]]:
    """A picture file in 8-bit RGB, and the width and height that its header names.

    Args:
        data: the encoded file.
        where: shard and key, for the message.
        decode: "pillow"; "simplejpeg": ordinary JPEG files by that package, to the same pixels.
        draft: maps width and height to the least that are needed: the JPEG decoder may scale down to no less.
        upright: turn the picture as its Exif orientation says.
        background: see `to_rgb`.

    Raises:
        BadSample: the file is corrupt, truncated, too large or of another format.
    """
    if decode == "simplejpeg" and draft is None and (pixels := decode_ordinary_jpeg(data, upright=upright)) is not None:
        return pixels, (pixels.shape[1], pixels.shape[0])
    try:
        file = open_picture(data)
        orientation = read_orientation(file) if upright else 1
        width, height = file.size[::-1] if orientation in SWAPPING else file.size
        if draft is not None:
            needed = draft(width, height)
            file.draft("RGB", needed[::-1] if orientation in SWAPPING else needed)  # does nothing to other than JPEG
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's texts name neither file nor sample
            file.load()
            return turn_upright(to_rgb(file, background), orientation), (width, height)
    except (BadSample, *UNREADABLE, MemoryError, OverflowError) as error:
        raise BadSample(f"{where}: cannot decode image ({len(data)} bytes): {error}", kind="image") from error


def decode_ordinary_jpeg(data: bytes, *, upright: bool = True) -> np.ndarray | None:
    """`[H, W, 3]` uint8 of an ordinary JPEG file by simplejpeg, which leaves out Pillow's copies of the pixels. The
    pixels are the same: both call libjpeg-turbo, by the same rules.

    None for all others, which Pillow has to read or to refuse: other formats, CMYK, pictures to be turned or too large,
    and files with the least damage. libjpeg-turbo mends some damage with a warning; `strict` makes that an error.
    """
    import simplejpeg

    if not data.startswith(JPEG_START):
        return None
    try:
        file = open_picture(data)
        if file.mode not in ("RGB", "L") or (upright and read_orientation(file) != 1):
            return None
        pixels = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
    except (BadSample, ValueError, MemoryError):
        return None
    return pixels if pixels.shape == (file.height, file.width, 3) else None


def list_traits(data: bytes) -> list[str]:
    """What of a picture file a reader of plain 8-bit pictures would not see: "16-bit picture", "transparent picture",
    "turned picture". Raises `BadSample`."""
    image = open_picture(data)
    found = ["16-bit picture"] if image.mode.startswith("I") else []
    found += ["transparent picture"] if image.has_transparency_data else []
    return found + (["turned picture"] if read_orientation(image) != 1 else [])
