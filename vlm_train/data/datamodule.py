"""Shards -> windows of micro-batches -> the trainer, resumable at any optimizer step.

The only state is the number of finished optimizer steps (`vlm_train.data.loader`, `vlm_train.data.order.sample_plan`).
"""

from __future__ import annotations

import gc
import hashlib
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, IterableDataset

from data_pipelines.shards.remote import CACHE_BYTES
from vlm_train.config.schema import BatchSize
from vlm_train.data.dataset import HasMedia, Samples
from vlm_train.data.loader import MicroBatches, ValidationStream, WindowStream
from vlm_train.data.order.cost import Cost, CostsOnDemand
from vlm_train.data.order.lengths import hash_content
from vlm_train.data.order.mixture import STORED_SAMPLES, Mixture
from vlm_train.data.order.sample_plan import Packing, Plan, SamplePlan, Sizes
from vlm_train.data.order.token_plan import PackingCursor, TokenPlan
from vlm_train.data.processor import Processor
from vlm_train.data.stream import StreamShards, open_entries
from vlm_train.distributed import exit_with_parent, say_once
from vlm_train.errors import ENDING, ConfigError
from vlm_train.seeds import derive_seed

ORDER_VERSION = 1  # of the way from a seed to an order: a checkpoint with another one does not go on


class VLMData(pl.LightningDataModule):
    """Training and validation data.

    Args:
        train, val: shard sets, `{shards: folder, name, limit, loss_weight}`; `columns`, a folder of numbers beside it,
            where an objective reads some; and, for train, how each takes part in the mixture: `repeat`, `weight`,
            `share` (`vlm_train.data.order.mixture.Share`), and `samples`, its published size, which only a dry run
            reads; or one `{tars: addresses of tars without index}`, see `vlm_train.data.stream.StreamShards`.
        mixture, temperature, shuffle: the order, see `vlm_train.data.order.mixture.Mixture`.
        block_samples: its `block`; shuffle_buffer_shards: its `pool`.
        group_by: modality | length | modality_length | null, see `vlm_train.data.order.sample_plan.SamplePlan`.
        pack: tokens of a packed row; null: one sample a row. pack_patches: patches of images of one at most.
        cache: folder of measured lengths, which packing and grouping by length need.
        shard_cache, shard_cache_bytes: where remote shards (s3, gs, https) are kept, and how much of them; null:
            $VLM_TRAIN_CACHE or ~/.cache/vlm_train/shards.
        val_share: share of every train source held out at its end when `val` is empty.
        annotations: dialogue | independent | first | drawn, see `vlm_train.data.text.render`.
        max_length: tokens of a sample, image tokens included; over_length: truncate | drop | split (whole turns, as
            samples of their own) | error.
        rejected: also the stream "rejected", for preference objectives.
        prefix_split: of encoder-decoders: the first words of an answer end the prompt
            (`vlm_train.data.text.prefix_lm`).
        limit, val_limit: use the first samples of every source only.
        workers, prefetch: loader processes, and windows each keeps ready.
        processor, batch, seed: given by `build.py`: the run's processor, and its `batch`. `plan` is set by `fit`.
        columns: given by `build.py`: the columns of numbers beside the shards that objectives read.
    """

    plan: Plan | None = None
    estimates_steps = _counts_steps = False

    def __init__(
        self,
        *,
        train: list[dict[str, Any]],
        val: list[dict[str, Any]],
        mixture: Literal["concat", "weights", "sqrt", "temperature"] = "concat",
        temperature: float = 1.0,
        shuffle: Literal["full", "shards", "none"] = "full",
        block_samples: int = 8192,
        shuffle_buffer_shards: int = 16,
        group_by: Literal["modality", "length", "modality_length"] | None = None,
        pack: int | None = None,
        pack_patches: int | None = None,
        cache: str = "data/.lengths",
        shard_cache: str | None = None,
        shard_cache_bytes: int = CACHE_BYTES,
        val_share: float = 0.0,
        annotations: Literal["dialogue", "independent", "first", "drawn"] = "dialogue",
        max_length: int | None = 2048,
        over_length: Literal["truncate", "drop", "split", "error"] = "truncate",
        rejected: bool = False,
        prefix_split: bool = False,
        limit: int | None = None,
        val_limit: int | None = None,
        workers: int = 2,
        prefetch: int = 4,
        processor: Processor,
        batch: BatchSize,
        seed: int = 0,
        columns: Sequence[str] = (),
    ) -> None:
        super().__init__()
        _check_settings(train, val, val_share, limit=limit, val_limit=val_limit, max_length=max_length)
        known = {"pack": pack, "group_by": group_by, "limit": limit, "val_share": val_share, "over_length": over_length}
        train, shuffle = open_entries(train, known, batch.samples, shuffle, seed=seed, cache=cache, fetched=shard_cache)
        options = {"annotations": annotations, "max_length": max_length, "over_length": over_length}
        options |= {"rejected": rejected} | ({"prefix_split": True} if prefix_split else {})
        remote = {"cache_dir": shard_cache, "cache_bytes": shard_cache_bytes}
        self.seed, self.cache = seed, Path(cache)
        self.train = Samples(train, processor, options, seed=seed, limit=limit, columns=columns, remote=remote)
        self.val = Samples(val, processor, options, seed=seed, limit=val_limit, columns=columns, remote=remote)
        self._divide_samples(0.0 if val else val_share, val_limit)
        order: dict[str, Any] = {"rule": mixture, "temperature": temperature, "block": block_samples}
        computed = shuffle == "full" and len(self.train) > STORED_SAMPLES
        order |= {"shuffle": "computed" if computed else shuffle, "pool": shuffle_buffer_shards}
        self.mixture = Mixture(sources=self.train.list_shares(), seed=seed, **order)
        self.pack, self.pack_patches, self.group_by, self.block_samples = pack, pack_patches, group_by, block_samples
        self.micro, self.normalize, self.batch = batch.micro, batch.normalize, (batch.samples, batch.tokens)
        self.max_length, self.over_length, self.workers, self.prefetch = max_length, over_length, workers, prefetch
        self.packing_in_order = (pack, pack_patches) if batch.tokens is not None else (None, None)  # decide what fits

    def _divide_samples(self, val_share: float, val_limit: int | None) -> None:
        """Hold out `val_share` of the training samples, if any, and cut long samples of both sets into pieces."""
        if val_share:
            self.val = self.train.split_off(val_share, val_limit)
        if self.train.options["over_length"] == "split":  # after it: pieces of one sample stay together
            self.train.split_long(self.cache)
            self.val.split_long(self.cache)

    def hash_samples(self) -> str:
        """Hash of the training samples and their order, from the manifests: other shards or columns, another hash."""
        found = [one.shards.fingerprint + one.columns_hash for one in self.train.sources]
        return hashlib.sha256("\n".join(found).encode()).hexdigest()

    def hash_order(self) -> str:
        """Hash of what decides which samples a step holds. The number of ranks, micro-batches and steps does not."""
        return self._hash_order_of(self.mixture, self.packing_in_order)

    def _hash_order_of(self, mixture: Mixture, rows: tuple[int | None, int | None]) -> str:
        how = (self.batch, *rows, self.group_by, self.block_samples, self.train.options)
        return hash_content(ORDER_VERSION, mixture, *how)

    def keep_order(self, checkpoint: Mapping[str, Any]) -> None:
        """Go on in the order of a checkpoint, whose manifest this is: an earlier version stored what is computed now,
        counted steps that are estimated now, and took rows for a part of it. To be called before `make_plan`."""
        self._counts_steps = "total_steps" not in checkpoint
        stored = replace(self.mixture, shuffle="full") if self.mixture.shuffle == "computed" else self.mixture
        packed = (self.pack, self.pack_patches)
        for mixture, rows in ((self.mixture, packed), (stored, self.packing_in_order), (stored, packed)):
            if checkpoint.get("order") == self._hash_order_of(mixture, rows):
                if mixture is not self.mixture:
                    print("data.shuffle=full: this run goes on in the stored order that it began in", flush=True)
                self.mixture, self.packing_in_order = mixture, rows
                return

    def note_estimate(self) -> dict[str, str]:
        """What a checkpoint says of the plan, for `keep_order`."""
        return {"total_steps": "estimated"} if self.estimates_steps else {}

    def make_plan(
        self, *, batch: int | None, tokens: int | None, epochs: float | None, most: int | None, world: int, cost: Cost
    ) -> Plan:
        """Which samples make up which step: `batch` samples, or rows of `pack` tokens within a budget of `tokens`.

        Args:
            epochs, most: passes over the mixture, and steps at most; None: no such limit.
            cost: what a sample takes to compute; packed rows are assigned to ranks by it.
        """
        packing, shards = self._make_packing(cost), self.train.sources[0].shards
        if isinstance(shards, StreamShards):
            say_once(shards.describe_reading(world, self.workers))
        total = None if epochs is None else math.ceil(epochs * self.mixture.samples)
        if tokens is not None:
            assert packing is not None, "checked with the configuration"
            plan = TokenPlan(
                mixture=self.mixture,
                packing=packing,
                tokens=tokens,
                total=total,
                most=most,
                world=world,
                micro=self.micro,
            )
            self.estimates_steps = total is not None and total > STORED_SAMPLES and not self._counts_steps
            return plan.end_by_estimate(total) if total is not None and self.estimates_steps else plan
        assert batch is not None
        by_length = self.group_by in ("length", "modality_length") and packing is None
        return SamplePlan(
            mixture=self.mixture,
            batch=batch,
            total=min(n for n in (total, None if most is None else most * batch) if n is not None),
            world=world,
            micro=self.micro,
            packing=packing,
            media=HasMedia(self.train) if self.group_by in ("modality", "modality_length") else None,
            lengths=self.train.measure_lengths(self.cache).tokens if by_length else None,
            group_by=self.group_by,
            block_samples=self.block_samples,
        )

    def _make_packing(self, cost: Cost) -> Packing | None:
        if self.pack is None:
            return None
        lengths = self.train.measure_lengths(self.cache)
        tokens, patches = lengths.tokens, lengths.patches
        if not tokens.any():
            raise ConfigError(
                f"data.train: none of the {len(tokens)} samples can be used with data.max_length={self.max_length} and "
                f"data.over_length={self.over_length}. mode=show says why."
            )
        if self.pack_patches is not None and (over := lengths.find_longer(self.pack_patches)):
            source, number, _ = self.train.locate_sample(over[1])
            raise ConfigError(
                f"data.pack_patches: rows of {self.pack_patches} patches cannot hold {over[0]} samples, the first of "
                f"{patches[over[1]]} patches: {source.shards.describe_sample(number)}. Raise data.pack_patches, or "
                "lower image.frames or image.max_pixels."
            )
        sizes = Sizes(tokens, patches, CostsOnDemand(cost, tokens, patches))
        return Packing(sizes=sizes, length=self.pack, patches=self.pack_patches)

    def state_dict(self) -> dict[str, Any]:
        """Where an endless token plan stands, so that a resumed run packs nothing twice. It decides no order; a plan
        that has an end was packed up to there when the run started."""
        if not isinstance(self.plan, TokenPlan) or self.plan.total is not None or self.trainer is None:
            return {}
        window = self.trainer.global_step // self.plan.steps_per_window
        cursor = self.plan.find_cursor(window)
        return {
            "plan": self.plan.identity,
            "window": window,
            "next": cursor.next,
            "waiting": list(cursor.waiting),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up again, unless the windows of this plan are others."""
        if isinstance(self.plan, TokenPlan) and state_dict.get("plan") == self.plan.identity:
            self.plan.remember_cursor(
                state_dict["window"], PackingCursor(state_dict["next"], tuple(state_dict["waiting"]))
            )

    def train_dataloader(self) -> MicroBatches:
        """Micro-batches from the trainer's current optimizer step on."""
        assert self.plan is not None and self.trainer is not None
        stream = WindowStream(self.train, self.plan, self.trainer.global_step, self.trainer.global_rank, self.normalize)
        return MicroBatches(self._make_loader(stream, self.workers))

    def val_dataloader(self) -> Any:
        """Validation micro-batches."""
        if not len(self.val) or self.trainer is None:
            return []
        rank, world = self.trainer.global_rank, self.trainer.world_size
        many = max(self.pack // self.max_length, 1) if self.pack and self.max_length else 1  # no more than a packed row
        stream = ValidationStream(self.val, self.micro * many, rank, world, self.normalize)
        return self._make_loader(stream, min(self.workers, stream.batches))

    def _make_loader(self, stream: IterableDataset, workers: int) -> DataLoader[Any]:
        assert self.trainer is not None
        seed = derive_seed(self.seed, "workers", self.trainer.global_step)
        return DataLoader(
            stream,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=self.prefetch if workers else None,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",  # by `Batch.pin_memory`
            worker_init_fn=_start_worker,
            generator=torch.Generator().manual_seed(seed),  # the global one must stand where a resumed run has put it
        )


def _check_settings(train: Any, val: Any, val_share: float, **least_one: int | None) -> None:
    """Raises `ConfigError` naming every setting that cannot be."""
    problems = [] if train else ["data.train: names no shard set; allowed: a list of {shards: <folder>}"]
    for name, entries in (("train", train), ("val", val)):
        for number, one in enumerate(entries):
            if not one.get("shards") and not (name == "train" and "tars" in one):
                problems.append(f"data.{name}[{number}]: got {one}; it must name a folder as `shards`")
    if not 0.0 <= val_share < 1.0:
        problems.append(f"data.val_share: {val_share}; allowed: 0 (none) to below 1")
    for name, value in least_one.items():
        if value is not None and value < 1:
            problems.append(f"data.{name}: {value}; allowed: null (no limit) or at least 1")
    if problems:
        raise ConfigError(problems)


def _start_worker(worker: int) -> None:
    """Schedulers signal every process of a job: the trainer decides when to stop, and its workers end with it. Also
    when it is killed: by themselves they would wait for ever, at a pipe that their siblings hold open. What the trainer
    had built is not looked at by the worker's garbage collection, which would copy all of it."""
    gc.freeze()
    parent = multiprocessing.parent_process()
    if sys.platform == "linux" and parent is not None:
        exit_with_parent(signal.SIGKILL)
        if os.getppid() != parent.pid:  # it was killed before we asked
            os._exit(1)
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
