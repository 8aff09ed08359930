"""How a run over very many samples starts: seconds and memory until its first step is planned and its samples found.

`python -m benchmarks.scale` (`millions=[1,10,100]`, `folder=data/bench/scale`)

The sets are made: shards of 10,000 samples, whose index files are one file under many names, and whose tars are not
there, as nothing of them is read before a sample is. Each case runs in a process of its own. Memory is what the process
holds for itself (anonymous); mapped index and length files are shared by all processes of a machine, and the system
takes their memory back when it needs it.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from benchmarks.measure import Line, Report
from data_pipelines.sample import MediaItem, Sample
from data_pipelines.shards.checksum import hash_file
from data_pipelines.shards.index_file import IndexBuilder
from data_pipelines.shards.index_parts import PARTS, format_parts
from data_pipelines.shards.layout import Layout
from data_pipelines.shards.manifest import FileInfo, Manifest
from data_pipelines.shards.members import Member, caption_annotation

SHARD = 10_000  # samples of a shard
ROW, TOKENS, BATCH = 4096, 4096 * 64, 256
PLANS = ("samples", "tokens")
DEFAULTS = {"millions": [1, 10, 100], "folder": "data/bench/scale", "output": "data/bench/scale.json"}


def make_set(folder: Path, samples: int) -> Path:
    """A set of so many samples, as `python -m data_pipelines.index shards=... output=folder` writes it."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "index").mkdir(parents=True)
    builder, annotation = IndexBuilder(), caption_annotation("a caption")
    media = (MediaItem(name="0.jpg", width=640, height=480),)
    for number in range(SHARD):
        members = [Member("jpg", 512 + 5120 * number, 4000, number), Member("txt", 5120 * number, 9, number)]
        builder.add_sample(0, Sample(key=f"{number:09d}", media=media, annotations=(annotation,)), members)
    made = builder.write_file(folder / "index" / "000000.npz")
    numbers = range(samples // SHARD)
    for number in numbers[1:]:
        os.link(folder / "index" / "000000.npz", folder / "index" / f"{number:06d}.npz")
    files = [FileInfo(f"index/{number:06d}.npz", made.bytes, made.sha256, SHARD) for number in numbers]
    (folder / PARTS).write_text(format_parts(files))
    address, tar = "https://host/set", 5120 * SHARD + 1024
    Manifest(
        samples=len(numbers) * SHARD,
        shards=tuple(FileInfo(f"{address}/{n:06d}.tar", tar, f"{n:064x}", SHARD) for n in numbers),
        index=FileInfo(PARTS, (folder / PARTS).stat().st_size, hash_file(folder / PARTS)),
        command="index",
        layout=Layout().to_json(),
        elsewhere=True,
    ).write(folder)
    return folder


def make_lengths(path: Path, samples: int) -> None:
    """Measured lengths of so many samples: log-normal texts and 576 tokens of an image."""
    tokens = 576 + np.clip(np.random.default_rng(0).lognormal(4.0, 0.8, SHARD), 8, 1472).astype(np.int32)
    columns = {"samples": np.arange(samples, dtype=np.int32), "pieces": np.zeros(samples, np.int32)}
    columns |= {"tokens": np.tile(tokens, samples // SHARD), "patches": np.full(samples, 576, np.int32)}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, allow_pickle=False, **columns)


def start_run(folder: str, samples: int, kind: str) -> tuple[float, float, float]:
    """CPU seconds and seconds until the first step is planned and its samples are found in the index, and the megabytes
    that takes."""
    from benchmarks.loaders import our_processor
    from vlm_train.config.schema import BatchSize
    from vlm_train.data.datamodule import VLMData
    from vlm_train.data.order.cost import Cost
    from vlm_train.data.order.lengths import VERSION, hash_content

    packed = kind == "tokens"
    options: dict[str, Any] = {
        "processor": our_processor(),
        "cache": f"{folder}-lengths",
        "pack": ROW if packed else None,
    }
    batch = BatchSize(samples=None if packed else BATCH, tokens=TOKENS if packed else None, micro=1)
    before, start, cpu = _held_megabytes(), time.perf_counter(), time.process_time()
    data = VLMData(train=[{"shards": folder}], val=[], batch=batch, **options)
    if packed:
        train = data.train
        key = hash_content(VERSION, train.sources[0].shards.fingerprint, train.processor, train.options)
        paused, paused_cpu = time.perf_counter(), time.process_time()
        make_lengths(Path(f"{folder}-lengths") / f"{key[:24]}.npz", samples)
        start, cpu = start + time.perf_counter() - paused, cpu + time.process_time() - paused_cpu
    data.plan = data.make_plan(
        batch=batch.samples, tokens=batch.tokens, epochs=1.0, most=None, world=1, cost=Cost(1.0, 1e-4, 1.0)
    )
    found = 0
    for micro in data.plan.step(0):
        for ref in (ref for row in micro for ref in row):
            source, number, _ = data.train.locate_sample(ref.index)
            found += len(source.shards.index.locate_sample(number).members)
    assert found and data.plan.steps > 1
    return time.process_time() - cpu, time.perf_counter() - start, _held_megabytes() - before


def _held_megabytes() -> float:
    """Anonymous memory of this process."""
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(rows["RssAnon"].split()[0]) / 1024


def measure_starts(folder: Path, millions: list[int]) -> Iterator[Line]:
    """Seconds and megabytes of every plan at every size."""
    for size in millions:
        samples = size * 1_000_000
        made = make_set(folder / f"{size}m", samples)
        for kind in PLANS:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                cpu, seconds, held = pool.submit(start_run, str(made), samples, kind).result()
            name = f"{size} million samples in {samples // SHARD:,} shards, batch of {kind}"
            yield Line(
                name=f"{name}: start", value=cpu, must=60, less=True, unit="CPU s", note=f"{seconds:.1f} s of clock"
            )
            yield Line(name=f"{name}: memory", value=held, unit="MB")
        shutil.rmtree(made)
        shutil.rmtree(f"{made}-lengths", ignore_errors=True)


def main(arguments: list[str]) -> int:
    """Measure all of it; the options are `DEFAULTS`."""
    options = OmegaConf.merge(OmegaConf.create(DEFAULTS), OmegaConf.from_dotlist(arguments))
    report = Report(settings={"millions": list(options.millions)})
    report.run([measure_starts(Path(options.folder), list(options.millions))], options.output)
    print(report.markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
