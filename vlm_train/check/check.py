"""Everything that can be known to be wrong before a weight is read. All problems are raised together.

Order of cost: the composed values, then our own targets from their source, then targets of other packages, which have
to be imported, then what only constructed evaluators can tell, and last the assets. A later kind is only looked at when
the earlier ones found nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from data_pipelines.nearest import did_you_mean, find_nearest
from vlm_train.check.assets import missing_assets
from vlm_train.check.parts import check_columns, check_decoders, check_encoders, check_groups, check_peft, shorten_value
from vlm_train.check.settings import (
    check_batch,
    check_data,
    check_launch,
    check_length,
    check_literals,
    check_numbers,
    check_run,
    check_stream,
    check_texts,
    check_warmup,
    check_zero,
)
from vlm_train.check.sources import check_auto, check_sources
from vlm_train.check.strategies import check_foreign_strategy, check_own_strategy
from vlm_train.config.auto import AUTO, FILLED
from vlm_train.config.moved_targets import moved_target
from vlm_train.config.renamed_keys import describe_renamed_key
from vlm_train.config.schema import Paths
from vlm_train.config.signatures import (
    Parameter,
    Signature,
    UnknownTarget,
    fits_annotation,
    import_signature,
    is_ours,
    read_signature,
)
from vlm_train.config.trust import check_unsafe_keys, iterate_components, reason_not_trusted, untrusted_object
from vlm_train.contracts.given import GIVEN
from vlm_train.errors import AssetError, ConfigError

ASSET_KEYS = ("weights", "shards")
ASSETS = ("model.name",)
"""Keys, and settings, that, like `init_from`, a recipe may leave to its user; a plan needs no asset, and assets.py asks
for them."""

INSTANTIATE_KEYS = ("_target_", "_partial_", "_recursive_", "_convert_")

Check = Callable[[DictConfig], Iterator[str]]


def check_config(cfg: DictConfig, *, need_assets: bool) -> None:
    """Raises one ConfigError that lists every problem, each under its dotted path.

    `need_assets` also requires weights, tokenizers, shards and the runs to start from to be there (AssetError).
    """
    problems = [problem for one in CHECKS for problem in one(cfg)]
    if problems:
        raise ConfigError(_leave_out_consequences(cfg, problems))
    for one in (check_foreign_targets, check_foreign_strategy, check_best, check_sources):
        problems = list(one(cfg))
        if problems:
            raise ConfigError(problems)
    if need_assets and (missing := missing_assets(cfg)):
        raise AssetError(missing)


def _leave_out_consequences(cfg: DictConfig, problems: list[str]) -> list[str]:
    """The problems, without those of settings that only repeat the value of one that has its own: `${optim.lr}`."""
    named = [(problem.partition(":")[0], problem) for problem in problems]
    written = OmegaConf.to_container(cfg, resolve=False)
    repeated = {key: _find_interpolation(written, key) for key, _ in named}
    causes = {key for key, _ in named if repeated[key] is None}
    return [problem for key, problem in named if repeated[key] not in causes]


def _find_interpolation(written: Any, key: str) -> str | None:
    """The key that the setting `key` takes its value from, as written; None where it has its own."""
    for name in key.split("."):
        if isinstance(written, list) and name.isdecimal() and int(name) < len(written):
            written = written[int(name)]
        else:
            written = written.get(name) if isinstance(written, dict) else None
    match = re.fullmatch(r"\$\{([\w.]+)\}", written) if isinstance(written, str) else None
    return match[1] if match else None


def check_values(cfg: DictConfig) -> Iterator[str]:
    """Mandatory values are given and interpolations resolve."""
    for key in map(str, cfg):
        if key != "init_from":
            yield from _check_value(cfg, key, key)


def _check_value(parent: Any, key: Any, where: str) -> Iterator[str]:
    if OmegaConf.is_missing(parent, key):
        if key not in ASSET_KEYS and where not in ASSETS:
            yield f"{where} is missing: give it a value, {where}=<value>."
        return
    try:
        node = parent[key]
    except InterpolationToMissingValueError:  # said once, where the value is missing
        return
    except OmegaConfBaseException as error:
        missing = re.match(r"Interpolation key '(.+)' not found", str(error))
        renamed = missing and describe_renamed_key(missing[1])
        yield f"{where}: {renamed or str(error).splitlines()[0]}"
        return
    if isinstance(node, DictConfig):
        section = OmegaConf.get_type(node)
        known = [one.name for one in fields(section)] if is_dataclass(section) and section is not Paths else None
        for inner in map(str, node):
            if known is not None and inner not in known:  # `+trainer.<key>` gets past Hydra
                yield _unknown_setting(where, inner, known)
            yield from _check_value(node, inner, f"{where}.{inner}")
    elif isinstance(node, ListConfig):
        for index in range(len(node)):
            yield from _check_value(node, index, f"{where}.{index}")


def _unknown_setting(section: str, key: str, known: list[str]) -> str:
    if renamed := describe_renamed_key(f"{section}.{key}"):
        return renamed
    return f"{section}.{key}: no such setting.{did_you_mean(key, known)} Settings: {', '.join(known)}."


def check_targets(cfg: DictConfig) -> Iterator[str]:
    """Targets are trusted; ours exist and take what they are given."""
    for path, group, node in iterate_components(cfg):
        target = node["_target_"]
        if now := moved_target(target):
            yield f"{path}._target_: got {target}, which is now {now}."
        elif reason := reason_not_trusted(target, list(cfg.allow_targets)):
            yield f"{path}._target_: {reason}"
        elif is_ours(target):
            yield from _check_component(path, group, node, read_signature, list(cfg.parts))


def check_foreign_targets(cfg: DictConfig) -> Iterator[str]:
    """Targets of other packages exist, are trusted, and take what they are given. Imports them."""
    for path, group, node in iterate_components(cfg):
        target = node["_target_"]
        if is_ours(target):
            continue
        try:
            reason = untrusted_object(target, list(cfg.allow_targets))
        except UnknownTarget as error:
            reason = f"{target} does not exist. {error}"
        if reason:
            yield f"{path}._target_: {reason}"
        else:
            yield from _check_component(path, group, node, import_signature, list(cfg.parts))


def check_best(cfg: DictConfig) -> Iterator[str]:
    """What BEST follows is measured at validations. Constructs the evaluators, whose targets are trusted by now."""
    best = cfg.trainer.best
    if cfg.mode != "fit" or best == "loss":
        return
    from vlm_train.build import build_evaluators
    from vlm_train.contracts.evaluator import validation_metrics

    allowed = ["loss", *validation_metrics(build_evaluators(cfg))]
    if best not in allowed:
        yield f"trainer.best: got {best!r}.{did_you_mean(best, allowed)} Allowed: {', '.join(allowed)}."


def _check_component(
    path: str, group: str, node: dict[str, Any], signature_of: Callable[[str], Signature], parts: list[str]
) -> Iterator[str]:
    target = node["_target_"]
    try:
        signature = signature_of(target)
    except UnknownTarget as error:
        yield f"{path}._target_: {target} does not exist. {error}"
        return
    known = signature.parameters
    further = set(parts) if path == "model" else set()
    given = GIVEN.get(group, frozenset()) | further
    for key, value in node.items():
        if key in INSTANTIATE_KEYS:
            continue
        if key not in known:
            if not signature.open:
                yield _unknown_argument(path, key, target, [name for name in known if name not in given])
        elif value != "???" and not (value == AUTO and key in FILLED):
            yield from _check_type(f"{path}.{key}", value, known[key], signature)
    if node.get("_partial_"):
        return
    for name, parameter in known.items():
        if parameter.required and name not in node and name not in given:
            part = f" Where it is a part, choose parts.{name}." if path == "model" else ""
            yield f"{path}.{name} is missing: {target} requires it.{part}"
    for name in sorted(further - known.keys()):
        yield f"parts.{name}: {target} takes no such part.{did_you_mean(name, known)} Arguments: {', '.join(known)}."


def _unknown_argument(path: str, key: str, target: str, known: list[str]) -> str:
    if renamed := describe_renamed_key(f"{path}.{key}"):
        return renamed
    options = ", ".join(known) or "none"
    said = f"{path}.{key}: {target} has no such option.{did_you_mean(key, known, path + '.')} Options: {options}."
    # A recipe's value stays on top of a group that the command line exchanges, so there may be no typo at all.
    return said if find_nearest(key, known) else f"{said} If a recipe sets it for another {path}, add ~{path}.{key}."


def _check_type(path: str, value: Any, parameter: Parameter, signature: Signature) -> Iterator[str]:
    if parameter.annotation and not fits_annotation(value, parameter.annotation, signature.aliases):
        meant = signature.aliases(parameter.annotation) or parameter.annotation  # the values that a name stands for
        yield f"{path}: expected {meant}, got {shorten_value(value)} ({type(value).__name__})."


CHECKS: list[Check] = [
    check_values, check_groups, check_auto, check_encoders, check_targets, check_unsafe_keys, check_literals,
    check_numbers, check_texts, check_data, check_stream, check_batch, check_length, check_warmup, check_columns,
    check_peft, check_decoders, check_launch, check_zero, check_own_strategy, check_run,
]  # fmt: skip
"""Every check that needs no import of other packages. Append to extend."""
