"""Rendering: sample + template + tokenizer + media layout -> token streams with aligned labels.

Every stretch of text between two media is tokenised once, as a whole, with character offsets; a token is learned if it
overlaps a learned character. Nothing is tokenised twice, so labels and ids cannot disagree.
`vlm_train.data.streams` puts several annotations of one image together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from data_pipelines.errors import BadSample
from data_pipelines.sample import Annotation, Media, Sample, Turn
from vlm_train.data.layout import PLACEHOLDER_ID, MediaLayout, MediaSize, Piece, Slot
from vlm_train.data.segments import Place, Run, Segment, stripped_turn
from vlm_train.data.split import pieces
from vlm_train.data.streams import PlacedSlot, Positions, Stream, Tokens, branch, fit, learned, single
from vlm_train.data.template import Template
from vlm_train.data.tokenizer import special_pattern
from vlm_train.errors import ConfigError

Annotations = Literal["independent", "dialogue", "first"]
OverLength = Literal["drop", "truncate", "split", "error"]


class NoPiece(BadSample):
    """A sample has fewer pieces than asked for."""


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A sample as token streams.

    Attributes:
        streams: "llm", and "rejected" if asked.
        media: the sample's media items that a model is to see: those that stand in a stream, and those that take no
            place in a text (two towers). The sample's other items are left out.
        reference: the expected answer, boxes as the template spells them (generation).
    """

    key: str
    streams: dict[str, Stream]
    media: tuple[int, ...] = ()
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
    piece: int = 0,
) -> Rendered:
    """Render a sample for training, or (with `generation`) the prompt of one annotation up to its last answer.

    Args:
        annotations: independent (all, as branches that do not see each other) | dialogue (all, as one conversation) |
            first (one only).
        annotation: render only this one; with `generation` and `rejected` it is 0 if not given.
        max_length: most tokens of a stream, media included; null: no limit.
        over_length: drop (`BadSample`) | truncate (cut whole text tokens off the end, never media) | split (at turns,
            see `vlm_train.data.split`) | error.
        rejected: also render the stream "rejected", the annotation with its last turn replaced.
        piece: which piece of a sample that is split.

    Raises:
        BadSample: nothing to learn, too long, or annotations that cannot share a prefix. Names the sample.
        ConfigError: the layout, the template and the tokenizer do not fit each other; or too long with `error`.
    """
    _check_choice("annotations", annotations, Annotations)
    _check_choice("over_length", over_length, OverLength)
    sizes = [MediaSize(m.width, m.height, m.frames, m.seconds) for m in sample.media]
    writer = _Writer(template, tokenizer, layout(sizes), getattr(layout, "positions", None))
    if generation or rejected:
        annotation = annotation or 0
    try:
        chosen = _choose(sample.annotations, annotations, annotation)
        if generation:
            stream, reference = writer.prompt(chosen[0])
            streams = {"llm": fit(stream, max_length, "drop")}
            return Rendered(key=sample.key, streams=streams, media=writer.shown(streams), reference=reference)
        if over_length == "split" and max_length and (piece or len(writer.training(chosen)) > max_length):
            chosen = _piece(writer, chosen, max_length, piece)
        streams = {"llm": writer.training(chosen)}
        if rejected:
            streams["rejected"] = writer.training([_rejected(chosen[0])])
        fitted = {name: learned(fit(stream, max_length, over_length)) for name, stream in streams.items()}
        return Rendered(key=sample.key, streams=fitted, media=writer.shown(fitted))
    except NoPiece:
        raise
    except BadSample as error:
        raise BadSample(f"sample {sample.key!r}: {error}", kind=error.kind) from error
    except ConfigError as error:
        raise type(error)(f"sample {sample.key!r}: {error}") from error


def _piece(writer: _Writer, annotations: Sequence[Annotation], max_length: int, number: int) -> list[Annotation]:
    def fits(tried: Sequence[Annotation]) -> bool:
        stream = writer.training(tried)
        return len(stream) <= max_length and stream.supervised > 0

    found = pieces(annotations, fits)
    if not found:
        raise BadSample(f"no round of its turns is learned within data.max_length={max_length} tokens", kind="too_long")
    if number >= len(found):
        raise NoPiece(f"{len(found)} pieces of at most {max_length} tokens, so there is no piece {number}")
    return found[number]


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ConfigError(f"data.{name}: {value!r}; allowed: {', '.join(get_args(choices))}")


def _choose(all_annotations: Sequence[Annotation], mode: str, number: int | None) -> list[Annotation]:
    if number is not None and not 0 <= number < len(all_annotations):
        raise BadSample(f"no annotation {number}; it has {len(all_annotations)}", kind="malformed")
    if number is not None or mode == "first":
        return [all_annotations[number or 0]]
    return [join(all_annotations)] if mode == "dialogue" else list(all_annotations)


def join(annotations: Sequence[Annotation]) -> Annotation:
    """All annotations as one conversation: media that an earlier one showed and later system turns are left out."""
    turns: list[Turn] = []
    shown: set[int] = set()
    for annotation in annotations:
        new: set[int] = set()
        for turn in annotation.turns:
            if turn.role == "system" and turns:
                continue
            repeats = any(isinstance(part, Media) and part.item in shown for part in turn.parts)
            if repeats:
                kept = tuple(p for p in turn.parts if not (isinstance(p, Media) and p.item in shown))
                turn = stripped_turn(replace(turn, parts=kept))
            new |= {part.item for part in turn.parts if isinstance(part, Media)}
            turns.append(replace(turn, weight=turn.weight * annotation.weight))
        shown |= new
    return Annotation(turns=tuple(turns))


def _rejected(annotation: Annotation) -> Annotation:
    if annotation.rejected is None:
        raise BadSample("no rejected answer, but the objective compares two", kind="no_rejected")
    return replace(annotation, turns=(*annotation.turns[:-1], annotation.rejected))


class _Writer:
    """Writes the conversations of one sample as tokens."""

    def __init__(
        self, template: Template, tokenizer: Any, pieces: list[list[Piece]], positions: Positions | None
    ) -> None:
        self.template, self.tokenizer, self.pieces, self.positions = template, tokenizer, pieces, positions
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
        return branch(parts) if len(parts) > 1 else single(parts[0])

    def prompt(self, annotation: Annotation) -> tuple[Stream, str]:
        """The prompt for the last answer, and that answer as the template spells it, boxes included ("" if the
        conversation ends with a question)."""
        turns, reference = annotation.turns, ""
        if turns and turns[-1].role == "assistant":
            answer = self.template.style.content(turns[-1])
            turns, reference = turns[:-1], "".join(run.text for run in answer if isinstance(run, Run) and run.content)
        tokens = self._tokens(self.template.segments(turns, self.tokenizer, generation=True), 0.0)
        return single(tokens), reference.strip()

    def shown(self, streams: Mapping[str, Stream]) -> tuple[int, ...]:
        """The media items that a model is to see."""
        placed = {placed.slot.item for stream in streams.values() for placed in stream.slots}
        return tuple(item for item, pieces in enumerate(self.pieces) if item in placed or not pieces)

    def _tokens(self, segments: Sequence[Segment], weight: float) -> Tokens:
        start = [self.tokenizer.bos_token_id] if self.template.bos and self.tokenizer.bos_token_id is not None else []
        ids, weights = [np.array(start, np.int64)], [np.zeros(len(start), np.float32)]
        slots, ends, length = list[PlacedSlot](), [len(start)], len(start)
        runs: list[Run] = []
        for segment in [*segments, None]:
            if isinstance(segment, Run):
                runs.append(segment)
                continue
            for new_ids, new_weights in encode(runs, self.tokenizer, self.special):
                ids.append(new_ids)
                weights.append(new_weights * np.float32(weight))
                length += len(new_ids)
            runs = []
            if isinstance(segment, Place) and self.pieces[segment.item]:
                ids.append(self._placed(segment.item, length, slots))
                weights.append(np.zeros(len(ids[-1]), np.float32))
                length += len(ids[-1])
                ends.append(length)
        positions = None if self.positions is None else self.positions(length, slots)
        return Tokens(np.concatenate(ids), np.concatenate(weights), slots, ends, positions)

    def _placed(self, item: int, start: int, slots: list[PlacedSlot]) -> NDArray[np.int64]:
        """The tokens of a media item that stands at `start`."""
        ids: list[NDArray[np.int64]] = []
        offset = 0
        for piece in self.pieces[item]:
            if isinstance(piece, Slot):
                slots.append(PlacedSlot(start, piece, offset))
                offset += piece.count
                ids.append(np.full(piece.count, PLACEHOLDER_ID, np.int64))
            else:
                ids.append(np.array([self._literal(piece)], np.int64))
            start += len(ids[-1])
        return np.concatenate(ids)

    def _literal(self, token: str) -> int:
        found = self.tokenizer.convert_tokens_to_ids(token)
        if found is None or (found == self.tokenizer.unk_token_id and token != self.tokenizer.unk_token):
            raise ConfigError(
                f"the media layout writes the token {token!r}, which is not in the tokenizer's vocabulary; "
                f"add it with tokenizer.add=['{token}']"
            )
        return int(found)


def encode(
    runs: Sequence[Run], tokenizer: Any, special: Any
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Token ids and loss weights of adjacent runs, tokenised as one text.

    Content that spells a special token is ordinary text: the text is cut after the first character of such a spelling
    and tokenised in two pieces. Only then do the ids differ from those of the whole text.
    """
    text = "".join(run.text for run in runs)
    if not text:
        return
    char_weights = np.repeat(
        np.array([run.weight for run in runs], np.float32), np.array([len(run.text) for run in runs])
    )
    cuts = [0, *_cuts(text, runs, special), len(text)]
    backend = tokenizer.backend_tokenizer  # without the wrapper, which takes three times as long and changes nothing
    for start, end in zip(cuts, cuts[1:], strict=False):
        encoding = backend.encode(text[start:end], add_special_tokens=False)
        if ids := encoding.ids:
            spans = np.fromiter(chain.from_iterable(encoding.offsets), np.int64, 2 * len(ids)).reshape(-1, 2)
            yield np.array(ids, np.int64), _heaviest(char_weights[start:end], spans)


def _heaviest(weights: NDArray[np.float32], spans: NDArray[np.int64]) -> NDArray[np.float32]:
    """The largest of `weights` in every span `[N, 2]`; an empty one belongs to the character it stands before."""
    if weights[0] == weights[-1] and (weights == weights[0]).all():
        return np.full(len(spans), weights[0], np.float32)
    first = np.minimum(spans[:, 0], len(weights) - 1)
    end = np.maximum(first + 1, np.minimum(spans[:, 1], len(weights)))
    padded = np.append(weights, np.float32(0))  # `reduceat` takes no index at the end
    return np.maximum.reduceat(padded, np.stack([first, end], axis=1).ravel())[::2]


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
