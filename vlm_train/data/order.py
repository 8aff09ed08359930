"""The order of samples: a pure function of (seed, epoch), dealt to optimizer steps, ranks and micro-batches.

Nothing here remembers anything. The state of a data stream is the number of finished optimizer steps, so a run resumes
at any step in constant time, with any number of workers, and another world size with the same global batch sees the
same global batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from vlm_train.errors import ConfigError
from vlm_train.randomness import derive_seed


@dataclass(frozen=True, slots=True)
class Address:
    """One drawn sample: its index among all samples, and the epoch that draws it (both seed its augmentation)."""

    index: int
    epoch: int


@dataclass(frozen=True)
class Plan:
    """Deals the endless shuffled order to optimizer steps.

    Attributes:
        samples: size of the data set.
        batch: samples per optimizer step, over all ranks.
        total: samples of the whole run; the last step may be short.
        world: ranks.
        micro: rows per rank and forward pass.
    """

    samples: int
    batch: int
    total: int
    seed: int
    world: int = 1
    micro: int = 1
    shuffle: bool = True

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ConfigError("data.train: no samples")
        if self.batch % self.world:
            raise ConfigError(
                f"batch.samples={self.batch} cannot be shared evenly by {self.world} ranks; "
                f"allowed: multiples of {self.world}"
            )

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return math.ceil(self.total / self.batch)

    @property
    def micro_count(self) -> int:
        """Micro-batches per optimizer step and rank (gradient accumulation)."""
        return math.ceil(self.batch // self.world / self.micro)

    def step(self, step: int, rank: int = 0) -> list[list[Address]]:
        """The samples of one optimizer step for one rank, as `micro_count` lists (empty ones in a short last step).

        The step's samples are dealt round-robin to the ranks, so a short last step is as even as it can be.
        """
        first = step * self.batch
        mine = range(first + rank, min(first + self.batch, self.total), self.world)
        addresses = [self.address(position) for position in mine]
        return [addresses[m * self.micro : (m + 1) * self.micro] for m in range(self.micro_count)]

    def address(self, position: int) -> Address:
        """The sample at a position of the endless order."""
        epoch, offset = divmod(position, self.samples)
        index = int(_permutation(self.seed, epoch, self.samples)[offset]) if self.shuffle else offset
        return Address(index=index, epoch=epoch)


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The shuffled order of one epoch (cached: a step may span two epochs)."""
    return np.random.default_rng(derive_seed(seed, "order", epoch)).permutation(size)
