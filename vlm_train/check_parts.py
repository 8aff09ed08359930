"""Rules about which parts a run needs and which fit together, from their source: nothing is imported or built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig

from vlm_train.check_settings import packed, ranks
from vlm_train.config import resolved
from vlm_train.contents import constant, members, uses
from vlm_train.schema import DICT_GROUPS, PART_GROUPS
from vlm_train.signatures import UnknownTarget, hint, is_ours, read_signature

PARTS = ("vision", "connector", "llm")
"""Arguments of a model's constructor that are groups of their own."""

ALWAYS = ("model", "tokenizer", "template", "data", "optim", "lr_schedule")
"""Groups that every run needs; those of `PARTS` follow from the model, and `image` from a vision tower."""

TOKEN_STREAMS = {"llm": "causal"}
"""Token streams of a family that names none."""

QUANTISED_BITS = (4, 8)
"""Widths of `peft.bits`."""

MODULE_MEMBERS = frozenset({"training", "parameters", "named_parameters", "modules", "named_modules", "train", "eval"})
"""What every model has from `nn.Module`."""


def check_groups(cfg: DictConfig) -> Iterator[str]:
    """Groups hold components, and only where components belong; those that the run needs are there."""
    wanted = _wanted_parts(resolved(cfg, "model"))
    required = {*ALWAYS, *wanted, *(("image",) if "vision" in wanted else ())}
    for group in PART_GROUPS:
        node = resolved(cfg, group)
        if node is None and group in required:
            yield f"{group} is empty: choose an option, {group}=<option> (--help lists them)."
        elif node is not None and (not isinstance(node, dict) or "_target_" not in node):
            choose = f"Choose an option, {group}=<option>."
            yield f"{group} has no _target_: it needs one component, got {short(node)}. {choose}"
    for group in DICT_GROUPS:
        node = resolved(cfg, group) or {}
        if not isinstance(node, dict):
            yield f"{group} must map names to components, got {short(node)}."
            continue
        for name, inner in node.items():
            if inner is not None and (not isinstance(inner, dict) or "_target_" not in inner):
                yield f"{group}.{name} has no _target_: expected a component or null, got {short(inner)}."
    objectives = resolved(cfg, "objective") or {}
    if isinstance(objectives, dict) and not any(node is not None for node in objectives.values()):
        yield "objective is empty: there is no loss. Choose an option, objective=<option> (--help lists them)."


def _wanted_parts(model: Any) -> list[str]:
    """Parts that the model's constructor cannot do without."""
    target = _our_target(model)
    try:
        known = read_signature(target).parameters if target else {}
    except UnknownTarget:
        return []
    return [name for name, parameter in known.items() if name in PARTS and parameter.required]


def _our_target(node: Any) -> str | None:
    target = node.get("_target_") if isinstance(node, dict) else None
    return target if isinstance(target, str) and is_ours(target) else None


def check_objectives(cfg: DictConfig) -> Iterator[str]:
    """Every loss finds what it reads: a token stream, the model's methods, all samples of a step at once."""
    objectives = resolved(cfg, "objective")
    for name, node in objectives.items() if isinstance(objectives, dict) else ():
        target = _our_target(node)
        try:
            known = read_signature(target).parameters if target else {}
            if target:
                yield from _check_model(f"objective.{name}", target, resolved(cfg, "model"))
        except UnknownTarget:  # reported with the target
            continue
        if "stream" not in known:
            continue
        stream, default = node.get("stream"), str(known["stream"].default).strip("'\"")
        learned = tuple(name for name, alignment in _streams(cfg).items() if alignment != "none")
        allowed = {"stream": ("samples",) if default == "samples" else learned, "text": learned}
        for key, words in allowed.items():
            if key in node and node[key] not in words:
                suggestion = hint(str(node[key]), words)
                yield f"objective.{name}.{key}: got {node[key]!r}.{suggestion} Allowed: {', '.join(words)}."
        if (stream or default) == "samples":
            yield from _check_whole_step(f"objective.{name}", cfg)
            yield from _check_whole_model(f"objective.{name}", cfg)


def _check_model(path: str, target: str, model: Any) -> Iterator[str]:
    """The model has what the objective asks of it."""
    family = _our_target(model)
    missing = uses(target, "model") - members(family) - MODULE_MEMBERS if family else set()
    if missing:
        yield (
            f"{path}: needs {', '.join(f'model.{name}' for name in sorted(missing))}, which {family} does not have. "
            "Choose another objective or another model."
        )


def _check_whole_step(path: str, cfg: DictConfig) -> Iterator[str]:
    """Samples that are contrasted with each other cannot be packed, or cut into micro-batches."""
    world = cfg.target.gpus if cfg.dry_run else ranks(cfg)
    samples, micro = (resolved(cfg.batch, name) for name in ("samples", "micro"))
    if packed(cfg):
        yield f"{path}: contrasts samples with each other, and packed rows do not tell them apart; use data.pack=null."
    if world and isinstance(samples, int) and isinstance(micro, int) and 0 < micro < samples // world:
        model = resolved(cfg, "model")
        caches = isinstance(model, dict) and "cache_chunk" in model
        advice = (
            f"Gradient caching bounds its memory: model.cache_chunk={micro}."
            if caches
            else "If that is too much for its memory: more processes (launch.devices), or a smaller batch.samples."
        )
        yield (
            f"{path}: contrasts all samples of a step with each other, so batch.micro={micro} cannot cut the "
            f"{samples // world} samples of a process; allowed: batch.micro={samples // world}. {advice}"
        )


def check_columns(cfg: DictConfig) -> Iterator[str]:
    """Modes that write columns know of which set, and each process its share."""
    if cfg.mode in ("caption", "score") and not cfg.columns.shards:
        yield f"columns.shards is missing: mode={cfg.mode} needs columns.shards=<shard set>."
    if cfg.mode == "caption" and cfg.columns.captions:
        yield "columns.captions: only mode=score reads captions of other columns; leave it out."
    if not 0 <= cfg.columns.part < cfg.columns.parts:
        yield f"columns.part: got {cfg.columns.part} with columns.parts={cfg.columns.parts}; allowed: 0 to parts - 1."


def _check_whole_model(path: str, cfg: DictConfig) -> Iterator[str]:
    """A temperature is read outside the model's forward and bounded after updates: every rank needs it as it is."""
    strategy = resolved(cfg, "strategy")
    kind = str(strategy.get("_target_")).rpartition(".")[2] if isinstance(strategy, dict) else ""
    if kind in ("ZeRO", "FSDP2"):
        yield (
            f"{path}: its temperature is a single number that every rank reads and bounds, and {kind} cannot cut it or "
            "keeps another copy. Use strategy=ddp."
        )


def _streams(cfg: DictConfig) -> dict[str, str]:
    """The token streams that the model reads, and how their labels are aligned."""
    family = _our_target(resolved(cfg, "model"))
    try:
        return (constant(family, "streams") if family else None) or TOKEN_STREAMS
    except UnknownTarget:  # reported with the target
        return TOKEN_STREAMS


def check_streams(cfg: DictConfig) -> Iterator[str]:
    """Several streams of a sample come one sample a row; only a model that reads an instruction is given one."""
    streams, data = _streams(cfg), resolved(cfg, "data")
    reads = f"the model reads the streams {' and '.join(streams)}"
    if len(streams) > 1 and isinstance(data, dict):
        if data.get("pack") is not None:
            yield f"data.pack: {reads}, which do not line up in packed rows; use data.pack=null."
        if data.get("over_length") == "split":
            yield f"data.over_length: {reads}, which are not cut at turns; use truncate, drop or error, got split."
        if data.get("rejected"):
            yield f"data.rejected: {reads}; pairs of answers need a model that reads one."
    if isinstance(data, dict) and data.get("prefix_split") and "seq2seq" not in streams.values():
        yield "data.prefix_split: only an encoder-decoder reads a prompt apart from its answer; use false."
    instruction = resolved(cfg, "instruction")
    if "qformer" in streams and instruction is None:
        yield "instruction is empty: the model's Q-Former reads one. Choose an option, instruction=<option>."
    if "qformer" not in streams and instruction is not None:
        yield "instruction: the model reads none. Leave it out (~instruction), or choose a model that reads qformer."


def check_kind(cfg: DictConfig) -> Iterator[str]:
    """An encoder-decoder (it has a `start_id`) goes with a model that reads answers as a stream of their own."""
    model, target = resolved(cfg, "model"), _our_target(resolved(cfg, "llm"))
    if target is None or "llm" not in _wanted_parts(model):
        return
    try:
        encodes = "start_id" in members(target)
    except UnknownTarget:  # reported with the target
        return
    name = target.rpartition(".")[2]
    if encodes and "seq2seq" not in _streams(cfg).values():
        yield f"llm: {name} is an encoder-decoder. Use model=prefix_seq2seq or instruct_seq2seq, or a causal llm."
    elif not encodes and "seq2seq" in _streams(cfg).values():
        yield f"llm: the model needs an encoder-decoder such as llm=flant5_xl, got {name}; or use another model."


def check_peft(cfg: DictConfig) -> Iterator[str]:
    """Quantised weights have a known width and are not sharded."""
    peft, strategy = resolved(cfg, "peft"), resolved(cfg, "strategy")
    bits = peft.get("bits") if isinstance(peft, dict) else None
    if bits is None:
        return
    if bits not in QUANTISED_BITS:
        yield f"peft.bits: got {bits!r}. Allowed: {', '.join(map(str, QUANTISED_BITS))}, or null for none."
    if bits == 8 and peft.get("dora"):
        yield "peft.dora: peft 0.21 loses the scales of 8-bit weights in DoRA. Use peft.bits=4 or peft.dora=false."
    node = strategy if isinstance(strategy, dict) else {}
    name = "ZeRO-3" if node.get("stage") == 3 else "FSDP" if "fsdp" in str(node.get("_target_")).lower() else None
    if name:
        yield (
            f"strategy: {name} cuts every weight into slices, but {bits}-bit weights have to stay with their scales, "
            "which slices do not. Use strategy=ddp, zero1 or zero2, where each GPU holds the whole "
            "quantised model, or peft=lora."
        )


def short(value: Any) -> str:
    """A value in at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
