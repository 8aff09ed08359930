"""Explicit masks in the form in which language models of `transformers` take them.

Legend: B rows, T tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm_train.contracts.batch import SequenceMask
from vlm_train.models.layers.attention import decoding
from vlm_train.models.layers.masks import within_window

MASKED_LAYERS = {"full_attention", "sliding_attention"}
"""Kinds of layers that take an explicit mask."""


def make_library_mask(config: Any, mask: Tensor | SequenceMask | None, embeds: Tensor) -> Any:
    """An explicit mask `[B, 1, T, T]`, or plain causal rows, in the form the library takes as is: boolean for sdpa,
    additive for eager, one per kind of layer."""
    length, kinds = embeds.shape[1], frozenset(getattr(config, "layer_types", None) or ())
    if kinds - MASKED_LAYERS:
        return None  # plain rows; only the library knows what these layers take
    eager, plain = config._attn_implementation == "eager", not isinstance(mask, Tensor)
    if not isinstance(mask, Tensor):
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=embeds.device).tril()
    near = within_window(mask, getattr(config, "sliding_window", None))
    if eager:
        least = torch.finfo(embeds.dtype).min
        mask, near = (torch.zeros_like(one, dtype=embeds.dtype).masked_fill(~one, least) for one in (mask, near))
    if not kinds:
        return near
    # sdpa is causal without a mask, and faster.
    return {"full_attention": None if plain and not eager else mask, "sliding_attention": near}


def prompt_inputs(
    model: Any, embeds: Tensor, token_mask: Tensor, positions: Tensor | None, prompt_mask: Tensor | None, beams: int
) -> dict[str, Any]:
    """What the library's `generate` is given of prompts, see `HFCausalLM.generate`."""
    inputs: dict[str, Any] = {"inputs_embeds": embeds, "attention_mask": token_mask.long()}
    if positions is not None:
        inputs["position_ids"] = positions
    if prompt_mask is not None:
        inputs["past_key_values"] = read_prompts(model, embeds, token_mask, prompt_mask, beams)
    return inputs


def read_prompts(model: Any, embeds: Tensor, token_mask: Tensor, prompt_mask: Tensor, beams: int) -> Any:
    """The key-value cache, for every beam, of all but the last token of prompts `[B, T, D]`, which generation reads
    next. `token_mask` `[B, T]` marks tokens that are no padding; `prompt_mask` `[B, 1, T, T]` says who sees whom."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    places = (token_mask.long().cumsum(dim=1) - 1).clamp(min=0)
    before = embeds[:, :-1]
    with decoding(None):
        model.get_decoder()(
            inputs_embeds=before,
            attention_mask=make_library_mask(model.config, prompt_mask[:, :, :-1, :-1], before),
            position_ids=places[:, :-1],
            past_key_values=cache,
            use_cache=True,
        )
    if beams > 1:
        cache.batch_repeat_interleave(beams)
    return cache
