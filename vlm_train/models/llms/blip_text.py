"""BERT as encoder and decoder of text that may read an image (BLIP's "MED", arXiv 2201.12086, section 3.1).

Encoder and decoder share embeddings, cross-attention and FFN; each has self-attention of its own. Which one runs, and
whether it reads an image, is the caller's choice.

Legend: B rows, T tokens, P image tokens, H heads, C channels a head, D width, D_v width of the image features, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_train.contracts.batch import SequenceMask
from vlm_train.errors import AssetError, BatchError, ConfigError
from vlm_train.models.layers.qformer import Attention, FeedForward, first_weights
from vlm_train.models.weights.hub import with_vocabulary

START_TOKENS = 2
"""The last rows of the vocabulary: [DEC], which starts text that is generated, and [ENC], text that is matched."""


@dataclass(frozen=True, kw_only=True)
class BlipTextConfig:
    """The architecture, named as in `transformers`. `vocab_size` includes `START_TOKENS`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    layer_norm_eps: float = 1e-12
    dropout: float = 0.1


class BlipTextLayer(nn.Module):
    """Self-attention of the encoder or of the decoder, cross-attention if there is an image, FFN."""

    def __init__(self, numbers: BlipTextConfig) -> None:
        super().__init__()
        self.encoder_attention = _make_attention(numbers)
        self.decoder_attention = _make_attention(numbers)
        self.cross: Attention | None = None
        self.feed = FeedForward(
            numbers.hidden_size, numbers.intermediate_size, dropout=numbers.dropout, eps=numbers.layer_norm_eps
        )

    def forward(self, hidden: Tensor, decodes: bool, mask: Tensor, image: tuple[Tensor, ...] = ()) -> Tensor:
        """`[B, T, D]`, mask `[B, 1, T, T]`, keys and values of the image twice `[B, H, P, C]` -> `[B, T, D]`."""
        attention = self.decoder_attention if decodes else self.encoder_attention
        hidden = attention(hidden, attention.keys_values(hidden), mask)
        if image:
            assert self.cross is not None
            hidden = self.cross(hidden, (image[0], image[1]))
        return self.feed(hidden)


class BlipTextModel(nn.Module):
    """The text transformer. Alone it is a causal language model; `read_images` gives it cross-attention.

    Args:
        config: the fields of `BlipTextConfig`; `vocab_size: null` takes the tokenizer's length and the start tokens.
        weights: hub name or local folder of a BERT, read by `load_weights` into both self-attentions; None: random.
        vocab_size: length of the tokenizer.
        new_tokens: how many tokens the tokenizer has beyond `config.vocab_size`; there must be none.
    """

    takes_packed = False

    def __init__(
        self,
        *,
        config: Mapping[str, Any],
        weights: str | None = None,
        vocab_size: int | None = None,
        new_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.numbers = numbers = _read_config(config, vocab_size)
        if new_tokens:
            raise ConfigError(f"llm.config.vocab_size: {numbers.vocab_size}, but the tokenizer has {new_tokens} more")
        self.weights = weights
        self.dim, self.vocab_size = numbers.hidden_size, numbers.vocab_size
        self.base_vocab_size = numbers.vocab_size
        self.decoder_start, self.encoder_start = self.vocab_size - 2, self.vocab_size - 1
        self.words = nn.Embedding(self.vocab_size, self.dim)
        self.positions = nn.Embedding(numbers.max_position_embeddings, self.dim)
        self.norm = nn.LayerNorm(self.dim, eps=numbers.layer_norm_eps)
        self.layers = nn.ModuleList(BlipTextLayer(numbers) for _ in range(numbers.num_hidden_layers))
        self.transform = nn.Sequential(
            nn.Linear(self.dim, self.dim), nn.GELU(), nn.LayerNorm(self.dim, eps=numbers.layer_norm_eps)
        )
        self.head_bias = nn.Parameter(torch.zeros(self.vocab_size))
        self.apply(first_weights)

    @property
    def blocks(self) -> list[BlipTextLayer]:
        """The layers by their type."""
        return cast("list[BlipTextLayer]", list(self.layers))

    def read_images(self, vision_dim: int) -> None:
        """Give every layer cross-attention to features of width D_v."""
        for layer in self.blocks:
            layer.cross = _make_attention(self.numbers, vision_dim)
            layer.cross.apply(first_weights)

    def context(self, features: Tensor) -> tuple[Tensor, ...]:
        """Image features `[B, P, D_v]` -> keys and values of every cross-attention, `[B, H, P, C]` each."""
        return tuple(
            states for layer in self.blocks if layer.cross is not None for states in layer.cross.keys_values(features)
        )

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids `[B, T]` -> embeddings `[B, T, D]`, without positions."""
        return self.words(ids.clamp(min=0))

    def encode(self, embeds: Tensor, positions: Tensor, mask: Tensor, context: Sequence[Tensor] = ()) -> Tensor:
        """As `decode`, with the encoder's self-attention."""
        return self._run_layers(embeds, positions, mask, context, decodes=False)

    def decode(
        self,
        embeds: Tensor,
        positions: Tensor,
        mask: Tensor | SequenceMask | None,
        context: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Embeddings `[B, T, D]`, positions `[A, B, T]`, mask `[B, 1, T, T]` (True = attend; None: causal), and the
        `context` of an image a row -> hidden `[B, T, D]`."""
        if isinstance(mask, SequenceMask):
            raise ConfigError("llm: takes no sequences in place of a mask")
        if mask is None:
            length = embeds.shape[1]
            mask = torch.ones(length, length, dtype=torch.bool, device=embeds.device).tril()[None, None]
        return self._run_layers(embeds, positions, mask, context or (), decodes=True)

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states `[..., D]` -> logits `[..., V]`; the weights are those of the embeddings."""
        return F.linear(self.transform(hidden), self.words.weight, self.head_bias)

    def encoder_parameters(self) -> list[str]:
        """Names of the parameters that only `encode` reads."""
        return [name for name, _ in self.named_parameters() if ".encoder_attention." in name]

    def load_weights(self) -> None:
        """Read the BERT `weights`, but its token types and pooler; the start tokens stay random.

        Raises:
            AssetError: they cannot be read, or are of another architecture.
        """
        if self.weights is not None:
            from vlm_train.models.weights.blip_names import bert_state

            self._copy_state(bert_state(self.weights, len(self.layers)))

    @torch.no_grad()
    def _copy_state(self, state: Mapping[str, Tensor]) -> None:
        own = {name: tensor for name, tensor in self.state_dict().items() if ".cross." not in name}
        if missing := sorted(own.keys() ^ state.keys()):
            raise AssetError(f"llm.weights: {self.weights!r} is no BERT of this architecture: {missing[0]}")
        for name, tensor in state.items():
            rows = own[name][:-START_TOKENS] if name in ("words.weight", "head_bias") else own[name]
            if rows.shape != tensor[: len(rows)].shape:
                shapes = f"{list(tensor.shape)}, the model has {list(rows.shape)}"
                raise AssetError(f"llm.weights: {self.weights!r}: {name} is {shapes}")
            rows.copy_(tensor[: len(rows)])

    def _run_layers(
        self, embeds: Tensor, positions: Tensor, mask: Tensor, context: Sequence[Tensor], *, decodes: bool
    ) -> Tensor:
        if embeds.shape[1] > (most := self.positions.num_embeddings):
            raise BatchError(
                f"llm: a text of {embeds.shape[1]} tokens, but it has {most} positions; set data.max_length"
            )
        hidden = self.norm(embeds + self.positions(positions[0]))
        hidden = F.dropout(hidden, self.numbers.dropout, self.training)
        for number, layer in enumerate(self.layers):
            hidden = layer(hidden, decodes, mask, tuple(context[2 * number : 2 * number + 2]))
        return hidden


def _make_attention(numbers: BlipTextConfig, source_dim: int | None = None) -> Attention:
    return Attention(
        numbers.hidden_size,
        numbers.num_attention_heads,
        source_dim=source_dim,
        dropout=numbers.dropout,
        eps=numbers.layer_norm_eps,
    )


def _read_config(config: Mapping[str, Any], vocab_size: int | None) -> BlipTextConfig:
    known = [field.name for field in fields(BlipTextConfig)]
    if unknown := sorted(set(config) - set(known)):
        raise ConfigError(f"llm.config.{unknown[0]}: not a setting of BlipTextModel. Allowed: {', '.join(known)}.")
    try:
        return BlipTextConfig(**with_vocabulary(config, None if vocab_size is None else vocab_size + START_TOKENS))
    except TypeError as error:
        raise ConfigError(f"llm.config: {error}") from error
