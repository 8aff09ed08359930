"""Small encoded videos: frame n is a grey of value 8 n."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np

GRAY = 8  # step between frames; codecs change values by less than half of it
MILLISECOND = Fraction(1, 1000)


def video(
    frames: int = 20,
    size: tuple[int, int] = (48, 40),
    *,
    codec: str = "libx264",
    container: str = "mp4",
    gop: int = 5,
    rate: int = 10,
    index_first: bool = False,
    times: Sequence[int] | None = None,
) -> bytes:
    """`frames` grey frames of `size` (width, height) with a key frame every `gop`; `index_first`: before the frames;
    `times`: milliseconds at which each is shown, whatever `rate` says."""
    file = io.BytesIO()
    options = {"moov_size": "4096"} if index_first else {}
    with av.open(file, "w", format=container, options=options) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.thread_count = gop, 1
        if times is not None:
            stream.codec_context.time_base = MILLISECOND
        for number in range(frames):
            pixels = np.full((size[1], size[0], 3), GRAY * number, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], MILLISECOND
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def numbers(frames: np.ndarray) -> list[int]:
    """Which frames these are, told by the grey of each `[..., H, W]` or `[..., H, W, 3]` picture's middle."""
    return [round(float(frame.mean()) / GRAY) for frame in frames]
