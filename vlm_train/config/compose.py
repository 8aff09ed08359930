"""Composition: where the YAML lives, how it is composed, and what a composed configuration is called.

Imports Hydra and OmegaConf only: help texts and configuration errors must not wait for torch.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from omegaconf import DictConfig, OmegaConf, open_dict

from vlm_train.config.folders import config_dir, find_recipe, recipes_dir
from vlm_train.config.schema import Root
from vlm_train.config.size import TINY, finish_config
from vlm_train.errors import ConfigError

CONFIG_NAME = "config"
EMPTY_PARENT = "A setting lies below an empty one"
GROUP_WITHOUT_OPTION = "Config group override must be a string or a list"


class RecipesOnSearchPath(SearchPathPlugin):
    """Lets `recipe=<name>` and `schedule=<name>` be found in `recipes/`."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("vlm_train", f"file://{recipes_dir()}")


def register_schema() -> None:
    """Tells Hydra about the typed root and the recipes. Calling it again changes nothing."""
    ConfigStore.instance().store(name="schema", node=Root, provider="vlm_train")
    Plugins.instance().register(RecipesOnSearchPath)


@contextmanager
def hydra_session(config_dirs: Iterable[str | Path] = ()) -> Iterator[list[str]]:
    """Hydra set up for our folders, also inside a job of a multirun. Yields the overrides that add `config_dirs`."""
    register_schema()
    folders = ",".join(f'"file://{Path(folder).absolute()}"' for folder in config_dirs)
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(config_dir()), job_name="vlm_train"):
            yield [f"hydra.searchpath=[{folders}]"] if folders else []
    finally:
        GlobalHydra.instance().hydra = outer


def compose_config(overrides: Iterable[str] = (), config_dirs: Iterable[str | Path] = ()) -> DictConfig:
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
    return finish_config(cfg, choices, overrides)


def check_recipe(name: str, cfg: DictConfig, config_dirs: Iterable[str | Path]) -> None:
    """Raises ConfigError for settings of a recipe that have no effect: Hydra would ignore them silently."""
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


def describe_replaced_data(overrides: Iterable[str], config_dirs: Iterable[str | Path] = ()) -> str | None:
    """What to say where `size=tiny` puts made pictures in the place of data that the recipe itself names."""
    given = dict(one.partition("=")[::2] for one in overrides)
    path = find_recipe(given.get("recipe", ""), config_dirs) if given.get("size") == TINY else None
    data = OmegaConf.to_container(OmegaConf.load(path), resolve=False).get("data") if path else None  # type: ignore[union-attr]
    keys = [f"data.{key}" for key in ("train", "val") if isinstance(data, dict) and data.get(key)]
    lost = [key for key in keys if key not in given]
    if not lost:
        return None
    stays = " ".join(f"'{key}=[{{shards: <folder>}}]'" for key in lost)
    return f"size=tiny: made pictures take the place of the recipe's own {' and '.join(lost)}; {stays} keeps data."


@contextmanager
def composition_errors() -> Iterator[None]:
    """Gives `peft.rank=8` without a chosen `peft`, and `vision=null`, `=[5]` or `schedule={a: 1}`, the type of Hydra's
    other errors.

    OmegaConf stops at the first with a bare assertion, Hydra at the others with a ValueError, a TypeError or one of
    OmegaConf's AttributeErrors.
    """
    try:
        yield
    except AssertionError as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if not frame.f_globals["__name__"].startswith("omegaconf."):  # a sweeper's or launcher's own
            raise
        raise ConfigCompositionException(EMPTY_PARENT) from error
    except (ValueError, TypeError, AttributeError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        inside = {TypeError: "hydra.", AttributeError: "omegaconf."}.get(type(error))
        of_hydra = inside is not None and frame.f_globals["__name__"].startswith(inside)
        if not of_hydra and GROUP_WITHOUT_OPTION not in str(error):
            raise
        raise ConfigCompositionException(GROUP_WITHOUT_OPTION) from error


def compose_tiny(*overrides: str) -> DictConfig:
    """Any recipe small enough for a CPU: `tiny("recipe=llava15_stage1")`."""
    return compose_config([*overrides, "size=tiny"])


def run_hydra(argv: Sequence[str], job: Callable[[DictConfig], Any]) -> None:
    """Lets Hydra answer: help, composed configuration, and `job` for each job of a multirun."""
    import hydra as framework

    register_schema()
    saved = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [sys.argv[0], *argv]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors instead of printing them; we print
    root = {"config_path": str(config_dir()), "config_name": CONFIG_NAME}
    try:
        with composition_errors():
            framework.main(version_base="1.3", **root)(job)()
    finally:
        sys.argv = saved[0]
        if saved[1] is None:
            del os.environ["HYDRA_FULL_ERROR"]
