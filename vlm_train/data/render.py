"""Rendering: sample + template + tokenizer + media layout -> token streams with aligned labels.

Every stretch of text between two media is tokenised once, as a whole, with character offsets; a token is learned if it
overlaps a learned character. Nothing is tokenised twice, so labels and ids cannot disagree.

Several independent annotations of one image become one stream: a shared prefix (group 0) that ends with the last media
token, and one private branch (group 1, 2, ...) for the rest of each annotation, all branches starting at the position
after the prefix. Without media the prefix is just the bos token. A branch's first token would have to be predicted by the
prefix's last token, whose one label cannot serve several branches, so with several branches it must not be learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from data_pipelines.errors import BadSample
from data_pipelines.sample import Annotation, Media, Sample, Turn
from vlm_train.data.layout import PLACEHOLDER_ID, MediaLayout, MediaSize, Piece, Slot
from vlm_train.data.template import Place, Run, Segment, Template, stripped_turn
from vlm_train.data.tokenizer import special_pattern
from vlm_train.errors import ConfigError

IGNORE = -100  # the same number as vlm_train.data.batch.IGNORE, which needs torch

Annotations = Literal["independent", "dialogue", "first"]
OverLength = Literal["drop", "truncate", "error"]


@dataclass(frozen=True, slots=True)
class PlacedSlot:
    """A run of placeholders and the position of its first one in the stream."""

    start: int
    slot: Slot

    @property
    def end(self) -> int:
        """Position after its last placeholder."""
        return self.start + self.slot.count


@dataclass(frozen=True, kw_only=True)
class Stream:
    """One token stream of a sample. All arrays are `[T]`.

    Attributes:
        ids: int64; placeholders are `PLACEHOLDER_ID`.
        labels: int64; `labels[t]` is the target of position t (its branch's next token), `IGNORE` if not learned.
        weights: float32 weight of every target: annotation x turn x text segment; 0 where ignored.
        positions: int64; every branch goes on where the prefix ends.
        attention_group: int32; 0 the prefix (or all of a single annotation), 1, 2, ... the branches.
        slots: where media stand.
    """

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    weights: NDArray[np.float32]
    positions: NDArray[np.int64]
    attention_group: NDArray[np.int32]
    slots: tuple[PlacedSlot, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def supervised(self) -> int:
        """Number of learned targets."""
        return int((self.labels != IGNORE).sum())


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A sample as token streams ("llm", and "rejected" if asked); `reference` is the expected answer (generation)."""

    key: str
    streams: dict[str, Stream]
    reference: str = ""

    @property
    def llm(self) -> Stream:
        """The main stream."""
        return self.streams["llm"]


def render(
    sample: Sample,
    template: Template,
    tokenizer: Any,
    layout: MediaLayout,
    *,
    annotations: Annotations = "independent",
    annotation: int | None = None,
    max_length: int | None = None,
    over_length: OverLength = "drop",
    generation: bool = False,
    rejected: bool = False,
) -> Rendered:
    """Render a sample for training, or (with `generation`) the prompt of one annotation up to its last answer.

    Args:
        annotations: independent (all, as branches that do not see each other) | dialogue (all, as one conversation) |
            first (one only).
        annotation: render only this one; with `generation` and `rejected` it is 0 if not given.
        max_length: most tokens of a stream, media included; null: no limit.
        over_length: drop (`BadSample`) | truncate (cut whole text tokens off the end, never media) | error.
        rejected: also render the stream "rejected", the annotation with its last turn replaced.

    Raises:
        BadSample: nothing to learn, too long, or annotations that cannot share a prefix. Names the sample.
        ConfigError: the layout, the template and the tokenizer do not fit each other; or too long with `error`.
    """
    _check_choice("annotations", annotations, Annotations)
    _check_choice("over_length", over_length, OverLength)
    sizes = [MediaSize(m.width, m.height, m.frames, m.seconds) for m in sample.media]
    writer = _Writer(template, tokenizer, layout(sizes))
    if generation or rejected:
        annotation = annotation or 0
    try:
        chosen = _choose(sample.annotations, annotations, annotation)
        if generation:
            stream, reference = writer.prompt(chosen[0])
            return Rendered(key=sample.key, streams={"llm": _fit(stream, max_length, "drop")}, reference=reference)
        streams = {"llm": writer.training(chosen)}
        if rejected:
            streams["rejected"] = writer.training([_rejected(chosen[0])])
        fitted = {name: _learned(_fit(stream, max_length, over_length)) for name, stream in streams.items()}
        return Rendered(key=sample.key, streams=fitted)
    except BadSample as error:
        raise BadSample(f"sample {sample.key!r}: {error}") from error
    except ConfigError as error:
        raise type(error)(f"sample {sample.key!r}: {error}") from error


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ConfigError(f"data.{name}: {value!r}; allowed: {', '.join(get_args(choices))}")


def _choose(all_annotations: Sequence[Annotation], mode: str, number: int | None) -> list[Annotation]:
    if number is not None and not 0 <= number < len(all_annotations):
        raise BadSample(f"no annotation {number}; it has {len(all_annotations)}")
    if number is not None or mode == "first":
        return [all_annotations[number or 0]]
    return [join(all_annotations)] if mode == "dialogue" else list(all_annotations)


def join(annotations: Sequence[Annotation]) -> Annotation:
    """All annotations as one conversation: media that were shown before and later system turns are left out."""
    turns: list[Turn] = []
    shown: set[int] = set()
    for annotation in annotations:
        for turn in annotation.turns:
            if turn.role == "system" and turns:
                continue
            repeats = any(isinstance(part, Media) and part.item in shown for part in turn.parts)
            if repeats:
                kept = tuple(p for p in turn.parts if not (isinstance(p, Media) and p.item in shown))
                turn = stripped_turn(replace(turn, parts=kept))
            shown |= {part.item for part in turn.parts if isinstance(part, Media)}
            turns.append(replace(turn, weight=turn.weight * annotation.weight))
    return Annotation(turns=tuple(turns))


def _rejected(annotation: Annotation) -> Annotation:
    if annotation.rejected is None:
        raise BadSample("no rejected answer, but the objective compares a chosen and a rejected one")
    return replace(annotation, turns=(*annotation.turns[:-1], annotation.rejected))


@dataclass(frozen=True)
class _Tokens:
    """A tokenised conversation: ids and, aligned with them, the loss weight of each token as a target."""

    ids: list[int]
    weights: list[float]
    slots: list[PlacedSlot]
    prefix: int  # tokens up to and including the last media token (or bos)


class _Writer:
    """Writes the conversations of one sample as tokens."""

    def __init__(self, template: Template, tokenizer: Any, pieces: list[list[Piece]]) -> None:
        self.template, self.tokenizer, self.pieces = template, tokenizer, pieces
        literals = {piece for item in pieces for piece in item if isinstance(piece, str)}
        self.special = special_pattern(tokenizer, tuple(sorted(literals)))

    def training(self, annotations: Sequence[Annotation]) -> Stream:
        """One stream of all annotations, every one a branch of its own if there are several."""
        parts = []
        for annotation in annotations:
            turns = annotation.turns
            while turns and turns[-1].role != "assistant":
                turns = turns[:-1]  # nothing after the last answer is learned
            parts.append(self._tokens(self.template.segments(turns, self.tokenizer), annotation.weight))
        return _branch(parts) if len(parts) > 1 else _single(parts[0])

    def prompt(self, annotation: Annotation) -> tuple[Stream, str]:
        """The prompt for the last answer, and that answer's text ("" if the conversation ends with a question)."""
        turns, reference = annotation.turns, ""
        if turns and turns[-1].role == "assistant":
            turns, reference = turns[:-1], turns[-1].text
        tokens = self._tokens(self.template.segments(turns, self.tokenizer, generation=True), 0.0)
        return _single(tokens), reference.strip()

    def _tokens(self, segments: Sequence[Segment], weight: float) -> _Tokens:
        bos = self.tokenizer.bos_token_id if self.template.bos else None
        ids: list[int] = [] if bos is None else [bos]
        weights, slots, prefix = [0.0] * len(ids), [], len(ids)
        runs: list[Run] = []
        for segment in [*segments, None]:
            if isinstance(segment, Run):
                runs.append(segment)
                continue
            new_ids, new_weights = encode(runs, self.tokenizer, self.special)
            ids += new_ids
            weights += [w * weight for w in new_weights]
            runs = []
            if isinstance(segment, Place) and self.pieces[segment.item]:
                for piece in self.pieces[segment.item]:
                    if isinstance(piece, Slot):
                        slots.append(PlacedSlot(len(ids), piece))
                    ids += [PLACEHOLDER_ID] * piece.count if isinstance(piece, Slot) else [self._literal(piece)]
                weights += [0.0] * (len(ids) - len(weights))
                prefix = len(ids)
        return _Tokens(ids, weights, slots, prefix)

    def _literal(self, token: str) -> int:
        found = self.tokenizer.get_vocab().get(token)
        if found is None:
            raise ConfigError(
                f"the media layout writes the token {token!r}, which is not in the tokenizer's vocabulary; "
                f"add it with tokenizer.add=['{token}']"
            )
        return int(found)


def encode(runs: Sequence[Run], tokenizer: Any, special: Any) -> tuple[list[int], list[float]]:
    """Token ids and loss weights of adjacent runs, tokenised as one text.

    Content that spells a special token is ordinary text: the text is cut after the first character of such a spelling
    and tokenised in two pieces. Only then do the ids differ from those of the whole text.
    """
    text = "".join(run.text for run in runs)
    if not text:
        return [], []
    char_weights = np.concatenate([np.full(len(run.text), run.weight, np.float32) for run in runs])
    cuts = [0, *_cuts(text, runs, special), len(text)]
    ids: list[int] = []
    weights: list[float] = []
    for start, end in zip(cuts, cuts[1:], strict=False):
        encoding = tokenizer(
            text[start:end],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        ids += encoding["input_ids"]
        span = char_weights[start:end]
        for a, b in encoding["offset_mapping"]:
            a = min(a, len(span) - 1)  # an empty span belongs to the character it stands before
            weights.append(float(span[a : max(b, a + 1)].max()))
    return ids, weights


def _cuts(text: str, runs: Sequence[Run], special: Any) -> list[int]:
    """Where to cut so that no special token is read that is not wholly written by the template."""
    spans, start = [], 0
    for run in runs:
        if not run.content:
            spans.append((start, start + len(run.text)))
        start += len(run.text)
    cuts, position = [], 0
    while match := special.search(text, position):
        a, b = match.span()
        if any(start <= a and b <= end for start, end in spans):
            position = b
        else:
            position = a + 1
            cuts.append(position)
    return cuts


def _shift(ids: Sequence[int], weights: Sequence[float]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Labels and weights aligned with the inputs: position t learns token t + 1."""
    next_weights = np.append(np.asarray(weights[1:], np.float32), np.float32(0.0))
    next_ids = np.append(np.asarray(ids[1:], np.int64), IGNORE)
    return np.where(next_weights > 0, next_ids, IGNORE), next_weights


def _single(tokens: _Tokens) -> Stream:
    labels, weights = _shift(tokens.ids, tokens.weights)
    return Stream(
        ids=np.asarray(tokens.ids, np.int64),
        labels=labels,
        weights=weights,
        positions=np.arange(len(tokens.ids), dtype=np.int64),
        attention_group=np.zeros(len(tokens.ids), np.int32),
        slots=tuple(tokens.slots),
    )


def _branch(parts: Sequence[_Tokens]) -> Stream:
    """Several conversations as one shared prefix and private branches."""
    first = parts[0]
    prefix = first.ids[: first.prefix]
    for number, part in enumerate(parts):
        if part.ids[: part.prefix] != prefix or [s.slot for s in part.slots] != [s.slot for s in first.slots]:
            raise BadSample(
                f"annotations 0 and {number} differ before their last image, so they cannot share it; set "
                "data.annotations to dialogue or first"
            )
        if any(w > 0 for w in part.weights[1 : part.prefix + 1]):
            raise ConfigError(
                "this template learns the token right after the image, which only one annotation an image can do; set "
                "data.annotations to first"
            )
    singles = [_single(part) for part in parts]
    size = len(prefix)

    def joined(name: str) -> Any:
        return np.concatenate([getattr(singles[0], name)[:size], *(getattr(s, name)[size:] for s in singles)])

    groups = [np.zeros(size, np.int32), *(np.full(len(s) - size, n, np.int32) for n, s in enumerate(singles, 1))]
    return Stream(
        ids=joined("ids"),
        labels=joined("labels"),
        weights=joined("weights"),
        positions=joined("positions"),
        attention_group=np.concatenate(groups),
        slots=singles[0].slots,
    )


def _fit(stream: Stream, max_length: int | None, over_length: str) -> Stream:
    """The stream within `max_length` tokens."""
    if max_length is None or len(stream) <= max_length:
        return stream
    message = f"{len(stream)} tokens, but data.max_length is {max_length}"
    if over_length == "error":
        raise ConfigError(f"{message} (data.over_length=error)")
    if over_length == "drop":
        raise BadSample(message)
    if stream.slots and stream.slots[-1].end > max_length:
        raise BadSample(f"{message}, and cutting there would cut an image that ends at token {stream.slots[-1].end}")
    cut = {name: getattr(stream, name)[:max_length].copy() for name in ("ids", "labels", "weights", "positions")}
    cut["labels"][-1], cut["weights"][-1] = IGNORE, 0.0  # its target was cut off
    return Stream(**cut, attention_group=stream.attention_group[:max_length], slots=stream.slots)


def _learned(stream: Stream) -> Stream:
    if not stream.supervised:
        raise BadSample(f"no supervised token in {len(stream)} tokens")
    return stream

