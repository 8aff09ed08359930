"""Two towers (CLIP type): images and texts as unit vectors of one space, with a learned temperature.

Legend: N images, B rows, T tokens, E width of the shared space. Source: arXiv 2103.00020, figure 3.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_train.data.batch import MediaBatch, TokenStream
from vlm_train.errors import ConfigError
from vlm_train.models.text_only import decode_stream


class TwoTower(nn.Module):
    """An image tower and a causal text tower, each projected without bias into the shared space.

    Args:
        vision: a `VisionEncoder`; its features are pooled here.
        llm: a `LanguageModel`; its head is not used.
        embed_dim: E.
        pooling: `cls` takes the first token (the vision encoder must keep it), `mean` averages all of them.
        init_temperature: the logits start at similarity / temperature.
        max_scale: bound of 1 / temperature, kept by `clamp_` after every optimizer step.
    """

    def __init__(
        self,
        *,
        vision: Any,
        llm: Any,
        embed_dim: int = 512,
        pooling: str = "cls",
        init_temperature: float = 0.07,
        max_scale: float = 100.0,
    ) -> None:
        super().__init__()
        if pooling not in ("cls", "mean"):
            raise ConfigError(f"model.pooling: {pooling!r}; allowed: cls, mean")
        if pooling == "cls" and not getattr(vision, "keep_cls", False):
            raise ConfigError("model.pooling: cls needs vision.keep_cls=true")
        self.vision = vision
        self.llm = llm
        self.pooling = pooling
        self.max_scale = max_scale
        self.image_projection = nn.Linear(vision.out_dim, embed_dim, bias=False)
        self.text_projection = nn.Linear(llm.dim, embed_dim, bias=False)
        nn.init.normal_(self.image_projection.weight, std=vision.out_dim**-0.5)
        nn.init.normal_(self.text_projection.weight, std=llm.dim**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(init_temperature)))

    def encode_image(self, media: MediaBatch) -> Tensor:
        """Unit vectors `[N, E]`."""
        features = self.vision.encode(media.pixels)
        pooled = features[:, 0] if self.pooling == "cls" else features.mean(dim=1)
        return F.normalize(self.image_projection(pooled), dim=-1)

    def encode_text(self, stream: TokenStream) -> Tensor:
        """Unit vectors `[B, E]` from the last real token of each row."""
        hidden = decode_stream(self.llm, self.llm.embed(stream.ids), stream)
        position = torch.arange(stream.ids.shape[1], device=stream.ids.device)
        last = (position * (stream.segment_ids != 0)).argmax(dim=1)
        pooled = hidden[torch.arange(len(hidden), device=hidden.device), last]
        return F.normalize(self.text_projection(pooled), dim=-1)

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bound the scale of the logits; called after every optimizer step, not inside forward (open_clip)."""
        self.logit_scale.clamp_(max=math.log(self.max_scale))

    def unused_parameters(self) -> list[str]:
        """Names of parameters that no loss reaches: those of the tower, and an output head of its own."""
        names = [f"vision.{name}" for name in self.vision.unused_parameters()]
        return names + [f"llm.{name}" for name in self.llm.head_parameters()]
