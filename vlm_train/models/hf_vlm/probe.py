"""Made samples for a whole model: what an export computes, and whether samples of a packed row see each other.

Legend: T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlm_train.contracts.batch import IGNORE, Batch, MediaBatch, PackedSequences, Slots, TokenStream
from vlm_train.contracts.layout import PLACEHOLDER_ID
from vlm_train.contracts.media import Grid3, MediaInput

SHADES = (0, 90)
"""Of the pictures of two samples; changed ones are 120 lighter."""
TOLERANCE = 1e-3
"""Of packed logits to those of each sample alone, relative to the largest; 16 bits are less exact."""


def make_probe(model: Any, samples: Sequence[tuple[int, int]] = ((0, 0),)) -> Batch:
    """One row of samples, each a picture among eight words: (its shade, the number of its first word)."""
    low = [one for one in range(8, 200) if one not in model.wants.type_ids]
    texts, shown = list[list[int]](), list[dict[str, Tensor]]()
    for shade, first in samples:
        picture = Image.linear_gradient("L").convert("RGB").resize((48, 32)).point(lambda v, s=shade: (v + s) % 256)
        fields, written = model.processor.prepare(picture)
        words = low[first : first + 8]
        texts.append([*words[:4], *written, *words[4:]])
        shown.append({name: torch.from_numpy(one) for name, one in fields.items()})
    lengths = tuple(map(len, texts))
    ids = torch.tensor([[one for text in texts for one in text]])
    index = (ids[0] == model.image_id).nonzero().flatten()
    counts = tuple(text.count(model.image_id) for text in texts)
    zeros, starts = torch.zeros_like(ids), torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    stream = TokenStream(
        ids=ids.masked_fill(ids == model.image_id, PLACEHOLDER_ID),
        labels=torch.full_like(ids, IGNORE),
        weights=zeros.float(),
        positions=torch.cat([torch.arange(length) for length in lengths])[None, None],
        segment_ids=torch.cat([torch.full((length,), n) for n, length in enumerate(lengths, 1)])[None].int(),
        attention_group=zeros.int(),
        slots=Slots(index=index, placeholders=len(index)),
        supervised=zeros[0, :0],
        plain_causal=len(samples) == 1,
        causal=PackedSequences(lengths=lengths, max_length=max(lengths), cu_seqlens=starts),
        sample_lengths=(lengths,),
    )
    inputs = MediaInput(
        values=torch.zeros(len(samples), 3, 1, 1, dtype=torch.uint8),
        grids=tuple(Grid3(1, 1, count) for count in counts),
        view_counts=(1,) * len(samples),
        fields={name: torch.cat([one[name] for one in shown]) for name in shown[0]},
        field_counts={name: tuple(len(one[name]) for one in shown) for name in shown[0]},
    )
    rows = torch.zeros(len(samples), dtype=torch.int64)
    return Batch(text={"llm": stream}, media=MediaBatch(inputs={"vision": inputs}, slot_counts=counts, row=rows))


@torch.no_grad()
def find_contamination(model: Any) -> str | None:
    """Why samples of this model cannot share a row, found by trying; None: each gives what it gives alone, to the bit
    whatever stands beside it."""
    training = model.training
    model.eval()
    try:
        pair = [(SHADES[0], 0), (SHADES[1], 8)]
        split = make_probe(model, pair).text["llm"].sample_lengths[0][0]  # type: ignore[index]
        hidden = _run(model, pair)
        for place, part in enumerate((hidden[:split], hidden[split:])):
            alone = _run(model, pair[place : place + 1])
            difference = (part - alone).abs().max() / alone.abs().max()
            if not difference <= TOLERANCE:
                return f"a packed sample differs from the same sample alone by {difference:.1e} of the largest number"
            changed = [*pair]
            changed[1 - place] = (pair[1 - place][0] + 120, pair[1 - place][1] + 60)
            other = _run(model, changed)
            same = other[:split] if place == 0 else other[split:]
            if not torch.equal(part, same):
                return "a sample of a packed row changes with the one beside it"
    finally:
        model.train(training)
    return None


def _run(model: Any, samples: Sequence[tuple[int, int]]) -> Tensor:
    """Hidden states `[T, D]` of one row."""
    device = next(model.llm.parameters()).device
    hidden: Tensor = model(make_probe(model, samples).to(device))
    return hidden[0].float()
