"""How well a model still writes text without images: perplexity and next-token accuracy on held-out texts.

Legend: S supervised tokens, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data_pipelines.errors import BadSample
from data_pipelines.shards.shard_set import ShardSet
from vlm_train.contracts.evaluator import Findings, ResultRow
from vlm_train.contracts.family import PredictsTokens
from vlm_train.data.collate import Example, collate_rows
from vlm_train.data.processor import Processor
from vlm_train.data.text.render import RenderOptions
from vlm_train.errors import ConfigError
from vlm_train.evaluation.common import Unusable, evaluation_mode, progress_bar
from vlm_train.models.layers.passes import outputs_of

CHUNK = 1024
"""Tokens whose logits are held at a time."""


class TextPerplexity:
    """`perplexity`, the exponential of the mean loss of the answers' tokens, and `token_accuracy`, the share of them
    that the model would have chosen.

    Every token counts as one, whatever `batch.normalize` says. Samples with images or videos are left out, and counted
    in the table.

    Args:
        shards: shard set with texts.
        limit: first samples only.
        batch: samples a call of the model.
        at_validation: also run at every validation.
    """

    needs = (PredictsTokens,)
    primary = "perplexity"
    higher_is_better: ClassVar[Mapping[str, bool]] = {"perplexity": False, "token_accuracy": True}

    def __init__(self, *, shards: str, limit: int | None = None, batch: int = 16, at_validation: bool = True) -> None:
        if batch < 1 or (limit is not None and limit < 1):
            raise ConfigError(f"eval: got batch={batch}, limit={limit}; allowed: from 1")
        self.shards, self.limit, self.batch, self.at_validation = shards, limit, batch, at_validation
        self.reported: set[tuple[str, int]] = set()

    def run(self, model: nn.Module, processor: Processor, folder: Path, *, final: bool) -> Findings:
        """Measure the model. Raises ConfigError for a set without a text that can be used."""
        del folder
        shards = ShardSet(self.shards)
        count = len(shards) if self.limit is None else min(self.limit, len(shards))
        unusable, device = Unusable(shards, self.reported), next(model.parameters()).device
        sums = torch.zeros(3, dtype=torch.float64)
        with evaluation_mode(model):
            progress = progress_bar("texts", count)
            for start in range(0, count, self.batch):
                numbers = range(start, min(start + self.batch, count))
                if rows := self._render_texts(processor, shards, numbers, unusable):
                    batch = collate_rows(rows, processor.images, streams=tuple(processor.streams)).to(device)
                    hidden = outputs_of(model, batch, "llm").hidden.flatten(0, 1)
                    stream = batch.text["llm"]
                    index = stream.supervised
                    sums += _sum_losses(model, hidden[index], stream.labels.flatten()[index])
                progress(len(numbers))
        unusable.require_usable(count)
        loss, hits, tokens = sums.tolist()
        found = {"perplexity": math.exp(min(loss / tokens, 700.0)), "token_accuracy": hits / tokens}
        note = f"{int(tokens):,} tokens of answers without images{unusable.note}"
        rows_found = [ResultRow("this run", value, int(tokens), note, name) for name, value in found.items()]
        return Findings(found, self.primary, self.higher_is_better, tuple(rows_found) if final else ())

    def _render_texts(
        self, processor: Processor, shards: ShardSet, numbers: range, unusable: Unusable
    ) -> list[list[Example]]:
        options = RenderOptions(max_length=processor.max_length, over_length="truncate")
        rows = []
        for number in numbers:
            with unusable.catch_bad_sample(number):
                sample = shards.read_sample(number)
                if sample.media:
                    raise BadSample(f"{len(sample.media)} media items; perplexity is of text alone", kind="media")
                rendered = processor.render(sample, options)
                rows.append([Example(rendered, {name: [] for name in processor.images})])
        return rows


def _sum_losses(model: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    """Sum of the losses, number of right choices and of tokens, of hidden states `[S, D]`; float64 on the CPU."""
    found = hidden.new_zeros(3, dtype=torch.float64)
    for states, targets in zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True):
        logits = model.logits(states).float()  # [S, V]
        found[0] += F.cross_entropy(logits, targets, reduction="sum")
        found[1] += (logits.argmax(dim=-1) == targets).sum()
        found[2] += len(targets)
    return found.cpu()
