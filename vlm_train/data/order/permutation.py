"""A random order that is computed, not stored: any place of it in constant time and memory, the same on every machine.

A Feistel network over two mixed digits (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002): a number
below `rows * columns` is a row and a column, each round adds a hash of one to the other, and every round can be undone,
so no two numbers meet. `rows * columns` is a little more than `size`: a number that lands at or above it goes on until
it lands below, which keeps it a permutation. Integers only.
"""

from __future__ import annotations

import math

from vlm_train.seeds import derive_seed

ROUNDS = 3  # each of which changes the row and the column
WORD = (1 << 64) - 1


class Permutation:
    """The numbers 0 to `size` - 1 in an order that follows from `seed`."""

    def __init__(self, seed: int, size: int) -> None:
        self.size = size
        self.rows = max(1, math.isqrt(size - 1) + 1) if size > 1 else 1
        self.columns = -(-size // self.rows)
        keys = [derive_seed(seed, "round", number) for number in range(2 * ROUNDS)]
        self._keys = list(zip(keys[::2], keys[1::2], strict=True))

    def __call__(self, place: int) -> int:
        """What stands at `place`. Raises `IndexError` outside the order."""
        if not 0 <= place < self.size:
            raise IndexError(f"place {place} of {self.size}")
        rows, columns = self.rows, self.columns
        while True:
            row, column = divmod(place, columns)
            for row_key, column_key in self._keys:
                row = (row + _mix_bits(column + row_key)) % rows
                column = (column + _mix_bits(row + column_key)) % columns
            place = row * columns + column
            if place < self.size:
                return place


def _mix_bits(value: int) -> int:
    """A hash of 64 bits: the finalizer of SplitMix64."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & WORD
    return value ^ (value >> 31)
