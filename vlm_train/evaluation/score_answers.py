"""`mode=score columns.scores=answers`: how likely a run's model finds pairs of answers, as columns that a preference
objective reads in place of a reference model (`objective.dpo.reference_columns`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from data_pipelines.sample import Sample
from vlm_train.contracts.family import PredictsTokens
from vlm_train.data.text.render import RenderOptions
from vlm_train.evaluation.score_shards import RENDERED, Shown, require_methods, score_captions, write_columns

if TYPE_CHECKING:
    from vlm_train.build import Assembly
    from vlm_train.data.processor import Processor

COLUMNS = ("chosen_logp", "rejected_logp")
"""Log-likelihoods of the chosen and of the rejected answer of a sample, sums over tokens by their weights."""


def write_scores(cfg: DictConfig) -> dict[str, Any]:
    """`mode=score`: scores of captions, or of answers, or what a teacher says of their tokens."""
    from vlm_train.evaluation.score_teacher import score_tokens

    return {"captions": score_captions, "answers": score_pairs, "teacher": score_tokens}[cfg.columns.scores](cfg)


def score_pairs(cfg: DictConfig) -> dict[str, Any]:
    """Write the log-likelihoods of both answers of every sample, as training would compute them in this precision."""
    rendered = {name: cfg.data[name] for name in RENDERED}
    options = RenderOptions(**rendered, rejected=True)

    def show_pair(processor: Processor, sample: Sample, blobs: Sequence[bytes]) -> Shown:
        text = processor.render(sample, options)
        views = processor.make_views(blobs, media=sample.media, shown=text.media)
        return Shown(sample.key, views, [text])

    def score_rows(assembly: Assembly, shown: Sequence[Shown]) -> list[dict[str, Any]]:
        found = _read_pairs(assembly, shown, cfg.columns.gamma)
        return [
            {"key": one.key, **dict(zip(COLUMNS, pair, strict=True))} for one, pair in zip(shown, found, strict=True)
        ]

    about = {"data": rendered, "gamma": cfg.columns.gamma}
    return write_columns(cfg, COLUMNS, about, show_pair, score_rows)


def _read_pairs(assembly: Assembly, shown: Sequence[Shown], gamma: float | None) -> list[tuple[float, ...]]:
    """The log-likelihoods of both answers of every sample."""
    from vlm_train.contracts.objective import StepContext
    from vlm_train.data.collate import Example, collate_rows
    from vlm_train.objectives.answers import ANSWERS, score_answers

    model = require_methods(assembly, (PredictsTokens,), "score")
    rows = [[Example(one.texts[0], one.views)] for one in shown]
    batch = collate_rows(rows, assembly.processor.images).to(next(model.parameters()).device)
    found = [score_answers(model, batch, stream, StepContext(), gamma=gamma)[0].tolist() for stream in ANSWERS]
    return [*zip(*found, strict=True)]
