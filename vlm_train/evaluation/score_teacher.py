"""`mode=score columns.scores=teacher`: what a run's model says of every learned token, its K most likely ids and their
log-probabilities, as a column that distillation reads in place of a second model (`objective.distill.teacher_columns`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from data_pipelines.sample import Sample
from data_pipelines.shards.top_tokens import TopTokens, write_records
from vlm_train.contracts.family import PredictsTokens
from vlm_train.data.text.render import RenderOptions
from vlm_train.errors import ConfigError
from vlm_train.evaluation.score_shards import RENDERED, Shown, require_methods, write_columns

if TYPE_CHECKING:
    from torch import Tensor

    from vlm_train.build import Assembly
    from vlm_train.data.processor import Processor

COLUMN = "teacher"
"""The most likely ids of every learned token of a sample, and their log-probabilities in half precision."""


def score_tokens(cfg: DictConfig) -> dict[str, Any]:
    """Write the `columns.top_k` most likely ids of every learned token, as the model finds them in this precision."""
    from vlm_train.build import build_tokenizer
    from vlm_train.data.text.tokenizer import hash_vocabulary

    rendered = {name: cfg.data[name] for name in RENDERED}
    options, tokenizer = RenderOptions(**rendered), build_tokenizer(cfg)
    top_k, vocab_size = min(cfg.columns.top_k, len(tokenizer)), len(tokenizer)

    def show_sample(processor: Processor, sample: Sample, blobs: Sequence[bytes]) -> Shown:
        text = processor.render(sample, options)
        return Shown(sample.key, processor.make_views(blobs, media=sample.media, shown=text.media), [text])

    def score_rows(assembly: Assembly, shown: Sequence[Shown]) -> list[dict[str, Any]]:
        told = _read_tokens(assembly, shown, top_k, vocab_size, cfg.columns.temperature)
        return [{"key": one.key, COLUMN: top} for one, top in zip(shown, told, strict=True)]

    def store_rows(folder: Path, shard: int, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        places = write_records(folder, shard, [row[COLUMN] for row in rows], top_k)
        return [{**row, COLUMN: place} for row, place in zip(rows, places, strict=True)]

    about = {"data": rendered, "temperature": cfg.columns.temperature, "top_k": top_k}
    about |= {"vocab_size": vocab_size, "vocabulary": hash_vocabulary(tokenizer)}
    return write_columns(cfg, (COLUMN,), about, show_sample, score_rows, store_rows)


def _read_tokens(
    assembly: Assembly, shown: Sequence[Shown], top_k: int, vocab_size: int, temperature: float
) -> list[TopTokens]:
    """The top tokens of every sample."""
    import torch

    from vlm_train.contracts.objective import StepContext
    from vlm_train.data.collate import Example, collate_rows
    from vlm_train.models.layers.passes import call_in_chunks, outputs_of

    model = require_methods(assembly, (PredictsTokens,), "score")
    rows = [[Example(one.texts[0], one.views)] for one in shown]
    batch = collate_rows(rows, assembly.processor.images).to(next(model.parameters()).device)
    hidden = outputs_of(model, batch, "llm").hidden.flatten(0, 1)[batch.text["llm"].supervised]  # [S, D]
    find = partial(_find_top, model, top_k=top_k, vocab_size=vocab_size, temperature=temperature)
    found = call_in_chunks(find, (hidden,), StepContext(), chunk=1024)
    ids, logps = (torch.cat([pair[n] for pair in found]).cpu() for n in (0, 1))
    sizes = [one.texts[0].streams["llm"].supervised for one in shown]
    return [
        TopTokens(one.int().numpy(), other.half().numpy())
        for one, other in zip(ids.split(sizes), logps.split(sizes), strict=True)
    ]


def _find_top(model: Any, hidden: Tensor, *, top_k: int, vocab_size: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Ids `[S, K]` and log-probabilities `[S, K]` from hidden states `[S, D]`."""
    logits = model.logits(hidden).float() / temperature
    if logits.shape[-1] != vocab_size:
        raise ConfigError(
            f"columns.scores: the model has a vocabulary of {logits.shape[-1]} tokens, its tokenizer {vocab_size}; "
            "columns of a teacher need both equal. Distill with reference.model=<run> instead"
        )
    logps, ids = logits.log_softmax(dim=-1).topk(top_k, dim=-1)
    return ids, logps
