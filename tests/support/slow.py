"""Parameters of a test of which `make test` runs a few, and `make test-all` every one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import pytest


def run_few(names: Sequence[str], few: Collection[str]) -> list[Any]:
    """`names` for `parametrize`: those not among `few` are slow tests. Raises `ValueError` if one of `few` is gone."""
    if gone := sorted(set(few) - set(names)):
        raise ValueError(f"no such parameters: {', '.join(gone)}")
    return [name if name in few else pytest.param(name, marks=pytest.mark.slow) for name in names]
