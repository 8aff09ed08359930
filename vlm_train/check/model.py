"""Rules about which parts go together, asked of the model itself, built on the meta device: no weight is read.

What a family offers and what an objective or evaluator needs is known for code of any package only when it is imported
and built. The rest is checked earlier, see `vlm_train.check.check`.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf

from data_pipelines.nearest import did_you_mean
from vlm_train.build import build_evaluators, build_objectives
from vlm_train.check.columns import check_columns_beside
from vlm_train.check.settings import count_processes, packed_row_length, select_settings
from vlm_train.check.strategies import shards_weights
from vlm_train.config.resolve import resolve_key
from vlm_train.config.signatures import read_attribute
from vlm_train.contracts.evaluator import Evaluator
from vlm_train.contracts.family import CAPABILITIES, Family, missing_members
from vlm_train.contracts.media import Grid3
from vlm_train.contracts.model_parts import find_encoders, find_parts
from vlm_train.contracts.objective import NormalizedBy, Objective
from vlm_train.contracts.parts import Connector, EncoderDecoder, VisionEncoder
from vlm_train.contracts.streams import QFORMER, Alignment
from vlm_train.errors import ConfigError

DECLARED = ("streams", "normalized_by", "needs_whole_step", "needs_reference", "needs")
"""What an objective says of itself."""

PART_KINDS: dict[str, type] = {"vision": VisionEncoder, "connector": Connector}
"""What every family needs of its parts. Language models differ: some only encode, see `check_offer`."""

REJECTED = "rejected"
"""The stream that `data.rejected` adds."""


def check_model(cfg: DictConfig, model: Family) -> None:
    """Raises one ConfigError that lists everything in `cfg` that does not go with `model`."""
    objectives = build_objectives(cfg)
    open_ = cfg.eval is None or OmegaConf.missing_keys(cfg.eval)  # a dry run needs no shards
    evaluators = {} if open_ else build_evaluators(cfg)
    problems = [*check_parts(model), *check_kind(model), *check_streams(cfg, model)]
    problems += check_evaluators(evaluators, model)
    for name, objective in objectives.items():
        problems += check_objective(f"objective.{name}", cfg, model, objective)
    problems += check_single_numbers(cfg, model)
    problems += check_packing(cfg, model)
    if cfg.reference.model is not None and not any(objective.needs_reference for objective in objectives.values()):
        problems.append("reference.model: no objective reads it. Leave it out, or choose one that does.")
    if problems:
        raise ConfigError(problems)


def check_parts(model: Family) -> Iterator[str]:
    """Every part has what `vlm_train.contracts.parts` asks of its kind."""
    for name, part in find_parts(model).items():
        kind = PART_KINDS.get(name.partition(".")[0])
        if kind is not None and (missing := missing_members(part, kind)):
            yield (
                f"{name}: {type(part).__name__} has no {', '.join(missing)}, which a {kind.__name__} needs. "
                f"python -m vlm_train.contract {name.partition('.')[0]}=<option> checks all of it."
            )
        elif kind is Connector:
            yield from check_token_grid(name, part)


def check_token_grid(name: str, connector: Any) -> Iterator[str]:
    """What says how many tokens an image takes can be sent to data workers, and says it as a grid."""
    who = f"{name}: token_grid of {type(connector).__name__}"
    try:
        pickle.dumps(connector.token_grid)
    except Exception as error:  # pickle raises what the object raises
        yield (
            f"{who} cannot be sent to data workers ({error}). Use a function of a module, or functools.partial of one, "
            "in place of a lambda or a function inside a function."
        )
        return
    patches = Grid3(1, 12, 12)
    try:
        grid = connector.token_grid(patches)
    except ConfigError:
        return  # it does not take this grid; those of the encoder are tried when the model is built
    except Exception as error:  # code of anybody
        yield f"{who} raised {type(error).__name__}: {error}. It is called with {patches} and returns a Grid3(t, h, w)."
        return
    whole = isinstance(grid, Grid3) and all(isinstance(side, int) and side > 0 for side in grid)
    if not whole:
        yield f"{who} returned {grid!r} for {patches}; allowed: a Grid3(t, h, w) of whole numbers above 0."


def check_packing(cfg: DictConfig, model: Family) -> Iterator[str]:
    """Samples share a row only where a mask reaches all that mixes tokens."""
    mixers = getattr(getattr(model, "llm", None), "unmasked_mixers", ())
    if packed_row_length(cfg) and mixers and cfg.llm is not None:  # whole models are tried, see `settle_packing`
        yield (
            f"data.pack: {cfg.llm.config.model_type!r} has {', '.join(mixers)}, which no mask reaches: samples of a "
            "row would see each other. Use data.pack=null and a larger batch.micro, or another llm."
        )


def check_objective(path: str, cfg: DictConfig, model: Family, objective: Objective) -> Iterator[str]:
    """An objective declares itself, and finds what it reads."""
    if undeclared := [name for name in DECLARED if not hasattr(objective, name)]:
        yield (
            f"{path}: {type(objective).__name__} does not declare {', '.join(undeclared)}. Inherit from "
            f"{Objective.__module__}.Objective, or set them."
        )
        return
    if wrong := list(_check_declarations(path, objective)):
        yield from wrong
        return
    yield from check_offer(path, objective.needs, model)
    allowed = learned_streams(cfg, model)
    for stream in objective.streams:
        if stream not in allowed:
            yield f"{path}: reads the stream {stream!r}.{did_you_mean(stream, allowed)} Allowed: {', '.join(allowed)}."
    if objective.needs_reference and cfg.reference.model is None:
        yield f"{path}: compares with a reference model. Use reference.model=start, or a run folder."
    yield from check_columns_beside(path, cfg, objective)
    if objective.needs_whole_step:
        yield from _check_whole_step(path, cfg)
    if objective.needs_whole_step and objective.normalized_by == "samples":
        yield from _check_weights(path, cfg)
    if rules := getattr(objective, "weight_rules", ()):
        yield from _check_weight_rules(path, cfg, rules)


def _check_declarations(path: str, objective: Objective) -> Iterator[str]:
    """What an objective says of itself has the types and values that `Objective` names."""
    streams, needs, divisor = objective.streams, objective.needs, objective.normalized_by
    if not isinstance(streams, (tuple, list)) or not all(isinstance(one, str) for one in streams):
        yield f"{path}: streams is {streams!r}; allowed: a tuple of names of streams."
    if not isinstance(needs, tuple) or not all(isinstance(one, type) for one in needs):
        yield f"{path}: needs is {needs!r}; allowed: a tuple of protocols of {Family.__module__}."
    columns = getattr(objective, "columns", ())
    if not isinstance(columns, (tuple, list)) or not all(isinstance(one, str) for one in columns):
        yield f"{path}: columns is {columns!r}; allowed: a tuple of names of columns."
    told = getattr(objective, "top_tokens", ())
    if not isinstance(told, (tuple, list)) or not all(isinstance(one, str) for one in told):
        yield f"{path}: top_tokens is {told!r}; allowed: a tuple of names of columns."
    if divisor not in get_args(NormalizedBy):
        yield f"{path}: normalized_by is {divisor!r}; allowed: {', '.join(get_args(NormalizedBy))}."
    for name in ("needs_whole_step", "needs_reference"):
        if not isinstance(getattr(objective, name), bool):
            yield f"{path}: {name} is {getattr(objective, name)!r}; allowed: True or False."


def check_reference(cfg: DictConfig, model: Family, reference: Family) -> None:
    """Raises one ConfigError that lists why the model of another run cannot read the batches of this one."""
    problems: list[str] = []
    for objective in build_objectives(cfg).values():
        if objective.needs_reference:
            problems += check_offer("reference.model", objective.needs, reference)
    own, others = dict(model.streams), dict(reference.streams)
    if own != others:
        problems.append(f"reference.model: {type(reference).__name__} reads the streams {others}; allowed: {own}.")
    sizes = {name: encoder.image_size for name, encoder in find_encoders(model).items()}
    for name, encoder in find_encoders(reference).items():
        if name not in sizes or encoder.image_size != sizes[name]:
            got = f"its encoder {name!r} takes images of {encoder.image_size} pixels"
            problems.append(f"reference.model: {got}; the run's encoders are given {sizes}.")
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))


def check_offer(path: str, needs: tuple[type, ...], model: object) -> Iterator[str]:
    """The model offers every protocol of `needs`."""
    for protocol in needs:
        if missing := missing_members(model, protocol):
            offered = [one.__name__ for one in CAPABILITIES if isinstance(model, one)]
            yield (
                f"{path}: needs a model that {protocol.__name__}. {type(model).__name__} lacks "
                f"{', '.join(missing)}; it {', '.join(offered) or 'offers nothing'}. Choose another model."
            )


def check_evaluators(evaluators: Mapping[str, Evaluator], model: object) -> Iterator[str]:
    """The model offers what evaluators need."""
    for name, evaluator in evaluators.items():
        yield from check_offer(f"eval.{name}", evaluator.needs, model)


def learned_streams(cfg: DictConfig, model: Family) -> list[str]:
    """The streams with labels: the model's, and the rejected answers where the data has them."""
    rejected = [REJECTED] if cfg.data.get("rejected") else []
    return [name for name, alignment in model.streams.items() if alignment != "none"] + rejected


def _check_whole_step(path: str, cfg: DictConfig) -> Iterator[str]:
    """Samples that are contrasted with each other cannot be packed, or cut into micro-batches."""
    world = cfg.target.gpus if cfg.dry_run else count_processes(cfg)
    samples, micro = (resolve_key(cfg.batch, name) for name in ("samples", "micro"))
    if packed_row_length(cfg):
        yield f"{path}: contrasts samples with each other, and packed rows do not tell them apart; use data.pack=null."
    if world and isinstance(samples, int) and isinstance(micro, int) and 0 < micro < samples // world:
        advice = (
            f"Gradient caching bounds its memory: model.cache_chunk={micro}."
            if "cache_chunk" in cfg.model
            else "If that is too much for its memory: more processes (launch.devices), or a smaller batch.samples."
        )
        yield (
            f"{path}: contrasts all samples of a step with each other, so batch.micro={micro} cannot cut the "
            f"{samples // world} samples of a process; allowed: batch.micro={samples // world}. {advice}"
        )


def _check_weights(path: str, cfg: DictConfig) -> Iterator[str]:
    """A loss over pairs counts every pair once: it reads no weights of targets, which these settings are about."""
    counts = f"has no effect on {path}, which counts every pair once. Allowed:"
    if cfg.batch.normalize in ("source", "sqrt_length"):
        yield f"batch.normalize: {cfg.batch.normalize} {counts} token or sample."
    for split in ("train", "val"):
        for key, weight in select_settings(cfg, f"data.{split}.*.loss_weight"):
            if weight not in (None, 1):
                yield f"{key}: {weight} {counts} 1, or leave it out."


def _check_weight_rules(path: str, cfg: DictConfig, rules: Sequence[str]) -> Iterator[str]:
    """A loss that reads the weights of tokens, such as log-likelihoods of answers, is not given scaled ones."""
    scales = f"scales the weights that {path} sums. Allowed:"
    if cfg.batch.normalize not in rules:
        yield f"batch.normalize: {cfg.batch.normalize} {scales} {', '.join(rules)}."
    for split in ("train", "val"):
        for key, weight in select_settings(cfg, f"data.{split}.*.loss_weight"):
            if weight not in (None, 1):
                yield f"{key}: {weight} {scales} 1, or leave it out."


def check_single_numbers(cfg: DictConfig, model: Family) -> Iterator[str]:
    """A family's own single numbers (temperatures) are read outside `forward` and bounded after updates: every rank
    needs them as they are."""
    strategy = resolve_key(cfg, "strategy")
    own = [name for name, parameter in model.named_parameters(recurse=False) if not parameter.ndim]
    if not own or not isinstance(strategy, dict):
        return
    target = str(strategy["_target_"])
    if shards_weights(strategy) or read_attribute(target, "keeps_fp32_copy"):
        yield (
            f"strategy: {', '.join(f'model.{name}' for name in own)} is a single number that every rank reads and "
            f"bounds, and {target.rpartition('.')[2]} cannot cut it or keeps another copy. Use strategy=ddp."
        )


def check_streams(cfg: DictConfig, model: Family) -> Iterator[str]:
    """Several streams of a sample come one sample a row; only a model that reads an instruction is given one."""
    streams: Mapping[str, str] = model.streams
    for name, alignment in streams.items():
        if alignment not in get_args(Alignment):
            got = f"{type(model).__name__} gives its stream {name!r} the alignment {alignment!r}"
            yield f"model: {got}; allowed: {', '.join(get_args(Alignment))}."
    data: Any = cfg.data
    reads = f"the model reads the streams {' and '.join(streams)}"
    if len(streams) > 1:
        if data.get("pack") is not None:
            how = "use data.pack=null and a larger batch.micro"
            yield f"data.pack: {reads}, which do not line up in packed rows; {how}."
        if data.get("over_length") == "split":
            yield f"data.over_length: {reads}, which are not cut at turns; use truncate, drop or error, got split."
        if data.get("rejected"):
            yield f"data.rejected: {reads}; pairs of answers need a model that reads one."
    if data.get("prefix_split") and "seq2seq" not in streams.values():
        yield "data.prefix_split: only an encoder-decoder reads a prompt apart from its answer; use false."
    if QFORMER in streams and cfg.instruction is None:
        yield "instruction is empty: the model's Q-Former reads one. Choose an option, instruction=<option>."
    if QFORMER not in streams and cfg.instruction is not None:
        yield "instruction: the model reads none. Leave it out (~instruction), or choose a model that reads qformer."


def check_kind(model: Family) -> Iterator[str]:
    """An encoder-decoder (it has a `start_id`) goes with a model that reads answers as a stream of their own."""
    llm = getattr(model, "llm", None)
    if llm is None:
        return
    name, encodes = type(llm).__name__, not missing_members(llm, EncoderDecoder)
    if encodes and "seq2seq" not in model.streams.values():
        yield f"llm: {name} is an encoder-decoder. Use model=prefix_seq2seq or instruct_seq2seq, or a causal llm."
    elif not encodes and "seq2seq" in model.streams.values():
        yield f"llm: the model needs an encoder-decoder such as llm=flant5_xl, got {name}; or use another model."
