"""What describes the lengths of a set's samples: counted while it is written, kept in the manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_pipelines.sample import Sample

PERCENTILES = (5, 50, 95)


def measure_lengths(sample: Sample, blobs: Sequence[bytes]) -> list[tuple[str, float]]:
    """`(name, value)` of one sample: chars and turns per annotation, pixels and bytes per media item."""
    found: list[tuple[str, float]] = [("annotations", len(sample.annotations)), ("media", len(sample.media))]
    for annotation in sample.annotations:
        found.append(("turns", len(annotation.turns)))
        found.append(("chars", sum(len(turn.text) for turn in annotation.turns)))
    for item, blob in zip(sample.media, blobs, strict=True):
        found += [("width", item.width), ("height", item.height), ("media_bytes", len(blob))]
        if item.kind == "video":
            found += [("frames", item.frames), ("seconds", item.seconds)]
    return found


@dataclass(slots=True)
class _Values:
    count: int = 0
    total: float = 0
    low: float = 0
    high: float = 0
    rounded: Counter[int] = field(default_factory=Counter)

    def compute_percentile(self, percent: int) -> int:
        """Exact below 100, else rounded down to two digits."""
        left = self.count * percent / 100
        for value in sorted(self.rounded):
            left -= self.rounded[value]
            if left <= 0:
                break
        return value

    def count_by_power_of_two(self) -> dict[str, int]:
        """Counts by power of two: `"8": 3` for three values from 8 to 15."""
        found: Counter[int] = Counter()
        for value, count in self.rounded.items():
            found[1 << value.bit_length() >> 1] += count
        return {str(low): found[low] for low in sorted(found)}


class Stats:
    """Running count, minimum, mean, maximum, percentiles and histogram of each length."""

    def __init__(self) -> None:
        self._values: dict[str, _Values] = {}

    def add_lengths(self, found: Sequence[tuple[str, float]]) -> None:
        """Count the `lengths` of one sample."""
        for name, value in found:
            self._merge_values(name, _Values(1, value, value, value, Counter((_round_down(value),))))

    def export_state(self) -> dict[str, Any]:
        """Everything counted, as plain JSON data for `merge`."""
        return {
            name: [v.count, v.total, v.low, v.high, [[n, v.rounded[n]] for n in sorted(v.rounded)]]
            for name, v in self._values.items()
        }

    def merge_state(self, state: Mapping[str, Any]) -> None:
        """Add what another `Stats` counted."""
        for name, (count, total, low, high, rounded) in state.items():
            self._merge_values(name, _Values(count, total, low, high, Counter(dict(rounded))))

    def to_json(self) -> dict[str, dict[str, Any]]:
        """`{name: {count, min, mean, max, p5, p50, p95, histogram}}`."""
        return {
            name: {"count": v.count, "min": v.low, "mean": round(v.total / v.count, 3), "max": v.high}
            | {f"p{percent}": v.compute_percentile(percent) for percent in PERCENTILES}
            | {"histogram": v.count_by_power_of_two()}
            for name, v in self._values.items()
        }

    def _merge_values(self, name: str, more: _Values) -> None:
        if name not in self._values:
            self._values[name] = more
            return
        values = self._values[name]
        values.count += more.count
        values.total += more.total
        values.low, values.high = min(values.low, more.low), max(values.high, more.high)
        values.rounded.update(more.rounded)


def _round_down(value: float) -> int:
    """`value` rounded down to two digits, so that a million lengths are a few hundred numbers."""
    whole = int(value)
    scale = 10 ** max(0, len(str(whole)) - 2)
    return whole // scale * scale
