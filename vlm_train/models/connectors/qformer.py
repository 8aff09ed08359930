"""The Q-Former as a connector: a fixed number of queries takes the place of an image's patches.

Legend: N views, Q queries, D_v / D / D_t widths of features, Q-Former and language model.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlm_train.contracts.media import Features, Grid3
from vlm_train.errors import AssetError, ConfigError
from vlm_train.models.layers.masks import both_ways
from vlm_train.models.layers.patch_selection import PatchSelection
from vlm_train.models.layers.qformer import QFormer, TextBranch
from vlm_train.models.weights.hub import read_state
from vlm_train.models.weights.qformer_names import connector_state, is_bert, is_known, new_beside_bert


def query_grid(grid: Grid3, count: int) -> Grid3:
    """The token grid of `count` queries, whatever the patches'."""
    del grid
    return Grid3(1, 1, count)


class QFormerConnector(nn.Module):
    """Queries read the image; a linear layer takes them to the language model.

    Args:
        in_dim, out_dim: D_v and D_t, from the other parts; without a language model there is no projection.
        weights: hub name or local folder of BERT, or of a BLIP-2 or InstructBLIP of `transformers`, whose Q-Former is
            taken by `load_weights`, never the projection; None: random.
        text: with a text branch, for stages in which the Q-Former reads text.
        vocab_size: of the text branch; null: the tokenizer's.
        num_query_tokens, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size,
            cross_attention_frequency, levels, dropout, eps: see `QFormer`. Several levels need as many entries in
            vision.layer.
        max_positions: most tokens of a text.
        budget, mass: how many patches the queries read, see `PatchSelection`; null: all.
        score_hidden: width of the head that scores them.
    """

    def __init__(
        self,
        *,
        in_dim: int,
        out_dim: int | None,
        weights: str | None = None,
        text: bool = False,
        vocab_size: int | None = None,
        max_positions: int = 512,
        num_query_tokens: int = 32,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        cross_attention_frequency: int = 2,
        levels: int = 1,
        budget: float | None = None,
        mass: float | None = None,
        score_hidden: int = 256,
        dropout: float = 0.1,
        eps: float = 1e-12,
    ) -> None:
        super().__init__()
        self.weights = weights
        if levels < 1 or in_dim % levels:
            raise ConfigError(f"connector.levels: {levels} levels do not fit features of width {in_dim} (vision.layer)")
        if levels > (readers := -(-num_hidden_layers // cross_attention_frequency)):
            raise ConfigError(f"connector.levels: {levels}, but only {readers} blocks read the image")
        if mass is not None and budget is None:
            raise ConfigError(f"connector.mass: {mass}, but nothing is selected; set connector.budget")
        patches = None if budget is None else PatchSelection(dim=in_dim, budget=budget, mass=mass, hidden=score_hidden)
        shared: dict[str, Any] = {
            "hidden_size": hidden_size,
            "num_hidden_layers": num_hidden_layers,
            "intermediate_size": intermediate_size,
            "dropout": dropout,
            "eps": eps,
        }
        self.qformer = QFormer(
            vision_dim=in_dim // levels,
            num_query_tokens=num_query_tokens,
            num_attention_heads=num_attention_heads,
            cross_attention_frequency=cross_attention_frequency,
            levels=levels,
            select=patches,
            **shared,
        )
        self.text = TextBranch(vocab_size=vocab_size or 0, max_positions=max_positions, **shared) if text else None
        self.projection = nn.Identity() if out_dim is None else nn.Linear(hidden_size, out_dim)
        self.token_grid = partial(query_grid, count=num_query_tokens)

    @property
    def layers(self) -> nn.ModuleList:
        """For layer-wise learning rates and activation checkpointing."""
        return self.qformer.layers

    def read_with_instruction(self, features: Features, ids: Tensor, token_mask: Tensor) -> Features:
        """With instructions `[N, T]`, whose tokens `token_mask` marks. Queries and instruction see each other."""
        assert self.text is not None
        queries = self._queries(features)
        seen = torch.cat([token_mask.new_ones(queries.shape[:2]), token_mask], dim=1)
        passed = self.qformer(
            queries=queries,
            text=self.text(ids, token_mask),
            branch=self.text,
            context=self.qformer.context(*features.padded()),
            mask=both_ways(seen),
        )
        return self._project(passed.hidden[:, : queries.shape[1]])

    def load_weights(self) -> None:
        """Read `weights`. Raises `AssetError` if they hold no Q-Former or BERT of these numbers."""
        if self.weights is None:
            return
        own = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("projection.")}
        state = read_state(self.weights, setting="connector.weights", wanted=is_known)
        taken = connector_state(state, own)
        missing = [name for name in own if name not in taken and not (is_bert(state) and new_beside_bert(name))]
        other = [name for name, tensor in taken.items() if tensor.shape != own[name].shape]
        if missing or other:
            raise AssetError(
                f"connector.weights: {self.weights!r} is no Q-Former of these numbers: missing {', '.join(missing[:3])}"
                f" ({len(missing)}), other shape {', '.join(other[:3])} ({len(other)})"
            )
        self.load_state_dict(taken, strict=False)

    def forward(self, features: Features) -> Features:
        """Q features of width D_t a view."""
        context = self.qformer.context(*features.padded())
        return self._project(self.qformer(queries=self._queries(features), context=context).hidden)

    def _queries(self, features: Features) -> Tensor:
        return self.qformer.queries.expand(len(features.grids), -1, -1)

    def _project(self, queries: Tensor) -> Features:
        """`[N, Q, D]` -> features of width D_t."""
        return Features.from_rectangular(self.projection(queries), Grid3(1, 1, queries.shape[1]))
