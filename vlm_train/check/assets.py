"""Files that a run needs and that are not there: weights, tokenizers, shards, earlier runs. No torch import."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from data_pipelines.errors import DataError
from vlm_train.check.sources import describe_tokenless, describe_weightless
from vlm_train.config.hub_files import describe_missing_source
from vlm_train.config.resolve import resolve_key
from vlm_train.config.schema import MODEL_PARTS
from vlm_train.config.trust import iterate_components

READ = {
    "eval": ("eval", "tokenizer"),
    "export": ("tokenizer",),
    "caption": ("columns", "tokenizer"),
    "score": ("columns", "tokenizer"),
}
"""Mode -> the groups whose shards it reads, where it does not train."""


def missing_assets(cfg: DictConfig, expected: Collection[Path] = (), *, ask_hub: bool = True) -> list[str]:
    """One line per asset that is named by a setting and missing.

    Args:
        expected: run folders yet to be filled.
        ask_hub: also look for names that only the hub can know.
    """
    if cfg.mode == "import":  # brings weights and tokenizer itself
        return list(_missing_runs(cfg, expected))
    problems = [
        *_missing_weights(cfg, ask_hub),
        *_missing_shards(cfg),
        *_missing_tars(cfg),
        *_missing_runs(cfg, expected),
        *_missing_packages(cfg),
    ]
    return list(dict.fromkeys(problems))


def _missing_weights(cfg: DictConfig, ask_hub: bool = True) -> Iterator[str]:
    """The `weights` of every part and the tokenizer's: a local file or folder, a name on the model hub, or a package's
    file."""
    named = []
    for path, group, node in iterate_components(cfg):
        if group in ("model", *MODEL_PARTS, "parts"):
            named.append((f"{path}.weights", node.get("weights"), "config.json"))
            if reason := describe_weightless(node):
                yield f"{path}.weights: {node['weights']} {reason}"
    named.append(("model.name", (resolve_key(cfg, "model") or {}).get("name"), "config.json"))
    for group, key in (("tokenizer", "name"), ("tokenizer", "file"), ("instruction", "tokenizer")):
        named.append((f"{group}.{key}", (resolve_key(cfg, group) or {}).get(key), "tokenizer_config.json"))
    for path, name, probe in named:
        if name == "???":
            yield f"{path} is missing: give a local path or a name on the hub, {path}=<value>."
        elif isinstance(name, str):
            reads_text = probe == "tokenizer_config.json"
            missing = describe_missing_source(name, probe, ask_hub=ask_hub)
            if reason := missing or (describe_tokenless(name) if reads_text else None):
                yield f"{path}: {name} {reason}"


def _missing_packages(cfg: DictConfig) -> Iterator[str]:
    """What a setting needs and only an extra installs."""
    peft = resolve_key(cfg, "peft")
    if isinstance(peft, dict) and peft.get("bits") is not None and importlib.util.find_spec("bitsandbytes") is None:
        yield f"peft.bits: {peft['bits']}-bit weights need bitsandbytes: pip install 'vlm-train[qlora]'."


NOT_GIVEN = ("???", "not given")
"""What stands for shards that nobody has named; the second one in options of `eval` where a run validates on none."""


def _missing_shards(cfg: DictConfig) -> Iterator[str]:
    """Every `shards` that the mode reads is a folder with a manifest."""
    for group in READ.get(cfg.mode, ("data", "eval", "tokenizer")):
        for path, folder in _find_shard_settings(group, resolve_key(cfg, group)):
            if path.endswith("validation_shards") and not _evaluates_at_validations(cfg, path):
                continue
            if folder in NOT_GIVEN:
                yield f"{path} is missing: give a folder of shards, {path}=<folder>."
            elif "://" in folder:
                continue  # reading its manifest tells
            elif not Path(folder).is_dir():
                yield f"{path}: {folder} does not exist. {_how_to_build(cfg, Path(folder))}"
            elif not (Path(folder) / "manifest.json").is_file():
                yield f"{path}: {folder} has no manifest.json: it holds no finished shards."
            elif lost := _lost_shards(Path(folder)):
                more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
                yield f"{path}: {folder} lacks {', '.join(lost[:3])}{more}, which its manifest.json names."
    for split in ("train", "val") if cfg.mode == "fit" else ():
        for index, entry in enumerate((resolve_key(cfg, "data") or {}).get(split) or []):
            folder = entry.get("columns")
            if folder is not None and not (Path(folder) / "columns.json").is_file():
                yield f"data.{split}.{index}.columns: {folder} has no columns.json: it holds no finished columns."


def _missing_tars(cfg: DictConfig) -> Iterator[str]:
    """The tars of a stream that lie on this machine; of others, that they may be read from there."""
    from data_pipelines.indexing.addresses import expand_addresses
    from vlm_train.data.stream import list_addresses

    for entry in (resolve_key(cfg, "data") or {}).get("train") or [] if cfg.mode == "fit" else []:
        texts = list_addresses(entry) if "tars" in entry else []
        here = [one for one in texts if "://" not in one or one.endswith(".tar")]  # others have to be listed
        try:
            expand_addresses(here) if here else []
        except DataError as error:
            yield f"data.train: {str(error).removeprefix('shards: ')}"


def _lost_shards(folder: Path) -> list[str]:
    """The shards of a finished set that are not there. A manifest that cannot be read is reported by who opens it."""
    from data_pipelines.shards.manifest import Manifest

    try:
        shards = Manifest.read(folder).shards
    except DataError:
        return []
    return [shard.name for shard in shards if not (folder / shard.name).is_file()]


def _evaluates_at_validations(cfg: DictConfig, path: str) -> bool:
    """Whether the evaluator that has the setting `path` runs while the mode trains."""
    group, name, *_ = path.split(".")
    evaluator = (resolve_key(cfg, group) or {}).get(name)
    asked = not isinstance(evaluator, dict) or evaluator.get("at_validation") is not False
    return cfg.mode == "fit" and cfg.trainer.val_every is not None and asked


def _how_to_build(cfg: DictConfig, folder: Path) -> str:
    """What to do about a missing folder of shards; the made pictures of size=tiny take one command."""
    if folder.parent != Path(cfg.paths.data) / "tiny":
        return "Build shards there, or set paths.data."
    shown = os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else str(folder)
    return f"Build it: python -m data_pipelines.build source=tiny split={folder.name} output={shown}"


def _find_shard_settings(path: str, value: Any) -> Iterator[tuple[str, str]]:
    """Every setting that names folders of shards, `shards` or `<what for>_shards`, with each of them."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if str(key) == "shards" or (str(key).endswith("_shards") and not isinstance(inner, int)):
                for folder in [inner] if isinstance(inner, str) else inner or []:
                    yield f"{path}.{key}", str(folder)
            else:
                yield from _find_shard_settings(f"{path}.{key}", inner)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _find_shard_settings(f"{path}.{index}", inner)


def _missing_runs(cfg: DictConfig, expected: Collection[Path]) -> Iterator[str]:
    """Every run that weights are taken from, and a checkpoint to resume from, exist."""
    reference = resolve_key(cfg, "reference") or {}
    sources = {f"init_from.{n}": one for n, one in enumerate(resolve_key(cfg, "init_from") or [])}
    sources |= {f"reference.init_from.{n}": one for n, one in enumerate(reference.get("init_from") or [])}
    for path, source in sources.items():
        run, key = source.get("run"), f"{path}.run"
        if run in (None, "???"):
            yield f"{key} is missing: this recipe starts from another run's weights, {key}=<run folder>."
        elif Path(run).absolute() not in expected and not Path(run).exists():
            yield f"{key}: {run} does not exist. Expected a run folder, a checkpoint or .safetensors."
    if (teacher := reference.get("model")) not in (None, "start") and not Path(teacher, "config.yaml").is_file():
        yield f"reference.model: {teacher} is not a run folder. Expected start, or a folder with config.yaml."
    if cfg.resume not in ("auto", "never", "restart") and not Path(cfg.resume).exists():
        yield f"resume: {cfg.resume} does not exist. Allowed: auto, never, restart, or the path of a checkpoint."
