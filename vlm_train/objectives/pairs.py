"""The image-text pairs of the global batch, as objectives with in-batch negatives see them.

Legend: b local pairs, G pairs on all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_train.data.batch import Batch
from vlm_train.objectives.base import Gather
from vlm_train.objectives.contrastive import caption_hashes


@dataclass(frozen=True)
class Pairs:
    """Where the local pairs stand among all.

    Attributes:
        sizes: pairs of every rank.
        own: `[b]`, the global number of every local pair.
        same: `[b, G]`, True where another pair has the same caption.
    """

    sizes: list[int]
    own: Tensor
    same: Tensor


def pairs_of(batch: Batch, gather: Gather) -> Pairs:
    """The pairs of a batch, one image a text."""
    rows = batch.media.row
    sizes = gather.sizes(len(rows))
    own = torch.arange(len(rows), device=rows.device) + sum(sizes[: gather.rank])
    mine = caption_hashes(batch.text["llm"])[rows]
    same = mine[:, None] == gather(mine, sizes, with_grad=False)[None, :]
    return Pairs(sizes, own, same.scatter(1, own[:, None], False))
