"""What a sample takes to compute, so that rows can be assigned to ranks that have to wait for each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from vlm_train.contracts.model_parts import find_encoders
from vlm_train.models.vision.example import count_typical_patches


@dataclass(frozen=True)
class Cost:
    """FLOPs of a training step, up to a factor: `token` a token, `pair` a squared token, `patch` an image patch."""

    token: float = 1.0
    pair: float = 0.0
    patch: float = 0.0

    def __call__(self, tokens: NDArray[Any], patches: NDArray[Any]) -> NDArray[np.float64]:
        """Cost of samples of `tokens` and `patches` `[N]`."""
        length = tokens.astype(np.float64)
        return self.token * length + self.pair * length**2 + self.patch * patches


@dataclass(frozen=True)
class CostsOnDemand:
    """The costs of samples of `tokens` and `patches` `[N]`, computed for those that are asked for: no array of them."""

    cost: Cost
    tokens: NDArray[np.int32]
    patches: NDArray[np.int32]

    def __getitem__(self, index: int | list[int]) -> Any:
        """The cost of a sample, or `[K]` of a list of them."""
        if isinstance(index, int):
            return self[[index]][0]
        return self.cost(self.tokens[index], self.patches[index])


def cost_of(model: Any) -> Cost:
    """The cost of a model's samples: 2 FLOPs a weight and token forward, as many for the gradient of its input and of
    the weight. A frozen language model still passes gradients on to what comes before it; a frozen tower does not.

    Causal attention adds 2 FLOPs a layer, channel and pair of tokens (performed on half of the pairs, for queries with
    keys and for scores with values). Of several encoders, each counts by the
    patches that an image of its own size has in it.
    """
    llm = getattr(model, "llm", None)
    if llm is None:
        return Cost()
    passes = 3.0 if _is_trained(llm) else 2.0
    embedding = llm.base_vocab_size * llm.dim
    token = passes * 2.0 * max(sum(p.numel() for p in llm.parameters()) - embedding, 1)
    pair = passes * 2.0 * len(llm.layers) * llm.dim
    encoders = [*find_encoders(model).values()]
    patches = [count_typical_patches(encoder) for encoder in encoders]
    flops = sum(_flops_of_patch(encoder) * count for encoder, count in zip(encoders, patches, strict=True))
    return Cost(token, pair, flops / max(sum(patches), 1))


def _flops_of_patch(encoder: nn.Module) -> float:
    """Of one patch in one vision encoder, without attention."""
    return (3.0 if _is_trained(encoder) else 1.0) * 2.0 * sum(p.numel() for p in encoder.parameters())


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
