"""Benchmarks of the data half: `python -m benchmarks.data [key=value ...]`, or `make bench ARGS="..."`.

Options: quick=true (2 minutes; default) or false; lines=[loader,torch_resize,simplejpeg,scaled,video,raw,position,
resume,planner,peers] (by default all, when quick all but peers);
peers_python=<interpreter with the peers installed>; folder=<where the made pictures are kept>; output=<file>.json.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from benchmarks import packing
from benchmarks.corpus import SIZES, clip, shard_set, tars
from benchmarks.loaders import BATCH, CONF, PREFETCH, our_data, our_loader, webdataset_loader
from benchmarks.measure import Line, Report, paired, rate
from benchmarks.peers import PEERS, Peer
from data_pipelines.media.video import read_frames, read_video_header, spread_frames
from data_pipelines.shards.shard_set import ShardSet


@dataclass
class Settings:
    """What the command line sets, `key=value`."""

    quick: bool = True
    lines: list[str] = field(default_factory=list)
    peers_python: str = sys.executable
    folder: str = "data/bench"
    output: str = "data/bench/data.json"

    @property
    def pairs(self) -> int:
        return 7 if self.quick else 15

    def samples(self, size: str) -> int:
        return {"small": 256, "medium": 128, "large": 64}[size] * (1 if self.quick else 4)

    def shards(self, size: str) -> Path:
        return shard_set(Path(self.folder), size, self.samples(size))


def loader(settings: Settings) -> Iterator[Line]:
    """Our loader / raw webdataset + Pillow: the same pixels."""
    folder = settings.shards("small")
    check_pixels(folder)
    for workers in (0, 1, 2):
        yield _against_webdataset(f"loader, {workers} workers", settings, "small", workers=workers, must=1.0, aim=1.3)


def torch_resize(settings: Settings) -> Iterator[Line]:
    """The same with torch's resize: all but the same pixels."""
    yield _against_webdataset("loader, torch's resize", settings, "small", resize="torch", must=1.3, aim=1.5)


def simplejpeg(settings: Settings) -> Iterator[Line]:
    """The same with torch's resize, and JPEG files decoded by simplejpeg (the same pixels of the files)."""
    if find_spec("simplejpeg") is None:
        yield Line(name="loader, simplejpeg", note="simplejpeg is not installed")
        return
    image: dict[str, Any] = {"decode": "simplejpeg", "resize": "torch"}
    check_pixels(settings.shards("small"), decode="simplejpeg")
    yield _against_webdataset("loader, simplejpeg and torch's resize", settings, "small", must=1.3, aim=1.5, **image)


def scaled(settings: Settings) -> Iterator[Line]:
    """The same with our scaled decoding: other pixels."""
    for size, must, aim in (("medium", 1.7, 2.0), ("large", 3.0, 4.0)):
        name = "scaled decode, {} x {}".format(*SIZES[size])
        yield _against_webdataset(name, settings, size, draft=True, must=must, aim=aim)


def _against_webdataset(
    name: str, settings: Settings, size: str, *, must: float, aim: float, workers: int = 0, **image: Any
) -> Line:
    folder = settings.shards(size)
    steps, skip = settings.samples(size) // BATCH, 1 + workers

    def ours() -> float:
        return rate(
            our_loader(folder, steps, workers=workers, **image),
            lambda batch: batch.media.inputs["vision"].views_total,
            skip,
        )

    def theirs() -> float:
        return rate(webdataset_loader(folder, workers=workers), len, skip)

    return paired(name, ours, theirs, pairs=settings.pairs, must=must, aim=aim, unit="samples/s")


def check_pixels(folder: Path, **image: Any) -> None:
    """Both sides make the same pixels of the same samples, in every mode."""
    for mode in ("crop", "pad", "resize"):
        ours = next(our_loader(folder, 1, mode=mode, shuffle=False, **image)).media.inputs["vision"].values
        assert torch.equal(ours, next(iter(webdataset_loader(folder, mode=mode)))), f"pixels differ, mode {mode}"


def video(settings: Settings) -> Iterator[Line]:
    """16 frames of one-minute clips of 1280 x 720 pixels: ours / every frame decoded, one after the other, by PyAV."""
    if find_spec("av") is None:
        yield Line(name="video, 16 frames", note="PyAV is not installed")
        return
    keys = {"the encoder's key frames": None, "a key frame every 2 s": 2, "a key frame every second": 1}
    for name, key_seconds in keys.items():
        data = clip(Path(settings.folder), key_seconds=key_seconds).read_bytes()
        numbers = spread_frames(read_video_header(data).frames, 16)
        ours, theirs = partial(read_frames, data, numbers), partial(_decode_all, data, {*numbers})
        assert all(np.array_equal(a, b) for a, b in zip(ours(), theirs(), strict=True)), "frames differ"
        sides = (partial(_clips_a_second, read) for read in (ours, theirs))
        title = f"video, 16 frames of a minute, {name}"
        yield paired(title, *sides, pairs=settings.pairs, must=2.0, aim=3.0, unit="clips/s")


def _decode_all(data: bytes, wanted: set[int]) -> Iterator[np.ndarray]:
    import av

    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                yield frame.to_ndarray(format="rgb24")


def _clips_a_second(read: Callable[[], Iterator[np.ndarray]]) -> float:
    return rate((list(read()) for _ in range(2)), lambda _: 1, skip=0)


def raw(settings: Settings) -> Iterator[Line]:
    """Encoded samples read, none decoded, as bytes: ours at random places and checked, theirs in file order. Then the
    same with ours parsed to typed samples."""
    import webdataset

    folder = settings.shards("small")
    shards = ShardSet(folder)
    order = torch.randperm(len(shards), generator=torch.Generator().manual_seed(0)).tolist()

    def reading(read: Callable[[int], Any]) -> Callable[[], float]:
        return lambda: rate(map(read, order), lambda _: 1)

    def read_files(number: int) -> list[tuple[str, bytes]]:
        return shards._read_members(shards.index.locate_sample(number))

    def theirs() -> float:
        return rate(webdataset.WebDataset(tars(folder), shardshuffle=False), lambda _: 1)

    about: dict[str, Any] = {"pairs": 3 * settings.pairs, "unit": "samples/s"}
    yield paired("raw reads", reading(read_files), theirs, must=2.0, aim=5.0, **about)
    yield paired("raw reads, ours parsed", reading(shards.load_sample), theirs, **about)


def position(settings: Settings) -> Iterator[Line]:
    """The state (the finished optimizer step, and where packing stands) taken at every step, and not."""
    folder, size = settings.shards("small"), settings.samples("small")
    state = b""

    def run(keep: bool) -> float:
        data = our_data(folder, size // BATCH)

        def batches() -> Iterator[Any]:
            nonlocal state
            for step, batch in enumerate(data.train_dataloader()):
                if keep:
                    state = json.dumps({"step": step, **data.state_dict()}).encode()
                yield batch

        return rate(batches(), lambda batch: batch.media.inputs["vision"].views_total)

    both = lambda keep: lambda: run(keep)  # noqa: E731
    about: dict[str, Any] = {"must": 0.99, "aim": 0.995, "unit": "samples/s"}
    yield paired("position kept / not kept", both(True), both(False), pairs=3 * settings.pairs, **about)
    size_kept = float(len(state))
    yield Line(
        name="state bytes", value=size_kept, must=64 * 1024, aim=8 * 1024, less=True, note="for any number of workers"
    )


def resume(settings: Settings) -> Iterator[Line]:
    """Seconds from nothing to the first batch in a fresh process: at step 10,000 / at step 10."""
    folder = settings.shards("small")

    def at(step: int) -> Callable[[], float]:
        program = f"""
import sys, time
from pathlib import Path
import torch
from benchmarks.loaders import our_loader
torch.set_num_threads(1)
start = time.perf_counter()
next(our_loader(Path(sys.argv[1]), 1, first={step}))
print(time.perf_counter() - start)"""
        command = [sys.executable, "-c", program, str(folder.resolve())]

        def run() -> float:
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=CONF.parent)
            return float(done.stdout)

        return run

    about: dict[str, Any] = {"must": 1.10, "aim": 1.02, "less": True, "unit": "s"}
    yield paired("resume at step 10,000 / 10", at(10_000), at(10), pairs=settings.pairs, **about)


def planner(settings: Settings) -> Iterator[Line]:
    """Packing: time of a sample, and share of real tokens, of the shapes of published models."""
    count = 8_192 if settings.quick else 50_000
    for shape, length, must, aim in packing.GOALS:
        tokens = packing.lengths(shape, count)
        start = time.perf_counter()
        rows = packing.pack(tokens, length)
        micros = (time.perf_counter() - start) / count * 1e6
        share = sum(tokens) / (len(rows) * length)
        name = f"packed {shape}, {length}"
        yield Line(name=f"{name}: real tokens", value=share, must=must, aim=aim)
        others = packing.best_fit_decreasing(tokens, length)
        yield Line(name=f"{name}: rows of best-fit-decreasing / ours", value=others / len(rows), must=1.0, aim=1.005)
        yield Line(name=f"{name}: planner", value=micros, must=100, aim=25, less=True, unit="us/sample")


def peers(settings: Settings) -> Iterator[Line]:
    """Our loader / others on the same samples, each in a process of its own."""
    count = 1_000 if settings.quick else 5_000
    folder = shard_set(Path(settings.folder), "small", count)
    batches = 16 if settings.quick else 64
    for workers in (0, 2):
        mine = Peer("ours", folder, workers, settings.peers_python)
        for name in (one for one in PEERS if one != "ours"):
            other = Peer(name, folder, workers, settings.peers_python)
            about: dict[str, Any] = {"unit": "samples/s", "must": 1.0, "aim": 1.2}
            if problem := mine.missing or other.missing:
                yield Line(name=f"{name}, {workers} workers", note=problem)
            else:
                both = [lambda peer=peer: peer.rate(batches) for peer in (mine, other)]
                yield paired(f"{name}, {workers} workers", both[0], both[1], pairs=settings.pairs, **about)
            other.close()
        mine.close()


LINES: dict[str, Callable[[Settings], Iterator[Line]]] = {
    one.__name__: one
    for one in (loader, torch_resize, simplejpeg, scaled, video, raw, position, resume, planner, peers)
}


def main(argv: list[str]) -> int:
    """The command line."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    settings: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Settings), OmegaConf.from_dotlist(argv)))
    lines = settings.lines or [name for name in LINES if not (settings.quick and name == "peers")]
    if unknown := set(lines) - set(LINES):
        print(f"lines: no {', '.join(sorted(unknown))}; allowed: {', '.join(LINES)}", file=sys.stderr)
        return 2
    report = Report({"quick": settings.quick, "threads": 1, "batch": BATCH, "prefetch": PREFETCH})
    report.run((LINES[name](settings) for name in lines), settings.output)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
