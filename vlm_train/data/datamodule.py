"""Shards -> windows of micro-batches -> the trainer, resumable at any optimizer step.

Every loader worker makes whole accumulation windows (all micro-batches of an optimizer step of this rank), because only
the whole window knows the denominator of its losses. Step s is made by worker s modulo workers: their number changes
nothing. The only state is the number of finished optimizer steps.
"""

from __future__ import annotations

import hashlib
import math
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data_pipelines.errors import BadSample
from vlm_train.build import Built
from vlm_train.data.batch import Batch, Window
from vlm_train.data.collate import Item, collate, target_weights
from vlm_train.data.cost import Cost
from vlm_train.data.mixture import Address, Mixture
from vlm_train.data.order import Packing, Plan, SamplePlan, Sizes, TokenPlan
from vlm_train.data.parcel import Parcel
from vlm_train.data.samples import Samples
from vlm_train.errors import ConfigError


@dataclass
class WindowStream(IterableDataset):
    """Optimizer steps `first` to the plan's end, as lists of micro-batches of one rank."""

    samples: Samples
    plan: Plan
    first: int
    rank: int
    normalise: str

    def __iter__(self) -> Iterator[list[Batch] | Parcel]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        for step in range(self.first + number, self.plan.steps, count):
            window = self.window(step)
            yield Parcel.of(window) if worker else window

    def window(self, step: int) -> list[Batch]:
        """All micro-batches of one optimizer step. A bad sample leaves a hole in its place."""
        micros: list[list[list[Item]]] = []
        problems: list[str] = []
        for rows in self.plan.step(step, self.rank):
            loaded = [load_row(self.samples, row, problems, training=True) for row in rows]
            micros.append([row for row in loaded if row])
        window = self._window(step, micros, tuple(problems))
        how: dict[str, Any] = {"streams": self.samples.streams, "normalise": self.normalise}
        return [
            collate(rows, self.samples.image_size, window=replace(window, micro=m), **how)
            for m, rows in enumerate(micros)
        ]

    def _window(self, step: int, micros: Sequence[Sequence[Sequence[Item]]], problems: tuple[str, ...]) -> Window:
        # Ranks reduce the sums by name, so a rank without samples needs all names, too.
        names = ("samples", *self.samples.streams)
        sums: dict[str, dict[str, float]] = {name: {} for name in names}
        tokens = supervised = 0
        items = [item for rows in micros for row in rows for item in row]
        for item in items:
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
            samples=len(items),
            tokens=tokens,
            places=sum(_places(rows, name) for rows in micros for name in self.samples.streams),
            supervised=supervised,
            problems=problems,
        )


def load_row(samples: Samples, row: Sequence[Address], problems: list[str], *, training: bool) -> list[Item]:
    """The usable samples of a row; why the others are not goes to `problems`."""
    items = []
    for address in row:
        try:
            items.append(samples.item(address, training=training))
        except BadSample as error:
            problems.append(str(error))
    return items


def _places(rows: Sequence[Sequence[Item]], name: str) -> int:
    """Tokens of a stream in a micro-batch, padding included."""
    return len(rows) * max((sum(len(item.rendered.streams[name]) for item in row) for row in rows), default=0)


class MicroBatches:
    """Unrolls a loader's windows into micro-batches."""

    def __init__(self, loader: DataLoader[list[Batch] | Parcel]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Batch]:
        for window in self.loader:
            yield from window.unpack() if isinstance(window, Parcel) else window


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
            problems: list[str] = []
            row = [Address(index, 0) for index in range(first, min(first + self.rows, len(self.samples)))]
            items = load_row(self.samples, row, problems, training=False)
            how: dict[str, Any] = {"streams": self.samples.streams, "normalise": self.normalise}
            yield replace(collate([[i] for i in items], self.samples.image_size, **how), problems=tuple(problems))


class VLMData(pl.LightningDataModule):
    """Training and validation data.

    Args:
        train, val: shard sets, `{shards: folder, name, limit, loss_weight}` and, for train, how each takes part in the
            mixture: `repeat`, `weight`, `share` (`vlm_train.data.mixture.Share`), and `samples`, its published size,
            which only a dry run reads.
        mixture, temperature, shuffle, window, pool: the order, see `vlm_train.data.mixture.Mixture` (its blocks are
            `window` draws).
        group: modality | length | modality_length | null, see `vlm_train.data.order.SamplePlan`.
        pack: tokens of a packed row; null: one sample a row. pack_views: views (images, tiles, frames) of one at most.
        cache: folder of measured lengths, which packing and grouping by length need.
        val_share: share of every train source held out at its end when `val` is empty.
        annotations: dialogue | independent | first, see `vlm_train.data.render`.
        max_length: tokens of a sample, image tokens included; over_length: truncate | drop | error.
        rejected: also the stream "rejected", for preference objectives.
        limit, val_limit: use the first samples of every source only.
        workers, prefetch: loader processes, and windows each keeps ready.
        built, seed: given by `fit`, as is the attribute `plan`.
    """

    def __init__(
        self,
        *,
        train: list[dict[str, Any]],
        val: list[dict[str, Any]],
        mixture: Literal["concat", "weights", "sqrt", "temperature"] = "concat",
        temperature: float = 1.0,
        shuffle: Literal["full", "shards", "none"] = "full",
        window: int = 8192,
        pool: int = 16,
        group: Literal["modality", "length", "modality_length"] | None = None,
        pack: int | None = None,
        pack_views: int | None = None,
        cache: str = "data/.lengths",
        val_share: float = 0.0,
        annotations: Literal["dialogue", "independent", "first"] = "dialogue",
        max_length: int | None = 2048,
        over_length: Literal["truncate", "drop", "error"] = "truncate",
        rejected: bool = False,
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
        _check(train, val, val_share, limit=limit, val_limit=val_limit, max_length=max_length)
        options = {"annotations": annotations, "max_length": max_length, "over_length": over_length}
        options |= {"rejected": rejected}
        self.train = Samples(train, built, options, seed=seed, limit=limit)
        self.val = Samples(val, built, options, seed=seed, limit=val_limit)
        if val_share and not val:
            self.val = self.train.split(val_share, val_limit)
        self.mixture = Mixture(
            sources=self.train.shares(),
            seed=seed,
            rule=mixture,
            temperature=temperature,
            shuffle=shuffle,
            block=window,
            pool=pool,
        )
        self.pack, self.pack_views, self.group, self.window = pack, pack_views, group, window
        self.cache = Path(cache)
        self.micro, self.normalise = built.cfg.batch.micro, built.cfg.batch.normalise
        self.workers, self.prefetch = workers, prefetch
        self.plan: Plan | None = None

    def fingerprint(self) -> str:
        """Hash of the training samples and their order, from the manifests: other shards have another one."""
        return hashlib.sha256("\n".join(one.fingerprint for one in self.train.sets).encode()).hexdigest()

    def make_plan(
        self, *, batch: int | None, tokens: int | None, epochs: float | None, most: int | None, world: int, cost: Cost
    ) -> Plan:
        """Which samples make up which step: `batch` samples, or rows of `pack` tokens within a budget of `tokens`.

        Args:
            epochs, most: passes over the mixture, and steps at most; None: no such limit.
            cost: what a sample takes to compute; packed rows are dealt by it.
        """
        packing = self._packing(cost)
        total = None if epochs is None else math.ceil(epochs * self.mixture.samples)
        if tokens is not None:
            assert packing is not None, "checked with the configuration"
            return TokenPlan(
                mixture=self.mixture,
                packing=packing,
                tokens=tokens,
                total=total,
                most=most,
                world=world,
                micro=self.micro,
                window=self.window,
            )
        assert batch is not None
        by_length = self.group in ("length", "modality_length")
        return SamplePlan(
            mixture=self.mixture,
            batch=batch,
            total=min(n for n in (total, None if most is None else most * batch) if n is not None),
            world=world,
            micro=self.micro,
            packing=packing,
            media=self.train.has_media() if self.group in ("modality", "modality_length") else None,
            lengths=self.train.measure(self.cache).tokens if by_length else None,
            group=self.group,
            window=self.window,
        )

    def _packing(self, cost: Cost) -> Packing | None:
        if self.pack is None:
            return None
        lengths = self.train.measure(self.cache)
        tokens, views = lengths.tokens, lengths.views
        return Packing(sizes=Sizes(tokens, views, cost(tokens, views)), length=self.pack, views=self.pack_views)

    def state_dict(self) -> dict[str, Any]:
        """Where a token plan stands, so that a resumed run packs nothing twice. It decides no order."""
        if not isinstance(self.plan, TokenPlan) or self.trainer is None:
            return {}
        window, first = self.plan.locate(self.trainer.global_step)
        return {"window": window, "first": first}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up again."""
        if isinstance(self.plan, TokenPlan) and state_dict:
            self.plan.remember(**state_dict)

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
