"""Small images, samples and shard sets."""

from __future__ import annotations

import io
import signal
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from data_pipelines.media.limits import image_item
from data_pipelines.sample import Annotation, Media, Sample, Text, Turn
from data_pipelines.shards.tar_writer import ShardWriter


def _picture(number: int = 0, kind: str = "PNG", size: tuple[int, int] = (12, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (number % 256, 7 * number % 256, 90)).save(file, kind)
    return file.getvalue()


def _sample(number: int, media: int = 1, key: str | None = None) -> tuple[Sample, list[bytes]]:
    blobs = [_picture(number + i, "JPEG" if i else "PNG", (12 + number, 8)) for i in range(media)]
    ask = Turn(role="user", parts=(*(Media(item=i) for i in range(media)), Text(text=f"Which number? é {number}")))
    answer = Turn(role="assistant", parts=(Text(text=str(number)),))
    return Sample(
        key=key or f"sample-{number:03d}",
        media=tuple(image_item(i, blob) for i, blob in enumerate(blobs)),
        annotations=(Annotation(turns=(ask, answer)),),
        source="test",
        license="CC0",
        meta={"number": number},
    ), blobs


@pytest.fixture(autouse=True)
def usual_sigterm() -> Iterator[None]:
    """Commands set a handler for their process; pools, which end their workers by SIGTERM, hang if these inherit it."""
    usual = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, usual)


@pytest.fixture
def picture() -> Callable[..., bytes]:
    """`picture(number, kind, size)`: the bytes of a one-coloured image."""
    return _picture


@pytest.fixture
def sample() -> Callable[..., tuple[Sample, list[bytes]]]:
    """`sample(number, media, key)`: a question about `media` images and its answer."""
    return _sample


@pytest.fixture
def shard_set(tmp_path: Path) -> Callable[..., Path]:
    """`shard_set(name, count)`: the folder of a set with 4 samples a shard and 0, 1 or 2 images a sample."""

    def make(name: str = "set", count: int = 10) -> Path:
        with ShardWriter(tmp_path / name, source="test", license="CC0", split="train", samples_per_shard=4) as writer:
            for number in range(count):
                writer.write_sample(*_sample(number, media=number % 3))
        return tmp_path / name

    return make


@pytest.fixture
def tar() -> Callable[[Path, list[tuple[str, bytes]]], None]:
    """`tar(path, members)`: a tar as another program would write it."""

    def make(path: Path, members: list[tuple[str, bytes]]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as file:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))

    return make
