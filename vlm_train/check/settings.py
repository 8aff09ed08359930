"""Rules about values and how they go together, each found without a target's source, a weight or another package."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from omegaconf import DictConfig

from data_pipelines.nearest import did_you_mean
from vlm_train.check.bounds import LITERALS, NAMES, POSITIVE, RANGES
from vlm_train.config.resolve import resolve_key
from vlm_train.errors import ConfigError

COMPARISONS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}

VAL_KEYS = ("shards", "columns", "name", "limit", "loss_weight", "samples")
"""What an entry of `data.val` says, see `vlm_train.data.dataset.Source`."""

OF_A_RUN = ("eval", "caption", "score", "export")
"""Modes that look at a run, and so need one."""

TRAIN_KEYS = (*VAL_KEYS, "repeat", "weight", "share")
"""What an entry of `data.train` says."""


def select_settings(cfg: DictConfig, pattern: str) -> Iterator[tuple[str, Any]]:
    """Every setting that fits a dotted path with `*` for any name or index, and its value; those that resolve."""
    first, *rest = pattern.split(".")
    yield from _select_below(first, resolve_key(cfg, first), rest)


def _select_below(path: str, value: Any, rest: list[str]) -> Iterator[tuple[str, Any]]:
    if not rest:
        if value != "???":
            yield path, value
        return
    step, *further = rest
    if isinstance(value, dict):
        inner = list(value.items())
    else:
        inner = [(str(index), item) for index, item in enumerate(value)] if isinstance(value, list) else []
    for name, item in inner:
        if step in ("*", name):
            yield from _select_below(f"{path}.{name}", item, further)


def check_literals(cfg: DictConfig) -> Iterator[str]:
    """Words are among the known ones."""
    for pattern, allowed in LITERALS.items():
        for key, value in select_settings(cfg, pattern):
            if value not in allowed:
                yield f"{key}: got {value!r}.{did_you_mean(str(value), allowed)} Allowed: {', '.join(allowed)}."


def check_numbers(cfg: DictConfig) -> Iterator[str]:
    """Lengths, intervals, sizes and shares are where they can be, and no number is NaN or infinite. A wrong type is
    reported elsewhere."""
    for key, value in _iterate_numbers(cfg):
        if not math.isfinite(value) and not any(_fits_pattern(key, pattern) for pattern in RANGES):
            yield f"{key}: expected a finite number, got {value}."
    for pattern in POSITIVE:
        for key, value in select_settings(cfg, pattern):
            if _is_number(value) and value <= 0:
                yield f"{key}: expected a positive number or null, got {value}."
    for pattern, condition in RANGES.items():
        for key, value in select_settings(cfg, pattern):
            if _is_number(value) and not _meets_condition(value, condition):
                yield f"{key}: expected a number {condition.replace(', ', ' and ')}, got {value}."


def _iterate_numbers(cfg: DictConfig) -> Iterator[tuple[str, float]]:
    """Every number of the configuration and its key; those that resolve."""
    pending = [(str(key), resolve_key(cfg, str(key))) for key in cfg]
    for path, value in pending:  # grows meanwhile
        if isinstance(value, dict):
            pending += [(f"{path}.{key}", inner) for key, inner in value.items()]
        elif isinstance(value, list):
            pending += [(f"{path}.{index}", inner) for index, inner in enumerate(value)]
        elif _is_number(value):
            yield path, value


def _fits_pattern(key: str, pattern: str) -> bool:
    names, steps = key.split("."), pattern.split(".")
    return len(names) == len(steps) and all(s in ("*", n) for n, s in zip(names, steps, strict=True))


def check_texts(cfg: DictConfig) -> Iterator[str]:
    """Names of files and folders are not empty: an empty one would mean the folder that the command is started in."""
    for pattern in NAMES:
        for key, value in select_settings(cfg, pattern):
            if value == "":
                yield f"{key}: expected a name or null, got ''."


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _meets_condition(value: float, condition: str) -> bool:
    parts = [part.split() for part in condition.split(", ")]
    return math.isfinite(value) and all(COMPARISONS[sign](value, float(bound)) for sign, bound in parts)


def check_data(cfg: DictConfig) -> Iterator[str]:
    """Sources of data are lists of entries that name shards and nothing that training would ignore."""
    data = resolve_key(cfg, "data")
    for name in ("train", "val"):
        entries = data.get(name) if isinstance(data, dict) else None
        if name == "train" and entries == []:
            yield "data.train: expected at least one entry, {shards: <folder>}, got none."
        for index, entry in enumerate(entries if isinstance(entries, list) else []):
            if name == "train" and isinstance(entry, dict) and "tars" in entry:
                continue  # `check_stream` judges it
            if name == "train" and isinstance(entry, dict) and "stream" in entry:
                yield f"data.{name}.{index}.stream: it is data.{name}.{index}.tars now."
                continue
            yield from _check_entry(f"data.{name}.{index}", entry, TRAIN_KEYS if name == "train" else VAL_KEYS)
    yield from _check_mixture(data) if isinstance(data, dict) else ()


def check_stream(cfg: DictConfig) -> Iterator[str]:
    """Tars that are read as a stream are asked for nothing that only an index knows."""
    from vlm_train.data.stream import NO_BUDGET, is_stream, list_problems  # imports numpy

    data = resolve_key(cfg, "data")
    if not isinstance(data, dict) or not is_stream(data.get("train")):
        return
    yield from list_problems(data)
    if cfg.batch.tokens is not None:
        yield NO_BUDGET
    if cfg.trainer.epochs is not None or cfg.trainer.max_steps is None:
        yield "trainer.epochs: tars tell no size of a pass; use trainer.epochs=null trainer.max_steps=<steps>."
    if cfg.trainer.largest_first:
        yield "trainer.largest_first: tars tell no lengths to find the largest by; use false."
    if cfg.mode == "lengths":
        yield "mode=lengths: tars have no index of their samples; write one with python -m data_pipelines.index."


def _check_mixture(data: dict[str, Any]) -> Iterator[str]:
    """Settings of the order that would be ignored, or that cannot go together."""
    train = data.get("train")
    entries = [entry for entry in train if isinstance(entry, dict)] if isinstance(train, list) else []
    if data.get("mixture") != "weights" and any(entry.get("weight") is not None for entry in entries):
        yield f"data.train: a weight counts only with data.mixture=weights, got {data.get('mixture')!r}."
    if any(entry.get("share") is not None and entry.get("weight") is not None for entry in entries):
        yield "data.train: an entry has a share of all draws or a weight among the others, got both."
    pack, longest = data.get("pack"), data.get("max_length")
    if data.get("pack_patches") is not None and pack is None:
        yield "data.pack_patches: bounds packed rows, but data.pack is null."
    if data.get("group_by") == "length" and pack is not None:
        allowed = "null, modality or modality_length"
        yield f"data.group_by: packed rows are evened out by themselves; use {allowed}, got length."
    if pack is not None and (longest is None or _is_number(longest) and _is_number(pack) and longest > pack):
        how = "raise data.pack, or lower data.max_length, or use data.pack=null and a larger batch.micro"
        yield f"data.pack: rows of {pack} tokens must hold samples of data.max_length={longest}; {how}."
    by_length = pack is not None or data.get("group_by") in ("length", "modality_length")
    if data.get("annotations") == "drawn" and (by_length or data.get("over_length") == "split"):
        yield (
            "data.annotations: drawn gives a sample another length in every pass, and data.pack, groups by length and "
            "data.over_length=split need one; use first, independent or dialogue (or data.pack=null and a larger "
            "batch.micro)."
        )
    if data.get("rejected") and data.get("over_length") == "split":
        yield "data.over_length: pairs of answers (data.rejected) are not cut; use truncate, drop or error, got split."


def _check_entry(path: str, entry: Any, known: tuple[str, ...]) -> Iterator[str]:
    if not isinstance(entry, dict):
        yield f"{path}: expected an entry such as {{shards: <folder>}}, got {entry!r}."
        return
    listed = ", ".join(known)
    for key in entry:
        if key not in known:
            yield f"{path}.{key}: unknown key.{did_you_mean(key, known, path + '.')} Keys of an entry: {listed}."
    if entry.get("shards") is None:
        yield f"{path}.shards is missing: name a folder of shards. Keys of an entry: {listed}."
    elif not isinstance(entry["shards"], (str, dict)):  # a dict is a component, which check_targets judges
        yield f"{path}.shards: expected one folder, got {entry['shards']!r}."
    if not isinstance(entry.get("columns"), str | None):
        yield f"{path}.columns: expected one folder, got {entry['columns']!r}."


def check_batch(cfg: DictConfig) -> Iterator[str]:
    """The batch size is given once, and can be dealt to the processes that are known to start."""
    given = [name for name in ("samples", "tokens") if cfg.batch[name] is not None]
    if len(given) != 1:
        got = "both" if given else "neither"
        if not given and cfg.recipe_name == "custom":
            if cfg.mode not in OF_A_RUN:  # which brings its recipe
                mode = "" if cfg.mode == "fit" else f"mode={cfg.mode} "
                example = f"python -m vlm_train {mode}recipe=llava15_stage1"
                yield f"recipe: none is chosen. Type for example {example}; --help lists recipes, schedules and modes."
            return
        yield f"batch: give exactly one of batch.samples and batch.tokens, got {got}."
    elif given == ["tokens"] and not packed_row_length(cfg):
        yield "batch.tokens: a token budget fills packed rows; set data.pack to their length, or give batch.samples."
    if given == ["tokens"] and (group := (resolve_key(cfg, "data") or {}).get("group_by")):
        yield f"data.group_by: groups steps of batch.samples; with batch.tokens use null, got {group!r}."
    try:
        _check_dealing(cfg)
    except ConfigError as error:
        yield from error.problems


def packed_row_length(cfg: DictConfig) -> Any:
    """Tokens of a packed row; None: rows hold one sample."""
    data = resolve_key(cfg, "data")
    return data.get("pack") if isinstance(data, dict) else None


def count_processes(cfg: DictConfig) -> int | None:
    """Processes that will train; None while that is not known."""
    numbers = [resolve_key(cfg.launch, name) for name in ("devices", "nodes")]
    if cfg.mode != "fit" or not all(isinstance(number, int) and number > 0 for number in numbers):
        return None
    return int(numbers[0] * numbers[1])


def _check_dealing(cfg: DictConfig) -> None:
    """The ranks can share the batch, by the rules of training."""
    from vlm_train.data.order.sample_plan import check_batch, check_tokens  # imports numpy

    world = count_processes(cfg)
    samples, tokens, micro = (resolve_key(cfg.batch, name) for name in ("samples", "tokens", "micro"))
    pack = packed_row_length(cfg)
    if world and isinstance(samples, int) and samples > 0:
        check_batch(samples, world)
    if world and all(isinstance(number, int) and number > 0 for number in (tokens, micro, pack)):
        check_tokens(tokens, pack, world, micro)


def check_length(cfg: DictConfig) -> Iterator[str]:
    """The length of the training is given, as epochs or as steps."""
    if cfg.trainer.epochs is None and cfg.trainer.max_steps is None:
        yield "trainer: give trainer.epochs or trainer.max_steps, got neither."


def check_warmup(cfg: DictConfig) -> Iterator[str]:
    """The warm-up is given once."""
    schedule = resolve_key(cfg, "lr_schedule")
    steps, ratio = (
        schedule.get(f"warmup_{name}") if isinstance(schedule, dict) else None for name in ("steps", "ratio")
    )
    if _is_number(steps) and _is_number(ratio) and ratio:
        yield f"lr_schedule: give warmup_steps or warmup_ratio, got both ({steps} and {ratio})."


def check_launch(cfg: DictConfig) -> Iterator[str]:
    """Several nodes need a launcher that spans them."""
    if cfg.launch.kind == "local" and cfg.launch.nodes > 1:
        yield f"launch.nodes: launch=local starts one node, got {cfg.launch.nodes}. Use launch=torchrun or launch=srun."


def check_zero(cfg: DictConfig) -> Iterator[str]:
    """Settings of ZeRO go together, and its package is there: what its constructor would refuse later."""
    strategy = resolve_key(cfg, "strategy")
    if not isinstance(strategy, dict) or strategy.get("_target_") != "vlm_train.training.strategies.zero.ZeRO":
        return
    stage = strategy.get("stage")
    if cfg.mode == "fit" and not cfg.dry_run and find_spec("deepspeed") is None:
        yield "strategy: DeepSpeed is not installed: pip install 'vlm-train[deepspeed]', or use ddp or fsdp2."
    if strategy.get("offload_parameters") and stage != 3:
        yield f"strategy.offload_parameters: only stage 3 can, got stage {stage}. Use zero3."
    if "nvme" in strategy.values() and not strategy.get("nvme_path"):
        yield "strategy.nvme_path is missing: offloading to nvme needs a folder on a fast local disk."


def check_run(cfg: DictConfig) -> Iterator[str]:
    """Modes that look at a run name one; the run's name is a folder name."""
    if cfg.mode in OF_A_RUN and not cfg.run:
        yield f"run is missing: mode={cfg.mode} needs run=<run folder>."
    if cfg.mode == "fit" and cfg.run:
        yield "run: mode=fit names its own folder; use init_from or resume to start from another run."
    if cfg.run_name is not None and (not cfg.run_name or set(cfg.run_name) & set("/\\") or cfg.run_name in (".", "..")):
        yield f"run_name: expected a folder name, got {cfg.run_name!r}."
