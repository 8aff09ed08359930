"""Randomness has an address: every random choice is a pure function of the run seed and where it is made.

Nothing depends on how many numbers were drawn before, so an interrupted run repeats exactly what it would have done.
"""

from __future__ import annotations

import hashlib


def derive_seed(*address: int | str) -> int:
    """A 63-bit seed for an address such as `(seed, "sample", epoch, index)`; equal on every machine and process."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, address)).encode(), digest_size=8).digest(), "big") >> 1
