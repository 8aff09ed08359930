"""RoPE whose frequencies change for texts beyond a limit (`rope_type: dynamic`), where no text can be so long."""

from __future__ import annotations

from typing import Any

DYNAMIC = "dynamic"


def has_growing_rope(decoder: Any) -> bool:
    """Whether the frequencies of a decoder of `transformers` change for long texts."""
    rotary = getattr(decoder, "rotary_emb", None)
    rope = getattr(getattr(rotary, "config", None), "rope_parameters", None) or {}
    return rope.get("rope_type") == DYNAMIC


def skip_rope_growth(decoder: Any, tokens: int) -> None:
    """Let a decoder whose RoPE grows leave it alone where at most `tokens` positions stay below its limit.

    `transformers` compares the largest position with the limit in every pass: the device would be asked each time, and
    a model without memory (meta) has no answer. After a longer text it has to be asked once more.
    """
    rotary = decoder.rotary_emb
    limit = rotary.config.max_position_embeddings
    rotary.rope_type = "default" if max(tokens, rotary.max_seq_len_cached) <= limit else DYNAMIC
