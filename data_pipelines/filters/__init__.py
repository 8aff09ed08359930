"""Filters: small classes with explicit keyword arguments that say which samples of a set to drop, and why.

A filter looks at samples twice. `measure` sees one sample alone, in any process. `verdict` sees what was measured, in
one process, in the order of the set, and only of samples that the filters before it keep: here a filter may remember.
A new filter is one class here and one .yaml in `data_pipelines/conf/filter`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.sample import Sample


class Drop(str):
    """The reason to drop a sample. Reasons are counted: what differs between samples does not belong into one."""


class Filter(ABC):
    """What `python -m data_pipelines.filter` asks of a filter. It is pickled once per process."""

    @abstractmethod
    def measure(self, sample: Sample, blobs: Sequence[bytes]) -> Any:
        """A `Drop`, or anything small that `verdict` needs. Raises `BadSample` for media that cannot be read."""

    def verdict(self, key: str, measured: Any) -> Drop | None:
        """Whether to drop the sample after all."""
        return None


def check_range(name: str, low: float | None, high: float | None) -> None:
    """Raise `DataError` unless some bound is given, and both agree."""
    if low is None and high is None:
        raise DataError(f"{name}: neither a minimum nor a maximum is given")
    if low is not None and high is not None and low > high:
        raise DataError(f"{name}: the minimum {low} is above the maximum {high}")


def drop_outside(name: str, value: float, low: float | None, high: float | None) -> Drop | None:
    """The reason to drop a `value` that lies outside the bounds."""
    if low is not None and value < low:
        return Drop(f"{name} below {low}")
    if high is not None and value > high:
        return Drop(f"{name} above {high}")
    return None


def text_of(sample: Sample, roles: Sequence[str]) -> str:
    """What `roles` say in all annotations, a line per turn."""
    turns = (turn for annotation in sample.annotations for turn in annotation.turns)
    return "\n".join(turn.text.strip() for turn in turns if turn.role in roles)


def check_roles(roles: Sequence[str]) -> tuple[str, ...]:
    """`roles` as a tuple. Raises `DataError` for one that does not exist."""
    from data_pipelines.sample import ROLES

    if not roles or set(roles) - set(ROLES):
        raise DataError(f"roles: got {list(roles)}; allowed: some of {', '.join(ROLES)}")
    return tuple(roles)
