"""Turns -> tokens, by a template, a tokenizer and a media layout.

Every stretch of text between two media (and before what a template sets apart) is tokenized once, as a whole, with
character offsets; a token is learned if it overlaps a learned character. Nothing is tokenized twice, so labels and ids
cannot disagree.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipelines.errors import BadSample
from data_pipelines.sample import Turn
from vlm_train.contracts.layout import PLACEHOLDER_ID, Piece, Slot
from vlm_train.data.text.spans import MediaRun, MediaSpan, Span, TextSpan, special_pattern
from vlm_train.data.text.streams import PlacedSlot, Positions, Tokens
from vlm_train.data.text.template import Template
from vlm_train.errors import ConfigError

MARK = re.compile(r"<[^<>\s]+>")
"""A text that can only be meant as one token."""


@dataclass(frozen=True)
class ConversationTokenizer:
    """The turns of one sample -> tokens.

    Args:
        pieces: what the media layout lays for every media item of the sample.
        positions: position ids of a model with several axes; None: they count from 0.
        both_ways: tokens that see each other and all placeholders in both directions; None: no token does.
    """

    template: Template
    tokenizer: Any
    pieces: list[list[Piece]]
    positions: Positions | None = None
    both_ways: tuple[str, ...] | None = None

    def tokenize_exchange(self, turns: Sequence[Turn], weight: float) -> tuple[Tokens, Tokens]:
        """All before the last answer, and that answer.

        Raises:
            BadSample: there is no answer, or it shows media. ConfigError: the template writes a prompt in two ways.
        """
        if not turns:
            raise BadSample("no answer", kind="unsupervised")
        whole = self.template.make_spans(turns, self.tokenizer)
        asked = self.template.make_spans(turns[:-1], self.tokenizer, generation=True)
        answer = whole[len(asked) :]
        if whole[: len(asked)] != asked:
            raise ConfigError("template: it writes a prompt otherwise than what precedes an answer; choose another one")
        if any(isinstance(span, MediaSpan) for span in answer):
            raise BadSample("the answer shows media, which a decoder cannot", kind="template")
        return self.tokenize_spans(asked, 0.0), self.tokenize_spans(answer, weight, bos=False)

    def tokenize_spans(self, spans: Sequence[Span], weight: float, *, bos: bool = True) -> Tokens:
        """Spans of a template; `weight` multiplies those of their text."""
        style, laid = self.template.style, list[TextSpan | MediaRun]()
        shown = list(dict.fromkeys(span.item for span in spans if isinstance(span, MediaSpan)))
        for span in spans:
            if isinstance(span, TextSpan):
                laid.append(span)
            elif style.views or style.several_prefix:
                place = shown.index(span.item) if len(shown) > 1 else None
                written = style.write_media(span, self.pieces[span.item], place)
                for mark in written:
                    if isinstance(mark, TextSpan) and MARK.fullmatch(mark.text):
                        self._literal_id(mark.text)  # else its letters would stand there
                laid += written
            else:
                run = MediaRun(span.item, tuple(self.pieces[span.item]))
                laid += [TextSpan(span.before), run, TextSpan(span.after)]
        literals = {piece for item in self.pieces for piece in item if isinstance(piece, str)}
        special = special_pattern(self.tokenizer, tuple(sorted(literals)))
        bos = bos and self.template.bos and self.tokenizer.bos_token_id is not None
        start = [self.tokenizer.bos_token_id] if bos else []
        ids, weights = [np.array(start, np.int64)], [np.zeros(len(start), np.float32)]
        slots, ends, length = list[PlacedSlot](), [len(start)], len(start)
        texts: list[TextSpan] = []
        for one in [*laid, None]:
            if isinstance(one, TextSpan) and not one.apart:
                texts.append(one)
                continue
            for new_ids, new_weights in _encode_text(texts, self.tokenizer, special):
                ids.append(new_ids)
                weights.append(new_weights * np.float32(weight))
                length += len(new_ids)
            texts = [one] if isinstance(one, TextSpan) else []
            if one is None or isinstance(one, TextSpan) or not (pieces := one.pieces):
                continue
            if not any(isinstance(piece, Slot) for piece in self.pieces[one.item]):  # literals mark where it stands
                pieces = (Slot(one.item, 0), *pieces)
            offset = one.offset
            for piece in pieces:
                if isinstance(piece, Slot):
                    slots.append(PlacedSlot(length, piece, offset))
                    offset += piece.count
                    ids.append(np.full(piece.count, PLACEHOLDER_ID, np.int64))
                else:
                    ids.append(np.array([self._literal_id(piece)], np.int64))
                weights.append(np.zeros(len(ids[-1]), np.float32))
                length += len(ids[-1])
            ends.append(length)
        positions = None if self.positions is None else self.positions(length, slots)
        return Tokens(np.concatenate(ids), np.concatenate(weights), slots, ends, positions, self._list_both_ways(slots))

    def _list_both_ways(self, slots: Sequence[PlacedSlot]) -> tuple[int, ...]:
        return (PLACEHOLDER_ID, *map(self._literal_id, self.both_ways)) if slots and self.both_ways else ()

    def _literal_id(self, token: str) -> int:
        found = self.tokenizer.convert_tokens_to_ids(token)
        if found is None or (found == self.tokenizer.unk_token_id and token != self.tokenizer.unk_token):
            raise ConfigError(
                f"the text of an image has the token {token!r}, which is not in the tokenizer's vocabulary; "
                f"add it with tokenizer.add=['{token}']"
            )
        return int(found)


def _encode_text(
    spans: Sequence[TextSpan], tokenizer: Any, special: Any
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Token ids and loss weights of adjacent spans, tokenized as one text: a token has its characters' largest weight.

    Content that spells a special token is ordinary text: the text is cut after the first character of such a spelling
    and tokenized in two pieces. Only then do the ids differ from those of the whole text.
    """
    text = "".join(span.text for span in spans)
    if not text:
        return
    char_weights = np.repeat(
        np.array([span.weight for span in spans], np.float32), np.array([len(span.text) for span in spans])
    )
    stops = [*accumulate(len(span.text) for span in spans)]
    written = [(stop - len(span.text), stop) for span, stop in zip(spans, stops, strict=True) if not span.content]
    cuts, position = [0], 0
    while match := special.search(text, position):
        first, stop = match.span()
        if any(start <= first and stop <= end for start, end in written):  # wholly written by the template
            position = stop
        else:
            position = first + 1
            cuts.append(position)
    cuts.append(len(text))
    backend = tokenizer.backend_tokenizer  # without the wrapper, which takes three times as long and changes nothing
    for start, end in zip(cuts, cuts[1:], strict=False):
        encoding, part = backend.encode(text[start:end], add_special_tokens=False), char_weights[start:end]
        if not (ids := encoding.ids):
            continue
        if (part == part[0]).all():
            yield np.array(ids, np.int64), np.full(len(ids), part[0], np.float32)
            continue
        offsets = np.fromiter(chain.from_iterable(encoding.offsets), np.int64, 2 * len(ids)).reshape(-1, 2)
        first = np.minimum(offsets[:, 0], len(part) - 1)  # an empty token belongs to the character it stands before
        stop = np.maximum(first + 1, np.minimum(offsets[:, 1], len(part)))
        padded = np.append(part, np.float32(0))  # `reduceat` takes no index at the end
        yield np.array(ids, np.int64), np.maximum.reduceat(padded, np.stack([first, stop], axis=1).ravel())[::2]
