"""Names and alignments of token streams."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

Alignment = Literal["causal", "seq2seq", "none"]


CAUSAL: Mapping[str, Alignment] = MappingProxyType({"llm": "causal"})
"""The streams of most models: one text that is read and continued."""


QFORMER = "qformer"
"""The stream that holds the instruction, as another tokenizer writes it."""
