"""Shards -> windows of micro-batches -> the trainer, resumable at any optimizer step.

Every loader worker makes whole accumulation windows (all micro-batches of an optimizer step of this rank), because only
the whole window knows the denominator of its losses. Step s is made by worker s modulo workers: their number changes
nothing. The only state is the number of finished optimizer steps.
"""

from __future__ import annotations

import copy
import hashlib
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data_pipelines.errors import BadSample, DataError
from data_pipelines.stream import ShardSet
from vlm_train.build import Built
from vlm_train.data.batch import Batch, Window
from vlm_train.data.collate import Item, collate, target_weights
from vlm_train.data.order import Address, Plan
from vlm_train.data.render import render
from vlm_train.errors import ConfigError
from vlm_train.randomness import derive_seed


class Samples:
    """The samples of several shard sets as one list, rendered on demand. Picklable: files open lazily per process.

    Raises:
        DataError: a folder is no shard set, or holds no sample.
    """

    def __init__(
        self, shards: Sequence[str], built: Built, options: dict[str, Any], *, seed: int, limit: int | None
    ) -> None:
        self.sets = [ShardSet(folder) for folder in shards]
        if empty := [str(one.folder) for one in self.sets if not len(one)]:
            raise DataError(f"{', '.join(empty)}: a shard set without samples; build it again or take it out")
        ends = np.cumsum([len(one) for one in self.sets]) if self.sets else np.zeros(0, np.int64)
        self.starts = [0, *map(int, ends)]
        self.first, self.size = 0, self.starts[-1] if limit is None else min(self.starts[-1], limit)
        self.template, self.tokenizer, self.layout, self.image = (
            built.template,
            built.tokenizer,
            built.layout,
            built.image,
        )
        self.image_size = built.image_size
        self.options = options
        self.streams = ("llm", "rejected") if options.get("rejected") else ("llm",)
        self.seed = seed

    def __len__(self) -> int:
        return self.size

    def item(self, address: Address, *, training: bool) -> Item:
        """Load, decode and render one sample. Raises `BadSample` naming shard and key."""
        index = self.first + address.index
        which = int(np.searchsorted(self.starts, index, side="right")) - 1
        shards, local = self.sets[which], index - self.starts[which]
        sample, blobs = shards.load(local)
        where = f"{shards.shard(local)}, {sample.key!r}"
        generator = (
            np.random.default_rng(derive_seed(self.seed, "sample", address.epoch, address.index)) if training else None
        )
        rendered = render(sample, self.template, self.tokenizer, self.layout, **self.options)
        views: list[np.ndarray | None] = []
        if self.image is not None:
            views = [None] * len(blobs)
            for number in rendered.media:
                views[number] = self.image(blobs[number], generator, where)
        return Item(rendered, views, source=sample.source, weight=sample.weight)

    def split(self, share: float, limit: int | None) -> Samples:
        """Take the last share of the samples away and return it, or its first `limit` samples."""
        held = max(1, int(self.size * share))
        if held >= self.size:
            folders = ", ".join(str(one.folder) for one in self.sets)
            raise ConfigError(
                f"data.val_share: {share} of the {self.size} samples in {folders} leaves none to train on"
            )
        self.size -= held
        tail = copy.copy(self)
        tail.first, tail.size = self.size, held if limit is None else min(held, limit)
        return tail


@dataclass
class WindowStream(IterableDataset):
    """Optimizer steps `first` to the plan's end, as lists of micro-batches of one rank."""

    samples: Samples
    plan: Plan
    first: int
    rank: int
    normalise: str

    def __iter__(self) -> Iterator[list[Batch]]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        for step in range(self.first + number, self.plan.steps, count):
            yield self.window(step)

    def window(self, step: int) -> list[Batch]:
        """All micro-batches of one optimizer step. A bad sample leaves a hole in its place."""
        micros: list[list[Item]] = []
        problems: list[str] = []
        for addresses in self.plan.step(step, self.rank):
            items = []
            for address in addresses:
                try:
                    items.append(self.samples.item(address, training=True))
                except BadSample as error:
                    problems.append(str(error))
            micros.append(items)
        window = self._window(step, micros, tuple(problems))
        how: dict[str, Any] = {"streams": self.samples.streams, "normalise": self.normalise}
        return [
            collate(items, self.samples.image_size, window=replace(window, micro=m), **how)
            for m, items in enumerate(micros)
        ]

    def _window(self, step: int, micros: Sequence[Sequence[Item]], problems: tuple[str, ...]) -> Window:
        # Ranks reduce the sums by name, so a rank without samples needs all names, too.
        names = ("samples", *self.samples.streams)
        sums: dict[str, dict[str, float]] = {name: {} for name in names}
        tokens = supervised = 0
        for item in (item for items in micros for item in items):
            sums["samples"][item.source] = sums["samples"].get(item.source, 0.0) + 1.0
            for name, stream in item.rendered.streams.items():
                total = float(target_weights(stream, self.normalise, item.weight).sum())
                sums[name][item.source] = sums[name].get(item.source, 0.0) + total
                tokens += len(stream)
                supervised += stream.supervised
        return Window(
            step=step,
            micro=0,
            micro_count=len(micros),
            sums=sums,
            samples=sum(len(items) for items in micros),
            tokens=tokens,
            supervised=supervised,
            problems=problems,
        )


class MicroBatches:
    """Unrolls a loader's windows into micro-batches."""

    def __init__(self, loader: DataLoader[list[Batch]]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Batch]:
        for window in self.loader:
            yield from window


@dataclass
class ValidationStream(IterableDataset):
    """The held-out samples in order, each once, dealt to ranks and workers; bad ones are named in `Batch.problems`.

    `normalise` is that of training, so that the best checkpoint is best by what is trained. `source` is `token` here:
    its factors depend on what else is in a training step.
    """

    samples: Samples
    rows: int
    rank: int
    world: int
    normalise: str = "token"

    @property
    def batches(self) -> int:
        """Batches of every rank."""
        return -(-len(self.samples) // (self.rows * self.world))

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        for batch in range(number, self.batches, count):
            first = (batch * self.world + self.rank) * self.rows
            items: list[Item] = []
            problems: list[str] = []
            for index in range(first, min(first + self.rows, len(self.samples))):
                try:
                    items.append(self.samples.item(Address(index, 0), training=False))
                except BadSample as error:
                    problems.append(str(error))
            how: dict[str, Any] = {"streams": self.samples.streams, "normalise": self.normalise}
            yield replace(collate(items, self.samples.image_size, **how), problems=tuple(problems))


class VLMData(pl.LightningDataModule):
    """Training and validation data.

    Args:
        train, val: shard sets, `{shards: folder, samples: published size, only read by a dry run}`.
        val_share: share of train held out at its end when `val` is empty.
        annotations: dialogue | independent | first, see `vlm_train.data.render`.
        max_length: tokens of a row, image tokens included; over_length: truncate | drop | error.
        rejected: also the stream "rejected", for preference objectives.
        shuffle: read by `fit`, which makes the plan.
        limit, val_limit: use the first samples only.
        workers, prefetch: loader processes, and windows each keeps ready.
        built, seed: given by `fit`, as is the attribute `plan`.
    """

    def __init__(
        self,
        *,
        train: list[dict[str, Any]],
        val: list[dict[str, Any]],
        val_share: float = 0.0,
        annotations: Literal["dialogue", "independent", "first"] = "dialogue",
        max_length: int | None = 2048,
        over_length: Literal["truncate", "drop", "error"] = "truncate",
        rejected: bool = False,
        shuffle: bool = True,
        limit: int | None = None,
        val_limit: int | None = None,
        workers: int = 2,
        prefetch: int = 4,
        built: Built | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        del shuffle
        if built is None:
            raise ConfigError("data: VLMData needs the built model parts")
        _check(train, val, val_share, limit=limit, val_limit=val_limit, max_length=max_length)
        options = {"annotations": annotations, "max_length": max_length, "over_length": over_length}
        options |= {"rejected": rejected}
        self.train = Samples([one["shards"] for one in train], built, options, seed=seed, limit=limit)
        self.val = Samples([one["shards"] for one in val], built, options, seed=seed, limit=val_limit)
        if val_share and not val:
            self.val = self.train.split(val_share, val_limit)
        self.micro, self.normalise = built.cfg.batch.micro, built.cfg.batch.normalise
        self.workers, self.prefetch = workers, prefetch
        self.plan: Plan | None = None

    def fingerprint(self) -> str:
        """Hash of the training samples and their order, from the manifests: other shards have another one."""
        return hashlib.sha256("\n".join(one.fingerprint for one in self.train.sets).encode()).hexdigest()

    def train_dataloader(self) -> MicroBatches:
        """Micro-batches from the trainer's current optimizer step on."""
        assert self.plan is not None and self.trainer is not None
        stream = WindowStream(self.train, self.plan, self.trainer.global_step, self.trainer.global_rank, self.normalise)
        return MicroBatches(self._loader(stream, self.workers))

    def val_dataloader(self) -> Any:
        """Validation micro-batches."""
        if not len(self.val) or self.trainer is None:
            return []
        rank, world = self.trainer.global_rank, self.trainer.world_size
        stream = ValidationStream(self.val, self.micro, rank, world, self.normalise)
        return self._loader(stream, min(self.workers, stream.batches))

    def _loader(self, stream: IterableDataset, workers: int) -> DataLoader[Any]:
        assert self.trainer is not None
        return DataLoader(
            stream,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=self.prefetch if workers else None,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",  # by `Batch.pin_memory`
            worker_init_fn=_leave_signals,
        )


def _check(train: Any, val: Any, val_share: float, **least_one: int | None) -> None:
    """Raises `ConfigError` naming every setting that cannot be."""
    problems = [] if train else ["data.train: names no shard set; allowed: a list of {shards: <folder>}"]
    for name, entries in (("train", train), ("val", val)):
        for number, one in enumerate(entries):
            if not one.get("shards"):
                problems.append(f"data.{name}[{number}]: got {one}; it must name a folder as `shards`")
    if not 0.0 <= val_share < 1.0:
        problems.append(f"data.val_share: {val_share}; allowed: 0 (none) to below 1")
    for name, value in least_one.items():
        if value is not None and value < 1:
            problems.append(f"data.{name}: {value}; allowed: null (no limit) or at least 1")
    if problems:
        raise ConfigError(problems)


def _leave_signals(worker: int) -> None:
    """Schedulers signal every process of a job. The trainer decides when to stop, and its workers end with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
