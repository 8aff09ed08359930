"""How every family drives its language model over the streams of a batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlm_train.contracts.batch import SequenceMask, TokenStream
from vlm_train.contracts.cross_states import CrossStates
from vlm_train.contracts.parts import Encoded
from vlm_train.models.layers.masks import attention_mask


def decode_stream(llm: Any, embeds: Tensor, stream: TokenStream, **reads: CrossStates | Encoded) -> Tensor:
    """Run `llm` over embeddings `[B, T, D]` with the stream's positions, segments and groups -> `[B, T, D]`.

    Who may attend to whom is said as cheaply as it can be: None for plain causal rows, a `SequenceMask` where the
    language model takes it, otherwise the mask `[B, 1, T, T]`.

    `reads` is what else it reads: `cross_states` for inserted blocks, `encoded` for the decoder of an encoder-decoder.
    """
    mask: Tensor | SequenceMask | None
    if stream.plain_causal:
        mask = None
    elif llm.takes_packed and (stream.causal or stream.masked):
        groups = None
        if stream.masked is not None:
            groups = stream.attention_group.flatten()
            groups = groups if stream.masked.index is None else groups[stream.masked.index]
        mask = SequenceMask(causal=stream.causal, masked=stream.masked, groups=groups)
    else:
        mask = attention_mask(stream.segment_ids, stream.attention_group)
    return llm.decode(embeds, stream.positions, mask, **reads)


def generate_from(
    llm: Any, embeds: Tensor, stream: TokenStream, *, cross_states: CrossStates | None = None, **settings: Any
) -> Tensor:
    """Continue the prompts of `stream`: rows of one segment, padded on any side -> `[B, up to max_new_tokens]`."""
    token_mask = stream.segment_ids != 0
    order = token_mask.int().argsort(dim=1, stable=True)  # padding to the left, real tokens in their order
    embeds = embeds.gather(1, order[..., None].expand_as(embeds))
    if cross_states is not None:
        settings["cross_states"] = cross_states.reorder_tokens(order)
    return llm.generate(embeds, token_mask.gather(1, order), **settings)
