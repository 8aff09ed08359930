"""The samples of several shard sets as one list, rendered on demand."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.errors import DataError
from data_pipelines.stream import ShardSet
from vlm_train.build import Built
from vlm_train.data.collate import Item
from vlm_train.data.layout import MediaSize
from vlm_train.data.lengths import Lengths, cached_lengths, fingerprint
from vlm_train.data.mixture import Address, Share
from vlm_train.data.render import Rendered, render
from vlm_train.errors import ConfigError
from vlm_train.randomness import derive_seed


@dataclass(frozen=True, kw_only=True)
class Source:
    """An entry of `data.train` or `data.val`: the stretch of a shard set that is used, and how it counts.

    Attributes:
        first, size: its samples, in the numbers of the shard set.
        name: what the log, and `batch.normalise=source`, call it; empty: what each sample says.
        loss_weight: factor on the weight of its targets.
        share: its part in the mixture.
    """

    shards: ShardSet
    first: int
    size: int
    name: str = ""
    loss_weight: float = 1.0
    share: Share

    @classmethod
    def open(cls, entry: dict[str, Any], limit: int | None) -> Source:
        """Raises `DataError` if the folder is no shard set, or holds no sample."""
        shards = ShardSet(entry["shards"])
        if not len(shards):
            raise DataError(f"{shards.folder}: a shard set without samples; build it again or take it out")
        size = min([len(shards), *(n for n in (limit, entry.get("limit")) if n is not None)])
        share = Share(size=size, **{k: entry[k] for k in ("repeat", "weight", "share") if entry.get(k) is not None})
        return cls(
            shards=shards,
            first=0,
            size=size,
            name=entry.get("name") or "",
            loss_weight=entry.get("loss_weight", 1.0),
            share=share,
        )

    def part(self, first: int, size: int) -> Source:
        """A stretch of it."""
        return replace(self, first=self.first + first, size=size, share=replace(self.share, size=size))


class Samples:
    """The samples of several sources, numbered through. Picklable: files open lazily per process.

    Raises:
        DataError: a folder is no shard set, or holds no sample.
    """

    def __init__(
        self, entries: Sequence[dict[str, Any]], built: Built, options: dict[str, Any], *, seed: int, limit: int | None
    ) -> None:
        self.sources = [Source.open(entry, limit) for entry in entries]
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
        self.lengths: Lengths | None = None

    @property
    def sets(self) -> list[ShardSet]:
        """The shard sets, one a source."""
        return [source.shards for source in self.sources]

    def __len__(self) -> int:
        return sum(source.size for source in self.sources)

    def locate(self, index: int) -> tuple[Source, int]:
        """The source of a sample, and its number in the source's shard set."""
        for source in self.sources:
            if index < source.size:
                return source, source.first + index
            index -= source.size
        raise IndexError(index)

    def item(self, address: Address, *, training: bool) -> Item:
        """Load, decode and render one sample. Raises `BadSample` naming shard and key."""
        source, number = self.locate(address.index)
        sample, blobs = source.shards.load(number)
        where = f"{source.shards.shard(number)}, {sample.key!r}"
        generator = (
            np.random.default_rng(derive_seed(self.seed, "sample", address.epoch, address.index)) if training else None
        )
        rendered = render(sample, self.template, self.tokenizer, self.layout, **self.options)
        if training and self.lengths is not None:
            self._require_planned(address.index, rendered, where)
        views: list[np.ndarray | None] = []
        if self.image is not None:
            views = [None] * len(blobs)
            for one in rendered.media:
                views[one] = self.image(blobs[one], generator, where)
        return Item(rendered, views, source=source.name or sample.source, weight=sample.weight * source.loss_weight)

    def split(self, share: float, limit: int | None) -> Samples:
        """Take the last share of every source away and return it, or its first `limit` samples."""
        held = [max(1, int(source.size * share)) for source in self.sources]
        for source, count in zip(self.sources, held):
            if count >= source.size:
                raise ConfigError(
                    f"data.val_share: {share} of the {source.size} samples in {source.shards.folder} leaves none to "
                    "train on"
                )
        tail = copy.copy(self)
        tail.sources = [
            source.part(source.size - count, min([count, *([limit] if limit is not None else [])]))
            for source, count in zip(self.sources, held)
        ]
        self.sources = [source.part(0, source.size - count) for source, count in zip(self.sources, held)]
        return tail

    def shares(self) -> tuple[Share, ...]:
        """How every source takes part in the mixture, with the places of its shards."""
        return tuple(replace(source.share, size=source.size, shards=_shard_starts(source)) for source in self.sources)

    def has_media(self) -> NDArray[np.bool_]:
        """Whether each sample has media `[N]`, from the index."""
        return np.concatenate(
            [
                np.diff(source.shards.index.media_start[source.first : source.first + source.size + 1]) > 0
                for source in self.sources
            ]
        )

    def measure(self, cache: Path, workers: int | None = None) -> Lengths:
        """Tokens and views of every sample `[N]`, kept in the folder `cache` and checked when a sample is loaded."""
        found = [self._measured(source, cache, workers or os.cpu_count() or 1) for source in self.sources]
        self.lengths = Lengths(
            np.concatenate([one.tokens for one in found]), np.concatenate([one.views for one in found])
        )
        return self.lengths

    def _measured(self, source: Source, cache: Path, workers: int) -> Lengths:
        """Those of a source: of its whole shard set, so that other stretches of it are known as well."""
        shards = source.shards
        key = fingerprint(
            shards.fingerprint, self.template, self.tokenizer, self.layout, self.options, self.image is not None
        )

        def size(number: int) -> tuple[int, int]:
            sample, _ = shards.load(number)
            return self._size(render(sample, self.template, self.tokenizer, self.layout, **self.options), sample)

        whole = cached_lengths(str(shards.folder), len(shards), key, size, cache, workers)
        part = slice(source.first, source.first + source.size)
        return Lengths(whole.tokens[part], whole.views[part])

    def _size(self, rendered: Rendered, sample: Any) -> tuple[int, int]:
        tokens = max(len(stream) for stream in rendered.streams.values())
        if self.image is None:
            return tokens, 0
        media = [sample.media[one] for one in rendered.media]
        sizes = [MediaSize(one.width, one.height, one.frames, one.seconds) for one in media]
        return tokens, sum(self.image.view_count(one) for one in sizes)

    def _require_planned(self, index: int, rendered: Rendered, where: str) -> None:
        assert self.lengths is not None
        tokens = max(len(stream) for stream in rendered.streams.values())
        if tokens != self.lengths.tokens[index]:
            raise DataError(
                f"{where}: {tokens} tokens, but {self.lengths.tokens[index]} were planned: the code that renders "
                "samples has changed since lengths were measured. Remove the folder data.cache names, and start again."
            )


def _shard_starts(source: Source) -> tuple[int, ...]:
    """First sample of every shard, counted from the source's own first sample."""
    shard = source.shards.index.shard[source.first : source.first + source.size]
    return tuple(np.flatnonzero(np.diff(shard, prepend=-1)).tolist())
