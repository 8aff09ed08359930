"""The samples of several shard sets as one list, rendered on demand."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.errors import BadSample, DataError
from data_pipelines.sample import Sample
from data_pipelines.shards.columns import Columns
from data_pipelines.shards.shard_set import ShardSet
from data_pipelines.shards.top_tokens import TopTokenColumn, open_top_tokens
from vlm_train.data.collate import Example
from vlm_train.data.order.lengths import VERSION, Lengths, cached_lengths, hash_content
from vlm_train.data.order.mixture import SampleRef, Share
from vlm_train.data.processor import Processor, measure_media
from vlm_train.data.stream import StreamShards
from vlm_train.data.text.render import RenderOptions, TokenizedSample
from vlm_train.data.text.split import NoPiece
from vlm_train.data.text.tokenizer import hash_vocabulary
from vlm_train.errors import ConfigError
from vlm_train.seeds import derive_seed

STALE = (
    "the code that renders samples has changed since lengths were measured. Remove the folder data.cache names, and "
    "start again."
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """An entry of `data.train` or `data.val`: the stretch of a shard set that is used, and how it counts.

    Attributes:
        first, size: its samples, in the numbers of the shard set.
        name: what the log, and `batch.normalize=source`, call it; empty: what each sample says.
        loss_weight: factor on the weight of its targets.
        share: its part in the mixture.
        columns: column of numbers beside the shards -> `[samples of the shard set]`; columns_hash: of their files.
        top_tokens: what a teacher says of every token, by column.
        pieces: `[size, 2]`, sample and piece of each number, where over-long samples are split.
    """

    shards: ShardSet
    first: int
    size: int
    name: str = ""
    loss_weight: float = 1.0
    share: Share
    columns: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    top_tokens: Mapping[str, TopTokenColumn] = field(default_factory=dict)
    columns_hash: str = ""
    pieces: NDArray[np.int32] | None = None

    @classmethod
    def open_source(cls, entry: dict[str, Any], limit: int | None, columns: Sequence[str], **remote: Any) -> Source:
        """Raises `DataError` if the folder is no shard set, holds no sample, or lacks the columns beside it.

        `remote`: see `ShardSet`.
        """
        shards = entry["shards"]  # a stream is open already
        if not isinstance(shards, StreamShards):
            shards = ShardSet(shards, **remote)
        if not len(shards):
            raise DataError(f"{shards.address}: a shard set without samples; build it again or take it out")
        size = min([len(shards), *(n for n in (limit, entry.get("limit")) if n is not None)])
        share = Share(size=size, **{k: entry[k] for k in ("repeat", "weight", "share") if entry.get(k) is not None})
        beside, told = None, list[str]()
        if columns:
            if not entry.get("columns"):
                raise DataError(f"{shards.address}: an objective reads the columns {', '.join(columns)} beside it")
            beside = Columns(entry["columns"], shards, columns, option="columns")
            told, columns = (list(columns), ()) if "top_k" in beside.manifest.about else ([], columns)
        return cls(
            shards=shards,
            first=0,
            size=size,
            columns=beside.load_numbers(columns) if beside else {},
            top_tokens={name: open_top_tokens(beside, name, shards) for name in told} if beside else {},
            columns_hash=beside.sha256 if beside else "",
            name=entry.get("name") or "",
            loss_weight=entry.get("loss_weight", 1.0),
            share=share,
        )

    def take_part(self, first: int, size: int) -> Source:
        """A stretch of it."""
        return replace(self, first=self.first + first, size=size, share=replace(self.share, size=size))

    def number_of(self, index: int) -> tuple[int, int]:
        """The number in the shard set, and the piece, of its sample `index`."""
        return (
            (self.first + index, 0) if self.pieces is None else (int(self.pieces[index, 0]), int(self.pieces[index, 1]))
        )


class Samples:
    """The samples of several sources, numbered through. Picklable: files open lazily per process.

    Raises:
        DataError: a folder is no shard set, holds no sample, or has not the columns of numbers that are asked for.
    """

    def __init__(
        self,
        entries: Sequence[dict[str, Any]],
        processor: Processor,
        options: dict[str, Any],
        *,
        seed: int,
        limit: int | None,
        columns: Sequence[str] = (),
        remote: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.sources = [Source.open_source(entry, limit, columns, **remote) for entry in entries]
        self.processor = processor
        self.options = options
        self.render_options = RenderOptions(**options)
        self.streams = (*processor.streams, *(("rejected",) if options.get("rejected") else ()))
        self.top_tokens = tuple(dict.fromkeys(name for source in self.sources for name in source.top_tokens))
        self.columns = tuple(name for name in columns if name not in self.top_tokens)
        for column in (one for source in self.sources for one in source.top_tokens.values()):
            column.require_vocabulary(hash_vocabulary(processor.tokenizer))
        self.seed = seed
        self.lengths: Lengths | None = None

    @property
    def sets(self) -> list[ShardSet]:
        """The shard sets, one a source."""
        return [source.shards for source in self.sources]

    def __len__(self) -> int:
        return sum(source.size for source in self.sources)

    def locate_sample(self, index: int) -> tuple[Source, int, int]:
        """The source of a sample, its number in the source's shard set, and its piece."""
        for source in self.sources:
            if index < source.size:
                return source, *source.number_of(index)
            index -= source.size
        raise IndexError(index)

    def load_example(self, ref: SampleRef, *, training: bool) -> Example:
        """Load, decode and render one sample. Raises `BadSample` naming shard and key."""
        source, number, piece = self.locate_sample(ref.index)
        shards = source.shards
        try:
            sample, blobs = shards.load_sample(number)
            columns = {name: float(source.columns[name][number]) for name in self.columns}
            if unknown := [name for name, value in columns.items() if not math.isfinite(value)]:
                raise BadSample(f"sample {sample.key!r}: no number in column {', '.join(unknown)}", kind="column")
            options = replace(self.render_options, piece=piece) if piece else self.render_options
            if training and options.annotations == "drawn":
                drawn = derive_seed(self.seed, "annotation", ref.epoch, ref.index) % len(sample.annotations)
                options = replace(options, annotation=drawn)
            rendered = self.processor.render(sample, options)
            if training and self.lengths is not None:
                self._require_planned(ref.index, rendered, source, number)
            top_tokens = {
                name: (told.read_sample(number, rendered.streams["llm"].supervised), told.vocab_size)
                for name, told in source.top_tokens.items()
            }
            views = self.processor.make_views(
                blobs,
                media=sample.media,
                shown=rendered.media,
                address=(self.seed, ref.epoch, ref.index) if training else None,
                where=f"sample {rendered.key!r}",
            )
        except NoPiece as error:
            raise DataError(f"{shards.describe_sample(number)}: {error}: {STALE}") from error
        except BadSample as error:
            error.shard, error.key = error.shard or shards.shard_path(number), error.key or shards.key(number)
            raise
        weight = sample.weight * source.loss_weight
        beside: dict[str, Any] = {"columns": columns, "top_tokens": top_tokens}
        return Example(rendered, views, source=source.name or sample.source, weight=weight, **beside)

    def split_off(self, share: float, limit: int | None) -> Samples:
        """Take the last share of every source away and return it, or its first `limit` samples."""
        held = [max(1, int(source.size * share)) for source in self.sources]
        for source, tail_size in zip(self.sources, held):
            if tail_size >= source.size:
                raise ConfigError(
                    f"data.val_share: {share} of the {source.size} samples in {source.shards.address} leaves none to "
                    "train on"
                )
        tail = copy.copy(self)
        tail.sources = [
            source.take_part(source.size - size, min(size, limit or size)) for source, size in zip(self.sources, held)
        ]
        self.sources = [source.take_part(0, source.size - size) for source, size in zip(self.sources, held)]
        return tail

    def list_shares(self) -> tuple[Share, ...]:
        """How every source takes part in the mixture, with the places of its shards."""
        return tuple(replace(source.share, size=source.size, shards=_shard_starts(source)) for source in self.sources)

    def measure_lengths(self, cache: Path, workers: int | None = None) -> Lengths:
        """Tokens and patches of every sample `[N]`, kept in the folder `cache` and checked when a sample is loaded."""
        found = [self._measure_source(source, cache, workers or os.cpu_count() or 1) for source in self.sources]
        if len(found) == 1:  # as it is mapped
            self.lengths = found[0]
        else:
            self.lengths = Lengths(*(np.concatenate([getattr(one, f.name) for one in found]) for f in fields(Lengths)))
        return self.lengths

    def split_long(self, cache: Path, workers: int | None = None) -> None:
        """Number the pieces of over-long samples through as samples of their own."""
        for number, source in enumerate(self.sources):
            found = self._measure_source(source, cache, workers or os.cpu_count() or 1)
            pieces = np.stack([found.samples, found.pieces], axis=1)
            share = replace(source.share, size=len(pieces))
            self.sources[number] = replace(source, size=len(pieces), share=share, pieces=pieces)

    def _measure_source(self, source: Source, cache: Path, workers: int) -> Lengths:
        """Those of a source. The whole shard set is measured, so that other stretches of it are known as well."""
        shards = source.shards
        key = hash_content(VERSION, shards.fingerprint, self.processor, self.options)

        def measure_sample(number: int) -> list[tuple[int, int]]:
            return self._measure_pieces(shards.read_sample(number))

        whole = cached_lengths(shards.address, len(shards), key, measure_sample, cache, workers)
        if not source.size:
            return whole.slice_samples(0, 0)
        return whole.slice_samples(source.number_of(0)[0], source.number_of(source.size - 1)[0] + 1)

    def _measure_pieces(self, sample: Sample) -> list[tuple[int, int]]:
        """Tokens and patches of a sample's pieces."""
        sizes = [self._measure_piece(self.processor.render(sample, self.render_options), sample)]
        if self.render_options.over_length == "split":
            with suppress(NoPiece):
                for piece in count(1):
                    rendered = self.processor.render(sample, replace(self.render_options, piece=piece))
                    sizes.append(self._measure_piece(rendered, sample))
        return sizes

    def _measure_piece(self, rendered: TokenizedSample, sample: Sample) -> tuple[int, int]:
        tokens = max(len(stream) for stream in rendered.streams.values())
        sizes, plans = measure_media(sample.media), self.processor.images.values()
        return tokens, sum(grid.size for plan in plans for one in rendered.media for grid in plan.grids(sizes[one]))

    def _require_planned(self, index: int, rendered: TokenizedSample, source: Source, number: int) -> None:
        assert self.lengths is not None
        tokens = max(len(stream) for stream in rendered.streams.values())
        planned = self.lengths.tokens[index]
        if tokens != planned:
            raise DataError(
                f"{source.shards.describe_sample(number)}: {tokens} tokens, but {planned} were planned: {STALE}"
            )


@dataclass(frozen=True)
class HasMedia:
    """Whether a sample has media, by its number among all samples: looked up in the index, no array of them."""

    samples: Samples

    def __getitem__(self, index: int) -> bool:
        """Whether sample `index` has an image or a video."""
        source, number, _ = self.samples.locate_sample(index)
        return source.shards.count_media(number) > 0


def _shard_starts(source: Source) -> tuple[int, ...]:
    """First sample of every shard, counted from the source's own first sample."""
    if source.pieces is not None:
        shard = source.shards.index.shard[source.pieces[:, 0]]
        return tuple(np.flatnonzero(np.diff(shard, prepend=-1)).tolist())
    starts = source.shards.find_runs() - source.first
    return (0, *starts[(starts > 0) & (starts < source.size)].tolist())
