"""Headers of images and videos: size and format without decoding, under limits that stop decompression bombs."""

from __future__ import annotations

import warnings

from PIL import Image

from data_pipelines.errors import BadSample
from data_pipelines.media.formats import describe_format
from data_pipelines.media.pictures import FORMATS, UNREADABLE, open_picture, upright_size
from data_pipelines.media.video import DEMUXERS, is_video, read_frames, read_video_header
from data_pipelines.sample import MediaItem

__all__ = ["FORMATS", "MAX_BYTES", "MAX_PIXELS", "check_media", "check_pixels", "image_item", "media_item"]

MAX_PIXELS = 64 * 2**20
MAX_BYTES = 64 * 2**20

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `MAX_PIXELS` is below PIL's own limit


def read_header(data: bytes, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES) -> tuple[int, int, str]:
    """Width and height in pixels, upright (Exif orientation applied), and the format. Raises `BadSample`."""
    if len(data) > max_bytes:
        raise BadSample(f"image of {len(data)} bytes; at most {max_bytes} are read", kind="image")
    with open_picture(data) as image:
        (width, height), kind = upright_size(image), str(image.format)
    if width * height > max_pixels:
        raise BadSample(f"image of {width} x {height} pixels; at most {max_pixels} pixels are read", kind="image")
    return width, height, kind


def image_item(number: int, data: bytes) -> MediaItem:
    """The `MediaItem` of image bytes that become media item `number` of a sample, named after their true format."""
    width, height, kind = read_header(data)
    return MediaItem(name=f"{number}.{FORMATS[kind]}", width=width, height=height)


def media_item(number: int, data: bytes) -> MediaItem:
    """The `MediaItem` of the bytes of an image or a video, told apart by their first bytes. Raises `BadSample`."""
    if not is_video(data):
        if (found := describe_format(data)) not in FORMATS:
            read = f"{', '.join(FORMATS)} and the videos {', '.join(DEMUXERS)}"
            raise BadSample(f"found {found}; read are {read}", kind="image")
        return image_item(number, data)
    header = read_video_header(data)
    return MediaItem(
        name=f"{number}.{header.extension}",
        width=header.width,
        height=header.height,
        kind="video",
        frames=header.frames,
        seconds=header.seconds,
    )


def check_media(item: MediaItem, data: bytes) -> None:
    """Raise `BadSample` unless the header of `data` says what `item` says, but for a video's seconds, which are not
    exact, and a picture's orientation, which older sets do not heed."""
    found = media_item(0, data)
    if (found.kind, found.frames) != (item.kind, item.frames):
        raise BadSample(f"{item.name} is {_format_length(found)}, its entry says {_format_length(item)}", kind="image")
    if (found.width, found.height) != (item.width, item.height) and not is_stored_size(item, data):
        raise BadSample(
            f"{item.name} is {found.width} x {found.height} pixels, its entry says {item.width} x {item.height}",
            kind="image",
        )


def is_stored_size(item: MediaItem, data: bytes) -> bool:
    """Whether `item` has the size of a picture that lies on its side, as it is stored."""
    if item.kind != "image":
        return False
    with open_picture(data) as image:
        return upright_size(image) != image.size == (item.width, item.height)


def _format_length(item: MediaItem) -> str:
    return f"{item.kind} of {item.frames} frames"


def check_pixels(data: bytes) -> None:
    """Decode an image or a video completely. Raises `BadSample` if it is cut off or damaged."""
    if is_video(data):
        for _ in read_frames(data, range(read_video_header(data).frames)):
            pass
        return
    read_header(data)
    try:
        with open_picture(data) as image:
            image.load()
    except UNREADABLE as error:
        raise BadSample(f"image does not decode: {error}", kind="image") from error
