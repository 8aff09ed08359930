"""Response dropout: residual dropout of the positions whose label is learned, so that answers lean on the image and not
on the answer so far (Molmo and Molmo2; `response_residual_dropout` in olmo/nn/llm.py of github.com/allenai/molmo2).

Legend: B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlm_train.errors import ConfigError

SETTING = "llm.response_residual_dropout"

BRANCH_ENDS = (
    ("post_attention_layernorm", "post_feedforward_layernorm"),  # norms behind the branches: Gemma 2, OLMo 2
    ("post_self_attn_layernorm", "post_mlp_layernorm"),  # GLM-4
    ("self_attn", "mlp"),
    ("self_attn", "fc2"),  # OPT
    ("attn", "mlp"),
    ("attention", "mlp"),
)
"""The last module of a layer's branch of attention, and of its MLP. The first pair that a layer has is taken."""


class ResponseDropout:
    """Drops numbers of both branches of every layer of one language model, before they are added to the layer's input.

    The layers stay what they are. The mask goes into a layer as an argument, so that a layer that is computed again in
    backward, after other passes, drops what it dropped.

    Attributes:
        response: `[B, T]`, True where a label is learned, of the pass that runs; None: nothing is dropped.

    Raises:
        ConfigError: `rate` is no probability below 1.
    """

    def __init__(self, rate: float) -> None:
        if not 0 <= rate < 1:
            raise ConfigError(f"{SETTING}: got {rate}; allowed: 0, or a probability below 1")
        self.rate = rate
        self.response: Tensor | None = None

    def __bool__(self) -> bool:
        """Whether anything is dropped."""
        return self.rate > 0

    def add_to(self, llm: Any) -> None:
        """Let the layers of `llm` drop, those that do not yet. Raises `ConfigError` if their branches are unknown."""
        for layer in llm.layers if self else ():
            if not isinstance(getattr(layer.forward, "__self__", None), _DroppingLayer):
                _DroppingLayer(self, layer)

    @contextmanager
    def given(self, response: Tensor | None) -> Iterator[None]:
        """The pass inside the `with` drops at `response`."""
        before, self.response = self.response, response
        try:
            yield
        finally:
            self.response = before


class _DroppingLayer:
    """One layer and the mask of its pass. An object, not a closure: a deep copy of the model gets its own."""

    def __init__(self, dropout: ResponseDropout, layer: nn.Module) -> None:
        self.dropout, self.plain_forward = dropout, layer.forward
        self.response: Tensor | None = None
        for name in _find_branch_ends(layer):
            getattr(layer, name).register_forward_hook(self.drop)
        layer.forward = self.forward
        layer.register_forward_pre_hook(self.add_mask, with_kwargs=True)

    def add_mask(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the layer, and before activation checkpointing, which keeps what `forward` is given."""
        return args, kwargs | {"response_mask": self.dropout.response}

    def forward(self, *args: Any, response_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """The layer's own, with the mask for `drop`."""
        self.response = response_mask
        return self.plain_forward(*args, **kwargs)

    def drop(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The branch's output `[B, T, D]` or `[B * T, D]`, alone or first of a tuple, with dropout at the answer."""
        if self.response is None or not module.training:
            return output
        values: Tensor = output[0] if isinstance(output, tuple) else output
        here = self.response.view(*values.shape[:-1], 1)
        values = torch.where(here, F.dropout(values, self.dropout.rate), values)
        return (values, *output[1:]) if isinstance(output, tuple) else values


def _find_branch_ends(layer: nn.Module) -> tuple[str, str]:
    for names in BRANCH_ENDS:
        if all(hasattr(layer, name) for name in names):
            return names
    known = "; ".join(" and ".join(names) for names in BRANCH_ENDS)
    raise ConfigError(f"{SETTING}: {type(layer).__name__} has no branches of known names ({known}); use 0")
