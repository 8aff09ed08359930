"""Other loaders on the same samples, each in a process of its own; imported only where they are installed.

`python -m benchmarks.peers NAME FOLDER WORKERS` converts the shard set once if the peer needs that, prints `ready` or
`not installed: ...`, and then, for every number of batches on a line of its input, its samples per second.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.corpus import tars
from benchmarks.loaders import BATCH, CONF, PREFETCH, our_data, stack, their_transform
from benchmarks.measure import rate
from data_pipelines.shards.shard_set import ShardSet
from vlm_train.data.loader import MicroBatches

ENDLESS = 10_000_000


def view(sample: dict[str, Any]) -> np.ndarray:
    return their_transform(sample["image"], "crop")


def views(samples: list[dict[str, Any]]) -> torch.Tensor:
    return stack([view(sample) for sample in samples])


def ours(folder: Path, workers: int) -> Iterator[Any]:
    return iter(our_data(folder, ENDLESS, workers=workers).train_dataloader())


def webdataset(folder: Path, workers: int) -> Iterator[Any]:
    from benchmarks.loaders import webdataset_loader

    return again(lambda: webdataset_loader(folder, workers=workers))


def torchdata(folder: Path, workers: int) -> Iterator[Any]:
    """Its loader over our dataset, its state taken at every step (its default)."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    stream = our_data(folder, ENDLESS).train_dataloader().loader.dataset
    loader = StatefulDataLoader(
        stream, batch_size=None, num_workers=workers, prefetch_factor=PREFETCH if workers else None
    )
    for batch in MicroBatches(loader):
        loader.state_dict()
        yield batch


def litdata(folder: Path, workers: int) -> Iterator[Any]:
    import litdata as lit

    class Views(lit.StreamingDataset):
        def __getitem__(self, index: Any) -> np.ndarray:
            return view(super().__getitem__(index))

    chunks = folder.parent / f"{folder.name}.litdata"
    if not (chunks / "index.json").is_file():
        many = list(range(len(ShardSet(folder))))
        lit.optimize(Blobs(folder), many, output_dir=str(chunks), chunk_bytes="64MB", num_workers=1)
    return again(
        lambda: lit.StreamingDataLoader(
            Views(str(chunks)),
            batch_size=BATCH,
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            collate_fn=stack,
        )
    )


def datasets(folder: Path, workers: int) -> Iterator[Any]:
    """Streamed from parquet."""
    import datasets as hf
    import pyarrow as pa
    import pyarrow.parquet as parquet

    files = folder.parent / f"{folder.name}.parquet"
    if not files.is_dir():
        files.mkdir()
        blobs, count = Blobs(folder), len(ShardSet(folder))
        for part, numbers in enumerate(np.array_split(np.arange(count), 4)):
            table = pa.table({"image": [blobs(int(number))["image"] for number in numbers]})
            parquet.write_table(table, files / f"{part}.parquet", row_group_size=64)
    stream = hf.load_dataset("parquet", data_files=str(files / "*.parquet"), split="train", streaming=True)
    return again(
        lambda: torch.utils.data.DataLoader(
            stream,
            batch_size=BATCH,
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            collate_fn=views,
        )
    )


def energon(folder: Path, workers: int) -> Iterator[Any]:
    """Our tars after `energon prepare`, in place of an order of its own."""
    from megatron import energon as peer

    @peer.edataclass
    class Cooked(peer.Sample):
        image: bytes

    @peer.stateless
    def cook(sample: dict[str, Any]) -> Any:
        return Cooked(**peer.basic_sample_keys(sample), image=sample["0.jpg"])

    class Encoder(peer.DefaultTaskEncoder):
        cookers = [peer.Cooker(cook)]
        decoder = None

        @peer.stateless
        def encode_sample(self, sample: Any) -> Any:
            return their_transform(sample.image, "crop")

        def batch(self, samples: list[Any]) -> Any:
            return stack(samples)

    if not (copy := folder.parent / f"{folder.name}.energon").is_dir():
        copy.mkdir()
        for tar in tars(folder):
            os.link(tar, copy / Path(tar).name)
        command = [str(Path(sys.executable).with_name("energon")), "prepare", str(copy), "--non-interactive"]
        command += ["--no-progress", "--split-ratio=1,0,0", "--sample-type=CrudeWebdataset", "--num-workers=1"]
        subprocess.run(command, check=True, stdout=sys.stderr)
    worker_config = peer.WorkerConfig(rank=0, world_size=1, num_workers=workers)
    dataset = peer.get_train_dataset(
        str(copy),
        worker_config=worker_config,
        batch_size=BATCH,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        task_encoder=Encoder(),
    )
    return iter(peer.get_loader(dataset, prefetch_factor=PREFETCH))


class Blobs:
    """Sample number -> its image file, for converters."""

    def __init__(self, folder: Path) -> None:
        self.shards = ShardSet(folder)

    def __call__(self, number: int) -> dict[str, bytes]:
        return {"image": self.shards.load_sample(number)[1][0]}


def again(loader: Callable[[], Any]) -> Iterator[Any]:
    """Pass after pass."""
    return itertools.chain.from_iterable(loader() for _ in itertools.count())


PEERS = {one.__name__: one for one in (ours, webdataset, torchdata, litdata, datasets, energon)}


def samples(batch: Any) -> int:
    return BATCH if hasattr(batch, "media") else len(batch)


class Peer:
    """A peer's process. `missing` says why there is none."""

    def __init__(self, name: str, folder: Path, workers: int, python: str = sys.executable) -> None:
        command = [python, "-m", "benchmarks.peers", name, str(folder.resolve()), str(workers)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=CONF.parent)
        answer = self._read()
        self.missing = "" if answer == "ready" else answer

    def rate(self, batches: int) -> float:
        """Samples per second over so many batches."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{batches}\n")
        self.process.stdin.flush()
        return float(self._read())

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()

    def _read(self) -> str:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline() or '"it ended; see its output above"')


def main(name: str, folder: str, workers: str) -> None:
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what peers print is no answer

    def say(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    try:
        batches = PEERS[name](Path(folder), int(workers))
        first = next(batches)
    except ImportError as error:
        say(f"not installed: {error}")
        return
    assert samples(first) == BATCH
    say("ready")
    skip = int(workers) * PREFETCH + 2
    for line in sys.stdin:
        say(rate(itertools.islice(batches, int(line) + skip), samples, skip))


if __name__ == "__main__":
    main(*sys.argv[1:])
