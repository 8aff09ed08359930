"""Everything that can be known to be wrong before a weight is read. All problems are raised together.

Order of cost: the composed values, then our own targets from their source, then targets of other packages, which have
to be imported, and last the assets. A later kind is only looked at when the earlier ones found nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from vlm_train.assets import missing_assets
from vlm_train.config import resolved
from vlm_train.errors import AssetError, ConfigError
from vlm_train.schema import DICT_GROUPS, PART_GROUPS
from vlm_train.signatures import (
    Parameter,
    Signature,
    UnknownTarget,
    fits,
    hint,
    import_signature,
    is_ours,
    read_signature,
)

ALLOWED_TARGETS = (
    "vlm_train.", "data_pipelines.", "torch.nn.", "torch.optim.", "lightning.pytorch.", "transformers.", "peft.",
)  # fmt: skip

THREADED: dict[str, frozenset[str]] = {
    "model": frozenset({"vision", "connector", "llm"}),
    "connector": frozenset({"in_dim", "out_dim", "grid"}),
    "llm": frozenset({"vocab_size", "new_tokens"}),
    "tokenizer": frozenset({"data"}),
    "image": frozenset({"size", "mean", "std", "seed"}),
    "template": frozenset({"tokenizer"}),
    "data": frozenset({"tokenizer", "template", "image", "layout", "batch", "seed"}),
    "peft": frozenset({"model"}),
    "optim": frozenset({"params"}),
    "lr_schedule": frozenset({"optimizer", "total_steps"}),
    "logger": frozenset({"folder"}),
}
"""Arguments that `build.py` derives from other parts: a configuration need not give them."""

LITERALS: dict[str, tuple[Any, ...]] = {
    "mode": ("fit", "eval", "export", "show", "import", "config"),
    "batch.normalise": ("token", "sample", "source", "sqrt_length"),
    "trainer.precision": ("32-true", "bf16-mixed", "bf16-true", "16-mixed"),
    "trainer.accelerator": ("auto", "cpu", "gpu"),
    "launch.kind": ("local", "torchrun", "srun"),
}

POSITIVE = (
    "batch.samples", "batch.tokens", "batch.micro", "trainer.epochs", "trainer.max_steps", "trainer.val_every",
    "trainer.save_every", "trainer.log_every", "trainer.clip_norm", "launch.devices", "launch.nodes",
)  # fmt: skip

ASSET_KEYS = ("weights", "shards")
"""Keys that, like `init_from`, a recipe may leave to its user; a plan needs no asset, and assets.py asks for them."""

INSTANTIATE_KEYS = ("_target_", "_partial_", "_recursive_", "_convert_")

Check = Callable[[DictConfig], Iterator[str]]


def check(cfg: DictConfig, *, need_assets: bool) -> None:
    """Raises one ConfigError that lists every problem, each under its dotted path.

    `need_assets` also requires weights, tokenizers, shards and the runs to start from to be there (AssetError).
    """
    problems = [problem for one in CHECKS for problem in one(cfg)]
    if problems:
        raise ConfigError(problems)
    problems = list(check_foreign_targets(cfg))
    if problems:
        raise ConfigError(problems)
    if need_assets and (missing := missing_assets(cfg)):
        raise AssetError(missing)


def components(cfg: DictConfig) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every node with a `_target_`: its dotted path, its top-level group and its resolved content."""
    for group in map(str, cfg):
        node = cfg._get_node(group)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            for path, content in _nodes(group, resolved(cfg, group)):
                yield path, group, content


def _nodes(path: str, value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, dict):
        if "_target_" in value:
            yield path, value
        for key, inner in value.items():
            yield from _nodes(f"{path}.{key}", inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _nodes(f"{path}.{index}", inner)


def check_values(cfg: DictConfig) -> Iterator[str]:
    """Mandatory values are given and interpolations resolve."""
    for key in map(str, cfg):
        if key != "init_from":
            yield from _check_value(cfg, key, key)


def _check_value(parent: Any, key: Any, where: str) -> Iterator[str]:
    if OmegaConf.is_missing(parent, key):
        if key not in ASSET_KEYS:
            yield f"{where} is missing: give it a value, {where}=<value>."
        return
    try:
        node = parent[key]
    except InterpolationToMissingValueError:  # said once, where the value is missing
        return
    except OmegaConfBaseException as error:
        yield f"{where}: {str(error).splitlines()[0]}"
        return
    if isinstance(node, DictConfig):
        for inner in map(str, node):
            yield from _check_value(node, inner, f"{where}.{inner}")
    elif isinstance(node, ListConfig):
        for index in range(len(node)):
            yield from _check_value(node, index, f"{where}.{index}")


def check_groups(cfg: DictConfig) -> Iterator[str]:
    """Groups hold components, and only where components belong."""
    required = {"model", "data", "optim", *_wanted_parts(resolved(cfg, "model"))}
    for group in PART_GROUPS:
        node = resolved(cfg, group)
        if node is None and group in required:
            yield f"{group} is empty: choose an option, {group}=<option> (--help lists them)."
        elif node is not None and (not isinstance(node, dict) or "_target_" not in node):
            yield f"{group} has no _target_: it needs one component, got {_short(node)}."
    for group in DICT_GROUPS:
        node = resolved(cfg, group) or {}
        if not isinstance(node, dict):
            yield f"{group} must map names to components, got {_short(node)}."
            continue
        for name, inner in node.items():
            if inner is not None and (not isinstance(inner, dict) or "_target_" not in inner):
                yield f"{group}.{name} has no _target_: expected a component or null, got {_short(inner)}."


def _wanted_parts(model: Any) -> list[str]:
    """Parts that the model's constructor cannot do without."""
    target = model.get("_target_") if isinstance(model, dict) else None
    try:
        known = read_signature(target).parameters if isinstance(target, str) and is_ours(target) else {}
    except UnknownTarget:
        return []
    return [name for name, parameter in known.items() if name in THREADED["model"] and parameter.required]


def check_targets(cfg: DictConfig) -> Iterator[str]:
    """Targets are trusted; ours exist and take what they are given."""
    trusted = (*ALLOWED_TARGETS, *cfg.allow_targets)
    for path, group, node in components(cfg):
        target = node["_target_"]
        if not isinstance(target, str) or not any(target.startswith(prefix) for prefix in trusted):
            yield (
                f"{path}._target_: {target!r} is not trusted. Allowed prefixes: {', '.join(trusted)}; "
                "extend them with allow_targets=[<prefix>] if you trust this code."
            )
        elif is_ours(target):
            yield from _check_component(path, group, node, read_signature)


def check_foreign_targets(cfg: DictConfig) -> Iterator[str]:
    """Targets of other packages exist and take what they are given. Imports them."""
    for path, group, node in components(cfg):
        if not is_ours(node["_target_"]):
            yield from _check_component(path, group, node, import_signature)


def _check_component(
    path: str, group: str, node: dict[str, Any], signature_of: Callable[[str], Signature]
) -> Iterator[str]:
    target = node["_target_"]
    try:
        signature = signature_of(target)
    except UnknownTarget as error:
        yield f"{path}._target_: {target} does not exist. {error}"
        return
    known = signature.parameters
    threaded = THREADED.get(group, frozenset())
    for key, value in node.items():
        if key in INSTANTIATE_KEYS:
            continue
        if key not in known:
            if not signature.open:
                yield _unknown_argument(path, key, target, [name for name in known if name not in threaded])
        elif value != "???":
            yield from _check_type(f"{path}.{key}", value, known[key], signature)
    if node.get("_partial_"):
        return
    for name, parameter in known.items():
        if parameter.required and name not in node and name not in threaded:
            yield f"{path}.{name} is missing: {target} requires it."


def _unknown_argument(path: str, key: str, target: str, known: list[str]) -> str:
    options = ", ".join(known) or "none"
    return f"{path}.{key}: {target} has no such option.{hint(key, known, path + '.')} Options: {options}."


def _check_type(path: str, value: Any, parameter: Parameter, signature: Signature) -> Iterator[str]:
    if parameter.annotation and not fits(value, parameter.annotation, signature.aliases):
        yield f"{path}: expected {parameter.annotation}, got {_short(value)} ({type(value).__name__})."


def check_literals(cfg: DictConfig) -> Iterator[str]:
    """Words are among the known ones."""
    for key, allowed in LITERALS.items():
        value = OmegaConf.select(cfg, key)
        if value not in allowed:
            yield f"{key}: got {value!r}.{hint(str(value), allowed)} Allowed: {', '.join(allowed)}."


def check_numbers(cfg: DictConfig) -> Iterator[str]:
    """Lengths, intervals and sizes are positive."""
    for key in POSITIVE:
        value = OmegaConf.select(cfg, key)
        if value is not None and value <= 0:
            yield f"{key}: expected a positive number or null, got {value}."


def check_batch(cfg: DictConfig) -> Iterator[str]:
    """The batch size is given once."""
    given = [name for name in ("samples", "tokens") if cfg.batch[name] is not None]
    if len(given) != 1:
        got = "both" if given else "neither"
        yield f"batch: give exactly one of batch.samples and batch.tokens, got {got}."


def check_length(cfg: DictConfig) -> Iterator[str]:
    """Training ends."""
    if cfg.trainer.epochs is None and cfg.trainer.max_steps is None:
        yield "trainer: give trainer.epochs or trainer.max_steps, got neither."


def check_launch(cfg: DictConfig) -> Iterator[str]:
    """Several nodes need a launcher that spans them."""
    if cfg.launch.kind == "local" and cfg.launch.nodes > 1:
        yield f"launch.nodes: launch=local starts one node, got {cfg.launch.nodes}. Use launch=torchrun or launch=srun."


def check_run(cfg: DictConfig) -> Iterator[str]:
    """Modes that look at a run name one; the run's name is a folder name."""
    if cfg.mode in ("eval", "export") and not cfg.run:
        yield f"run is missing: mode={cfg.mode} needs run=<run folder>."
    if cfg.mode == "fit" and cfg.run:
        yield "run: mode=fit names its own folder; use init_from or resume to start from another run."
    if cfg.run_name is not None and (not cfg.run_name or set(cfg.run_name) & set("/\\") or cfg.run_name in (".", "..")):
        yield f"run_name: expected a folder name, got {cfg.run_name!r}."


CHECKS: list[Check] = [
    check_values, check_groups, check_targets, check_literals, check_numbers, check_batch, check_length, check_launch,
    check_run,
]  # fmt: skip
"""Every check that needs no import of other packages. Append to extend."""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
