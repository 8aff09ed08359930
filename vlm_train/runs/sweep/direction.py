"""Which way a sweep's metric is better, known before its first job."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser

from vlm_train.check.check import check_config
from vlm_train.check.hydra_errors import Composition
from vlm_train.config.compose import compose_config
from vlm_train.errors import AssetError, ConfigError

LOWER_IS_BETTER = re.compile(r"loss|perplexity|error", re.IGNORECASE)


def direction_of(metric: str, overrides: Sequence[str]) -> str:
    """ "minimize" or "maximize": as the evaluator declares whose metric it is, else by its name.

    Args:
        metric: a final metric of a run, `val_loss` or `<evaluator>/<metric>`.
        overrides: the sweep's command line. Its evaluators are those of the job with the first of all values.
    """
    higher = _declared(overrides).get(metric) if "/" in metric else None
    lower = bool(LOWER_IS_BETTER.search(metric)) if higher is None else not higher
    return "minimize" if lower else "maximize"


def _declared(overrides: Sequence[str]) -> dict[str, bool]:
    """`<evaluator>/<metric>` -> whether higher is better; empty where the first job cannot be composed or is wrong,
    which the job itself reports."""
    from vlm_train.build import build_evaluators
    from vlm_train.contracts.evaluator import every_metric

    try:
        cfg = compose_config(_first_values(overrides))
        if cfg.schedule is not None:  # results are those of the last stage
            last = cfg.schedule.stages[-1]
            own = [o for o in _first_values(overrides) if not o.startswith("schedule")]
            cfg = compose_config([f"recipe={last.recipe}", *last.overrides, *own])
        check_config(cfg, need_assets=False)  # nothing is constructed that is not trusted
        return every_metric(build_evaluators(cfg))
    except (*Composition, ConfigError, AssetError):
        return {}


def _first_values(overrides: Sequence[str]) -> Iterator[str]:
    """The overrides of a job; of several values the first, none of what only a sweeper can draw."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.key_or_group.startswith("hydra"):
            continue
        if not override.is_sweep_override():
            yield str(override.input_line)
        elif override.is_discrete_sweep():
            yield f"{override.get_key_element()}={next(override.sweep_string_iterator())}"
