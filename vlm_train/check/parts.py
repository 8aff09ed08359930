"""Rules about which parts a run needs and which fit together, from their source: nothing is imported or built."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from omegaconf import DictConfig

from vlm_train.config.resolve import resolve_key
from vlm_train.config.schema import DICT_GROUPS, MODEL_PARTS, PART_GROUPS, SEVERAL
from vlm_train.config.signatures import UnknownTarget, is_ours, read_signature
from vlm_train.config.trust import iterate_components

ALWAYS = ("model", "tokenizer", "template", "data", "optim", "lr_schedule")
"""Groups that every run needs; those of `MODEL_PARTS` follow from the model, and `image` from a vision tower."""

NAME = re.compile(r"[A-Za-z]\w*")
TAKEN = ("keys", "values", "items", "pop", "clear", "update", "type", "forward", "training")
"""What a component cannot be called: modules have such members."""

QUANTIZED_BITS = (4, 8)
"""Widths of `peft.bits`."""


def check_groups(cfg: DictConfig) -> Iterator[str]:
    """Groups hold components, and only where components belong; those that the run needs are there."""
    wanted = _wanted_parts(resolve_key(cfg, "model"))
    required = {*ALWAYS, *wanted, *(("image",) if "vision" in wanted else ())}
    for group in PART_GROUPS:
        node = resolve_key(cfg, group)
        if node is None and group in required:
            yield f"{group} is empty: choose an option, {group}=<option> (--help lists them)."
        elif node is not None and not _is_component(node):
            yield from _check_several(group, node)
    for group in DICT_GROUPS:
        node = resolve_key(cfg, group) or {}
        if not isinstance(node, dict):
            yield f"{group} must map names to components, got {shorten_value(node)}."
            continue
        for name, inner in node.items():
            if inner is not None and not _is_component(inner):
                yield f"{group}.{name} has no _target_: expected a component or null, got {shorten_value(inner)}."
            if group == "parts" and name in ("model", *MODEL_PARTS):
                yield f"parts.{name}: has a place of its own, {name}=<option>."
            elif group == "parts" and (not NAME.fullmatch(name) or name in TAKEN):
                yield _describe_wrong_name(f"parts.{name}", name)
    objectives = resolve_key(cfg, "objective") or {}
    if isinstance(objectives, dict) and not any(node is not None for node in objectives.values()):
        yield "objective is empty: there is no loss. Choose an option, objective=<option> (--help lists them)."


def check_decoders(cfg: DictConfig) -> Iterator[str]:
    """The package that an image plan decodes with is installed: what its constructor would refuse later."""
    for path, group, node in iterate_components(cfg):
        if group == "image" and node.get("decode") == "simplejpeg" and find_spec("simplejpeg") is None:
            yield (
                f"{path}.decode: got simplejpeg, which is not installed: pip install 'vlm-train[jpeg]'. "
                "Allowed without it: pillow."
            )


def _is_component(node: Any) -> bool:
    return isinstance(node, dict) and "_target_" in node


def _check_several(group: str, node: Any) -> Iterator[str]:
    """A group in place of one component may name several, if it is one of those."""
    members = node if group in SEVERAL and isinstance(node, dict) else {}
    if not any(map(_is_component, members.values())):
        choose = f"Choose an option, {group}=<option>."
        yield f"{group} has no _target_: it needs one component, got {shorten_value(node)}. {choose}"
        return
    for name, inner in members.items():
        if inner is None:
            continue
        if not _is_component(inner):
            got = shorten_value(inner)
            yield (
                f"{group}.{name} has no _target_: {group} names several components, and this is none: {got}. "
                f"If a recipe sets it for a single one, {group}.{name}=null leaves it out."
            )
        elif group in MODEL_PARTS and (not NAME.fullmatch(name) or name in TAKEN):
            yield _describe_wrong_name(f"{group}.{name}", name)


def _describe_wrong_name(path: str, name: str) -> str:
    return f"{path}: a component cannot be called {name!r}. Allowed: letters, digits and _."


def names_of(node: Any) -> list[str]:
    """The names of the components of a group; none where it holds a single one."""
    members = {} if not isinstance(node, dict) or "_target_" in node else node
    return [name for name, inner in members.items() if _is_component(inner)]


def check_encoders(cfg: DictConfig) -> Iterator[str]:
    """Image plans and connectors that have names have those of the vision encoders."""
    encoders = names_of(resolve_key(cfg, "vision"))
    for group in ("image", "connector"):
        named = names_of(resolve_key(cfg, group))
        if named and sorted(named) != sorted(encoders):
            one = f"one that serves all, {group}=<option>"
            allowed = f"{', '.join(encoders)}, as vision names its encoders, or {one}" if encoders else one
            yield f"{group}: has components called {', '.join(named)}. Allowed: {allowed}."


def _wanted_parts(model: Any) -> list[str]:
    """Parts that the model's constructor cannot do without."""
    target = _our_target(model)
    try:
        known = read_signature(target).parameters if target else {}
    except UnknownTarget:
        return []
    return [name for name, parameter in known.items() if name in MODEL_PARTS and parameter.required]


def _our_target(node: Any) -> str | None:
    target = node.get("_target_") if isinstance(node, dict) else None
    return target if isinstance(target, str) and is_ours(target) else None


def check_columns(cfg: DictConfig) -> Iterator[str]:
    """Modes that write columns know of which set, and each process its share."""
    if cfg.mode in ("caption", "score") and not cfg.columns.shards:
        yield f"columns.shards is missing: mode={cfg.mode} needs columns.shards=<shard set>."
    if cfg.mode == "caption" and cfg.columns.captions:
        yield "columns.captions: only mode=score reads captions of other columns; leave it out."
    if cfg.columns.scores != "captions" and cfg.columns.captions:
        yield f"columns.captions: columns.scores={cfg.columns.scores} scores no captions; leave one of them out."
    if cfg.columns.scores == "teacher" and not cfg.columns.temperature:
        yield "columns.temperature: got 0 with columns.scores=teacher; allowed: above 0."
    if cfg.columns.scores == "teacher" and cfg.data.get("annotations") == "drawn":
        yield "data.annotations: drawn shows other answers in every epoch; columns.scores=teacher writes one."
    if cfg.columns.scores == "teacher" and cfg.data.get("over_length") == "split":
        yield "data.over_length: split makes several samples of one; columns.scores=teacher writes one. Use truncate."
    if not 0 <= cfg.columns.part < cfg.columns.parts:
        yield f"columns.part: got {cfg.columns.part} with columns.parts={cfg.columns.parts}; allowed: 0 to parts - 1."


def check_peft(cfg: DictConfig) -> Iterator[str]:
    """Quantized weights have a known width. That they are not sharded, `vlm_train.check.strategies` sees to."""
    peft = resolve_key(cfg, "peft")
    bits = peft.get("bits") if isinstance(peft, dict) else None
    if bits is None:
        return
    if bits not in QUANTIZED_BITS:
        yield f"peft.bits: got {bits!r}. Allowed: {', '.join(map(str, QUANTIZED_BITS))}, or null for none."
    if bits == 8 and peft.get("dora"):
        yield "peft.dora: peft 0.21 loses the scales of 8-bit weights in DoRA. Use peft.bits=4 or peft.dora=false."


def shorten_value(value: Any) -> str:
    """A value in at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
