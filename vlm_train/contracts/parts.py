"""The contracts of the parts a family is wired from. Plain nn.Modules fulfil them; nothing here is inherited.

Legend: B rows, T tokens, A position axes, D_v / D_t widths of vision encoder and language model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from vlm_train.contracts.batch import SequenceMask, TokenStream
from vlm_train.contracts.cross_states import CrossStates
from vlm_train.contracts.layout import MediaSize
from vlm_train.contracts.media import Features, Grid3, MediaInput, MediaShape


class VisionEncoder(Protocol):
    """Views or flat patches to patch features.

    Attributes:
        out_dim: width D_v of the features (the sum over layers when several are chosen).
        image_size: (height, width) in pixels of every view, or None for native resolution, whose input is flat patches.
        image_mean, image_std: per-channel statistics in [0, 1] that `encode` normalizes with.
        patch_grid: module-level function or partial: `MediaSize` of a view -> its grid of features.
    """

    out_dim: int
    image_size: tuple[int, int] | None
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    patch_grid: Callable[[MediaSize], Grid3]

    def encode(self, media: MediaInput) -> Features:
        """Features of width D_v of every view. Runs only the layers they need."""
        ...


class Connector(Protocol):
    """Features of width D_v to features of the language model's width D_t, view by view.

    Attributes:
        token_grid: module-level function or partial: patch grid of a view -> its grid of tokens.
    """

    token_grid: Callable[[Grid3], Grid3]

    def __call__(self, features: Features) -> Features: ...


class Stitcher(Protocol):
    """The tokens of a media item's views, as a connector made them, to those that stand for it in the text.

    Attributes:
        count_tokens: module-level function or partial: how an item is made up, token grids of its views -> tokens.
    """

    count_tokens: Callable[[MediaShape, Sequence[Grid3]], int]

    def __call__(self, features: Features, media: MediaInput) -> Features:
        """One grid `(1, 1, tokens)` for each media item of the batch, in order. What belongs to none comes behind:
        the tokens of a blank view, and those of the stitcher's own, so that all ranks learn alike."""
        ...


class LanguageModel(Protocol):
    """A causal language model taken apart so that families can feed it embeddings and insert blocks.

    One that also encodes lists what only its `encode` reads in `encoder_parameters()`.

    Attributes:
        dim: width D_t of embeddings and hidden states.
        vocab_size: rows of the output head.
        layers: the decoder's layers, for layer-wise learning rates and activation checkpointing.
        takes_packed: whether `decode` takes a `SequenceMask` in place of a mask.
    """

    dim: int
    vocab_size: int
    layers: nn.ModuleList
    takes_packed: bool

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids `[B, T]` -> embeddings `[B, T, D_t]`. Negative ids (placeholders) give any finite embedding."""
        ...

    def insert(self, make_block: Callable[[], nn.Module], *, every: int = 1) -> nn.ModuleList:
        """Insert a block before every `every`-th layer (the layers `every`, `2 * every`, ... counted from 1).

        A block is called as `block(hidden, cross_states)`, `[R, Q, D_t]` -> `[R, Q, D_t]`, in every pass, also where
        the batch has no media. The family keeps what this returns, `self.blocks = llm.insert(...)`: the blocks are
        named, trained, frozen and saved as a part of their own, outside `llm`, so that patterns such as LoRA's
        `llm\\..*` do not reach them. Call it after the weights are loaded.

        Raises:
            ConfigError: `every` is not between 1 and the number of layers.
        """
        ...

    def decode(
        self,
        embeds: Tensor,
        positions: Tensor,
        mask: Tensor | SequenceMask | None,
        *,
        cross_states: CrossStates | None = None,
    ) -> Tensor:
        """Embeddings `[B, T, D_t]`, positions `[A, B, T]`, mask `[B, 1, T, T]` (True = attend; None = plain causal) or
        a `SequenceMask` -> final hidden states `[B, T, D_t]`. The inserted blocks read `cross_states`."""
        ...

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states `[..., D_t]` -> logits `[..., V]`."""
        ...


@dataclass(frozen=True)
class Encoded:
    """What a decoder reads: the encoder's hidden states `[B, S, D_t]` and which of them count `[B, 1, 1, S]`."""

    states: Tensor
    mask: Tensor


class EncoderDecoder(Protocol):
    """A language model whose decoder reads what `encode` made of another stream.

    It takes no inserted blocks: images stand in the encoder's text.

    Attributes:
        dim, vocab_size, layers, takes_packed: as of `LanguageModel`.
        start_id: the token that a decoder's input begins with.
    """

    dim: int
    vocab_size: int
    layers: nn.ModuleList
    takes_packed: bool
    start_id: int

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids `[B, T]` -> embeddings `[B, T, D_t]`, for the encoder or the decoder."""
        ...

    def encode(self, embeds: Tensor, mask: Tensor) -> Encoded:
        """Embeddings `[B, S, D_t]` and mask `[B, 1, 1, S]` (True = every token sees it) of the encoder's stream."""
        ...

    def decode(self, embeds: Tensor, positions: Tensor, mask: Tensor | None, *, encoded: Encoded) -> Tensor:
        """Hidden states `[B, T, D_t]` of the decoder, as in `LanguageModel`; it also attends to `encoded`."""
        ...

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states `[..., D_t]` -> logits `[..., V]`."""
        ...


class TextTower(Protocol):
    """The text half of two towers, where it is no causal language model.

    Attributes:
        dim: width D of the vectors.
        layers: the blocks, for layer-wise learning rates and activation checkpointing.
    """

    dim: int
    layers: nn.ModuleList

    def pooled(self, stream: TokenStream) -> Tensor:
        """Captions, one a row and padded on any side -> vectors `[B, D]`, before projection and normalization."""
        ...

    def head_parameters(self) -> list[str]:
        """Names of parameters that `pooled` never reads."""
        ...
