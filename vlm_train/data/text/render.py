"""Rendering: sample + template + tokenizer + media layout -> the token streams that a model reads, with aligned labels.

`vlm_train.data.text.tokenize` tokenises; `vlm_train.data.text.streams` puts several annotations of one image together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from data_pipelines.errors import BadSample
from data_pipelines.sample import Annotation, Media, Sample, Turn
from vlm_train.contracts.layout import MediaLayout, MediaSize
from vlm_train.contracts.streams import CAUSAL, QFORMER, Alignment
from vlm_train.data.text.prefix_lm import with_prefix
from vlm_train.data.text.spans import stripped_turn
from vlm_train.data.text.split import split_annotations
from vlm_train.data.text.streams import Stream, require_targets, truncate_stream
from vlm_train.data.text.template import Template
from vlm_train.data.text.tokenize import Writer
from vlm_train.errors import ConfigError

Annotations = Literal["independent", "dialogue", "first", "drawn"]
OverLength = Literal["drop", "truncate", "split", "error"]


class NoPiece(BadSample):
    """A sample has fewer pieces than asked for."""


@dataclass(frozen=True, kw_only=True)
class Rendered:
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


def render_sample(
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
    prefix_split: bool = False,
    piece: int = 0,
    streams: Mapping[str, Alignment] = CAUSAL,
    instruction: Callable[[str], Stream] | None = None,
) -> Rendered:
    """Render a sample for training, or (with `generation`) the prompt of one annotation up to its last answer.

    Args:
        annotations: independent (all, as branches that do not see each other) | dialogue (all, as one conversation) |
            first (one only) | drawn (one only, which training draws anew in every pass: `annotation`, else the first).
        annotation: render only this one; with `generation` and `rejected` it is 0 if not given.
        max_length: most tokens of a stream, media included; null: no limit.
        over_length: drop (`BadSample`) | truncate (cut whole text tokens off the end, or off the beginning of an
            encoder's text, never media) | split (at turns, see `vlm_train.data.text.split`) | error.
        rejected: also render the stream "rejected", the annotation with its last turn replaced.
        prefix_split: the first words of the last answer end the prompt, see `vlm_train.data.text.prefix_lm`; not in
            generation.
        piece: which piece of a sample that is split.
        streams: what the model reads. One aligned `seq2seq` takes the last answer, and "llm" all that precedes it.
        instruction: writes the stream "qformer" from the text of the user turns.

    Raises:
        BadSample: nothing to learn, too long, or annotations that cannot share a prefix. Names the sample.
        ConfigError: the layout, the template and the tokenizer do not fit each other; or too long with `error`.
    """
    _check_choice("annotations", annotations, Annotations)
    _check_choice("over_length", over_length, OverLength)
    sizes = [MediaSize(m.width, m.height, m.frames, m.seconds) for m in sample.media]
    writer = Writer(template, tokenizer, layout(sizes), getattr(layout, "positions", None), streams)
    if generation or rejected:
        annotation = annotation or 0
    try:
        chosen, reference = _choose_annotations(sample.annotations, annotations, annotation), ""
        _check_pairs(chosen, streams)
        if generation:
            prompt, reference = writer.prompt_stream(chosen[0])
            found = {"llm": truncate_stream(prompt, max_length, "drop")}
        else:
            if over_length == "split" and max_length and (piece or len(writer.joint_stream(chosen)) > max_length):
                chosen = _take_piece(writer, chosen, max_length, piece)
            if prefix_split:
                chosen = [with_prefix(one, sample.key) for one in chosen]
            made = _make_streams(writer, chosen, rejected)
            found = {
                name: require_targets(truncate_stream(stream, max_length, over_length)) for name, stream in made.items()
            }
        if QFORMER in streams:
            found[QFORMER] = _instruction_stream(instruction, writer.instruction_text(chosen[0]))
        return Rendered(key=sample.key, streams=found, media=writer.shown_media(found), reference=reference)
    except NoPiece:
        raise
    except BadSample as error:
        raise BadSample(f"sample {sample.key!r}: {error}", kind=error.kind) from error
    except ConfigError as error:
        raise type(error)(f"sample {sample.key!r}: {error}") from error


def _make_streams(writer: Writer, annotations: Sequence[Annotation], rejected: bool) -> dict[str, Stream]:
    found = writer.training_streams(annotations)
    if rejected:
        found["rejected"] = writer.joint_stream([_swap_rejected(annotations[0])])
    return found


def _check_pairs(annotations: Sequence[Annotation], streams: Mapping[str, Alignment]) -> None:
    if len(streams) > 1 and len(annotations) > 1:
        raise ConfigError(
            f"{len(annotations)} independent annotations cannot share the streams {', '.join(streams)}; set "
            "data.annotations to first or dialogue"
        )


def _instruction_stream(instruction: Callable[[str], Stream] | None, text: str) -> Stream:
    if instruction is None:
        raise ConfigError("instruction is empty, but the model reads the stream qformer; choose instruction=bert")
    return instruction(text)


def _take_piece(writer: Writer, annotations: Sequence[Annotation], max_length: int, number: int) -> list[Annotation]:
    def fits_length(tried: Sequence[Annotation]) -> bool:
        stream = writer.joint_stream(tried)
        return len(stream) <= max_length and stream.supervised > 0

    found = split_annotations(annotations, fits_length)
    if not found:
        raise BadSample(f"no round of its turns is learned within data.max_length={max_length} tokens", kind="too_long")
    if number >= len(found):
        raise NoPiece(f"{len(found)} pieces of at most {max_length} tokens, so there is no piece {number}")
    return found[number]


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ConfigError(f"data.{name}: {value!r}; allowed: {', '.join(get_args(choices))}")


def _choose_annotations(all_annotations: Sequence[Annotation], mode: str, number: int | None) -> list[Annotation]:
    if number is not None and not 0 <= number < len(all_annotations):
        raise BadSample(f"no annotation {number}; it has {len(all_annotations)}", kind="malformed")
    if number is not None or mode in ("first", "drawn"):
        return [all_annotations[number or 0]]
    return [join_annotations(all_annotations)] if mode == "dialogue" else list(all_annotations)


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
                turn = stripped_turn(replace(turn, parts=kept))
            new |= {part.item for part in turn.parts if isinstance(part, Media)}
            turns.append(replace(turn, weight=turn.weight * annotation.weight))
        shown |= new
    return Annotation(turns=tuple(turns))


def _swap_rejected(annotation: Annotation) -> Annotation:
    if annotation.rejected is None:
        raise BadSample("no rejected answer, but the objective compares two", kind="no_rejected")
    return replace(annotation, turns=(*annotation.turns[:-1], annotation.rejected))
