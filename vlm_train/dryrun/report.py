"""`dry_run=true`: the whole plan of a run before it costs anything. No weights, tokenizer, data, network or GPU."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vlm_train.build import build_model, build_tokenizer
from vlm_train.check.assets import missing_assets
from vlm_train.check.model import check_model
from vlm_train.checkpoint.weights import is_in_parts
from vlm_train.config.schema import MODEL_PARTS
from vlm_train.config.trust import iterate_components
from vlm_train.dryrun.advice import Advice, Suggestion, advise_run, describe_rows
from vlm_train.dryrun.memory import GIB, Peak
from vlm_train.dryrun.plan import Plan, checkpointing_mode, make_plan, rows_at_once
from vlm_train.training.filled import find_random_parts

ASSUMED_VOCABULARY = 32000
"""Where neither the configuration nor shards say how long the vocabulary is."""

ASSUMED_NOTE = (
    f"Note        there is no tokenizer yet: counts are those of an assumed vocabulary of {ASSUMED_VOCABULARY:,}"
)


def dry_run(cfg: DictConfig) -> dict[str, Any]:
    """Build the model of `cfg` on the meta device, print its plan, and return it as plain data."""
    asked, (cfg, notes) = cfg, without_assets(cfg)
    if cfg.batch.samples is not None:  # a device has no more rows than its share
        cfg.batch.micro = min(cfg.batch.micro, -(-cfg.batch.samples // cfg.target.gpus))
    assumed = ASSUMED_NOTE in notes
    model = build_model(cfg, meta=True)
    check_model(cfg, model)
    plan = make_plan(cfg, model)
    notes += list_unfilled(asked, model)
    rest = "\n".join(note for note in notes if note != ASSUMED_NOTE)
    print("\n\n".join([*format_plan(cfg, plan, assumed_vocabulary=assumed), rest]).rstrip())
    return as_dict(cfg, plan)


def without_assets(cfg: DictConfig) -> tuple[DictConfig, list[str]]:
    """A copy in which everything still missing is null and an open vocabulary has a size, and what was assumed."""
    open_ones = re.compile(r"\S+ is missing")  # which has a note of its own below
    notes = [f"Note        {line}" for line in missing_assets(cfg, ask_hub=False) if not open_ones.match(line)]
    cfg = cfg.copy()
    for index, source in enumerate(cfg.init_from):
        if OmegaConf.is_missing(source, "run"):
            notes.append(f"Note        init_from[{index}].run is still open: a run needs it")
    cfg.init_from = []
    for path, group, node in iterate_components(cfg):
        if group in (*MODEL_PARTS, "parts") and node.get("weights") == "???":
            notes.append(f"Note        {path}.weights is still open: a run needs it")
            OmegaConf.update(cfg, f"{path}.weights", None)
    reading = [] if cfg.llm is None else [cfg.llm.config]
    reading += [cfg.connector] if cfg.connector is not None and cfg.connector.get("text") else []
    if unsized := [part for part in reading if part.get("vocab_size") is None]:
        size, known = _vocabulary_size(cfg)
        for part in unsized:
            part.vocab_size = size
        if not known:
            notes.append(ASSUMED_NOTE)
    return cfg, notes


def list_unfilled(cfg: DictConfig, model: Any) -> list[str]:
    """Notes on parts that a run would refuse: frozen, and filled by neither their weights nor `init_from`."""
    if cfg.trainer.guard.random_frozen != "refuse":
        return []
    names = [name for name, _ in model.named_parameters()]
    filled = {name for one in cfg.init_from for name in names if one.parts is None or is_in_parts(name, one.parts)}
    for path, group, node in iterate_components(cfg):
        if group in (*MODEL_PARTS, "parts") and node.get("weights") == "???":
            filled |= {name for name in names if name.startswith(f"{path.removeprefix('parts.')}.")}
    return [
        f"Note        {part} is frozen, and neither {part}.weights nor init_from fills it: a run refuses that"
        for part in find_random_parts(model, filled)
    ]


def _vocabulary_size(cfg: DictConfig) -> tuple[int, bool]:
    try:
        return len(build_tokenizer(cfg)), True
    except Exception:  # whatever the tokenizer lacks, the plan uses a guess and says so
        return ASSUMED_VOCABULARY, False


def as_dict(cfg: DictConfig, plan: Plan) -> dict[str, Any]:
    """The plan as plain data: counts, bytes, FLOPs."""
    parts: dict[str, int] = {}
    for row in plan.policy.rows:
        parts[row.part] = parts.get(row.part, 0) + row.parameters
    advice = advise_run(cfg, plan)
    return {
        "recipe": plan.recipe,
        "parameters": parts,
        "total": plan.policy.total,
        "trainable": plan.policy.trainable,
        "groups": [asdict(row) for row in plan.policy.rows],
        "visual_tokens": plan.visual_tokens,
        "row_tokens": plan.visual_tokens + cfg.target.text_tokens,
        "flops": {part: asdict(flops) for part, flops in plan.flops.items()},
        "flops_per_sample": sum(flops.total for flops in plan.flops.values()),
        "memory": {name: asdict(peak) | {"total": peak.total} for name, peak in advice.peaks.items()},
        "activations_per_row": plan.activations,
        "cheapest": advice.best,
        "configured": advice.configured,
        "configured_fits": advice.fits,
        "suggestions": [{"flag": one.flag, "strategy": one.strategy, "fits": one.fits} for one in advice.suggestions],
        **asdict(plan.length),
        "checkpoint_bytes": plan.disk.checkpoint,
        "disk_bytes": plan.disk.kept,
        "round_trip_tensors": plan.round_trip,
    }


def format_plan(cfg: DictConfig, plan: Plan, *, assumed_vocabulary: bool = False) -> list[str]:
    """The plan as sections of aligned text."""
    guess = f"\n{ASSUMED_NOTE}" if assumed_vocabulary else ""
    return [
        f"Dry run of {plan.recipe}: built on the meta device, nothing trained",
        plan.policy.format_table() + guess,
        _format_tokens(cfg, plan),
        _format_flops(plan),
        _format_memory(cfg, plan),
        _format_length(cfg, plan),
        _format_round_trip(plan),
    ]


def _format_round_trip(plan: Plan) -> str:
    if plan.round_trip is None:
        return f"Round trip  left out: no `tiny:` block says how {', '.join(plan.unsized)} becomes small"
    return f"Round trip  a tiny copy was saved and loaded: {plan.round_trip} tensors equal"


def _format_tokens(cfg: DictConfig, plan: Plan) -> str:
    longest = cfg.data.get("max_length")
    budget = "no limit" if longest is None else f"{longest} tokens a row"
    if longest is not None and longest > plan.visual_tokens:
        budget += f", {longest - plan.visual_tokens} of them text"
    elif longest is not None:
        budget += ": too few for such an image (data.max_length, or target.image_width and target.image_height)"
    of_size = f" of {plan.image_size.width} x {plan.image_size.height} pixels" if plan.image_size else ""
    return f"Tokens      {plan.visual_tokens} visual tokens an image{of_size}; {budget}"


def _format_flops(plan: Plan) -> str:
    total = sum(flops.total for flops in plan.flops.values())
    name, unit = ("TFLOP", 1e12) if total >= 1e11 else ("GFLOP", 1e9)
    rows: list[Sequence[str]] = [(f"{name} a sample", "forward", "to inputs", "to weights", "total")]
    for part, flops in plan.flops.items():
        numbers = (flops.forward, flops.input_grad, flops.weight_grad, flops.total)
        rows.append((part, *(f"{number / unit:.4g}" for number in numbers)))
    rows.append(("all", "", "", "", f"{total / unit:.4g}"))
    return format_table(rows)


DEVICE = {"gpu": "GPU", "cpu": "process"}
"""What `trainer.accelerator` runs on; `auto` is decided where the run starts."""


def _format_memory(cfg: DictConfig, plan: Plan) -> str:
    advice = advise_run(cfg, plan)
    device = DEVICE.get(cfg.trainer.accelerator, "device")
    columns = ("weights", "gradients", "optimizer", "buffers", "activations", "logits", "runtime")
    places = [place for place in ("cpu", "nvme") if any(getattr(one, place) for one in advice.peaks.values())]
    titles = ("peak", *({"cpu": "CPU", "nvme": "NVMe"}[place] for place in places), "fits")
    rows: list[Sequence[str]] = [(f"GiB a {device}", *columns, *titles)]
    for name, one in advice.peaks.items():
        parts = [_format_gib(getattr(one, column)) for column in columns]
        offloaded = [_format_gib(getattr(one, place)) if getattr(one, place) else "" for place in places]
        rows.append(
            (name, *parts, _format_gib(one.total), *offloaded, "yes" if one.fits_hardware(advice.hardware) else "no")
        )
    return "\n".join([format_table(rows), *_format_verdict(cfg, plan, advice, device)])


def _format_verdict(cfg: DictConfig, plan: Plan, advice: Advice, device: str) -> list[str]:
    """The verdict of the table: the cheapest that fits, whether the run's own does, and what to change if none does."""
    target, own = cfg.target, advice.configured
    lines = [
        f"Predicted for {describe_rows(cfg, plan.longest)} at once on {target.gpus} x {target.memory_gib:g} GiB.",
        f"Cheapest that fits: {advice.best} (strategy={advice.best})" if advice.best else "Nothing fits.",
    ]
    if any(one.cpu for one in advice.peaks.values()):
        lines[0] += f" CPU, NVMe: GiB a node, which has {target.cpu_gib:g} of CPU."
    if own and not advice.fits:
        name = own if cfg.strategy is not None else f"auto (here {own})"
        lines.append(
            f"The run's own strategy={name} does not fit: {_describe_shortage(advice.peaks.get(own), target, device)}."
        )
    if advice.suggestions:
        what = "What helps" if advice.best is None else "What avoids offloading"
        lines += [
            f"{what}, each with those before it:",
            format_table([_format_suggestion(suggestion) for suggestion in advice.suggestions]),
        ]
    now = checkpointing_mode(cfg)
    change = ", ".join(
        f"{name} {_format_gib(rows_at_once(cfg) * kept)} GiB" for name, kept in plan.activations.items() if name != now
    )
    return [
        *lines,
        f"Activations with trainer.activation_checkpointing={now}: "
        f"{_format_gib(plan.needs.activations)} GiB; {change}.",
    ]


def _format_suggestion(suggestion: Suggestion) -> tuple[str, str, str]:
    verdict = f"fits with strategy={suggestion.strategy}" if suggestion.fits else "not yet"
    return f"  {suggestion.flag}", f"{_format_gib(suggestion.peak.total)} GiB", verdict


def _describe_shortage(one: Peak | None, target: DictConfig, device: str) -> str:
    """Which memory is too small, and what the strategy needs."""
    if one is None:
        return "it cannot run so"
    if one.total > target.memory_gib * GIB:
        return f"{_format_gib(one.total)} of {target.memory_gib:g} GiB a {device}"
    return f"{_format_gib(one.cpu)} of {target.cpu_gib:g} GiB of CPU memory a node"


def _format_gib(count: float) -> str:
    """GiB with one digit, large numbers with none, small ones with two significant ones."""
    value = count / GIB
    if value >= 100 or not value:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}" if value >= 0.01 else f"{value:.4f}"


def _format_length(cfg: DictConfig, plan: Plan) -> str:
    length = plan.length
    if length.steps is None:
        steps = "unknown: there are no shards, and data.train gives no samples"
    else:
        seen = "unknown" if length.samples is None else f"{length.samples:,}"
        steps = f"{length.steps:,} optimizer steps, {length.warmup_steps:,} of them warm-up; {seen} samples a pass"
    return "\n".join(
        [
            f"Length      {steps}",
            f"Disk        {_format_bytes(plan.disk.checkpoint)} a checkpoint (what learns, and its optimizer state), "
            f"{_format_bytes(plan.disk.kept)} for all that are kept",
        ]
    )


def _format_bytes(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 1024**2:.1f} MiB"


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right. The first row is the header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells))
    return "\n".join(lines)
