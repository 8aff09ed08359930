"""What every model family is, and what it may offer to objectives, evaluators and callbacks.

A family wires parts (vision, connector, llm ...) into one model. It inherits from `Family`, which has a default for
every question that the rest of the framework asks, and has the methods of those protocols below that it offers.

Legend: B rows, T tokens, D width, V vocabulary, N views, b image-text pairs, m rows that are matched, P patches, E
shared space.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from vlm_train.contracts.batch import Batch, MediaBatch, TokenStream
from vlm_train.contracts.layout import MediaLayout
from vlm_train.contracts.media import Features
from vlm_train.contracts.model_parts import find_parts
from vlm_train.contracts.streams import CAUSAL, Alignment


class Family(nn.Module):
    """A model: its parts are attributes that bear the names of their configuration groups.

    Attributes:
        streams: the token streams that it reads -> alignment of their labels: causal (text that is read and continued),
            seq2seq (the last answer, which "llm" then ends before) or none (text that is only read, in both
            directions). "qformer" is the instruction, as `instruction` writes it.
        plays_reference: true while the model, its adapters off, is the reference that it is compared with.
    """

    streams: ClassVar[Mapping[str, Alignment]] = CAUSAL
    plays_reference = False

    def media_layout(self, images: Mapping[str, Any]) -> MediaLayout | None:
        """Where media stand in the text: a picklable object without weights. None: as the connector's token grid.

        `images` are the plans of its vision encoders, by name.
        """
        return None

    def unused_parameters(self) -> list[str]:
        """Full names of parameters that no loss reaches: those that the parts declare never to read."""
        parts: dict[str, Any] = find_parts(self)
        return [
            f"{name}.{parameter}"
            for name, part in parts.items()
            if hasattr(part, "unused_parameters")
            for parameter in part.unused_parameters()
        ]

    def find_packing_problem(self) -> str | None:
        """Why samples cannot share a row, where only trying tells; None: they can. Asked before a run that packs: its
        rows then hold one sample each, and a sentence says so."""
        return None

    def load_weights(self) -> None:
        """Read what the family takes from its parts' files, after they have read theirs. Raises `AssetError`."""

    def clamp_(self) -> None:
        """Bound parameters that learn, in place; called after every optimizer step."""


class Outputs(NamedTuple):
    """What `forward` may return in place of bare hidden states.

    A tuple, so that hooks of sharded and compiled modules find the tensors in it. Auxiliary values are returned, not
    stored, so that layers whose activations are recomputed give each of them once.

    Attributes:
        hidden: `[B, T, D]`, final hidden states.
        aux: further values that an objective reads by name: router logits, hidden states of several layers.
    """

    hidden: Tensor
    aux: dict[str, Tensor]


@runtime_checkable
class PredictsTokens(Protocol):
    """`forward(batch, stream)` gives hidden states `[B, T, D]` (or `Outputs`), `logits` their vocabulary."""

    def forward(self, batch: Batch, stream: str = "llm") -> Tensor | Outputs: ...

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., D]` -> `[..., V]`."""
        ...


@runtime_checkable
class Generates(Protocol):
    """A family that generates answers to prompts."""

    def generate(
        self, batch: Batch, *, max_new_tokens: int, eos_ids: list[int], stream: str = "llm", **sampling: Any
    ) -> Tensor:
        """Answers `[B, up to max_new_tokens]` to the prompts in `batch` (one segment a row, padded on either side)."""
        ...


@runtime_checkable
class EncodesPatches(Protocol):
    """Shows what its vision encoder, named "vision", gives."""

    def encode_patches(self, batch: Batch) -> Features:
        """Features `[F, D_v]` of every view, the blank one of a batch without images included."""
        ...


@runtime_checkable
class EmbedsImagesAndTexts(Protocol):
    """Two towers: each embeds images or texts alone, as unit vectors of one space."""

    def encode_image(self, media: MediaBatch) -> Tensor:
        """Unit vectors `[N, E]` of the images."""
        ...

    def encode_text(self, stream: TokenStream) -> Tensor:
        """Unit vectors `[B, E]` of the texts."""
        ...


@runtime_checkable
class ScalesSimilarity(Protocol):
    """The logits of a pair are exp(logit_scale) x similarity, plus `logit_bias` where it is not None."""

    logit_scale: Tensor
    logit_bias: Tensor | None


@runtime_checkable
class AlignsPairs(Protocol):
    """The images and texts of a batch as unit vectors of one space, an image as one or several of them."""

    temperature: Tensor

    def image_vectors(self, batch: Batch) -> Tensor:
        """Unit vectors `[b, Q, E]` of the images, Q of each."""
        ...

    def text_vectors(self, batch: Batch) -> Tensor:
        """Unit vectors `[b, E]` of the texts."""
        ...


@runtime_checkable
class MatchesPairs(Protocol):
    """Tells whether a text belongs to an image, by cross-attention."""

    def features(self, batch: Batch) -> Tensor:
        """Image features `[b, P, D_v]`, one image for each text of the batch."""
        ...

    def context(self, features: Tensor) -> tuple[Tensor, ...]:
        """The states that cross-attention reads, from image features `[m, P, D_v]`: tensors with m rows."""
        ...

    def image_keys_values(self, batch: Batch) -> tuple[Tensor, ...]:
        """The same for the images of the batch."""
        ...

    def match(self, context: tuple[Tensor, ...], ids: Tensor, real: Tensor) -> Tensor:
        """Texts `[m, T]`, `real` where they are no padding -> logits `[m, 2]`, the second says yes."""
        ...


CAPABILITIES = (
    PredictsTokens,
    Generates,
    EncodesPatches,
    EmbedsImagesAndTexts,
    ScalesSimilarity,
    AlignsPairs,
    MatchesPairs,
)
"""Everything that a shipped objective or evaluator asks of a family. Others may declare protocols of their own."""


def missing_members(model: object, protocol: type) -> list[str]:
    """Names that `protocol` asks for and `model` does not have."""
    names = {name for base in protocol.__mro__ if getattr(base, "_is_protocol", False) for name in _members(base)}
    return sorted(name for name in names if not hasattr(model, name))


def _members(protocol: type) -> set[str]:
    own = {*vars(protocol), *vars(protocol).get("__annotations__", {})}
    return {name for name in own if not name.startswith("_")}
