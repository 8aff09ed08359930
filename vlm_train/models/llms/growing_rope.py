"""RoPE whose frequencies change for texts beyond a limit (`rope_type: dynamic`).

The library looks for such a text in every pass; here only where a text can be so long.
"""

from __future__ import annotations

from typing import Any

DYNAMIC = "dynamic"


def has_growing_rope(decoder: Any) -> bool:
    """Whether the frequencies of a decoder of `transformers` change for long texts."""
    rotary = getattr(decoder, "rotary_emb", None)
    rope = getattr(getattr(rotary, "config", None), "rope_parameters", None) or {}
    return rope.get("rope_type") == DYNAMIC


def skip_rope_growth(decoder: Any, tokens: int) -> None:
    """Let a decoder with such a RoPE keep its frequencies in a pass over at most `tokens` positions below the limit.

    `transformers` compares the largest position with the limit: the device would be asked in every pass, and a model on
    the meta device has no answer. After a longer text the library compares once more, and goes back.
    """
    rotary = decoder.rotary_emb
    limit = rotary.config.max_position_embeddings
    rotary.rope_type = "default" if max(tokens, rotary.max_seq_len_cached) <= limit else DYNAMIC
