"""Blocks inserted among the layers of a language model, such as gated cross-attention to images.

The layers stay what they are: a hook runs the block on what enters its layer. So names of weights, checkpoints, LoRA's
patterns and what a decoder reads of its layers (`attention_type`, `self_attn`) are those of the model without blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from vlm_train.contracts.cross_states import CrossStates
from vlm_train.errors import ConfigError

MakeBlock = Callable[[], nn.Module]
"""Makes one block: `block(hidden [R, Q, D], cross_states) -> [R, Q, D]`."""


class BlockInserter:
    """Inserts blocks into one language model and hands them the cross states of its calls."""

    def __init__(self) -> None:
        self.groups: list[nn.ModuleList] = []
        self.cross_states: CrossStates | None = None

    def insert(self, layers: nn.ModuleList, make_block: MakeBlock, every: int) -> nn.ModuleList:
        """See `LanguageModel.insert`."""
        if not 1 <= every <= len(layers):
            raise ConfigError(
                f"model: blocks every {every} layers, but the language model has {len(layers)}; "
                f"allowed: 1 to {len(layers)}"
            )
        targets = list(layers)[every - 1 :: every]
        group = nn.ModuleList(make_block() for _ in targets)
        for index, layer in enumerate(targets):
            layer.register_forward_pre_hook(_RunBlock(self, group, index), with_kwargs=True)
        self.groups.append(group)
        return group

    @contextmanager
    def given(self, cross_states: CrossStates | None) -> Iterator[None]:
        """The blocks get `cross_states` inside the `with`.

        Raises:
            ConfigError: cross states without blocks, or blocks without cross states. The latter would let ranks make
                different collective calls.
        """
        if cross_states is not None and not self.groups:
            raise ConfigError("llm: it got cross states, but has no blocks that read them; call llm.insert")
        if cross_states is None and self.groups:
            raise ConfigError(
                "llm: its inserted blocks got no cross states; a batch without media passes those of its blank view"
            )
        before, self.cross_states = self.cross_states, cross_states
        try:
            yield
        finally:
            self.cross_states = before

    @contextmanager
    def following_cache(self, decoder: nn.Module) -> Iterator[None]:
        """The blocks know how many tokens the key-value cache of each call of `decoder` holds inside the `with`."""

        def set_query_start(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if self.cross_states is not None:
                cache = kwargs.get("past_key_values")
                start = 0 if cache is None else int(cache.get_seq_length())
                self.cross_states = replace(self.cross_states, query_start=start)

        handle = decoder.register_forward_pre_hook(set_query_start, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


class _RunBlock:
    """The hook of one layer. An object, not a closure: a deep copy of the model gets hooks of its own."""

    def __init__(self, inserter: BlockInserter, group: nn.ModuleList, index: int) -> None:
        self.inserter, self.group, self.index = inserter, group, index

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # The block is looked up, not held: adapters may have replaced it.
        block, cross_states = self.group[self.index], self.inserter.cross_states
        if args:
            return (block(args[0], cross_states), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": block(kwargs["hidden_states"], cross_states)}


def check_ownership(model: nn.Module) -> None:
    """Raise `ConfigError` where a family inserted blocks but did not keep them: nobody would train or save them."""
    inserter = getattr(getattr(model, "llm", None), "inserter", None)
    if inserter is None:
        return
    owned = {id(module) for module in model.modules()}
    if any(id(group) not in owned for group in inserter.groups):
        raise ConfigError(
            f"model: {type(model).__name__} inserted blocks but does not hold them; "
            "keep them: self.blocks = llm.insert(...)"
        )
