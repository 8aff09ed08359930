"""`batch.normalize=source`: every data source weighs the same in the loss, however much of it a step holds.

With w the weight of a target, n the number of sources in the optimizer step (on all ranks) and W(s), W the sums of w
over source s and over all, the loss is

    1/n sum over s of (sum of w nll in s / W(s))  =  sum of (f(s) w) nll / W    with    f(s) = W / (n W(s))

The factors leave the denominator W as it is, so nothing but the weights changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from vlm_train.contracts.batch import Batch


def source_factors(sums: Mapping[str, float]) -> dict[str, float]:
    """Source -> f(s), from its total weight in the step on all ranks. Sources without weight have no factor."""
    present = {source: total for source, total in sums.items() if total > 0}
    whole = sum(present.values())
    return {source: whole / (len(present) * total) for source, total in present.items()}


def weigh_sources(batch: Batch, factors: Mapping[str, Mapping[str, float]]) -> Batch:
    """`batch` with the target weights of every stream in `factors` (stream -> source -> f) multiplied."""
    text = dict(batch.text)
    width = max(map(len, batch.sources), default=0) + 1
    for name in text.keys() & factors.keys():
        stream = text[name]
        table = torch.zeros(len(stream.ids), width)  # [B, 1 + segments]; segment 0 is padding
        for row, sources in enumerate(batch.sources):
            for segment, source in enumerate(sources, start=1):
                table[row, segment] = factors[name].get(source, 0.0)
        table = table.to(stream.weights.device, non_blocking=True)
        text[name] = replace(stream, weights=stream.weights * table.gather(1, stream.segment_ids.long()))
    return replace(batch, text=text)
