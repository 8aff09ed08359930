"""RoPE whose frequencies change for texts beyond a limit (`rope_type: dynamic`), where no text can be so long."""

from __future__ import annotations

from typing import Any

DYNAMIC = "dynamic"


def skip_rope_growth(decoder: Any, tokens: int) -> None:
    """Let `decoder` leave its frequencies alone where passes over at most `tokens` positions stay below its limit.

    `transformers` compares the largest position with the limit in every pass: the device would be asked each time, and
    a model without memory (meta) has no answer. After a longer text it has to be asked once more.
    """
    rotary: Any = getattr(decoder, "rotary_emb", None)
    config = getattr(rotary, "config", None)
    if config is None or (getattr(config, "rope_parameters", None) or {}).get("rope_type") != DYNAMIC:
        return
    limit = config.max_position_embeddings
    rotary.rope_type = "default" if max(tokens, rotary.max_seq_len_cached) <= limit else DYNAMIC
