"""Rendering: sample + template + tokenizer + media layout -> token streams with aligned labels.

Every stretch of text between two media is tokenised once, as a whole, with character offsets; a token is learned if it
overlaps a learned character. Nothing is tokenised twice, so labels and ids cannot disagree.
`vlm_train.data.streams` puts several annotations of one image together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

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
        bos = self.tokenizer.bos_token_id if self.template.bos else None
        ids: list[int] = [] if bos is None else [bos]
        weights, slots, ends = [0.0] * len(ids), list[PlacedSlot](), [len(ids)]
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
                self._place(segment.item, ids, slots)
                weights += [0.0] * (len(ids) - len(weights))
                ends.append(len(ids))
        positions = None if self.positions is None else self.positions(len(ids), slots)
        return Tokens(ids, weights, slots, ends, positions)

    def _place(self, item: int, ids: list[int], slots: list[PlacedSlot]) -> None:
        """Append the tokens of a media item."""
        offset = 0
        for piece in self.pieces[item]:
            if isinstance(piece, Slot):
                slots.append(PlacedSlot(len(ids), piece, offset))
                offset += piece.count
            ids += [PLACEHOLDER_ID] * piece.count if isinstance(piece, Slot) else [self._literal(piece)]

    def _literal(self, token: str) -> int:
        found = self.tokenizer.convert_tokens_to_ids(token)
        if found is None or (found == self.tokenizer.unk_token_id and token != self.tokenizer.unk_token):
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
    backend = tokenizer.backend_tokenizer  # without the wrapper, which takes three times as long and changes nothing
    for start, end in zip(cuts, cuts[1:], strict=False):
        encoding = backend.encode(text[start:end], add_special_tokens=False)
        ids += encoding.ids
        if spans := encoding.offsets:
            weights += _heaviest(char_weights[start:end], np.asarray(spans))
    return ids, weights


def _heaviest(weights: np.ndarray, spans: np.ndarray) -> list[float]:
    """The largest of `weights` in every span `[N, 2]`; an empty one belongs to the character it stands before."""
    first = np.minimum(spans[:, 0], len(weights) - 1)
    end = np.clip(spans[:, 1], first + 1, len(weights))
    padded = np.append(weights, np.float32(0))  # `reduceat` takes no index at the end
    heaviest: list[float] = np.maximum.reduceat(padded, np.stack([first, end], axis=1).ravel())[::2].tolist()
    return heaviest


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
