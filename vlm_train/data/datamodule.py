"""Shards -> windows of micro-batches -> the trainer, resumable at any optimizer step.

Every loader worker makes whole accumulation windows (all micro-batches of an optimizer step of this rank), because only
the whole window knows the denominator of its losses. Step s is made by worker s modulo workers: their number changes
nothing. The only state is the number of finished optimizer steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data_pipelines.errors import BadSample
from data_pipelines.stream import ShardSet
from vlm_train.build import Built
from vlm_train.data.batch import Batch, Window
from vlm_train.data.collate import Item, collate, target_weights
from vlm_train.data.order import Address, Plan
from vlm_train.data.render import render
from vlm_train.errors import ConfigError
from vlm_train.randomness import derive_seed


class Samples:
    """The samples of several shard sets as one list, rendered on demand. Picklable: files open lazily per process."""

    def __init__(
        self, shards: Sequence[str], built: Built, options: dict[str, Any], *, seed: int, limit: int | None
    ) -> None:
        self.sets = [ShardSet(folder) for folder in shards]
        ends = np.cumsum([len(one) for one in self.sets]) if self.sets else np.zeros(0, np.int64)
        self.starts = [0, *map(int, ends)]
        self.size = min(self.starts[-1], limit) if limit else self.starts[-1]
        self.template, self.tokenizer, self.layout, self.image = (
            built.template,
            built.tokenizer,
            built.layout,
            built.image,
        )
        self.image_size = built.image_size
        self.options = options
        self.seed = seed

    def __len__(self) -> int:
        return self.size

    def item(self, address: Address, *, training: bool) -> Item:
        """Load, decode and render one sample. Raises `BadSample` naming shard and key."""
        which = int(np.searchsorted(self.starts, address.index, side="right")) - 1
        shards, local = self.sets[which], address.index - self.starts[which]
        sample, blobs = shards.load(local)
        where = f"{shards.shard(local)}, {sample.key!r}"
        generator = (
            np.random.default_rng(derive_seed(self.seed, "sample", address.epoch, address.index)) if training else None
        )
        rendered = render(sample, self.template, self.tokenizer, self.layout, **self.options)
        views = [self.image(blob, generator, where) for blob in blobs] if self.image is not None else []
        return Item(rendered, views, source=sample.source, weight=sample.weight)


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
        window = _window(step, micros, self.normalise, tuple(problems))
        return [
            collate(items, self.samples.image_size, normalise=self.normalise, window=replace(window, micro=m))
            for m, items in enumerate(micros)
        ]


def _window(step: int, micros: Sequence[Sequence[Item]], normalise: str, problems: tuple[str, ...]) -> Window:
    sums: dict[str, dict[str, float]] = {"samples": {}}
    tokens = supervised = 0
    for item in (item for items in micros for item in items):
        sums["samples"][item.source] = sums["samples"].get(item.source, 0.0) + 1.0
        for name, stream in item.rendered.streams.items():
            by_source = sums.setdefault(name, {})
            total = float(target_weights(stream, normalise, item.weight).sum())
            by_source[item.source] = by_source.get(item.source, 0.0) + total
            tokens += len(stream)
            supervised += stream.supervised
    samples = sum(len(items) for items in micros)
    return Window(
        step=step,
        micro=0,
        micro_count=len(micros),
        sums=sums,
        samples=samples,
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
    """The held-out samples in order, each once, dealt to ranks and workers."""

    samples: Samples
    rows: int
    rank: int
    world: int

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        batches = -(-len(self.samples) // (self.rows * self.world))
        for batch in range(number, batches, count):
            first = (batch * self.world + self.rank) * self.rows
            items = []
            for index in range(first, min(first + self.rows, len(self.samples))):
                try:
                    items.append(self.samples.item(Address(index, 0), training=False))
                except BadSample:
                    continue
            yield collate(items, self.samples.image_size)


class VLMData(pl.LightningDataModule):
    """Training and validation data.

    Args:
        train, val: shard sets, `{shards: folder, samples: published size, only read by a dry run}`.
        val_share: share of train held out at its end when `val` is empty.
        annotations: dialogue | independent | first, see `vlm_train.data.render`.
        max_length: tokens of a row, image tokens included; over_length: truncate | drop | error.
        limit, val_limit: use the first samples only.
        workers, prefetch: loader processes, and windows each keeps ready.
        built, batch, total, seed: given by `fit`.
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
        shuffle: bool = True,
        limit: int | None = None,
        val_limit: int | None = None,
        workers: int = 2,
        prefetch: int = 4,
        built: Built | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if built is None:
            raise ConfigError("data: VLMData needs the built model parts")
        options = {"annotations": annotations, "max_length": max_length, "over_length": over_length}
        self.train = Samples([one["shards"] for one in train], built, options, seed=seed, limit=limit)
        self.val = Samples([one["shards"] for one in val], built, options, seed=seed, limit=val_limit)
        if val_share and not val:
            held = max(1, int(len(self.train) * val_share))
            self.train.size -= held
            self.val = _Tail(self.train, held, options, built, seed, [one["shards"] for one in train])
        batch = built.cfg.batch
        self.micro, self.normalise, self.shuffle = batch.micro, batch.normalise, shuffle
        self.loading: dict[str, Any] = {"batch_size": None, "num_workers": workers}
        if workers:
            self.loading |= {"prefetch_factor": prefetch, "persistent_workers": False}
        self.plan: Plan | None = None

    def train_dataloader(self) -> MicroBatches:
        """Micro-batches from the trainer's current optimizer step on."""
        assert self.plan is not None and self.trainer is not None
        stream = WindowStream(self.train, self.plan, self.trainer.global_step, self.trainer.global_rank, self.normalise)
        return MicroBatches(DataLoader(stream, **self.loading))

    def val_dataloader(self) -> Any:
        """Validation micro-batches."""
        if not len(self.val) or self.trainer is None:
            return []
        stream = ValidationStream(self.val, self.micro, self.trainer.global_rank, self.trainer.world_size)
        return DataLoader(stream, batch_size=None, num_workers=0)


class _Tail(Samples):
    """The last `held` samples of a training set, held out."""

    def __init__(
        self, train: Samples, held: int, options: dict[str, Any], built: Built, seed: int, shards: list[str]
    ) -> None:
        super().__init__(shards, built, options, seed=seed, limit=None)
        self.offset, self.size = len(train), held

    def item(self, address: Address, *, training: bool) -> Item:
        return super().item(Address(address.index + self.offset, address.epoch), training=training)
