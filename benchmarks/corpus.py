"""Made photographs and the shard sets of them that all sides read.

Noise with the spectrum of photographs costs a JPEG decoder what photographs of the same size and quality cost.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.media.limits import image_item
from data_pipelines.sample import Annotation, Media, Sample, Text, Turn
from data_pipelines.shards.manifest import MANIFEST
from data_pipelines.shards.tar_writer import ShardWriter

SIZES = {"small": (640, 480), "medium": (1024, 768), "large": (2048, 1536)}
SLOPE = 1.2
"""Amplitude falls with frequency ** SLOPE: about 140, 340 and 1,200 KB at quality 90."""

SHARDS = 4

PICTURES = 32
"""Different pictures of a set; they repeat under other keys."""

QUESTION = "What can be seen in the picture? Answer in one sentence."
ANSWER = "A wide valley under low clouds, with a narrow road that leads between dark trees to a small white house."


def photograph(width: int, height: int, seed: int) -> bytes:
    """A JPEG of quality 90."""
    generator = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1.0
    spectrum = generator.normal(size=(3, *frequency.shape, 2)).view(np.complex128)[..., 0] / frequency**SLOPE
    waves = np.fft.irfft2(spectrum, s=(height, width))
    waves /= waves.std(axis=(1, 2), keepdims=True)
    pixels = 128 + 55 * (0.7 * waves[:1] + 0.3 * waves)  # the channels of a photograph are much alike
    file = io.BytesIO()
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8).transpose(1, 2, 0).copy())
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def clip(
    root: Path, seconds: int = 60, size: tuple[int, int] = (1280, 720), rate: int = 30, key_seconds: int | None = None
) -> Path:
    """An MP4 of a photograph that moves, H.264 with the encoder's own settings, or a key frame every `key_seconds`,
    written if it is not there."""
    import av

    keys = "" if key_seconds is None else f"-key{key_seconds}s"
    path = root / f"clip-{seconds}s-{size[0]}x{size[1]}{keys}.mp4"
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    picture = np.asarray(Image.open(io.BytesIO(photograph(2 * width, 2 * height, 0))))
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if key_seconds is not None:
            stream.options = {"x264-params": f"keyint={key_seconds * rate}"}
        for number in range(seconds * rate):
            angle = 2 * np.pi * number / (20 * rate)
            left, top = (int((1 + turn(angle)) / 2 * side) for turn, side in ((np.cos, width), (np.sin, height)))
            view = np.ascontiguousarray(picture[top : top + height, left : left + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(view, "rgb24")))
        container.mux(stream.encode())
    path.write_bytes(file.getvalue())
    return path


def shard_set(root: Path, size: str, samples: int) -> Path:
    """The folder of a set of `samples` pictures, written by `ShardWriter` if it is not there."""
    folder = root / f"{size}-{samples}"
    if (folder / MANIFEST).is_file():
        return folder
    blobs = [photograph(*SIZES[size], seed) for seed in range(min(PICTURES, samples))]
    ask = Turn(role="user", parts=(Media(item=0), Text(text=QUESTION)))
    answer = Turn(role="assistant", parts=(Text(text=ANSWER),))
    with ShardWriter(folder, source="benchmark", license="CC0-1.0", samples_per_shard=-(-samples // SHARDS)) as writer:
        for number in range(samples):
            blob = blobs[number % len(blobs)]
            sample = Sample(
                key=f"{number:06d}",
                media=(image_item(0, blob),),
                annotations=(Annotation(turns=(ask, answer)),),
                source="benchmark",
                license="CC0-1.0",
            )
            writer.write_sample(sample, [blob])
    return folder


def tars(folder: Path) -> list[str]:
    """The shards, for other readers."""
    return [str(path) for path in sorted(folder.glob("*.tar"))]
