"""The image-text pairs of the global batch, as objectives with in-batch negatives see them.

Legend: b local pairs, G pairs on all ranks, B rows, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_train.contracts.batch import Batch, TokenStream, count_pairs
from vlm_train.contracts.objective import Gather

_HASH_BASE = 6364136223846793005  # an odd 64-bit multiplier; sums wrap around


@dataclass(frozen=True)
class Pairs:
    """Where the local pairs stand among all.

    Attributes:
        batch, stream: the batch, and the stream of its texts.
        sizes: pairs of every rank.
        own: `[b]`, the global number of every local pair.
    """

    batch: Batch
    stream: TokenStream
    sizes: list[int]
    own: Tensor

    def same_captions(self, gather: Gather) -> Tensor:
        """`[b, G]`, True where another pair has the same caption. A collective."""
        mine = caption_hashes(self.stream)[self.batch.media.row]
        equal = mine[:, None] == gather(mine, self.sizes, with_grad=False)[None, :]
        return equal.scatter(1, self.own[:, None], False)

    def count_hits(self, logits: Tensor) -> Tensor:
        """How many rows of `[b, G]` are largest at their own pair."""
        return (logits.argmax(dim=1) == self.own).sum() if len(self.own) else self.own.sum()

    def by_source(self, each: Tensor) -> dict[str, Tensor]:
        """The losses `[b]` of the local pairs as `Loss.sources`."""
        first = self.batch.media.row * self.stream.ids.shape[1]  # the flat position of every text
        return self.batch.sum_by_source(self.stream, first, torch.stack([each, torch.ones_like(each)], dim=1))


def pairs_of(batch: Batch, gather: Gather, text: str = "llm") -> Pairs:
    """The pairs of a batch. Raises `BatchError` unless every text of the stream named `text` has one image view."""
    pairs = count_pairs(batch, text)
    sizes = gather.sizes(pairs)
    own = torch.arange(pairs, device=batch.media.row.device) + sum(sizes[: gather.rank])
    return Pairs(batch, batch.text[text], sizes, own)


def caption_hashes(stream: TokenStream) -> Tensor:
    """`[B]` int64 fingerprint of each row's real tokens; the same for any padding, so it compares across ranks."""
    token_mask = stream.segment_ids != 0
    place = token_mask.long().cumsum(dim=1)
    mixed = (stream.ids + 1) * (2 * place + 1) * _HASH_BASE
    mixed = (mixed ^ (mixed >> 29)) * _HASH_BASE  # so that swapped tokens do not cancel
    return (mixed * token_mask).sum(dim=1)
