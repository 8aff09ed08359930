"""Context: how what a family gives to `decode` reaches the blocks that it inserted among a language model's layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn

from vlm_train.errors import ConfigError
from vlm_train.models.parts import ReadsContext


def context_readers(module: nn.Module) -> list[Any]:
    """The blocks in `module` that read the context."""
    return [block for block in module.modules() if isinstance(block, ReadsContext)]


@contextmanager
def given_context(module: nn.Module, context: Any) -> Iterator[None]:
    """The blocks in `module` hold `context` inside the `with`, and nothing after it.

    Raises:
        ConfigError: there is a context, but nothing reads it.
    """
    readers = [] if context is None else context_readers(module)
    if context is not None and not readers:
        raise ConfigError("llm: decode got a context, but none of its blocks reads one; insert blocks that do")
    with _held(readers, [context] * len(readers)):
        yield


def recomputed_context(module: nn.Module) -> Callable[[], tuple[AbstractContextManager, AbstractContextManager]]:
    """`context_fn` of `torch.utils.checkpoint`: `module` recomputes with the context of its forward, long gone then."""
    readers = context_readers(module)
    return lambda: (nullcontext(), _held(readers, [reader.context for reader in readers]))


@contextmanager
def _held(readers: Sequence[Any], contexts: Sequence[Any]) -> Iterator[None]:
    before = [reader.context for reader in readers]
    for reader, context in zip(readers, contexts, strict=True):
        reader.context = context
    try:
        yield
    finally:
        for reader, context in zip(readers, before, strict=True):
            reader.context = context
