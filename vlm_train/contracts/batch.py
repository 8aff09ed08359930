"""`Batch`: the one shape in which data reaches every model family.

Legend: A position axes (1, or 3 for M-RoPE), B rows, T tokens, S placeholders (of packed sequences: sequences).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from data_pipelines.errors import BadSample
from vlm_train.contracts.media import MediaInput
from vlm_train.contracts.streams import Alignment
from vlm_train.errors import BatchError

IGNORE = -100
"""Label of a position that is not learned."""


@dataclass(frozen=True, kw_only=True)
class Slots:
    """Where media features go in one token stream. An item may stand in it once, several times or not at all.

    Attributes:
        index: `[S]` int64, flat positions `b * T + t` that receive a feature.
        feature_index: `[S]` int64, the feature that each receives, a row of the batch's features joined item by item;
            None: every feature once, in order.
        placeholders: placeholders in the stream's `ids`, counted on the CPU: as many as `index` must name.
    """

    index: Tensor
    feature_index: Tensor | None = None
    placeholders: int


@dataclass(frozen=True, kw_only=True)
class PackedSequences:
    """Sequences of tokens that do not see each other, one after the other as attention kernels take them.

    Attributes:
        lengths: S lengths, on the CPU.
        max_length: the largest of them.
        cu_seqlens: `[S + 1]` int32, where each begins, and where the last ends.
        index: `[sum(lengths)]` int64, flat positions `b * T + t` of their tokens; None: all of the batch, in order.
    """

    lengths: tuple[int, ...]
    max_length: int
    cu_seqlens: Tensor
    index: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class TokenStream:
    """One text stream of a batch, its labels already aligned: `labels[b, t]` is the target of position t.

    Attributes:
        ids: `[B, T]` int64 token ids; placeholder positions hold `PLACEHOLDER_ID`, padding 0.
        labels: `[B, T]` int64 targets, `IGNORE` where nothing is learned.
        weights: `[B, T]` float32 loss weight per target (0 where ignored), normalization rule included.
        positions: `[A, B, T]` int64 position ids. They say nothing about who sees whom.
        segment_ids: `[B, T]` int32; 0 is padding, 1, 2, ... the samples packed into the row.
        attention_group: `[B, T]` int32, see `vlm_train.models.layers.masks`: 0 shared by its segment, n > 0 a private
            branch, n < 0 a shared block whose tokens see each other in both directions.
        slots: where media features go.
        alignment: how labels relate to inputs: causal (the next token), seq2seq (the token that the input was shifted
            by), or none (a text that is only read).
        supervised: `[S]` int64, flat positions `b * T + t` that have a label. Found by collate: a loss would have to
            ask the device.
        plain_causal: every row is one sample of group 0, padded on the right. Then causal attention needs no mask, and
            fast kernels run. Like the fields below decided by collate: a device would have to be asked.
        causal: the samples of group 0, and the padding of every row as a sequence of its own; None: there are none, or
            only a mask tells.
        masked: the samples with other groups; None likewise.
        sample_lengths: tokens of every sample of every row, as in `segment_ids`; None: only `segment_ids` tells.
        media_of_token: `[B, T]` int64, the last media item that stands at or before the token where it may see it (in
            its own segment, in the shared part or its own branch), as a number in the batch; -1: none. Inserted
            cross-attention reads it. None: the batch was not made by collate.
    """

    ids: Tensor
    labels: Tensor
    weights: Tensor
    positions: Tensor
    segment_ids: Tensor
    attention_group: Tensor
    slots: Slots
    supervised: Tensor
    alignment: Alignment = "causal"
    plain_causal: bool = False
    causal: PackedSequences | None = None
    masked: PackedSequences | None = None
    sample_lengths: tuple[tuple[int, ...], ...] | None = None
    media_of_token: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class MediaBatch:
    """All media items of a batch, in order. Where their features go, each token stream says.

    Attributes:
        inputs: name of a vision encoder -> what it is given. A family with one encoder names it "vision".
        slot_counts: features of each media item, in order, as the layout promised them to the text; 0 for items that
            take no place in a text (two towers).
        row: `[items]` int64, the row of the batch each item belongs to.
        keys: sample key of each item, for messages.
    """

    inputs: Mapping[str, MediaInput] = field(default_factory=dict)
    slot_counts: tuple[int, ...] = ()
    row: Tensor
    keys: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a sample was left out; `kind` is the word it is counted under."""

    reason: str
    kind: str = "other"
    shard: str = ""
    key: str = ""

    @classmethod
    def from_error(cls, error: BadSample) -> Problem:
        """The problem that an error tells."""
        return cls(str(error), error.kind, error.shard, error.key)

    def __str__(self) -> str:
        known = not self.key or (self.shard in self.reason and self.key in self.reason)
        return self.reason if known else f"{self.shard}, key {self.key!r}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class Window:
    """Where a micro-batch stands in its optimizer step, and what the step holds on this rank.

    `sums[stream][source]` is the total loss weight of this rank's whole window (the stream "samples" counts samples);
    one all-reduce of it before the first backward gives the global denominator. The other counts are for the log
    (`positions_total`: tokens and padding; `unknown`: targets that the tokenizer does not know); `problems` says which
    samples were left out, and why.
    """

    step: int
    micro: int
    micro_count: int
    sums: Mapping[str, Mapping[str, float]]
    samples: int = 0
    tokens: int = 0
    positions_total: int = 0
    supervised: int = 0
    unknown: int = 0
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TopTokenBatch:
    """What a teacher said of every supervised token of the stream "llm", in the order of its `supervised`.

    Attributes:
        ids: `[S, K]` int64, the most likely tokens, the first most of all.
        logps: `[S, K]` float32, their log-probabilities.
        vocab_size: size of the teacher's vocabulary; 0: no sample of the batch tells.
    """

    ids: Tensor
    logps: Tensor
    vocab_size: int = 0


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch: named token streams, media, and the accumulation window it belongs to.

    `keys[b][s - 1]` and `sources[b][s - 1]` name the sample in segment s of row b and where it comes from; `references`
    carries what evaluation needs (the expected answers), never read by a model. `columns[name]` `[samples]` float32, in
    the same order, is what a column beside the shards says of each sample; `top_tokens[name]` is a column of what a
    teacher says of each token. `problems` says which held-out samples
    were left out, and why; those of a training step are in its window. `shared` is where
    `vlm_train.models.layers.passes` keeps passes.
    """

    text: Mapping[str, TokenStream]
    media: MediaBatch
    window: Window | None = None
    sources: tuple[tuple[str, ...], ...] = ()
    keys: tuple[tuple[str, ...], ...] = ()
    references: tuple[Any, ...] = field(default=())
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    top_tokens: Mapping[str, TopTokenBatch] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    shared: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The batch with every tensor on `device` (called by Lightning)."""
        if self.media.row.device == torch.device(device):
            return self
        return map_tensors(self, lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory (called by the DataLoader)."""
        return map_tensors(self, lambda t: t.pin_memory())

    def sum_by_source(self, stream: TokenStream, index: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Source -> `[K]`, its part of the sums of `values` `[S, K]`, which belong to the flat positions `index` `[S]`
        of `stream`. Nothing has to be asked of the device: which sources a batch holds is known on the CPU."""
        names = sorted({source for row in self.sources for source in row})
        if len(names) < 2:
            return {name: values.sum(dim=0) for name in names}
        table = torch.zeros(len(stream.ids), max(map(len, self.sources)) + 1, dtype=torch.int64)
        for row, sources in enumerate(self.sources):
            for segment, source in enumerate(sources, start=1):
                table[row, segment] = names.index(source)
        table = table.to(index.device, non_blocking=True)
        held = table.gather(1, stream.segment_ids.long()).flatten()[index]
        sums = values.new_zeros(len(names), values.shape[1]).index_add_(0, held, values)
        return dict(zip(names, sums, strict=True))


def count_pairs(batch: Batch, text: str = "llm") -> int:
    """Number of image-text pairs. Raises `BatchError` unless every text of the stream `text` has one image view."""
    texts, pairs, views = len(batch.text[text].ids), len(batch.media.row), batch.media.inputs["vision"].views_total
    if views != pairs or (pairs and pairs != texts):  # without pairs, a row of padding
        raise BatchError(f"batch: needs one image view a text, got {views} views of {pairs} images for {texts} texts")
    return pairs


def map_tensors(value: Any, function: Callable[[Any], Any], kind: type = Tensor) -> Any:
    """Apply `function` to every tensor (or other `kind`) of a nested dataclass or mapping; leave the rest as it is."""
    if isinstance(value, kind):
        return function(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: map_tensors(getattr(value, f.name), function, kind) for f in fields(value)})
    if isinstance(value, Mapping):
        return {key: map_tensors(item, function, kind) for key, item in value.items()}
    return value


@dataclass(frozen=True, kw_only=True)
class SequenceMask:
    """Who may attend to whom in a batch, sequence by sequence, in place of a mask `[B, 1, T, T]`.

    Attributes:
        causal: sequences that are causal, each by itself; None: there are none.
        masked: sequences whose attention groups say more; None: there are none.
        groups: `[tokens of masked]` their attention groups; None: there are none.
    """

    causal: PackedSequences | None
    masked: PackedSequences | None = None
    groups: Tensor | None = None
