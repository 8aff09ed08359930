"""Video bytes -> uint8 frames. Which frames depends on the video and the asked number or times alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipelines.errors import BadSample
from data_pipelines.media.video import VideoHeader, frames_at, read_frames, read_video_header, spread_frames

MAX_DECODED = 2**29
"""Most pixels of all decoded frames together (1.5 GB as RGB)."""


def measure_video(data: bytes, where: str = "video") -> VideoHeader:
    """Size, frames and seconds of an encoded video. Raises `BadSample`, which names `where`, for a broken one."""
    try:
        return read_video_header(data)
    except BadSample as error:
        raise BadSample(f"{where}: cannot decode video ({len(data)} bytes): {error}", kind="video") from error


def decode_frames(
    data: bytes, *, count: int | None = None, times: Sequence[float] | None = None, where: str = "video"
) -> np.ndarray:
    """Some frames of an encoded video.

    Args:
        data: the encoded file (MP4, WebM or Matroska).
        count: at most so many frames, evenly from the first to the last (the middle one for 1), as Video-LLaVA and
            LLaVA-Video sample; all frames of a shorter video.
        times: or the last frame shown up to each of these ascending times, in seconds from the first frame.
        where: shard and key, for the message.

    Returns:
        uint8 `[F, H, W, 3]`, RGB.

    Raises:
        BadSample: the bytes are not a sound video of acceptable size.
    """
    if (count is None) == (times is None):
        raise ValueError(f"decode_frames: count={count}, times={times}; give one of the two")
    try:
        header = read_video_header(data)
        numbers = spread_frames(header.frames, count) if count is not None else frames_at(data, times or ())
        if len(numbers) * header.width * header.height > MAX_DECODED:
            raise BadSample(
                f"{len(numbers)} frames of {header.width} x {header.height} pixels; "
                f"at most {MAX_DECODED} pixels are decoded at once"
            )
        return np.stack(list(read_frames(data, numbers)))
    except BadSample as error:
        raise BadSample(f"{where}: cannot decode video ({len(data)} bytes): {error}", kind="video") from error
