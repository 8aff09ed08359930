"""The training state as flat pieces of named tensors, as strategies give it and checkpoints keep it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

WEIGHT = "weight"
"""The kind of a piece that is a part of a parameter; others are named as the optimizer names its states."""


@dataclass(frozen=True)
class Piece:
    """A part of one tensor of the training state that this process holds.

    Attributes:
        name: of the parameter.
        kind: `WEIGHT`, or the optimizer's name for a state ("exp_avg").
        start: of its first element within the flattened whole.
        tensor: 1-D and live: what is written to it is trained on.
        owned: whether this process writes it into checkpoints: one does of those that hold the same.
        single: one number for the whole parameter, such as how often it was updated.
    """

    name: str
    kind: str
    start: int
    tensor: Tensor
    owned: bool
    single: bool = False


class HasState(Protocol):
    """What `checkpoint` asks of a strategy."""

    shards_model: bool

    def pieces(self, named: dict[str, nn.Parameter]) -> Iterator[Piece]:
        """The parts of the training state that this process holds, of the learning parameters `named`."""

    def whole(self, named: dict[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
        """Every learning parameter as a whole, in its most exact form. A collective: every rank goes through it."""

    def allocate_state(self, kinds: Mapping[str, bool]) -> None:
        """Make the optimizer hold states of these kinds, which `pieces` then gives; True: one number a parameter."""
