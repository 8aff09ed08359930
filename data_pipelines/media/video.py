"""Videos in memory: size, frames and seconds from the packets, without decoding, and single frames by number.

Only MP4, WebM and Matroska are read, from bytes and each by its own demuxer, so that no playlist can name a file or an
address. Needs PyAV, which is imported when the first video is met.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipelines.errors import BadSample, DataError
from data_pipelines.media.formats import describe_format, is_picture_brand

MAX_BYTES = 256 * 2**20
MAX_PIXELS = 16 * 2**20  # of one frame
MAX_FRAMES = 400_000
MAX_SECONDS = 4 * 3600.0
MATROSKA = b"\x1aE\xdf\xa3"
"""The first bytes of Matroska and WebM."""
DEMUXERS = {"mp4": "mp4", "webm": "matroska", "mkv": "matroska"}
"""The file name extensions that videos are stored under, and what reads each."""
SKIPPING = ("h264", "hevc", "vp8", "vp9")
"""Decoders that are told packet by packet whether to leave a frame out. AV1's is told once, when it opens."""


@dataclass(frozen=True, slots=True)
class VideoHeader:
    """Width and height in pixels as stored (rotation not applied), frames, seconds and file name extension."""

    width: int
    height: int
    frames: int
    seconds: float
    extension: str


def is_video(data: bytes) -> bool:
    """Whether a file is one of the videos that are read, told by its first bytes."""
    return data[:4] == MATROSKA or (data[4:8] == b"ftyp" and not is_picture_brand(data))


def video_extension(data: bytes) -> str | None:
    """The extension of a video's container, told by its first bytes; None: no video that is read."""
    if not is_video(data):
        return None
    if data[:4] == MATROSKA:
        return "webm" if b"webm" in data[:64] else "mkv"
    return "mp4"


def read_video_header(data: bytes) -> VideoHeader:
    """The header of an encoded video, all its packets counted. Raises `BadSample` for a broken or too large one."""
    with _open_video(data) as video:
        return video.header


def read_frames(data: bytes, numbers: Sequence[int]) -> Iterator[np.ndarray]:
    """The frames `numbers` (ascending, from 0, in the order they are shown) of an encoded video, `[H, W, 3]` uint8 RGB.

    Stretches between them that start with a key frame are not decoded. Raises `BadSample` for a frame that is not there
    or does not decode.
    """
    with _open_video(data) as video:
        if list(numbers) != sorted(numbers) or any(not 0 <= n < len(video.times) for n in numbers):
            raise ValueError(f"numbers: {list(numbers)}; allowed: ascending, 0 to {len(video.times) - 1}")
        yield from video.decode_frames([video.times[number] for number in numbers])


def frames_at(data: bytes, times: Sequence[float]) -> list[int]:
    """The number of the frame shown at each of `times`, in seconds from the first frame. Raises `BadSample`."""
    with _open_video(data) as video:
        start = video.times[0]
        return [max(bisect_right(video.times, start + time / video.second) - 1, 0) for time in times]


def spread_frames(frames: int, count: int) -> list[int]:
    """At most `count` frame numbers, evenly from the first to the last (rounded down); of one, the middle."""
    if count == 1:
        return [(frames - 1) // 2]
    return np.linspace(0, frames - 1, min(count, frames), dtype=int).tolist()


class _Video:
    """An open video stream. `times` are its frames' times in display order, in units of `second` seconds."""

    def __init__(self, stream: Any, packets: list[Any], header: VideoHeader) -> None:
        self.header, self.packets, self.times = header, packets, sorted(p.pts for p in packets if not p.is_discard)
        self.second = float(stream.time_base)
        self._context = stream.codec_context
        self._context.thread_count = 1
        self._context.options = {"max_pixels": str(MAX_PIXELS)}
        self._keys = [number for number, packet in enumerate(packets) if packet.is_keyframe]
        self._number = {packet.pts: number for number, packet in enumerate(packets)}

    def decode_frames(self, times: Sequence[int]) -> Iterator[np.ndarray]:
        """The first frame at or after each of the ascending `times`."""
        for start, end, some in self._plan_runs(times):
            frames, frame = self._iterate_frames(start, end, {*some}), None
            for time in some:
                while frame is None or frame.pts is None or frame.pts < time:
                    frame = next(frames, None)
                    if frame is None:
                        raise BadSample(f"no frame at time {time}, though the video has {len(self.times)} frames")
                yield self._to_pixels(frame)

    def _plan_runs(self, times: Sequence[int]) -> list[tuple[int, int, list[int]]]:
        """The packets to decode, from a key frame to the last frame that is wanted before another key frame is nearer:
        first and last packet, and the times."""
        runs: list[tuple[int, int, list[int]]] = []
        for time in times:
            start, own = self._find_start(time), self._number[time]
            if runs and start <= runs[-1][1]:
                first, end, some = runs.pop()
                runs.append((first, max(end, own), [*some, time]))
            else:
                runs.append((start, own, [time]))
        return runs

    def _iterate_frames(self, start: int, end: int, wanted: set[int]) -> Iterator[Any]:
        """Frames as they are decoded; those that are not wanted and that no other one refers to are left out.

        The decoder is told to end behind packet `end`, for it holds frames back until it has seen later packets, and
        the next one may be a key frame, the most expensive of all. Where that does not give the last frame (a packet
        may hold half of it), it begins once more and reads on to the end of the video.
        """
        skips, last = self._context.name in SKIPPING, max(wanted)
        for stop in (end + 1, len(self.packets)):
            self._context.flush_buffers()
            for packet in [*self.packets[start:stop], None]:
                if skips and packet is not None:
                    self._context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
                for frame in self._context.decode(packet):
                    yield frame
                    if frame.pts is not None and frame.pts >= last:
                        return

    def _find_start(self, time: int) -> int:
        """The packet to decode from for a frame at `time`: the last key frame up to it."""
        key = bisect_right(self._keys, time, key=lambda number: self.packets[number].pts)
        return self._keys[key - 1] if key else 0

    def _to_pixels(self, frame: Any) -> np.ndarray:
        if (frame.width, frame.height) != (self.header.width, self.header.height) or frame.is_corrupt:
            raise BadSample(
                f"frame at time {frame.pts} is {frame.width} x {frame.height} pixels{', corrupt' * frame.is_corrupt}; "
                f"the video is {self.header.width} x {self.header.height}"
            )
        return np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)


@contextmanager
def _open_video(data: bytes) -> Iterator[_Video]:
    try:
        import av
    except ImportError as error:
        raise DataError("videos need PyAV: pip install 'vlm-train[data]'") from error
    extension = video_extension(data)
    if extension is None:
        raise BadSample(f"found {describe_format(data)}; videos are read from {', '.join(DEMUXERS)}")
    if len(data) > MAX_BYTES:
        raise BadSample(f"video of {len(data)} bytes; at most {MAX_BYTES} are read")
    try:
        file, options = io.BytesIO(data), {"protocol_whitelist": "none"}
        with av.open(file, format=DEMUXERS[extension], options=options, metadata_errors="replace") as container:
            stream = next(iter(container.streams.video), None)
            if stream is None or stream.codec_context is None or stream.time_base is None:
                raise BadSample("no video stream of a known codec")
            packets = _read_packets(container, stream)
            yield _Video(stream, packets, _read_header(stream, packets, extension))
    except av.FFmpegError as error:
        raise BadSample(f"video does not decode: {error}") from error


def _read_packets(container: Any, stream: Any) -> list[Any]:
    packets: list[Any] = []
    for packet in container.demux(stream):
        if packet.size:  # the last one only says that it is the last
            packets.append(packet)
        if packet.size and (packet.pts is None or packet.is_corrupt):
            raise BadSample(f"packet {len(packets) - 1} of the video is corrupt or has no time")
        if len(packets) > MAX_FRAMES:
            raise BadSample(f"video of more than {MAX_FRAMES} frames")
    if len(packets) < stream.frames:
        raise BadSample(f"video is cut off: {len(packets)} of its {stream.frames} frames are there")
    return packets


def _read_header(stream: Any, packets: list[Any], extension: str) -> VideoHeader:
    shown = [packet for packet in packets if not packet.is_discard]
    if len(shown) < 2:
        raise BadSample(f"video of {len(shown)} frames; at least 2 make a video")
    width, height = stream.codec_context.width, stream.codec_context.height
    if not 0 < width * height <= MAX_PIXELS:
        raise BadSample(f"video of {width} x {height} pixels; 1 to {MAX_PIXELS} pixels are read")
    ticks = max(packet.pts + (packet.duration or 0) for packet in shown) - min(packet.pts for packet in shown)
    seconds = round(float(ticks * stream.time_base), 3)
    if not 0 <= seconds <= MAX_SECONDS:
        raise BadSample(f"video of {seconds:.0f} seconds; at most {MAX_SECONDS:.0f} are read")
    return VideoHeader(width, height, len(shown), seconds, extension)
