"""Writing: turns -> tokens, by a template, a tokenizer and a media layout.

Every stretch of text between two media is tokenised once, as a whole, with character offsets; a token is learned if it
overlaps a learned character. Nothing is tokenised twice, so labels and ids cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.errors import BadSample
from data_pipelines.sample import Annotation, Turn
from vlm_train.contracts.layout import PLACEHOLDER_ID, Piece, Slot
from vlm_train.contracts.streams import CAUSAL, Alignment
from vlm_train.data.text.spans import Place, Run, Segment
from vlm_train.data.text.streams import (
    PlacedSlot,
    Positions,
    Stream,
    Tokens,
    branched_stream,
    causal_stream,
    decoder_stream,
    encoder_stream,
)
from vlm_train.data.text.template import Template
from vlm_train.data.text.tokenizer import special_pattern
from vlm_train.errors import ConfigError


class Writer:
    """Writes the conversations of one sample as tokens.

    Args:
        pieces: what the media layout lays for every media item.
        streams: what the model reads; one aligned `seq2seq` takes the last answer.
    """

    def __init__(
        self,
        template: Template,
        tokenizer: Any,
        pieces: list[list[Piece]],
        positions: Positions | None = None,
        streams: Mapping[str, Alignment] = CAUSAL,
    ) -> None:
        self.template, self.tokenizer, self.pieces, self.positions = template, tokenizer, pieces, positions
        self.answer = next((name for name, alignment in streams.items() if alignment == "seq2seq"), None)
        literals = {piece for item in pieces for piece in item if isinstance(piece, str)}
        self.special = special_pattern(tokenizer, tuple(sorted(literals)))

    def training_streams(self, annotations: Sequence[Annotation]) -> dict[str, Stream]:
        """What training reads of the sample's text, by the main tokenizer."""
        if self.answer is None:
            return {"llm": self.joint_stream(annotations)}
        asked, answer = self._encoder_decoder_streams(annotations[0])
        return {"llm": asked, self.answer: answer}

    def joint_stream(self, annotations: Sequence[Annotation]) -> Stream:
        """One stream of all annotations, every one a branch of its own if there are several."""
        parts = [
            self._tokenize_spans(self.template.make_spans(_turns_until_answer(one), self.tokenizer), one.weight)
            for one in annotations
        ]
        return branched_stream(parts) if len(parts) > 1 else causal_stream(parts[0])

    def _encoder_decoder_streams(self, annotation: Annotation) -> tuple[Stream, Stream]:
        """All before the last answer, as an encoder reads it, and that answer, as a decoder gives it."""
        turns = _turns_until_answer(annotation)
        if not turns:
            raise BadSample("no answer", kind="unsupervised")
        whole = self.template.make_spans(turns, self.tokenizer)
        asked = self.template.make_spans(turns[:-1], self.tokenizer, generation=True)
        answer = whole[len(asked) :]
        if whole[: len(asked)] != asked:
            raise ConfigError("template: it writes a prompt otherwise than what precedes an answer; choose another one")
        if any(isinstance(segment, Place) for segment in answer):
            raise BadSample("the answer shows media, which a decoder cannot", kind="template")
        tokens = self._tokenize_spans(answer, annotation.weight, bos=False)
        return encoder_stream(self._tokenize_spans(asked, 0.0)), decoder_stream(
            tokens, self.tokenizer.pad_token_id or 0
        )

    def instruction_text(self, annotation: Annotation) -> str:
        """The text of the user turns, without media; boxes as the template spells them."""
        return " ".join(self._text_of_turn(turn) for turn in annotation.turns if turn.role == "user").strip()

    def prompt_stream(self, annotation: Annotation) -> tuple[Stream, str]:
        """The prompt for the last answer, and that answer as the template spells it, boxes included ("" if the
        conversation ends with a question)."""
        turns, reference = annotation.turns, ""
        if turns and turns[-1].role == "assistant":
            turns, reference = turns[:-1], self._text_of_turn(turns[-1])
        tokens = self._tokenize_spans(self.template.make_spans(turns, self.tokenizer, generation=True), 0.0)
        return causal_stream(tokens) if self.answer is None else encoder_stream(tokens), reference

    def shown_media(self, streams: Mapping[str, Stream]) -> tuple[int, ...]:
        """The media items that a model is to see: those that stand in a text, and those that the layout gives no
        place in one."""
        placed = {placed.slot.item for stream in streams.values() for placed in stream.slots}
        return tuple(item for item, pieces in enumerate(self.pieces) if item in placed or not pieces)

    def _text_of_turn(self, turn: Turn) -> str:
        """A turn's own text, boxes as the template spells them."""
        content = self.template.style.make_spans(turn)
        return "".join(run.text for run in content if isinstance(run, Run) and run.content).strip()

    def _tokenize_spans(self, segments: Sequence[Segment], weight: float, *, bos: bool = True) -> Tokens:
        bos = bos and self.template.bos and self.tokenizer.bos_token_id is not None
        start = [self.tokenizer.bos_token_id] if bos else []
        ids, weights = [np.array(start, np.int64)], [np.zeros(len(start), np.float32)]
        slots, ends, length = list[PlacedSlot](), [len(start)], len(start)
        runs: list[Run] = []
        for segment in [*segments, None]:
            if isinstance(segment, Run):
                runs.append(segment)
                continue
            for new_ids, new_weights in encode_runs(runs, self.tokenizer, self.special):
                ids.append(new_ids)
                weights.append(new_weights * np.float32(weight))
                length += len(new_ids)
            runs = []
            if isinstance(segment, Place) and self.pieces[segment.item]:
                ids.append(self._place_media(segment.item, length, slots))
                weights.append(np.zeros(len(ids[-1]), np.float32))
                length += len(ids[-1])
                ends.append(length)
        positions = None if self.positions is None else self.positions(length, slots)
        return Tokens(np.concatenate(ids), np.concatenate(weights), slots, ends, positions)

    def _place_media(self, item: int, start: int, slots: list[PlacedSlot]) -> NDArray[np.int64]:
        """The tokens of a media item that stands at `start`."""
        ids: list[NDArray[np.int64]] = []
        offset = 0
        pieces = self.pieces[item]
        if not any(isinstance(piece, Slot) for piece in pieces):  # literals that mark where the item stands
            pieces = [Slot(item, 0), *pieces]
        for piece in pieces:
            if isinstance(piece, Slot):
                slots.append(PlacedSlot(start, piece, offset))
                offset += piece.count
                ids.append(np.full(piece.count, PLACEHOLDER_ID, np.int64))
            else:
                ids.append(np.array([self._literal_id(piece)], np.int64))
            start += len(ids[-1])
        return np.concatenate(ids)

    def _literal_id(self, token: str) -> int:
        found = self.tokenizer.convert_tokens_to_ids(token)
        if found is None or (found == self.tokenizer.unk_token_id and token != self.tokenizer.unk_token):
            raise ConfigError(
                f"the media layout writes the token {token!r}, which is not in the tokenizer's vocabulary; "
                f"add it with tokenizer.add=['{token}']"
            )
        return int(found)


def _turns_until_answer(annotation: Annotation) -> tuple[Turn, ...]:
    """The turns up to the last answer: nothing after it is learned."""
    turns = annotation.turns
    while turns and turns[-1].role != "assistant":
        turns = turns[:-1]
    return turns


def encode_runs(
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
    cuts = [0, *_find_cuts(text, runs, special), len(text)]
    backend = tokenizer.backend_tokenizer  # without the wrapper, which takes three times as long and changes nothing
    for start, end in zip(cuts, cuts[1:], strict=False):
        encoding = backend.encode(text[start:end], add_special_tokens=False)
        if ids := encoding.ids:
            spans = np.fromiter(chain.from_iterable(encoding.offsets), np.int64, 2 * len(ids)).reshape(-1, 2)
            yield np.array(ids, np.int64), _heaviest_weights(char_weights[start:end], spans)


def _heaviest_weights(weights: NDArray[np.float32], spans: NDArray[np.int64]) -> NDArray[np.float32]:
    """The largest of `weights` in every span `[N, 2]`; an empty one belongs to the character it stands before."""
    if weights[0] == weights[-1] and (weights == weights[0]).all():
        return np.full(len(spans), weights[0], np.float32)
    first = np.minimum(spans[:, 0], len(weights) - 1)
    end = np.maximum(first + 1, np.minimum(spans[:, 1], len(weights)))
    padded = np.append(weights, np.float32(0))  # `reduceat` takes no index at the end
    return np.maximum.reduceat(padded, np.stack([first, end], axis=1).ravel())[::2]


def _find_cuts(text: str, runs: Sequence[Run], special: Any) -> list[int]:
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
