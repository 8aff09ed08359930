"""The Q-Former: learned queries and text through one BERT-type transformer (BLIP-2, arXiv 2301.12597, section 3.1).

Queries and text share self-attention; only queries read the image, in every second layer; each has FFNs of its own.
Who sees whom is a mask of `vlm_train.models.layers.masks`: queries are a shared block (group -1), text is one too
where both see all of each other (matching, instructions), or causal (group 0) where it is generated. Queries never see
causal text, so their keys and values can be computed once, without it: `QFormerOutput.keys_values`.

Legend: B rows, Q queries, T text tokens, L = Q + T, P image tokens, H heads, C channels a head, D width, D_v width of
the image features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_train.errors import BatchError
from vlm_train.models.layers.padding import position_ids_from_mask

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one attention, `[B, H, L, C]` each."""

STD = 0.02
"""BERT's standard deviation of first weights."""


class Attention(nn.Module):
    """Multi-head attention, then output projection, residual and LayerNorm, in BERT's order.

    Args:
        source_dim: width of what is attended to, if not `dim`.
    """

    def __init__(self, dim: int, heads: int, *, source_dim: int | None = None, dropout: float, eps: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.output = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.key, self.value = nn.Linear(source_dim or dim, dim), nn.Linear(source_dim or dim, dim)
        self.norm = nn.LayerNorm(dim, eps=eps)

    def keys_values(self, source: Tensor) -> KeysValues:
        """Keys and values of `[B, L, D or D_v]`."""
        return self._split_heads(self.key(source)), self._split_heads(self.value(source))

    def forward(self, hidden: Tensor, source: KeysValues, mask: Tensor | None = None) -> Tensor:
        """`[B, L, D]` -> `[B, L, D]`; `mask` `[B, 1, L, source]` is True where a row may attend to a column."""
        dropout = self.dropout if self.training else 0.0
        found = F.scaled_dot_product_attention(self._split_heads(self.query(hidden)), *source, mask, dropout)
        found = self.output(found.transpose(1, 2).flatten(2))
        return self.norm(hidden + F.dropout(found, self.dropout, self.training))

    def _split_heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.heads, states.shape[-1] // self.heads)).transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear layers with GELU between, residual and LayerNorm after."""

    def __init__(self, dim: int, hidden: int, *, dropout: float, eps: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.dropout = dropout

    def forward(self, hidden: Tensor) -> Tensor:
        """`[B, L, D]` -> `[B, L, D]`."""
        found = self.down(F.gelu(self.up(hidden)))
        return self.norm(hidden + F.dropout(found, self.dropout, self.training))


class QFormerLayer(nn.Module):
    """Self-attention, in some layers cross-attention to the image, and the FFN of the queries."""

    def __init__(self, dim: int, heads: int, ffn: int, vision_dim: int | None, *, dropout: float, eps: float) -> None:
        super().__init__()
        self.attention = Attention(dim, heads, dropout=dropout, eps=eps)
        self.cross = (
            None if vision_dim is None else Attention(dim, heads, source_dim=vision_dim, dropout=dropout, eps=eps)
        )
        self.feed = FeedForward(dim, ffn, dropout=dropout, eps=eps)

    def forward(
        self,
        hidden: Tensor,
        count: int,
        *,
        context: Sequence[Tensor] | None,
        mask: Tensor | None,
        past: KeysValues | None,
        text: nn.Module | None,
    ) -> tuple[Tensor, KeysValues]:
        """`[B, L, D]`, of which the first `count` are queries -> the same shape, and the keys and values of its own.

        Args:
            context: what cross-attention reads, in a layer that has one: keys, values and, if not all count, a mask.
            past: keys and values of tokens before these.
            text: the FFN of text tokens.
        """
        own = self.attention.keys_values(hidden)
        seen = own if past is None else (torch.cat([past[0], own[0]], dim=2), torch.cat([past[1], own[1]], dim=2))
        hidden = self.attention(hidden, seen, mask)
        parts = []
        if count:
            asked = hidden[:, :count]
            if self.cross is not None and context is not None:
                asked = self.cross(asked, (context[0], context[1]), *context[2:])
            parts.append(self.feed(asked))
        if text is not None and hidden.shape[1] > count:
            parts.append(text(hidden[:, count:]))
        return torch.cat(parts, dim=1), own


class TextBranch(nn.Module):
    """What only text has: embeddings, and an FFN in every layer."""

    def __init__(
        self,
        *,
        vocab_size: int,
        max_positions: int,
        hidden_size: int,
        num_hidden_layers: int,
        intermediate_size: int,
        dropout: float,
        eps: float,
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocab_size, hidden_size)
        self.positions = nn.Embedding(max_positions, hidden_size)
        self.feeds = nn.ModuleList(
            FeedForward(hidden_size, intermediate_size, dropout=dropout, eps=eps) for _ in range(num_hidden_layers)
        )
        self.apply(first_weights)

    def forward(self, ids: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Token ids `[B, T]` -> embeddings `[B, T, D]`. Raises `BatchError` for too many.

        Positions count from the first token that `token_mask` `[B, T]` marks as no padding; None: from the first.
        """
        if ids.shape[1] > (most := len(self.positions.weight)):
            raise BatchError(
                f"connector: a text of {ids.shape[1]} tokens, but max_positions={most}; set data.max_length"
            )
        positions = (
            self.positions.weight[: ids.shape[1]]
            if token_mask is None
            else self.positions(position_ids_from_mask(token_mask))
        )
        return self.words(ids) + positions


@dataclass(frozen=True)
class QFormerOutput:
    """What came out of a pass.

    Attributes:
        hidden: `[B, L, D]`, queries before text.
        keys_values: those of every self-attention, for a later pass whose tokens see these.
    """

    hidden: Tensor
    keys_values: list[KeysValues]


class QFormer(nn.Module):
    """The shared transformer with its queries.

    Args:
        vision_dim: D_v.
        num_query_tokens: learned queries; 0: the caller brings others.
        hidden_size, intermediate_size: D, and the width within an FFN.
        cross_attention_frequency: one layer in so many reads the image, the first included.
        levels: the features are those of so many encoder layers beside each other, each D_v wide; cross-attentions
            read them in turn, early ones the first level, each behind a LayerNorm of its own.
        select: which patches are read: `[B, P, levels D_v]` and a mask `[B, P]` or None -> some of them and, if not all
            of these count, a mask `[B, 1, 1, patches]`.
        dropout: of attention weights, of the embeddings and before every residual.
    """

    def __init__(
        self,
        *,
        vision_dim: int,
        num_query_tokens: int = 32,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        cross_attention_frequency: int = 2,
        levels: int = 1,
        select: nn.Module | None = None,
        dropout: float = 0.1,
        eps: float = 1e-12,
    ) -> None:
        super().__init__()
        self.dim, self.dropout = hidden_size, dropout
        self.select = select
        self.level_norms = nn.ModuleList(nn.LayerNorm(vision_dim) for _ in range(levels if levels > 1 else 0))
        self.queries = nn.Parameter(torch.empty(num_query_tokens, hidden_size).normal_(std=STD))
        self.norm = nn.LayerNorm(hidden_size, eps=eps)
        every = cross_attention_frequency
        reads = [vision_dim if number % every == 0 else None for number in range(num_hidden_layers)]
        self.layers = nn.ModuleList(
            QFormerLayer(hidden_size, num_attention_heads, intermediate_size, one, dropout=dropout, eps=eps)
            for one in reads
        )
        self.apply(first_weights)

    def context(self, features: Tensor, seen: Tensor | None = None) -> tuple[Tensor, ...]:
        """Image features `[B, P, levels D_v]` -> for every cross-attention keys and values, `[B, H, P, C]` each, and,
        where not all patches are read, a mask `[B, 1, 1, P]`. `seen` `[B, P]` is False where an image has no patch."""
        mask = [] if seen is None else [seen[:, None, None]]
        if self.select is not None:
            features, *mask = self.select(features, seen)
        readers = [layer.cross for layer in self.blocks if layer.cross is not None]
        count = max(1, len(self.level_norms))
        levels = features.chunk(count, dim=-1)
        if self.level_norms:
            levels = tuple(norm(level) for norm, level in zip(self.level_norms, levels, strict=True))
        found: list[Tensor] = []
        for number, reader in enumerate(readers):
            found += [*reader.keys_values(levels[number * count // len(readers)]), *mask]
        return tuple(found)

    @property
    def blocks(self) -> list[QFormerLayer]:
        """The layers by their type."""
        return cast("list[QFormerLayer]", list(self.layers))

    def forward(
        self,
        *,
        queries: Tensor | None = None,
        text: Tensor | None = None,
        branch: TextBranch | None = None,
        context: Sequence[Tensor] = (),
        mask: Tensor | None = None,
        past: Sequence[KeysValues] = (),
    ) -> QFormerOutput:
        """One pass of queries, of text, or of both.

        Args:
            queries: `[B, Q, D]`; they need a `context`.
            text: embeddings `[B, T, D]` of `branch`.
            mask: `[B, 1, L, past + L]`, True where a row may attend to a column; None: everything to everything.
            past: `QFormerOutput.keys_values` of tokens that stand before these.
        """
        count = 0 if queries is None else queries.shape[1]
        hidden = torch.cat([part for part in (queries, text) if part is not None], dim=1)
        hidden = F.dropout(self.norm(hidden), self.dropout, self.training)
        keys_values = []
        each = len(context) // max(1, sum(layer.cross is not None for layer in self.blocks))
        read = iter(zip(*[iter(context)] * each, strict=True)) if each else iter(())
        for number, layer in enumerate(self.blocks):
            hidden, own = layer(
                hidden,
                count,
                context=next(read) if count and layer.cross is not None else None,
                mask=mask,
                past=past[number] if past else None,
                text=None if branch is None else branch.feeds[number],
            )
            keys_values.append(own)
        return QFormerOutput(hidden, keys_values)


def first_weights(module: nn.Module) -> None:
    """BERT's: normal weights, no biases."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
