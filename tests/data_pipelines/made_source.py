"""A source of made records, for builds in other processes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from data_pipelines.errors import BadSample
from data_pipelines.sample import Annotation, Sample, Text, Turn
from data_pipelines.sources import Record


class MadeSource:
    """`counts[p]` text samples in part p. `bad`, `twice` and `broken` are part numbers.

    The last record of a `bad` part is unusable, that of a `twice` part has the key of the first sample of all, and a
    `broken` part raises in its middle. While `gate` is a file, parts from `slow` on wait; every part that is begun is
    noted in `log`.
    """

    name, license, split = "made", "CC0-1.0", "train"

    def __init__(
        self,
        *,
        counts: list[int],
        bad: list[int] | None = None,
        twice: list[int] | None = None,
        broken: list[int] | None = None,
        log: str | None = None,
        gate: str | None = None,
        slow: int = 0,
    ) -> None:
        self.counts, self.bad, self.twice, self.broken = list(counts), bad or [], twice or [], broken or []
        self.log, self.gate, self.slow = log, gate, slow

    @property
    def parts(self) -> int:
        return len(self.counts)

    def read(self, part: int) -> Iterator[Record]:
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{part}\n")
        for i in range(self.counts[part]):
            while self.gate and part >= self.slow and Path(self.gate).exists():
                time.sleep(0.01)
            last = i == self.counts[part] - 1
            if last and part in self.broken:
                raise ZeroDivisionError(f"part {part}")
            if last and part in self.bad:
                yield BadSample(f"record {part}-{i}: no answer")
            else:
                yield self.sample(*((0, 0) if last and part in self.twice else (part, i))), []

    def sample(self, part: int, i: int) -> Sample:
        ask = Turn(role="user", parts=(Text(text=f"Number {i} of part {part}?"),))
        answer = Turn(role="assistant", parts=(Text(text="x" * (7 * i % 40 + 1)),))
        return Sample(key=f"{part}-{i}", annotations=(Annotation(turns=(ask, answer)),), source=self.name)
