"""Composition: where the YAML lives, how it is composed, and what a composed configuration is called.

Imports Hydra and OmegaConf only: help texts and configuration errors must not wait for torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from vlm_train.errors import ConfigError
from vlm_train.schema import MODEL_PARTS, Paths, Root
from vlm_train.size import TINY, apply_tiny, take_blocks

CONFIG_NAME = "config"
EMPTY_PARENT = "A setting lies below an empty one"
GROUP_WITHOUT_OPTION = "Config group override must be a string or a list"

TRAINING_KEYS = (
    "seed", "init_from", "model", *MODEL_PARTS, "tokenizer", "image", "template", "instruction", "objective",
    "reference", "params", "peft", "data", "batch", "optim", "lr_schedule", "trainer",
)  # fmt: skip
"""What decides the trained weights, hence the run id."""

COSMETIC_KEYS = {
    "trainer": ("val_every", "save_every", "log_every", "async_save", "keep_last", "keep_best", "keep_every", "best",
                "activation_checkpointing", "compile", "accelerator", "threads", "max_bad_samples", "max_bad_share",
                "strict", "guard", "skip_steps", "export", "peak_tflops",
                "watchdog_minutes"),
    "data": ("workers", "prefetch", "cache", "shard_cache", "shard_cache_bytes"),
}  # fmt: skip
"""Keys below `TRAINING_KEYS` that may change while a run goes on: they say how to watch it or on what to run it."""


def _packaged(name: str) -> Path:
    """A folder of YAML: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def config_dir() -> Path:
    """The folder of `config.yaml` and the groups of components."""
    return _packaged("conf")


def recipes_dir() -> Path:
    """The folder of the groups `recipe/` and `schedule/`."""
    return _packaged("recipes")


class RecipesOnSearchPath(SearchPathPlugin):
    """Lets `recipe=<name>` and `schedule=<name>` be found in `recipes/`."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("vlm_train", f"file://{recipes_dir()}")


def register() -> None:
    """Tells Hydra about the typed root and the recipes. Calling it again changes nothing."""
    ConfigStore.instance().store(name="schema", node=Root, provider="vlm_train")
    Plugins.instance().register(RecipesOnSearchPath)


@contextmanager
def hydra_session(config_dirs: Iterable[str | Path] = ()) -> Iterator[list[str]]:
    """Hydra set up for our folders, also inside a job of a multirun. Yields the overrides that add `config_dirs`."""
    register()
    folders = ",".join(f'"file://{Path(folder).absolute()}"' for folder in config_dirs)
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(config_dir()), job_name="vlm_train"):
            yield [f"hydra.searchpath=[{folders}]"] if folders else []
    finally:
        GlobalHydra.instance().hydra = outer


def compose(overrides: Iterable[str] = (), config_dirs: Iterable[str | Path] = ()) -> DictConfig:
    """Composes the configuration of a command line, in process. Unknown keys stay errors (struct mode).

    `config_dirs` are further folders to search, as `--config-dir` adds them. Raises Hydra's own errors.
    """
    overrides = list(overrides)
    with hydra_session(config_dirs) as searched, composition_errors():
        cfg = hydra_compose(CONFIG_NAME, overrides=[*overrides, *searched], return_hydra_config=True)
    choices = dict(cfg.hydra.runtime.choices)
    if choices.get("recipe"):
        check_recipe(str(choices["recipe"]), cfg, config_dirs)
    with open_dict(cfg):
        del cfg["hydra"]
    return finish(cfg, choices, overrides)


def find_recipe(name: str, config_dirs: Iterable[str | Path] = ()) -> Path | None:
    """The file of a recipe, or None."""
    for folder in (recipes_dir(), *config_dirs):
        path = (Path(folder) / "recipe" / name).with_suffix(".yaml")
        if path.is_file():
            return path
    return None


def check_recipe(name: str, cfg: DictConfig, config_dirs: Iterable[str | Path]) -> None:
    """Raises ConfigError for what a recipe says in vain: Hydra would ignore it silently."""
    path = find_recipe(name, config_dirs)
    if path is None:
        return
    content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    assert isinstance(content, dict)
    defaults = [str(key) for entry in content.get("defaults") or [] if isinstance(entry, dict) for key in entry]
    forbidden = [key for key in [*map(str, content), *defaults] if key == "hydra" or "hydra/" in key]
    lost = [str(key) for key, value in content.items() if value == "???" and not OmegaConf.is_missing(cfg, key)]
    problems = [
        f"{path}: {key}: Hydra's own settings belong on the command line, not in a recipe." for key in forbidden
    ]
    problems += [f"{path}: {key}: ??? is lost here; write a list's items out, as in - run: ???." for key in lost]
    if problems:
        raise ConfigError(problems)


@contextmanager
def composition_errors() -> Iterator[None]:
    """Gives `peft.rank=8` without a chosen `peft`, and `vision=null`, the type of Hydra's other errors.

    OmegaConf stops at the first with a bare assertion, Hydra at the second with a ValueError.
    """
    try:
        yield
    except AssertionError as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if not frame.f_globals["__name__"].startswith("omegaconf."):  # a sweeper's or launcher's own
            raise
        raise ConfigCompositionException(EMPTY_PARENT) from error
    except ValueError as error:
        if GROUP_WITHOUT_OPTION not in str(error):
            raise
        raise ConfigCompositionException(GROUP_WITHOUT_OPTION) from error


def tiny(*overrides: str) -> DictConfig:
    """Any recipe small enough for a CPU: `tiny("recipe=llava15_stage1")`."""
    return compose([*overrides, "size=tiny"])


def finish(cfg: DictConfig, choices: Mapping[str, Any], overrides: Iterable[str] = ()) -> DictConfig:
    """Names the configuration after its recipe, makes its parts small under `size=tiny`, and pins its folders to the
    directory the command was started in."""
    blocks = take_blocks(cfg)
    if choices.get("size") == TINY:
        apply_tiny(cfg, blocks, choices, overrides)
    if cfg.dry_run:
        cfg.tiny = blocks
    if cfg.recipe_name == "custom" and choices.get("recipe"):
        cfg.recipe_name = Path(str(choices["recipe"])).name
    for name in cfg.paths:
        cfg.paths[name] = os.path.abspath(os.path.expanduser(cfg.paths[name]))
    return cfg


def training_config(cfg: DictConfig) -> dict[str, Any]:
    """The resolved part of `cfg` that decides the trained weights. It does not depend on where folders lie."""
    cfg = cfg.copy()
    for name in Paths.__dataclass_fields__:
        cfg.paths[name] = name
    plain = {key: resolved(cfg, key) for key in TRAINING_KEYS}
    if plain["reference"]["model"] is None:  # runs of before this key keep their ids
        del plain["reference"]
    if plain["batch"].get("samples") is not None:  # a token budget is rounded to whole micro-batches
        plain["batch"].pop("micro")
    for group, keys in COSMETIC_KEYS.items():
        for key in keys if isinstance(plain[group], dict) else ():
            plain[group].pop(key, None)
    return plain


def resolved(parent: Any, key: Any) -> Any:
    """The content of one key as plain Python; `???` stands for what is missing or cannot be resolved."""
    try:
        node = parent[key]
    except OmegaConfBaseException:
        return "???"
    if isinstance(node, DictConfig):
        return {str(inner): resolved(node, inner) for inner in node}
    if isinstance(node, ListConfig):
        return [resolved(node, index) for index in range(len(node))]
    return node


def training_hash(cfg: DictConfig) -> str:
    """Eight hexadecimal digits that name the training-relevant configuration."""
    text = json.dumps(training_config(cfg), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def run_id(cfg: DictConfig) -> str:
    """`run_name`, or `<recipe>-<hash of the training-relevant configuration>`. No clock: the same command resumes."""
    return cfg.run_name or f"{cfg.recipe_name}-{training_hash(cfg)}"


def run_dir(cfg: DictConfig) -> Path:
    """The folder of this run: `run` where an existing one was named, else `<paths.runs>/<run_id>`."""
    return Path(cfg.run).absolute() if cfg.run else Path(cfg.paths.runs).absolute() / run_id(cfg)


def load_config(path: str | Path) -> DictConfig:
    """A configuration file read as data into the typed root. Raises ConfigError when it is missing or does not fit."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"run: {path} does not exist. Expected a run folder with its config.yaml.")
    try:
        cfg = OmegaConf.structured(Root)
        cfg.merge_with(OmegaConf.load(path))
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from error
    OmegaConf.set_struct(cfg, True)
    return cfg


def save_config(cfg: DictConfig, path: str | Path) -> None:
    """Writes `cfg` with its interpolations kept, so that no secret of the environment reaches the disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(OmegaConf.to_yaml(cfg, resolve=False), encoding="utf-8")
    partial.replace(path)


def groups(config_dirs: Iterable[str | Path] = ()) -> set[str]:
    """Names of all groups: the folders of options."""
    folders = (config_dir(), recipes_dir(), *map(Path, config_dirs))
    return {entry.name for folder in folders for entry in folder.iterdir() if entry.is_dir()}
