"""How long the training samples are, and how full rows get."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_pipelines.errors import BadSample
from vlm_train.data.datamodule import VLMData
from vlm_train.data.dataset import Samples, Source
from vlm_train.data.order.packing import fill_rows
from vlm_train.data.text.tokenizer import find_unknown_id
from vlm_train.errors import ConfigError

PACKED = 8192
"""Samples that are packed to see how full rows get."""

LOOKED_AT, FEWEST = 1024, 64
"""Samples in which targets that the tokenizer does not know are looked for: of all sources, and of each at least."""

WORTH_SAYING = 0.01
"""Share of them that is said."""


def measure_sources(data: VLMData, max_unknown: float | None = None) -> None:
    """Measure every training source, and print a line for each.

    Raises:
        ConfigError: as `require_known_targets`.
    """
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
    require_known_targets(data.train, max_unknown)


def require_known_targets(samples: Samples, most: float | None) -> None:
    """Look for targets that the tokenizer does not know, in some samples of every source, and say where there are many.

    Args:
        most: share of a source's targets that is borne, `trainer.guard.max_unknown`; None: any, nothing is looked at.

    Raises:
        ConfigError: a source has more.
    """
    unknown_id = find_unknown_id(samples.processor.tokenizer)
    if most is None or unknown_id is None:
        return
    problems = []
    for source in samples.sources:
        unknown, targets = _count_unknown(samples, source, unknown_id)
        share = unknown / max(targets, 1)
        where = f"{source.name or source.shards.address}: {share:.1%} of the {targets:,} learned tokens looked at"
        if share > most:
            problems.append(
                f"{where} are unknown to the tokenizer, more than trainer.guard.max_unknown={most:g}. Choose one that "
                "knows the words of the answers (tokenizer=..., or tokenizer.shards of this data); mode=show shows "
                "them."
            )
        elif share > WORTH_SAYING:
            print(f"warning: {where} are unknown to the tokenizer; mode=show shows them.", flush=True)
    if problems:
        raise ConfigError(problems)


def _count_unknown(samples: Samples, source: Source, unknown_id: int) -> tuple[int, int]:
    """Unknown targets, and targets, of some samples of a source, evenly spread over it."""
    unknown = targets = 0
    most = max(LOOKED_AT // len(samples.sources), FEWEST)
    for place in range(0, source.size, -(-source.size // most)):
        number = source.first + place if source.pieces is None else source.pieces[place, 0]
        try:
            rendered = samples.processor.render(source.shards.read_sample(int(number)), samples.render_options)
        except BadSample:  # training meets it, and says why
            continue
        for stream in rendered.streams.values():
            unknown += int((stream.labels == unknown_id).sum())
            targets += stream.supervised
    return unknown, targets


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
