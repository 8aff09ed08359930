"""Step by step generation for decoders that bring no `generate` of their own.

Legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens, min_new_tokens: length of a continuation; its ending token counts.
        temperature: 0 takes the most likely token.
        top_p: draw from the fewest tokens that hold this much probability.
        repetition_penalty: the logit of a token that is there already is divided by it if positive, else multiplied
            (arXiv 1909.05858, section 4.1).
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


def generate_tokens(
    following: Callable[[Tensor, Tensor], Tensor],
    ids: Tensor,
    token_mask: Tensor,
    sampling: Sampling,
    eos_ids: Sequence[int],
) -> Tensor:
    """Continue prompts with what torch's generator draws.

    Args:
        following: `ids [B, T], token_mask [B, T]`, padded on the left -> logits `[B, V]` of the next token.
        ids, token_mask: prompts `[B, T]`, padded on any side, and which tokens are no padding.

    Returns:
        `[B, up to max_new_tokens]`; a row that ended is filled up with its ending token.
    """
    order = token_mask.int().argsort(dim=1, stable=True)  # padding to the left, real tokens in their order
    ids, token_mask = ids.gather(1, order), token_mask.gather(1, order)
    prompt, ended = ids.shape[1], torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    ends = torch.tensor(list(eos_ids), dtype=torch.long, device=ids.device)
    for count in range(sampling.max_new_tokens):
        logits = _penalize_repeats(following(ids, token_mask).float(), ids, token_mask, sampling.repetition_penalty)
        if count < sampling.min_new_tokens:
            logits[:, ends] = float("-inf")
        chosen = _choose_token(logits, sampling)
        if len(ends):
            chosen = torch.where(ended, ends[0], chosen)
            ended |= torch.isin(chosen, ends)
        ids = torch.cat([ids, chosen[:, None]], dim=1)
        token_mask = torch.cat([token_mask, token_mask.new_ones(len(ids), 1)], dim=1)
        if bool(ended.all()):
            break
    return ids[:, prompt:]


def _penalize_repeats(logits: Tensor, ids: Tensor, token_mask: Tensor, penalty: float) -> Tensor:
    if penalty == 1.0:
        return logits
    seen = (
        torch.zeros_like(logits).scatter_reduce(1, ids, token_mask.float(), reduce="amax") > 0
    )  # padding does not count
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def _choose_token(logits: Tensor, sampling: Sampling) -> Tensor:
    """`[B, V]` -> `[B]`."""
    if sampling.temperature == 0:
        return logits.argmax(dim=1)
    shares, order = (logits / sampling.temperature).softmax(dim=1).sort(dim=1, descending=True)
    before = shares.cumsum(dim=1) - shares
    kept = torch.where(before < sampling.top_p, shares, 0.0)
    return order.gather(1, torch.multinomial(kept, 1))[:, 0]
