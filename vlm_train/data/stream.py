"""A set of tars without an index, trained on while it streams: `data.train=[{tars: <addresses>}]`.

Every pass deals the shards to a fixed number of lanes, in another order. A lane reads its shards one after another,
each from start to end through a shuffle buffer, and then goes on to its shards of the next pass by itself. Which lane
gives a place of a step follows from the place and the step alone, whatever the number of processes and ranks. To resume
takes the step only: a shard that was read to its end has left its index, which says how many samples to pass over, and
a shard that was not is read again.

`webdataset` runs the pipeline of a shard and shuffles it. The tar itself is read by `read_shard`: webdataset's own
reader tells no offsets, which an index needs, takes a tar that is cut for a shorter one, and lets a sparse member fill
the memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.errors import BadSample, DataError
from data_pipelines.indexing.addresses import expand_addresses
from data_pipelines.indexing.shard_index import Found, IndexJob, find_record, read_shard
from data_pipelines.shards.layout import Layout
from data_pipelines.shards.remote import PIPE, default_cache, is_remote
from vlm_train.data.order.lanes import LaneDeal
from vlm_train.data.order.lengths import hash_content
from vlm_train.data.order.permutation import Permutation
from vlm_train.errors import ConfigError
from vlm_train.seeds import derive_seed

ENDLESS = 2**62
"""Samples of such a set: nobody knows how many, and they go on in another order."""

ENTRY_KEYS = ("tars", "layout", "index", "name", "loss_weight", "lanes", "shuffle_buffer")
"""What an entry of `data.train` that names tars says."""

LAYOUT, LANES, SHUFFLE_BUFFER = "captions", 16, 256

NO_BUDGET = "batch.tokens: fills a budget by lengths, which tars do not tell; use batch.samples."

EMPTY_PASSES = 64
"""Passes in a row in which a lane may get shards without any sample; only empty shards are so unlucky."""


def is_stream(train: Any) -> bool:
    """Whether an entry of `data.train` names tars, which are read as a stream."""
    return isinstance(train, list) and any(isinstance(entry, dict) and "tars" in entry for entry in train)


def list_addresses(entry: Mapping[str, Any]) -> list[str]:
    """The addresses of the tars as they are written. Raises `DataError` for what is none, and for `pipe:`."""
    given = [entry["tars"]] if isinstance(entry["tars"], str) else entry["tars"]
    if not isinstance(given, list) or not all(isinstance(one, str) and one for one in given) or not given:
        raise DataError(f"tars: expected addresses of tars, such as /data/{{000..099}}.tar, got {entry['tars']!r}")
    for text in given:
        if any(PIPE.match(part.strip()) for part in text.split("::")):
            expand_addresses(text)  # says what to do
    return given


def list_problems(data: Mapping[str, Any]) -> list[str]:
    """What keeps the stream of `data.train` from being one: unknown options of its entry, and settings of `data` that
    need the number of samples or their lengths."""
    entry, problems = next(one for one in data["train"] if isinstance(one, dict) and "tars" in one), []
    if len(data["train"]) > 1:
        problems.append(f"data.train: an entry of tars is the only one, got {len(data['train'])} entries.")
    if unknown := [str(key) for key in entry if key not in ENTRY_KEYS]:
        problems.append(f"data.train: an entry of tars has no {', '.join(unknown)}; its keys: {', '.join(ENTRY_KEYS)}.")
    for name in ("lanes", "shuffle_buffer"):
        if name in entry and not (type(entry[name]) is int and 1 <= entry[name] <= 2**20):
            problems.append(f"data.train: {name} is a whole number from 1 to {2**20}, got {entry[name]!r}.")
    for judge in (list_addresses, lambda entry: Layout.from_option(entry.get("layout", LAYOUT))):
        try:
            judge(entry)
        except DataError as error:
            problems.append(f"data.train: {error}.")
    if data.get("shuffle") not in ("shards", "none"):
        got = f"got {data.get('shuffle')}"
        problems.append(f"data.shuffle: tars are shuffled by shards and a buffer; use shards, or none, {got}.")
    unfit = {"over_length": data.get("over_length") == "split"}
    unfit |= {name: data.get(name) is not None for name in ("pack", "group_by", "limit")}
    unfit |= {"val_share": bool(data.get("val_share"))}
    for name in [name for name, found in unfit.items() if found]:
        how = "; use data.pack=null and a larger batch.micro" if name == "pack" else ""
        problems.append(f"data.{name}: needs an index of all samples, which tars have not, got {data[name]}{how}.")
    return problems


def open_entries(
    train: list[dict[str, Any]], settings: Mapping[str, Any], batch: int | None, shuffle: Any, **how: Any
) -> tuple[list[dict[str, Any]], Any]:
    """`data.train` and `data.shuffle`. A stream's shards are opened, and as they bring their own order there is no
    other. Raises `ConfigError` for what a stream cannot do."""
    if not is_stream(train):
        return train, shuffle
    problems = list_problems({"train": train, "shuffle": shuffle, **settings})
    if batch is None:
        problems.append(NO_BUDGET)
    if batch is None or problems:
        raise ConfigError(problems)
    return [open_stream(train[0], batch, shuffle, **how)], "none"


def open_stream(
    entry: Mapping[str, Any], batch: int, shuffle: str, *, seed: int, cache: str, fetched: str | None
) -> dict[str, Any]:
    """The entry of `data.train`, with its shards opened. Raises what `StreamShards` raises."""
    how: dict[str, Any] = {"seed": seed, "shuffle": shuffle == "shards", "batch": batch}
    shards = StreamShards(entry, **how, cache=Path(cache), fetched=fetched)
    return {name: entry[name] for name in ("name", "loss_weight") if name in entry} | {"shards": shards}


class StreamShards:
    """What training asks of a shard set, of tars that have no index.

    Sample i, of an endless number, is the one at position i of the order. Samples of a lane are cheap in their order
    only. Picklable: a process opens its own shards.

    Args:
        entry: that of `data.train`: `tars`, addresses as `expand_addresses` reads them; `layout`, a name or its
            options; `index`, the folder that takes the indexes, null: one in `cache`; `lanes`, shards that are mixed
            with each other; `shuffle_buffer`, samples of each that are held for it.
        seed, shuffle: of the order; without `shuffle`, every lane has its shards, and a shard its samples, as they lie.
        batch: samples of an optimizer step.
        cache: folder of what is measured once; fetched: where remote shards are held while they are read.

    Raises:
        DataError: an address or the layout cannot be used.
    """

    def __init__(
        self,
        entry: Mapping[str, Any],
        *,
        seed: int,
        shuffle: bool,
        batch: int,
        cache: Path,
        fetched: Path | str | None = None,
    ) -> None:
        addresses = tuple(expand_addresses(list_addresses(entry)))
        layout = Layout.from_option(entry.get("layout", LAYOUT))
        most = min(entry.get("lanes") or LANES, len(addresses))
        lanes = 1 << (most.bit_length() - 1)  # a power of two: processes, too, mostly come in such numbers
        self.deal = LaneDeal.deal_lanes(batch, lanes)
        self.buffer = (entry.get("shuffle_buffer") or SHUFFLE_BUFFER) if shuffle else 1
        self.seed, self.shuffle, self.lanes = seed, shuffle, lanes
        known = hash_content(addresses, layout.to_json())
        self.job = IndexJob(
            addresses=addresses, folder=Path(entry.get("index") or cache / f"stream-{known[:12]}"), layout=layout
        )
        try:
            (self.job.folder / "index").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"tars: {error}; name a folder that can be written with index=<folder>") from error
        self.fetched = Path(fetched or default_cache())
        self.address = addresses[0] if len(addresses) == 1 else f"{addresses[0]} and {len(addresses) - 1} more"
        sizes = [0 if is_remote(one) else Path(one).stat().st_size for one in addresses]
        self.fingerprint = hash_content(known, sizes, lanes, self.buffer, shuffle, version("webdataset"))
        self._lanes: dict[int, _Lane] = {}
        self._sizes: dict[int, int] = {}
        self._last = (0, "")  # shard and key of what was read last

    def __len__(self) -> int:
        return ENDLESS

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lanes": {}}

    def load_sample(self, i: int) -> Found:
        """Sample i and the encoded bytes of its media. Raises `BadSample`, and `DataError` if a shard cannot be had."""
        lane, nth = self.deal.locate_place(i)
        if lane not in self._lanes:
            self._lanes[lane] = _Lane(self, lane)
        shard, key, found = self._lanes[lane].take_sample(nth)
        self._last = shard, key
        if isinstance(found, DataError):
            kind = getattr(found, "kind", "other")
            where = f"{self.shard_path(i)}, key {key!r}" if key else self.shard_path(i)
            kind = "malformed" if kind == "other" else kind
            raise BadSample(f"{where}: {found}", kind=kind, shard=self.shard_path(i), key=key)
        return found

    def shard_path(self, i: int) -> str:
        """The address of the shard of the sample that was loaded last."""
        return self.job.addresses[self._last[0]]

    def key(self, i: int) -> str:
        """The key of the sample that was loaded last."""
        return self._last[1]

    def find_runs(self) -> NDArray[np.int64]:
        """`[1]`: nothing is known of where shards begin."""
        return np.zeros(1, np.int64)

    def find_shard(self, epoch: int, place: int) -> int:
        """The shard at a place of a pass."""
        if not self.shuffle:
            return place
        return Permutation(derive_seed(self.seed, "stream", epoch), len(self.job.addresses))(place)

    def count_samples(self, shard: int) -> int | None:
        """Samples of a shard, bad ones included, that was read to its end; None: not known."""
        if shard not in self._sizes:
            record = find_record(self.job, shard)
            if record is None:
                return None
            self._sizes[shard] = record.shard.samples + len(record.bad)
        return self._sizes[shard]

    def read_shuffled(self, epoch: int, shard: int) -> Iterator[tuple[str, Found | DataError]]:
        """The samples of a shard in the order of a pass."""
        import webdataset

        read = partial(read_shard, self.job, shard, self.fetched)
        random = Random(derive_seed(self.seed, "buffer", epoch, shard))
        mix = webdataset.shuffle(self.buffer, initial=self.buffer, rng=random) if self.buffer > 1 else None
        return iter(webdataset.DataPipeline(read, mix))

    def describe_reading(self, ranks: int, workers: int) -> str:
        """A sentence for the log of a run of so many ranks, each with so many loader processes."""
        steps, rows = self.deal.steps, self.deal.rows
        times = ranks // math.gcd(ranks, rows) * (max(workers, 1) // math.gcd(max(workers, 1), steps))
        more = f" Numbers of ranks that divide {rows}, and data.workers that divide {steps}, make it one."
        return (
            f"data.train: streams {len(self.job.addresses)} shards in {self.lanes} lanes, each shard into {times} "
            f"process{'es' if times > 1 else ''}; their indexes go to {self.job.folder}.{more if times > 1 else ''}"
        )


class _Lane:
    """Reads the shards that every pass deals to it, and hands out their samples in order."""

    def __init__(self, shards: StreamShards, number: int) -> None:
        self.shards, self.number = shards, number
        self._start_over()

    def _start_over(self) -> None:
        self.given, self.epoch, self.place, self.shard = 0, 0, self.number, 0
        self.filled = (0, 0)  # samples given before this pass, and the last pass that gave some
        self.items: Iterator[tuple[str, Found | DataError]] | None = None

    def take_sample(self, nth: int) -> tuple[int, str, Found | DataError]:
        """Shard, key and content of its sample `nth` of all passes; those before it are passed over."""
        if nth < self.given:
            self._start_over()
        while True:
            for key, found in self.items or self._open_shard(nth):
                self.given += 1
                if self.given > nth:
                    return self.shard, key, found
            self._leave_shard()

    def _open_shard(self, nth: int) -> Iterator[tuple[str, Found | DataError]]:
        """The first shard, from its place on, that is not known to end before sample `nth`."""
        while True:
            self.shard = self.shards.find_shard(self.epoch, self.place)
            size = self.shards.count_samples(self.shard)
            if size is None or self.given + size > nth:
                self.items = self.shards.read_shuffled(self.epoch, self.shard)
                return self.items
            self.given += size
            self._leave_shard()

    def _leave_shard(self) -> None:
        self.items = None
        self.place += self.shards.lanes
        if self.place >= len(self.shards.job.addresses):
            before, filled = self.filled
            filled = self.epoch if self.given > before else filled
            if self.epoch - filled >= EMPTY_PASSES:
                raise DataError(
                    f"{self.shards.job.addresses[self.shard]}: no sample in it, nor in the other shards of the stream"
                )
            self.epoch, self.place, self.filled = self.epoch + 1, self.number, (self.given, filled)
