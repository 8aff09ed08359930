"""Image-text alignment with a Q-Former (BLIP-2 stage 1): what ITC, ITM and ITG ask of the model.

The tower runs once a batch, and so does the pass of the queries, which see no text in ITC and ITG; texts go through the
Q-Former once for ITC, once for ITG, and three times, beside queries, for ITM: 4 Q + 5 T tokens a pair in all.

Legend: b pairs, m rows that are matched, B rows of text, Q queries, T tokens, P patches, D width, E shared space, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_train.contracts.batch import Batch, TokenStream, count_pairs
from vlm_train.contracts.family import Family
from vlm_train.contracts.layout import MediaLayout, NoMedia
from vlm_train.errors import ConfigError
from vlm_train.models.layers.masks import attention_mask, both_ways
from vlm_train.models.layers.padding import first_token_state, replace_first_token
from vlm_train.models.layers.passes import cached_on_batch
from vlm_train.models.layers.qformer import QFormerOutput, first_weights
from vlm_train.models.weights.hub import read_state
from vlm_train.models.weights.qformer_names import head_from_bert


class Blip2QFormerModel(Family):
    """vision -> Q-Former with its text branch -> a shared space, a matching head and a language-model head.

    Args:
        vision: a `VisionEncoder`.
        connector: a `QFormerConnector` with `text: true`.
        embed_dim: E.
        init_temperature: similarities are divided by it at first; it is learned itself, not its logarithm as in CLIP.
        start_id: token id that starts a text that is to be generated, `[DEC]`; null: the last of the vocabulary.
    """

    def __init__(
        self,
        *,
        vision: Any,
        connector: Any,
        embed_dim: int = 256,
        init_temperature: float = 0.07,
        start_id: int | None = None,
    ) -> None:
        super().__init__()
        if getattr(connector, "text", None) is None:
            raise ConfigError("model: alignment needs a Q-Former that reads text: connector.text=true")
        self.vision, self.connector = vision, connector
        dim, words = connector.qformer.dim, connector.text.words.num_embeddings
        self.start_id = words - 1 if start_id is None else start_id
        self.image_projection, self.text_projection = nn.Linear(dim, embed_dim), nn.Linear(dim, embed_dim)
        self.match_head = nn.Linear(dim, 2)
        self.lm_head = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim, eps=connector.qformer.norm.eps))
        self.lm_bias, self.vocab_size = nn.Parameter(torch.zeros(words)), words
        self.lm_head.apply(first_weights)
        self.temperature = nn.Parameter(torch.tensor(init_temperature))

    def load_weights(self) -> None:
        """Start the head that generates text from that of the BERT which `connector.weights` names, as LAVIS does; any
        other file has none. Raises `AssetError` if it cannot be read."""
        if (source := self.connector.weights) is not None:
            theirs = read_state(source, setting="connector.weights", wanted=lambda name: name.startswith("cls."))
            self.load_state_dict(head_from_bert(theirs, self.lm_bias.detach()), strict=False)

    def media_layout(self, images: Mapping[str, Any]) -> MediaLayout:
        """Images take no place in the text."""
        return NoMedia()

    def features(self, batch: Batch) -> Tensor:
        """`[b, P, D_v]` of the batch's images, one a text, all of one size."""
        return cached_on_batch(batch, self, "features", lambda: self._encode_images(batch))

    def context(self, features: Tensor) -> tuple[Tensor, ...]:
        """What cross-attention reads of images `[m, P, D_v]`: tensors with m rows."""
        return self.connector.qformer.context(features)

    def image_keys_values(self, batch: Batch) -> tuple[Tensor, ...]:
        """`context` of the batch's images, made once a batch."""
        return cached_on_batch(batch, self, "context", lambda: self.context(self.features(batch)))

    def image_vectors(self, batch: Batch) -> Tensor:
        """Unit vectors `[b, Q, E]`."""
        return cached_on_batch(
            batch,
            self,
            "image",
            lambda: F.normalize(self.image_projection(self._encode_batch_queries(batch).hidden), dim=-1),
        )

    def text_vectors(self, batch: Batch) -> Tensor:
        """Unit vectors `[b, E]`, from the first token."""
        return cached_on_batch(batch, self, "text", lambda: self._text_vectors(batch.text["llm"]))[
            : len(batch.media.row)
        ]

    def match(self, context: tuple[Tensor, ...], ids: Tensor, token_mask: Tensor) -> Tensor:
        """Whether images and texts `[m, T]` belong together: logits `[m, 2]`, the second says yes. `token_mask`
        `[m, T]` marks tokens that are no padding."""
        queries = self._expand_queries(len(ids))
        seen = torch.cat([token_mask.new_ones(len(ids), queries.shape[1]), token_mask], dim=1)
        text, former = self.connector.text, self.connector.qformer
        passed = former(queries=queries, text=text(ids, token_mask), branch=text, context=context, mask=both_ways(seen))
        return self.match_head(passed.hidden[:, : queries.shape[1]]).mean(dim=1)

    def forward(self, batch: Batch, stream: str = "llm") -> Tensor:
        """Final hidden states `[B, T, D]` of text that is generated from the image (ITG)."""
        text = batch.text[stream]
        asked = self._encode_batch_queries(batch)
        if not len(asked.hidden):  # a batch of padding: no image, one row of text
            return self._encode_text(text.ids, text.segment_ids != 0)
        token_mask = text.segment_ids != 0
        ids = replace_first_token(text.ids, token_mask, self.start_id)
        count = asked.hidden.shape[1]
        segments = F.pad(text.segment_ids, (count, 0), value=1)
        groups = F.pad(torch.zeros_like(text.attention_group), (count, 0), value=-1)  # queries are a shared block
        mask = attention_mask(segments, groups)[:, :, count:]
        branch = self.connector.text
        return self.connector.qformer(
            text=branch(ids, token_mask), branch=branch, mask=mask, past=asked.keys_values
        ).hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., D]` -> `[..., V]`; the weights are those of the embeddings."""
        return F.linear(self.lm_head(hidden), self.connector.text.words.weight, self.lm_bias)

    def _encode_images(self, batch: Batch) -> Tensor:
        return self.vision.encode(batch.media.inputs["vision"]).rectangular()[: count_pairs(batch)]

    def _encode_batch_queries(self, batch: Batch) -> QFormerOutput:
        """The pass of the queries alone."""
        return cached_on_batch(batch, self, "queries", lambda: self._encode_queries(self.image_keys_values(batch)))

    def _encode_queries(self, context: tuple[Tensor, ...]) -> QFormerOutput:
        return self.connector.qformer(queries=self._expand_queries(len(context[0])), context=context)

    def _text_vectors(self, stream: TokenStream) -> Tensor:
        token_mask = stream.segment_ids != 0
        return F.normalize(
            self.text_projection(first_token_state(self._encode_text(stream.ids, token_mask), token_mask)), dim=-1
        )

    def _expand_queries(self, rows: int) -> Tensor:
        return self.connector.qformer.queries.expand(rows, -1, -1)

    def _encode_text(self, ids: Tensor, token_mask: Tensor) -> Tensor:
        """Text `[B, T]` by itself, in both directions -> `[B, T, D]`."""
        branch = self.connector.text
        return self.connector.qformer(text=branch(ids, token_mask), branch=branch, mask=both_ways(token_mask)).hidden
