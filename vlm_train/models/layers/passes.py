"""Passes over a batch: how objectives call a family and its head, how a family drives its language model, and what is
made once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlm_train.contracts.batch import IGNORE, Batch, SequenceMask, TokenStream
from vlm_train.contracts.cross_states import CrossStates
from vlm_train.contracts.family import Family, Outputs
from vlm_train.contracts.objective import StepContext
from vlm_train.contracts.parts import Encoded
from vlm_train.models.layers.masks import attention_mask

Made = TypeVar("Made")


def outputs_of(model: Any, batch: Batch, stream: str) -> Outputs:
    """`model(batch, stream)` as `Outputs`. A pass is made once a batch: several objectives read its hidden states, or
    one these and another one its auxiliary values."""
    kept = (id(model), "outputs", stream, torch.is_grad_enabled(), model.plays_reference)
    if kept not in batch.shared:
        found = model(batch, stream=stream)
        batch.shared[kept] = Outputs(found, {}) if isinstance(found, Tensor) else found
    return batch.shared[kept]


def call_in_chunks(
    compute: Callable[..., Made], tensors: Sequence[Tensor], context: StepContext, *, chunk: int
) -> list[Made]:
    """What `compute` gives of at most `chunk` positions of every tensor `[S, ...]`, piece by piece; it is computed
    again in backward. No positions still make one call, so that a batch without targets reaches the same parameters.
    Ranks that gather the head at every call make as many calls as the one with the most positions.
    """
    pieces = max(1, -(-context.most_of_ranks(len(tensors[0])) // chunk))
    if torch.is_grad_enabled():
        compute = partial(checkpoint, compute, use_reentrant=False, preserve_rng_state=False)
    return [compute(*part) for part in zip(*(tensor.tensor_split(pieces) for tensor in tensors), strict=True)]


def decode_stream(llm: Any, embeds: Tensor, stream: TokenStream, **reads: CrossStates | Encoded | Tensor) -> Tensor:
    """Run `llm` over embeddings `[B, T, D]` with the stream's positions, segments and groups -> `[B, T, D]`.

    Who may attend to whom is said as cheaply as it can be: None for plain causal rows, a `SequenceMask` where the
    language model takes it, otherwise the mask `[B, 1, T, T]`.

    `reads` is what else it reads: `cross_states` for inserted blocks, `encoded` for the decoder of an encoder-decoder.
    """
    mask: Tensor | SequenceMask | None
    if stream.plain_causal:
        mask = None
    elif llm.takes_packed and (stream.causal or stream.masked):
        mask = make_sequence_mask(stream)
    else:
        mask = attention_mask(stream.segment_ids, stream.attention_group)
    if getattr(llm, "response_dropout", None):
        reads["response"] = stream.labels != IGNORE
    return llm.decode(embeds, stream.positions, mask, **reads)


def make_sequence_mask(stream: TokenStream) -> SequenceMask:
    """Who may attend to whom in a stream of packed or branched samples."""
    groups = None
    if stream.masked is not None:
        groups = stream.attention_group.flatten()
        groups = groups if stream.masked.index is None else groups[stream.masked.index]
    return SequenceMask(causal=stream.causal, masked=stream.masked, groups=groups)


def generate_from(
    llm: Any, embeds: Tensor, stream: TokenStream, *, cross_states: CrossStates | None = None, **settings: Any
) -> Tensor:
    """Continue the prompts of `stream`: rows of one segment, padded on any side -> `[B, up to max_new_tokens]`."""
    token_mask = stream.segment_ids != 0
    order = token_mask.int().argsort(dim=1, stable=True)  # padding to the left, real tokens in their order
    embeds = embeds.gather(1, order[..., None].expand_as(embeds))
    if len(stream.positions) > 1:
        settings["positions"] = stream.positions.gather(2, order[None].expand_as(stream.positions))
    if stream.masked is not None and stream.alignment != "none":  # what is generated belongs to no group of the prompt
        mask = attention_mask(stream.segment_ids, stream.attention_group)
        for axis, places in ((2, order[:, None, :, None]), (3, order[:, None, None, :])):
            mask = mask.gather(axis, places.expand_as(mask))
        settings["prompt_mask"] = mask
    if cross_states is not None:
        settings["cross_states"] = cross_states.reorder_tokens(order)
    return llm.generate(embeds, token_mask.gather(1, order), **settings)


def cached_on_batch(batch: Batch, owner: Family, name: str, make: Callable[[], Made]) -> Made:
    """What `make` gives, kept with the batch, hence as long as it: the second to ask gets the same.

    `owner` and `name` say what it is. Kept apart by whether gradients are recorded, and whether the model plays its own
    reference.
    """
    key = _key_of(owner, name)
    if key not in batch.shared:
        batch.shared[key] = make()
    return batch.shared[key]


def take_from_batch(batch: Batch, owner: Family, name: str, make: Callable[[], Made]) -> Made:
    """What `cached_on_batch` has kept under these; else what `make` gives, which is not kept."""
    key = _key_of(owner, name)
    return batch.shared[key] if key in batch.shared else make()


def _key_of(owner: Family, name: str) -> tuple[Any, ...]:
    return (id(owner), name, torch.is_grad_enabled(), owner.plays_reference)
