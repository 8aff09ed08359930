"""How long the training samples are, and how full rows get."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlm_train.data.datamodule import VLMData
from vlm_train.data.order.packing import fill_rows

PACKED = 8192
"""Samples that are packed to see how full rows get."""


def measure_sources(data: VLMData) -> None:
    """Measure every training source, and print a line for each."""
    tokens = data.train.measure_lengths(Path(data.cache)).tokens
    assert data.train.lengths is not None
    patches, first = data.train.lengths.patches, 0
    for source in data.train.sources:
        part = slice(first, first + source.size)
        print(f"{source.name or source.shards.address}: {describe_lengths(tokens[part], patches[part])}")
        first += source.size
    if data.pack is not None:
        drawn = [data.mixture.draw_sample(position).index for position in range(min(PACKED, data.mixture.samples))]
        rows = fill_rows(
            tokens[drawn].tolist(), data.pack, patches=patches[drawn].tolist(), max_patches=data.pack_patches
        )
        share = tokens[drawn].sum() / (len(rows) * data.pack)
        print(f"rows of {data.pack:,} tokens: {len(drawn) / len(rows):.1f} samples each, {share:.1%} real tokens")


def describe_lengths(tokens: NDArray[np.int32], patches: NDArray[np.int32]) -> str:
    """Samples of these lengths `[N]` in a line."""
    usable = tokens[tokens > 0]
    bad = f"; {len(tokens) - len(usable):,} cannot be used" if len(usable) < len(tokens) else ""
    if not len(usable):
        return f"{len(tokens):,} samples{bad}"
    low, half, high, most = (f"{number:,.0f}" for number in np.quantile(usable, [0.0, 0.5, 0.99, 1.0]))
    seen = f"{patches.sum():,} patches, at most {patches.max()} a sample"
    return (
        f"{len(tokens):,} samples, {usable.sum():,} tokens: least {low}, median {half}, mean {usable.mean():,.0f}, "
        f"99th percentile {high}, most {most}; {seen}{bad}"
    )
