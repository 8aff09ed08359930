"""The text transformers of CLIP and SigLIP: one vector a caption, for two-tower models.

Legend: B rows, T tokens, L positions of the tower, D width of the vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlm_train.config.architecture import build_config
from vlm_train.contracts.batch import TokenStream
from vlm_train.errors import ConfigError
from vlm_train.models.weights.clip_init import init_text
from vlm_train.models.weights.hub import load_pretrained, with_vocabulary

CLIP, SIGLIP = "clip_text_model", "siglip_text_model"
_DEFAULT_END = 49407  # `eos_token_id` of both configurations: the end of the text for CLIP

# Whole checkpoints also hold a vision tower and, CLIP's, the projections of both.
_NOT_TEXT = (r"^vision_model\.", r"^logit_(scale|bias)$", r"(text|visual)_projection", r"position_ids$")


class HFTextTower(nn.Module):
    """CLIP's text transformer (causal; the final norm at the first end-of-text token), or SigLIP's (every token sees
    every other, padding too; a linear head on the last of L tokens), from `config`.

    A caption longer than L keeps its first L - 1 tokens and its last one, the end of the text, as the published
    tokenizers cut it. Random weights of CLIP are those of `clip/model.py` (github.com/openai/CLIP).

    Args:
        config: `{model_type: clip_text_model | siglip_text_model, ...}`, the fields of the `transformers`
            configuration; `vocab_size: null` takes the length of the tokenizer.
        weights: hub name or local folder of the tower or of a whole two-tower checkpoint; None: random.
        vocab_size: length of the tokenizer.
        new_tokens: what a tokenizer has beyond `config.vocab_size`: nothing is allowed.
    """

    def __init__(
        self,
        *,
        config: Mapping[str, Any],
        weights: str | None = None,
        vocab_size: int | None = None,
        new_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.numbers = with_vocabulary(config, vocab_size)
        if new_tokens:
            raise ConfigError(
                f"llm.config.vocab_size: {self.numbers['vocab_size']}, but the tokenizer has {new_tokens} tokens more; "
                "choose the tower's own tokenizer, or vocab_size: null to train from scratch"
            )
        self.weights = weights
        # Another tokenizer's vocabulary may lack the default; the library's own pooling, unread, needs an id.
        known = "eos_token_id" in self.numbers or self.numbers["vocab_size"] > _DEFAULT_END
        self.model = _make_model(self.numbers if known else {**self.numbers, "bos_token_id": None, "eos_token_id": 0})
        numbers = self.model.config
        self.end = numbers.eos_token_id if known else None
        self.causal = numbers.model_type == CLIP
        if self.causal:
            init_text(self.model)
        self.dim = numbers.hidden_size if self.causal else numbers.projection_size
        self.vocab_size = self.base_vocab_size = numbers.vocab_size
        self.max_length = numbers.max_position_embeddings

    @property
    def layers(self) -> nn.ModuleList:
        """The encoder blocks."""
        return self.tower.encoder.layers

    @property
    def tower(self) -> Any:
        """The module that holds `embeddings` and `encoder` (some releases nest it once)."""
        return getattr(self.model, "text_model", self.model)

    def pooled(self, stream: TokenStream) -> Tensor:
        """Captions, one a row -> vectors `[B, D]`, before any projection and normalization."""
        ids, last = self._pad_right(stream)
        output = self.model(input_ids=ids)
        if not self.causal:
            return output.pooler_output
        if self.end is not None:
            ends = ids == self.end
            last = torch.where(ends.any(dim=1), ends.int().argmax(dim=1), last)
        return output.last_hidden_state[torch.arange(len(ids), device=ids.device), last]

    def head_parameters(self) -> list[str]:
        """Names of parameters that `pooled` never reads: none."""
        return []

    def load_weights(self) -> None:
        """Read `weights` into the tower. Raises `AssetError` if they are not those of this architecture."""
        if self.weights is not None:
            self.model = load_pretrained(
                self.model, self.weights, setting="llm.weights", declared=_NOT_TEXT, config=self.numbers
            )

    def _pad_right(self, stream: TokenStream) -> tuple[Tensor, Tensor]:
        """Ids with the padding on the right, `[B, min(T, L)]` (SigLIP: `[B, L]`), and the place of the last token."""
        token_mask = stream.segment_ids != 0
        count = token_mask.sum(dim=1, keepdim=True)
        place = token_mask.long().cumsum(dim=1) - 1
        # Places from `width` on are cut off, but the last token of a row always has one.
        width = min(stream.ids.shape[1], self.max_length) if self.causal else self.max_length
        final = (place + 1 == count).logical_and(token_mask)
        place = torch.where(final, place.clamp(max=width - 1), torch.where(place < width - 1, place, width))
        place = torch.where(token_mask, place, width)
        fill = self.model.config.pad_token_id
        ids = torch.full((len(place), width + 1), fill, dtype=stream.ids.dtype, device=place.device)
        ids = ids.scatter(1, place, stream.ids)[:, :width]
        return ids, (count[:, 0] - 1).clamp(min=0, max=width - 1)


def _make_model(numbers: Mapping[str, Any]) -> Any:
    """A random tower. Raises `ConfigError` for a `model_type` that is neither."""
    from transformers import CLIPTextModel, SiglipTextModel

    classes: dict[Any, Any] = {CLIP: CLIPTextModel, SIGLIP: SiglipTextModel}
    if numbers.get("model_type") not in classes:
        raise ConfigError(f"llm.config.model_type: {numbers.get('model_type')!r}; allowed: {', '.join(classes)}")
    config = build_config("llm.config", numbers)
    return classes[config.model_type]._from_config(config, attn_implementation="sdpa")
