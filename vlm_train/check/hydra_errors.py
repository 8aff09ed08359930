"""Turns the errors of Hydra and OmegaConf into sentences that name the setting, what it got and what is allowed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml  # type: ignore[import-untyped]
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_pipelines.nearest import did_you_mean
from vlm_train.check.check import check_config
from vlm_train.config.compose import EMPTY_PARENT, GROUP_WITHOUT_OPTION, compose_config
from vlm_train.config.folders import find_recipe, list_groups
from vlm_train.config.origins import flatten_leaves
from vlm_train.config.renamed_keys import describe_renamed_key
from vlm_train.config.signatures import UnknownTarget, is_ours, read_signature
from vlm_train.errors import ConfigError

Composition = (HydraException, OmegaConfBaseException, yaml.YAMLError)
"""What composing raises when a file or an override is wrong."""


def explain_errors(overrides: Sequence[str], dirs: Sequence[str | Path], error: BaseException) -> list[str]:
    """Every problem of a command line: each wrong override is set aside to see whether others are wrong too."""
    remaining, problems = list(overrides), []
    while True:
        problem, culprit = _describe_error(error, remaining, dirs)
        problems.append(problem)
        if culprit is None or _key_of(culprit) in ("recipe", "schedule"):  # what the others mean depends on these
            return problems
        remaining.remove(culprit)
        try:
            check_config(compose_config(remaining, dirs), need_assets=False)
            return problems
        except Composition as further:
            error = further
        except ConfigError as further:
            return problems + further.problems


def _describe_error(error: BaseException, overrides: list[str], dirs: Sequence[str | Path]) -> tuple[str, str | None]:
    """A sentence, and the override that caused it where one did."""
    text = str(error)
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"{mark.name}, line {mark.line + 1}: not valid YAML: {error.problem}.", None
    if isinstance(error, OverrideParseException):
        line = str(error.override)
        return f"{line}: not of the form key=value ({text.splitlines()[0]}).", _find_override(overrides, line)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _unknown_option(error, overrides, dirs)
    if match := re.search(r"Could not override '(.+?)'", text):
        key = match[1].partition("@")[0]
        culprit = next((o for o in overrides if _key_of(o) == key), None)
        return unknown_key(key, _remove_override(overrides, culprit), dirs), culprit
    if text == GROUP_WITHOUT_OPTION:
        culprit = next((o for o in overrides if _key_of(o) in list_groups(dirs) and not _names_options(o)), None)
        instead = f"takes the name of an option (--help lists them); ~{str(culprit).partition('=')[0]} leaves it out."
        return f"{culprit}: a group on the command line {instead}", culprit
    if text == EMPTY_PARENT:
        return _below_empty(overrides, dirs)
    if match := re.match(r"Error merging override (.+)", text):
        return f"{match[1]}: {_first_line(error)}", _find_override(overrides, match[1])
    if match := re.match(r"In '(.+?)'", text):
        return _in_file(match[1], error, overrides, dirs), None
    return (_find_headless_recipe(overrides, dirs) or text.strip().splitlines()[0]), None


def _unknown_option(
    error: MissingConfigException, overrides: list[str], dirs: Sequence[str | Path]
) -> tuple[str, str | None]:
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    options = sorted(name for name in error.options or () if not name.startswith("_"))
    culprit = next((o for o in overrides if _key_of(o) == group and o.endswith(f"={option}")), None)
    recipe = next((find_recipe(o.partition("=")[2], dirs) for o in overrides if _key_of(o) == "recipe"), None)
    place = f"{recipe}: " if culprit is None and recipe else ""
    if renamed := describe_renamed_key(f"{group}={option}"):
        return f"{place}{renamed}", culprit
    listed = f" Available: {', '.join(options)}." if options else f" There is no group '{group}'."
    return f"{place}{group}={option}: no such option.{did_you_mean(option, options)}{listed}", culprit


def _below_empty(overrides: list[str], dirs: Sequence[str | Path]) -> tuple[str, str | None]:
    """`peft.r=8` while `peft` is null."""
    cfg = compose_config([o for o in overrides if "." not in _key_of(o)], dirs)
    for override in overrides:
        *parents, _ = _key_of(override).split(".")
        for depth in range(1, len(parents) + 1):
            path = ".".join(parents[:depth])
            if OmegaConf.select(cfg, path, throw_on_missing=False) is None:
                return (
                    f"{_key_of(override)}: {path} is empty. Choose an option for it first, {path}=<option>.",
                    override,
                )
    return f"{EMPTY_PARENT}: {', '.join(overrides)}.", None


def unknown_key(key: str, overrides: Sequence[str], dirs: Sequence[str | Path]) -> str:
    """What to say about a key that no layer knows; `overrides` are those that are fine so far."""
    for attempt in (list(overrides), [o for o in overrides if "." not in _key_of(o)], []):
        try:
            return unknown_in(key, compose_config(attempt, dirs))
        except Composition:
            continue
    return f"{key}: unknown key."


def unknown_in(key: str, cfg: DictConfig) -> str:
    """What to say about a key that `cfg` lacks."""
    if renamed := describe_renamed_key(key):
        return renamed
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, parent, throw_on_missing=False) if parent else cfg
    group = key.partition(".")[0]
    if parent and group in cfg and OmegaConf.select(cfg, group, throw_on_missing=False) is None:
        return f"{key}: {group} is empty. Choose an option for it first, {group}=<option>."
    if not isinstance(node, DictConfig):
        return f"{key}: unknown key.{did_you_mean(key, _every_key(cfg))}"
    target = node.get("_target_") if "_target_" in node else None
    if isinstance(target, str) and name in _options_of(target):
        return f"{key}: an option of {target} that no file lists yet; write ++{key}=<value>."
    known = [str(other) for other in node if other != "_target_"]
    if parent:
        suggestion = did_you_mean(name, known, f"{parent}.") or did_you_mean(key, _every_key(cfg))
    else:  # one that other programs have at their top may stand in a section here
        suggestion = did_you_mean(name, {*known, *_every_key(cfg)})
    return f"{key}: unknown key.{suggestion} Keys of {parent or 'the configuration'}: {', '.join(known)}."


def _options_of(target: str) -> Iterable[str]:
    try:
        return read_signature(target).parameters if is_ours(target) else ()
    except (UnknownTarget, ImportError):
        return ()


def _every_key(cfg: DictConfig) -> set[str]:
    """Dotted keys of all nodes, leaves or not."""
    found = set()
    for leaf in flatten_leaves(cfg):
        while leaf:
            found.add(leaf)
            leaf = leaf.rpartition(".")[0]
    return found


def _in_file(path: str, error: BaseException, overrides: list[str], dirs: Sequence[str | Path]) -> str:
    """A file whose content does not fit: a misspelt key, a wrong type, a missing first line."""
    if headless := _find_headless_recipe(overrides, dirs):
        return headless
    body = str(error).partition("\n")[2]
    key = re.search(r"full_key: (\S+)", body)
    if key and re.search(r"Key '.+' (not in|is not in)", body):
        return f"{path}.yaml: {unknown_key(key[1], [o for o in overrides if _key_of(o) != path.split('/')[0]], dirs)}"
    reason = body.strip().splitlines()[0] if body.strip() else str(error).splitlines()[0]
    return f"{path}.yaml: {key[1] + ': ' if key else ''}{reason}"


def _find_headless_recipe(overrides: list[str], dirs: Sequence[str | Path]) -> str | None:
    """A recipe without its package line would land below `recipe` instead of at the root."""
    for override in overrides:
        if _key_of(override) != "recipe":
            continue
        path = find_recipe(override.partition("=")[2], dirs)
        if path and "@package _global_" not in path.read_text(encoding="utf-8").partition("\n")[0]:
            return f"{path}: the first line of a recipe must be '# @package _global_'."
    return None


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error.__context__
    return str(cause if cause is not None else error).strip().splitlines()[0]


def _key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~").partition("@")[0]


def _names_options(override: str) -> bool:
    """Whether the value is a name or a list of names, as Hydra wants it for a group."""
    parsed = OverridesParser.create().parse_override(override)
    if parsed.is_delete() or parsed.is_sweep_override():
        return True
    value = parsed.value()
    return all(isinstance(one, str) for one in value) if isinstance(value, list) else isinstance(value, str)


def _find_override(overrides: list[str], text: str) -> str | None:
    return text if text in overrides else None


def _remove_override(overrides: list[str], culprit: str | None) -> list[str]:
    return [o for o in overrides if o != culprit]
