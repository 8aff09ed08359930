"""Rendering: sample + template + tokenizer + media layout -> the token streams that a model reads, with aligned labels.

The way of the text: choose annotations (here and in `split`), write them as spans (`template`, `spans`), tokenize the
spans (`tokenize`), lay the tokens as streams, cut what is too long (`streams`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from data_pipelines.errors import BadSample
from data_pipelines.sample import Annotation, Media, Part, Sample, Text, Turn
from vlm_train.contracts.streams import QFORMER, Alignment
from vlm_train.data.text.captions import clean_answers
from vlm_train.data.text.prefix_lm import with_prefix
from vlm_train.data.text.spans import TextSpan
from vlm_train.data.text.split import take_piece
from vlm_train.data.text.streams import (
    Stream,
    branched_stream,
    causal_stream,
    decoder_stream,
    encoder_stream,
    truncate_stream,
)
from vlm_train.data.text.template import Template
from vlm_train.data.text.tokenize import ConversationTokenizer
from vlm_train.errors import ConfigError

Annotations = Literal["independent", "dialogue", "first", "drawn"]
OverLength = Literal["drop", "truncate", "split", "error"]


@dataclass(frozen=True, kw_only=True)
class TokenizedSample:
    """A sample as token streams.

    Attributes:
        streams: "llm", and others as the model and the data ask: "decoder", "qformer", "rejected".
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


@dataclass(frozen=True, kw_only=True)
class RenderOptions:
    """What of a sample is rendered, and how long it may be. Raises `ConfigError` for a word that is none.

    Attributes:
        annotations: independent (all, as branches that do not see each other) | dialogue (all, as one conversation) |
            first (one only) | drawn (one only, which training draws anew in every pass: `annotation`, else the first).
        annotation: render only this one; with `generation` and `rejected` it is 0 if not given.
        max_length: most tokens of a stream, media included; null: no limit.
        over_length: drop (`BadSample`) | truncate (cut whole text tokens off the end, or off the beginning of an
            encoder's text, never media) | split (at turns, see `vlm_train.data.text.split`) | error.
        generation: only the prompt of one annotation up to its last answer.
        rejected: also render the stream "rejected", the annotation with its last turn replaced.
        prefix_split: the first words of the last answer end the prompt, see `vlm_train.data.text.prefix_lm`; not in
            generation.
        piece: which piece of a sample that is split.
    """

    annotations: Annotations = "independent"
    annotation: int | None = None
    max_length: int | None = None
    over_length: OverLength = "drop"
    generation: bool = False
    rejected: bool = False
    prefix_split: bool = False
    piece: int = 0

    def __post_init__(self) -> None:
        for name, value, words in (
            ("annotations", self.annotations, get_args(Annotations)),
            ("over_length", self.over_length, get_args(OverLength)),
        ):
            if value not in words:
                raise ConfigError(f"data.{name}: {value!r}; allowed: {', '.join(words)}")


DEFAULT_OPTIONS = RenderOptions()
CHARACTERS_PER_TOKEN = 256
"""More than the longest token of the known vocabularies has: a longer text is beyond `max_length` for certain."""


def make_streams(
    sample: Sample,
    conversation: ConversationTokenizer,
    streams: Mapping[str, Alignment],
    instruction: Callable[[str], Stream] | None,
    how: RenderOptions,
) -> tuple[dict[str, Stream], str]:
    """The streams by their names, and the expected answer (generation). Arguments and errors: see `Processor`."""
    answer = next((name for name, alignment in streams.items() if alignment == "seq2seq"), None)
    chosen, reference = bound_texts(choose_annotations(sample.annotations, how), how, cut=answer is None), ""
    style = conversation.template.style
    if len(streams) > 1 and len(chosen) > 1:
        raise ConfigError(
            f"{len(chosen)} independent annotations cannot share the streams {', '.join(streams)}; set "
            "data.annotations to first or dialogue"
        )
    if how.generation:
        turns = chosen[0].turns  # answers as they are: a cleaned one would be no reference
        if turns and turns[-1].role == "assistant":
            turns, reference = turns[:-1], _text_of_turn(turns[-1], conversation.template)
        spans = conversation.template.make_spans(turns, conversation.tokenizer, generation=True)
        tokens = conversation.tokenize_spans(spans, 0.0)
        prompt = causal_stream(tokens) if answer is None else encoder_stream(tokens)
        found = {"llm": truncate_stream(prompt, how.max_length, "drop")}
    else:
        if (words := style.caption_words) is not None:
            chosen = [clean_answers(one, words) for one in chosen]
        if how.over_length == "split":
            chosen = _take_fitting_piece(chosen, conversation, how)
        if how.prefix_split:
            chosen = [with_prefix(one, sample.key) for one in chosen]
        if answer is None:
            found = {"llm": _joint_stream(conversation, chosen)}
        else:
            asked, told = conversation.tokenize_exchange(chosen[0].turns_until_answer, chosen[0].weight)
            pad = conversation.tokenizer.pad_token_id or 0
            found = {"llm": encoder_stream(asked), answer: decoder_stream(told, pad)}
        if how.rejected:
            found["rejected"] = _joint_stream(conversation, [swap_rejected(chosen[0])])
        for name, stream in found.items():
            if how.max_length is not None and len(stream) > how.max_length:
                found[name] = stream = truncate_stream(stream, how.max_length, how.over_length, keep_end=style.keep_end)
            if not stream.supervised and stream.alignment != "none":
                raise BadSample(f"no supervised token in {len(stream)} tokens", kind="unsupervised")
    if QFORMER in streams:
        if instruction is None:
            raise ConfigError("instruction is empty, but the model reads the stream qformer; choose instruction=bert")
        questions = [_text_of_turn(turn, conversation.template) for turn in chosen[0].turns if turn.role == "user"]
        found[QFORMER] = instruction(" ".join(questions).strip())
    return found, reference


def choose_annotations(annotations: Sequence[Annotation], how: RenderOptions) -> list[Annotation]:
    """The annotations that `how` names. Raises `BadSample` if there is none of its number."""
    number = (how.annotation or 0) if how.generation or how.rejected else how.annotation
    if number is not None and not 0 <= number < len(annotations):
        raise BadSample(f"no annotation {number}; it has {len(annotations)}", kind="malformed")
    if number is not None or how.annotations in ("first", "drawn"):
        return [annotations[number or 0]]
    return [join_annotations(annotations)] if how.annotations == "dialogue" else list(annotations)


def bound_texts(annotations: Sequence[Annotation], how: RenderOptions, *, cut: bool) -> list[Annotation]:
    """The annotations with no more text than `how.max_length` tokens can hold.

    With `truncate` the end is cut off, if `cut`: tokens behind it would be.

    Raises:
        BadSample, ConfigError: too long, as `how.over_length` says.
    """
    most = None if how.max_length is None else how.max_length * CHARACTERS_PER_TOKEN
    lengths = [
        len(turn.text) for one in annotations for turn in (*one.turns, *([one.rejected] if one.rejected else ()))
    ]
    if most is None or sum(lengths) <= most or (how.over_length == "split" and max(lengths) <= most):
        return list(annotations)
    message = f"{sum(lengths)} characters, but data.max_length is {how.max_length} tokens"
    if how.over_length == "error":
        raise ConfigError(f"{message} (data.over_length=error)")
    if how.over_length != "truncate" or how.generation or not cut:
        raise BadSample(message, kind="too_long")
    found, left = list[Annotation](), most
    for one in annotations:
        turns = []
        for turn in one.turns:
            turns.append(_cut_turn(turn, left))
            left -= len(turns[-1].text)
        found.append(replace(one, turns=tuple(turns), rejected=one.rejected and _cut_turn(one.rejected, most)))
    return found


def join_annotations(annotations: Sequence[Annotation]) -> Annotation:
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
                turn = _strip_turn(replace(turn, parts=kept))
            new |= {part.item for part in turn.parts if isinstance(part, Media)}
            turns.append(replace(turn, weight=turn.weight * annotation.weight))
        shown |= new
    return Annotation(turns=tuple(turns))


def swap_rejected(annotation: Annotation) -> Annotation:
    """The annotation with its rejected answer. Raises `BadSample` without one."""
    if annotation.rejected is None:
        raise BadSample("no rejected answer, but the objective compares two", kind="no_rejected")
    return replace(annotation, turns=(*annotation.turns[:-1], annotation.rejected))


def _strip_turn(turn: Turn) -> Turn:
    """`turn` without white space at both ends of its text; weighted stretches move along."""
    parts = list(turn.parts)
    for index, strip in ((0, str.lstrip), (-1, str.rstrip)):
        if parts and isinstance(part := parts[index], Text):
            text = strip(part.text)
            moved = len(part.text) - len(text) if index == 0 else 0
            weights = tuple((max(a - moved, 0), max(b - moved, 0), w) for a, b, w in part.weights)
            parts[index] = Text(text=text, weights=weights)
    return replace(turn, parts=tuple(parts))


def _joint_stream(conversation: ConversationTokenizer, annotations: Sequence[Annotation]) -> Stream:
    """One stream of all annotations, every one a branch of its own if there are several."""
    parts = []
    for one in annotations:
        spans = conversation.template.make_spans(one.turns_until_answer, conversation.tokenizer)
        parts.append(conversation.tokenize_spans(spans, one.weight))
    return branched_stream(parts) if len(parts) > 1 else causal_stream(parts[0])


def _take_fitting_piece(
    annotations: list[Annotation], conversation: ConversationTokenizer, how: RenderOptions
) -> list[Annotation]:
    """The piece that is asked for, of annotations that are too long together (`over_length: split`)."""
    most = how.max_length
    if not most or (not how.piece and len(_joint_stream(conversation, annotations)) <= most):
        return annotations

    def fits_length(tried: Sequence[Annotation]) -> bool:
        stream = _joint_stream(conversation, tried)
        return len(stream) <= most and stream.supervised > 0

    return take_piece(annotations, how.piece, fits_length, most)


def _text_of_turn(turn: Turn, template: Template) -> str:
    """A turn's own text, boxes as the template spells them."""
    spans = template.style.make_spans(turn)
    return "".join(span.text for span in spans if isinstance(span, TextSpan) and span.content).strip()


def _cut_turn(turn: Turn, most: int) -> Turn:
    return turn if len(turn.text) <= most else replace(turn, parts=tuple(_cut_parts(turn.parts, most)))


def _cut_parts(parts: Sequence[Part], left: int) -> Iterator[Part]:
    """The parts with their first `left` characters; what is no text stays."""
    for part in parts:
        if isinstance(part, Text):
            text = part.text[:left]
            weights = tuple((a, min(b, len(text)), weight) for a, b, weight in part.weights if a < len(text))
            left -= len(text)
            part = Text(text=text, weights=weights)
        yield part
