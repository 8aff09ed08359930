"""Rendering: sample + template + tokenizer + media layout -> token streams with aligned labels.

Every stretch of text between two media is tokenised once, as a whole, with character offsets; a token is learned if it
overlaps a learned character. Nothing is tokenised twice, so labels and ids cannot disagree.
`vlm_train.data.streams` puts several annotations of one image together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from data_pipelines.errors import BadSample
from data_pipelines.sample import Annotation, Media, Sample, Turn
from vlm_train.data.layout import PLACEHOLDER_ID, MediaLayout, MediaSize, Piece, Slot
from vlm_train.data.segments import Place, Run, Segment, stripped_turn
from vlm_train.data.streams import PlacedSlot, Stream, Tokens, branch, fit, learned, single
from vlm_train.data.template import Template
from vlm_train.data.tokenizer import special_pattern
from vlm_train.errors import ConfigError

Annotations = Literal["independent", "dialogue", "first"]
OverLength = Literal["drop", "truncate", "error"]


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
            return Rendered(key=sample.key, streams={"llm": fit(stream, max_length, "drop")}, reference=reference)
        streams = {"llm": writer.training(chosen)}
        if rejected:
            streams["rejected"] = writer.training([_rejected(chosen[0])])
        fitted = {name: learned(fit(stream, max_length, over_length)) for name, stream in streams.items()}
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
        return branch(parts) if len(parts) > 1 else single(parts[0])

    def prompt(self, annotation: Annotation) -> tuple[Stream, str]:
        """The prompt for the last answer, and that answer's text ("" if the conversation ends with a question)."""
        turns, reference = annotation.turns, ""
        if turns and turns[-1].role == "assistant":
            turns, reference = turns[:-1], turns[-1].text
        tokens = self._tokens(self.template.segments(turns, self.tokenizer, generation=True), 0.0)
        return single(tokens), reference.strip()

    def _tokens(self, segments: Sequence[Segment], weight: float) -> Tokens:
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
        return Tokens(ids, weights, slots, prefix)

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
