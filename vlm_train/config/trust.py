"""Which code a configuration may run. A run folder that somebody sends us must not be able to run theirs.

A `_target_` is first judged by its name. What it names in another package is imported and judged as well, because a
name may wander through the imports of an innocent module, as `torch.nn.functional.torch.load` does.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vlm_train.config.resolve import resolve_key
from vlm_train.config.signatures import import_target, is_ours
from vlm_train.errors import ConfigError

OUR_TARGETS = (
    "vlm_train.models.", "vlm_train.data.", "vlm_train.objectives.", "vlm_train.training.callbacks.",
    "vlm_train.training.strategies.", "vlm_train.training.optim.", "vlm_train.evaluation.", "vlm_train.export.",
    "vlm_train.loggers.",
)  # fmt: skip
"""Where our components live. Machinery such as `vlm_train.runs.launch`, which starts programs, is none."""

FOREIGN_TARGETS = ("torch.nn.", "torch.optim.", "lightning.pytorch.", "transformers.", "peft.")
"""Packages whose classes may be built. Their functions may not: some of them load and run code."""

REFUSED = ("lightning.pytorch.cli.", "transformers.cli.", "transformers.commands.")
"""Command lines inside those packages: classes that start what their arguments say."""

UNSAFE_KEYS = {"trust_remote_code": False, "weights_only": True}
"""Arguments that would let downloaded files run code, and the only value that they may have."""


def check_extended_trust(cfg: DictConfig, overrides: Iterable[str]) -> None:
    """Raises ConfigError where a file extends trust. Recipes are passed around: whose code runs, the command line says
    alone."""
    given = any(one.partition("=")[0].lstrip("+") == "allow_targets" for one in overrides)
    if cfg.allow_targets and not given:
        listed = f"[{','.join(map(str, cfg.allow_targets))}]"
        raise ConfigError(
            f"allow_targets: {cfg.recipe_name}, or a file that it is made of, trusts {listed} by itself, which no file "
            f"can. If you trust this code, say allow_targets={listed} on the command line."
        )


OUR_RESOLVERS = {
    "${oc.decode:${oc.env:SLURM_NTASKS_PER_NODE,1}}", "${oc.decode:${oc.env:SLURM_JOB_NUM_NODES,1}}",
    "${oc.decode:${oc.env:LOCAL_WORLD_SIZE,1}}", "${oc.decode:${oc.env:GROUP_WORLD_SIZE,1}}",
}  # fmt: skip
"""Values of `conf/launch` that read the environment: numbers of processes."""

_REFERENCE = re.compile(r"\$\{[\w.\[\]-]+\}")


def check_environment_unread(folder: str, cfg: DictConfig, given: Collection[str] = ()) -> None:
    """Raise `ConfigError` where the configuration of a run folder, which may be somebody else's, reads the environment
    or calls another resolver: an address could carry a secret to their server. `given` are keys of the command line."""
    problems = []
    for path, text in _iterate_texts("", OmegaConf.to_container(cfg, resolve=False)):
        if any(path == key or path.startswith(f"{key}.") for key in given) or text in OUR_RESOLVERS:
            continue
        while (rest := _REFERENCE.sub("", text)) != text:
            text = rest
        if "${" in text:
            problems.append(
                f"{path}: the configuration in {folder} reads the environment or the like, which is not done for a "
                f"folder that may be somebody else's. Give it on the command line: {path}=<value>"
            )
    if problems:
        raise ConfigError(problems)


def _iterate_texts(path: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _iterate_texts(f"{path}.{key}" if path else str(key), inner)


def iterate_components(cfg: DictConfig) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every node with a `_target_`: its dotted path, its top-level group and its resolved content."""
    for path, node in iterate_nodes(cfg):
        if "_target_" in node:
            yield path, path.partition(".")[0], node


def iterate_nodes(cfg: DictConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping below the root: its dotted path and its resolved content."""
    for group in map(str, cfg):
        yield from _iterate_below(group, resolve_key(cfg, group))


def _iterate_below(path: str, value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, dict):
        yield path, value
        for key, inner in value.items():
            yield from _iterate_below(f"{path}.{key}", inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _iterate_below(f"{path}.{index}", inner)


def reason_not_trusted(target: Any, allow_targets: list[str]) -> str | None:
    """Why the name of a target is not trusted, or None."""
    trusted = (*OUR_TARGETS, *FOREIGN_TARGETS, *allow_targets)
    if not isinstance(target, str) or not target.startswith(trusted) or target.startswith(REFUSED):
        return (
            f"{target!r} is not trusted. Allowed prefixes: {', '.join(trusted)}; "
            f"extend them with allow_targets=[{_prefix_to_trust(target)}] if you trust this code."
        )
    if is_ours(target) and any(name.startswith("_") for name in target.split(".")):
        return f"{target!r} is private, so it is not a component."
    return None


def _prefix_to_trust(target: Any) -> str:
    """The package of a target that a user may trust; of ours, and of command lines, none is suggested."""
    refused = not isinstance(target, str) or "." not in target or is_ours(target) or target.startswith(REFUSED)
    return "<prefix>" if refused else f"{target.partition('.')[0]}."


def untrusted_object(target: str, allow_targets: list[str]) -> str | None:
    """Why what a target of another package names is not trusted, or None. Raises UnknownTarget."""
    found = import_target(target)
    where = f"{getattr(found, '__module__', None)}."
    by_user = where.startswith(tuple(allow_targets))
    if where.startswith(REFUSED) or not (by_user or where.startswith(FOREIGN_TARGETS)):
        home = getattr(found, "__module__", None) or f"a {type(found).__name__}"
        return f"{target!r} is not trusted: it is really from {home}. Name it there, and allow_targets=[<prefix>]."
    if not by_user and not isinstance(found, type):
        return (
            f"{target!r} is not trusted: of other packages only classes are, this is a {type(found).__name__}. "
            "Wrap it in a function of your own, or extend allow_targets=[<prefix>] if you trust this code."
        )
    return None


def check_unsafe_keys(cfg: DictConfig) -> Iterator[str]:
    """No argument lets a downloaded file run code."""
    for path, node in iterate_nodes(cfg):
        for key, safe in UNSAFE_KEYS.items():
            if node.get(key) not in (None, safe):
                yield f"{path}.{key}: got {node[key]!r}. Allowed: {safe}, so that no downloaded file runs code."
