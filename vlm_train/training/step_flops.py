"""What a training step computes, from what it holds: the useful FLOPs that the log's TFLOP/s and MFU refer to.

The dry run's count (`flops.py`) of one sample is linear in its image patches and supervised tokens, and quadratic in
its length. A few traces on the meta device give the coefficients, for any family and any frozen parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from omegaconf import DictConfig

from vlm_train.training.flops import count_flops
from vlm_train.training.meta_batch import count_patches, visual_tokens
from vlm_train.training.params import make_policy
from vlm_train.training.trace import trace_step

TEXTS = (32, 64, 128)
"""Text tokens of the traced samples: as many as a parabola needs."""


@dataclass(frozen=True)
class Work:
    """FLOPs of a training step: of an image patch, a token, a squared segment length, and a supervised token."""

    patch: float
    token: float
    pair: float
    supervised: float

    def __call__(self, *, patches: float, tokens: float, pairs: float, supervised: float) -> float:
        """FLOPs of a step that holds so many of each; `pairs` is the sum of the segments' squared lengths."""
        return self.patch * patches + self.token * tokens + self.pair * pairs + self.supervised * supervised


def work_of(cfg: DictConfig, model: Any) -> Work:
    """The coefficients of a configuration, whose `model` lies on the meta device. Sets `requires_grad` on it."""
    make_policy(cfg, model)

    def flops_of_batch(text: int, supervised: int) -> float:
        products = trace_step(cfg, model, text_tokens=text, supervised=supervised).products
        return sum(part.total for part in count_flops(products).values())

    lengths = np.array([visual_tokens(model) + text for text in TEXTS], np.float64)
    pair, token, rest = np.polyfit(lengths, [flops_of_batch(text, 1) for text in TEXTS], 2)
    more = (flops_of_batch(TEXTS[0], TEXTS[0]) - flops_of_batch(TEXTS[0], 1)) / (TEXTS[0] - 1)
    patches = count_patches(model)
    return Work(
        patch=float(rest - more) / max(patches, 1), token=float(token), pair=float(pair), supervised=float(more)
    )
