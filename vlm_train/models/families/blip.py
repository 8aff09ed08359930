"""BLIP: one model that tells, matches and describes images (arXiv 2201.12086, section 3.1).

The tower runs once a batch, and so do the keys and values that cross-attention makes of its features.

Legend: b pairs, m rows that are matched, B rows of text, T tokens, P image tokens, D width, D_v width of the image
features, E shared space, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_train.contracts.batch import Batch, TokenStream, count_pairs
from vlm_train.contracts.family import Family
from vlm_train.errors import ConfigError
from vlm_train.models.layers.generate import Sampling, generate_tokens
from vlm_train.models.layers.masks import attention_mask
from vlm_train.models.layers.padding import first_token_state, position_ids_from_mask, replace_first_token
from vlm_train.models.layers.passes import cached_on_batch
from vlm_train.models.layers.qformer import first_weights


class Blip(Family):
    """vision -> text transformer, with a shared space (ITC), a matching head (ITM) and a language-model head (LM).

    Args:
        vision: a `VisionEncoder` that keeps its class token in front.
        llm: a `BlipTextModel`, which is given cross-attention here.
        embed_dim: E.
        init_temperature: similarities are divided by it at first; it is learned itself, not its logarithm as in CLIP.
        min_temperature, max_temperature: its bounds, kept by `clamp_` after every optimizer step.
    """

    def __init__(
        self,
        *,
        vision: Any,
        llm: Any,
        embed_dim: int = 256,
        init_temperature: float = 0.07,
        min_temperature: float = 0.001,
        max_temperature: float = 0.5,
    ) -> None:
        super().__init__()
        if not getattr(vision, "keep_cls", False):
            raise ConfigError("model: BLIP compares images by their class token; set vision.keep_cls=true")
        if not hasattr(llm, "read_images"):
            raise ConfigError(f"model: BLIP needs a text transformer such as llm=bert_base, got {type(llm).__name__}")
        self.vision, self.llm = vision, llm
        llm.read_images(vision.out_dim)
        self.image_projection = nn.Linear(vision.out_dim, embed_dim)
        self.text_projection = nn.Linear(llm.dim, embed_dim)
        self.match_head = nn.Linear(llm.dim, 2)
        for layer in (self.image_projection, self.text_projection, self.match_head):
            first_weights(layer)
        self.temperature = nn.Parameter(torch.tensor(init_temperature))
        self.bounds = (min_temperature, max_temperature)

    def features(self, batch: Batch) -> Tensor:
        """`[b, P, D_v]` of the batch's images, one a text, all of one size."""
        return self._encode_views(batch)[: count_pairs(batch)]

    def context(self, features: Tensor) -> tuple[Tensor, ...]:
        """What cross-attention reads of images `[m, P, D_v]`: tensors with m rows."""
        return self.llm.context(features)

    def image_keys_values(self, batch: Batch) -> tuple[Tensor, ...]:
        """`context` of the batch's images, made once a batch."""
        return cached_on_batch(batch, self, "context", lambda: self.context(self.features(batch)))

    def image_vectors(self, batch: Batch) -> Tensor:
        """Unit vectors `[b, 1, E]`, from the class token."""
        first = self.features(batch)[:, :1]
        return cached_on_batch(batch, self, "image", lambda: F.normalize(self.image_projection(first), dim=-1))

    def text_vectors(self, batch: Batch) -> Tensor:
        """Unit vectors `[b, E]`, from the first token."""
        return cached_on_batch(batch, self, "text", lambda: self._text_vectors(batch.text["llm"]))[
            : len(batch.media.row)
        ]

    def match(self, context: tuple[Tensor, ...], ids: Tensor, token_mask: Tensor) -> Tensor:
        """Whether images and texts `[m, T]` belong together: logits `[m, 2]`, the second says yes. `token_mask`
        `[m, T]` marks tokens that are no padding."""
        return self.match_head(
            self._encode_text(replace_first_token(ids, token_mask, self.llm.encoder_start), token_mask, context)
        )

    def forward(self, batch: Batch, stream: str = "llm") -> Tensor:
        """Final hidden states `[B, T, D]` of text that is generated from the image (LM)."""
        text = batch.text[stream]
        ids = replace_first_token(text.ids, text.segment_ids != 0, self.llm.decoder_start)
        # A batch of padding still reads its blank view, so that every rank has the same gradients.
        context = self.image_keys_values(batch) if len(batch.media.row) else self.context(self._encode_views(batch))
        mask = None if text.plain_causal else attention_mask(text.segment_ids, text.attention_group)
        return self.llm.decode(self.llm.embed(ids), text.positions, mask, context)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., D]` -> `[..., V]`."""
        return self.llm.head(hidden)

    @torch.no_grad()
    def generate(
        self,
        batch: Batch,
        *,
        max_new_tokens: int,
        eos_ids: list[int],
        stream: str = "llm",
        min_new_tokens: int = 0,
        temperature: float = 0.0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
    ) -> Tensor:
        """Texts `[B, up to max_new_tokens]` that continue the prompts in `batch`; see `Sampling`."""
        text, context = batch.text[stream], self.image_keys_values(batch)
        sampling = Sampling(
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            temperature=temperature,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
        )

        def next_logits(ids: Tensor, token_mask: Tensor) -> Tensor:
            mask = attention_mask(token_mask.int(), torch.zeros_like(ids))
            hidden = self.llm.decode(self.llm.embed(ids), position_ids_from_mask(token_mask)[None], mask, context)
            logits = self.llm.head(hidden[:, -1])
            logits[:, [self.llm.decoder_start, self.llm.encoder_start]] = float("-inf")  # they are no text
            return logits

        token_mask = text.segment_ids != 0
        return generate_tokens(
            next_logits,
            replace_first_token(text.ids, token_mask, self.llm.decoder_start),
            token_mask,
            sampling,
            eos_ids,
        )

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bound the temperature, where it learns; called after every optimizer step."""
        if self.temperature.requires_grad:
            self.temperature.clamp_(*self.bounds)

    def _encode_views(self, batch: Batch) -> Tensor:
        """Features of every view, the blank one included."""
        return cached_on_batch(batch, self, "features", lambda: self._encode_pixels(batch))

    def _encode_pixels(self, batch: Batch) -> Tensor:
        trains = any(parameter.requires_grad for parameter in self.vision.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            return self.vision.encode(batch.media.inputs["vision"]).rectangular()

    def _text_vectors(self, stream: TokenStream) -> Tensor:
        return F.normalize(self.text_projection(self._encode_text(stream.ids, stream.segment_ids != 0)), dim=-1)

    def _encode_text(self, ids: Tensor, token_mask: Tensor, context: tuple[Tensor, ...] = ()) -> Tensor:
        """Texts `[m, T]`, all of whose tokens see each other -> the hidden state `[m, D]` of their first token."""
        mask = attention_mask(token_mask.int(), torch.full_like(ids, -1))
        hidden = self.llm.encode(self.llm.embed(ids), position_ids_from_mask(token_mask)[None], mask, context)
        return first_token_state(hidden, token_mask)
