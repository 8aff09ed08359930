"""Two towers (CLIP, SigLIP): images and texts as unit vectors of one space, with a learned temperature.

Legend: N images, B rows, T tokens, E width of the shared space. Sources: arXiv 2103.00020, figure 3; 2303.15343.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vlm_train.contracts.batch import MediaBatch, TokenStream
from vlm_train.contracts.family import Family
from vlm_train.contracts.media import MediaInput
from vlm_train.errors import ConfigError
from vlm_train.models.layers.passes import decode_stream

POOLING = ("cls", "mean", "head")


class TwoTower(Family):
    """An image tower and a text tower, each projected without bias into the shared space.

    Args:
        vision: a `VisionEncoder`; its features are pooled here.
        llm: a `TextTower`, or a causal `LanguageModel`, whose head is not used.
        embed_dim: E; null: no projections, the towers end in the shared space (SigLIP).
        pooling: `cls` takes the first token (the vision encoder must keep it), `mean` averages all of them, `head` is
            the tower's own attention pooling (SigLIP).
        init_temperature: the logits start at similarity / temperature.
        max_scale: bound of 1 / temperature, kept by `clamp_` after every optimizer step; null: none.
        init_bias: what the learned bias of the sigmoid loss's logits starts at; null: there is none.
        cache_chunk: gradient caching: the towers see so many images, and texts, at a time and compute them again in
            backward, so that memory holds the activations of one chunk whatever `batch.micro`; null: all at once.
    """

    def __init__(
        self,
        *,
        vision: Any,
        llm: Any,
        embed_dim: int | None = 512,
        pooling: str = "cls",
        init_temperature: float = 0.07,
        max_scale: float | None = 100.0,
        init_bias: float | None = None,
        cache_chunk: int | None = None,
    ) -> None:
        super().__init__()
        _check_parts(vision, llm, embed_dim, pooling, cache_chunk)
        self.vision = vision
        self.llm = llm
        self.pooling = pooling
        self.max_scale = max_scale
        self.cache_chunk = cache_chunk
        self.image_projection = _make_projection(vision.out_dim, embed_dim)
        self.text_projection = _make_projection(llm.dim, embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(init_temperature)))
        self.logit_bias = None if init_bias is None else nn.Parameter(torch.tensor(float(init_bias)))

    def encode_image(self, media: MediaBatch) -> Tensor:
        """Unit vectors `[N, E]`."""
        shown = media.inputs["vision"]
        return self._in_chunks(self._image_vectors, shown, len(shown))

    def encode_text(self, stream: TokenStream) -> Tensor:
        """Unit vectors `[B, E]`: of a causal language model from the last real token of each row."""
        rows = torch.arange(len(stream.ids), device=stream.ids.device)
        return self._in_chunks(lambda some: self._text_vectors(_rows_of(stream, some)), rows, len(rows))

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bound the scale of the logits, where it learns; called after every optimizer step (open_clip)."""
        if self.max_scale is not None and self.logit_scale.requires_grad:
            self.logit_scale.clamp_(max=math.log(self.max_scale))

    def unused_parameters(self) -> list[str]:
        """Names of parameters that no loss reaches: those of the tower, and an output head of its own."""
        pooled = set(map(id, self.vision.pooling_head.parameters())) if self.pooling == "head" else set()
        unused = [name for name in super().unused_parameters() if id(self.get_parameter(name)) not in pooled]
        heads = self.llm.head_parameters() if hasattr(self.llm, "head_parameters") else ()
        return unused + [f"llm.{name}" for name in heads]

    def _image_vectors(self, media: MediaInput) -> Tensor:
        features = self.vision.encode(media)
        if self.pooling == "head":
            pooled = self.vision.pooling_head(features.rectangular())
        elif self.pooling == "cls":
            pooled = features.rectangular()[:, 0]
        else:
            pooled = features.mean()
        return F.normalize(self.image_projection(pooled), dim=-1)

    def _text_vectors(self, stream: TokenStream) -> Tensor:
        if hasattr(self.llm, "pooled"):
            return F.normalize(self.text_projection(self.llm.pooled(stream)), dim=-1)
        hidden = decode_stream(self.llm, self.llm.embed(stream.ids), stream)
        position = torch.arange(stream.ids.shape[1], device=stream.ids.device)
        last = (position * (stream.segment_ids != 0)).argmax(dim=1)
        pooled = hidden[torch.arange(len(hidden), device=hidden.device), last]
        return F.normalize(self.text_projection(pooled), dim=-1)

    def _in_chunks(self, encode: Callable[[Any], Tensor], whole: Any, size: int) -> Tensor:
        """`encode(whole)`, a chunk at a time where there are several; each is computed again in backward."""
        if self.cache_chunk is None or size <= self.cache_chunk:
            return encode(whole)
        parts = whole.split(self.cache_chunk)
        if not torch.is_grad_enabled():
            return torch.cat([encode(part) for part in parts])
        return torch.cat([cast(Tensor, checkpoint(encode, part, use_reentrant=False)) for part in parts])


def _check_parts(vision: Any, llm: Any, embed_dim: int | None, pooling: str, cache_chunk: int | None) -> None:
    """Raises ConfigError for parts and options that do not fit each other."""
    if pooling not in POOLING:
        raise ConfigError(f"model.pooling: {pooling!r}; allowed: {', '.join(POOLING)}")
    if pooling == "cls" and not getattr(vision, "keep_cls", False):
        raise ConfigError("model.pooling: cls needs vision.keep_cls=true")
    if pooling == "head" and getattr(vision, "pooling_head", None) is None:
        raise ConfigError("model.pooling: the vision tower has no head; allowed: cls, mean")
    if pooling == "head" and not vision.final_norm:
        raise ConfigError("model.pooling: head reads normalized features: vision.layer=-1 vision.final_norm=true")
    if embed_dim is None and vision.out_dim != llm.dim:
        raise ConfigError(
            f"model.embed_dim: null needs towers of one width, got {vision.out_dim} (vision) and {llm.dim} (llm)"
        )
    if cache_chunk is not None and cache_chunk < 1:
        raise ConfigError(f"model.cache_chunk: {cache_chunk}; allowed: 1 or more, or null")


def _make_projection(width: int, embed_dim: int | None) -> nn.Module:
    if embed_dim is None:
        return nn.Identity()
    projection = nn.Linear(width, embed_dim, bias=False)
    nn.init.normal_(projection.weight, std=width**-0.5)
    return projection


def _rows_of(stream: TokenStream, rows: Tensor) -> TokenStream:
    """Some rows of captions, one a row, which are only read."""
    if len(rows) == len(stream.ids):
        return stream
    names = ("ids", "labels", "weights", "segment_ids", "attention_group")
    cut = {name: getattr(stream, name)[rows] for name in names}
    cut["positions"] = stream.positions[:, rows]
    return replace(stream, **cut, supervised=stream.supervised[:0], causal=None, masked=None, sample_lengths=None)
