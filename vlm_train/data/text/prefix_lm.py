"""Prefix language modelling of an encoder-decoder: the first words of an answer end the prompt.

Source: BLIP-2 with Flan-T5 (arXiv 2301.12597, section 3.2). Where a text is cut, the authors say in LAVIS issue #139: a
random point between position 1 and the midpoint. Positions are words here. The draw depends on the sample alone, so
that a sample has one length.
"""

from __future__ import annotations

import re
from dataclasses import replace

from data_pipelines.sample import Annotation, Text, Turn
from vlm_train.seeds import derive_seed


def with_prefix(annotation: Annotation, key: str) -> Annotation:
    """`annotation` with the first words of its last answer at the end of the question, drawn by the sample's `key`.

    An answer of one word, or of more than text, stays whole.
    """
    *before, last = annotation.turns
    if last.role != "assistant" or len(last.parts) != 1 or not isinstance(text := last.parts[0], Text):
        return annotation
    words = [match.start() for match in re.finditer(r"\S+", text.text)]
    if len(words) < 2:
        return annotation
    at = words[1 + derive_seed("prefix", key, text.text) % (len(words) // 2)]
    if not before or before[-1].role != "user":
        before.append(Turn(role="user", parts=()))
    asked, prefix = before[-1], text.text[:at].strip()
    before[-1] = replace(asked, parts=(*asked.parts, Text(text=f" {prefix}" if asked.text else prefix)))
    weights = tuple((max(start - at, 0), end - at, weight) for start, end, weight in text.weights if end > at)
    answer = replace(last, parts=(Text(text=text.text[at:], weights=weights),))
    return replace(annotation, turns=(*before, answer))
