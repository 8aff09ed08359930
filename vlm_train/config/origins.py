"""Where every value of a composed configuration came from: a default, the recipe, an overlay or the command line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.default_element import ResultDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from vlm_train.config.compose import CONFIG_NAME, hydra_session
from vlm_train.config.redact import without_credentials
from vlm_train.config.size import TINY

COMMAND_LINE = "command line"
DEFAULT = "default"
NOT_TRAINING = ("columns", "target", "tiny")
"""Root keys that only CapFilt and the dry run read."""


@dataclass(frozen=True)
class Origin:
    """The layer that set a key: `default`, `recipe`, `size`, `debug`, `schedule` or `command line`, and its file."""

    layer: str
    source: str

    def __str__(self) -> str:
        return self.source if self.layer == COMMAND_LINE else f"{self.layer}: {self.source}"


def find_origins(overrides: Iterable[str] = (), config_dirs: Iterable[str | Path] = ()) -> dict[str, Origin]:
    """Dotted key -> the last layer that wrote it, for every leaf of `compose(overrides, config_dirs)`."""
    found: dict[str, Origin] = {}
    with hydra_session(config_dirs) as searched:
        loader = GlobalHydra.instance().config_loader()
        assert isinstance(loader, ConfigLoaderImpl)
        lines = [*overrides, *searched]
        parsed, repo = loader._parse_overrides_and_create_caching_repo(CONFIG_NAME, lines)
        defaults = loader.compute_defaults_list(CONFIG_NAME, lines, RunMode.RUN)
        for default in defaults.defaults:
            for key in flatten_leaves(loader._load_single_config(default, repo).config):
                _set_origin(found, key, _origin_of(default, parsed))
        if any(default.config_path == f"size/{TINY}" for default in defaults.defaults):
            for key in [key for key in found if f".{TINY}." in key]:
                _set_origin(found, key.replace(f".{TINY}.", "."), Origin("size", TINY))
        recipes = [str(one.config_path) for one in defaults.defaults if str(one.config_path).startswith("recipe/")]
        if (
            recipes and found["recipe_name"].layer == DEFAULT
        ):  # the last one is the chosen one, others are what it extends
            found["recipe_name"] = Origin("recipe", recipes[-1].split("/", 1)[1])
        for override in defaults.config_overrides:
            for key in _written_keys(override):
                _set_origin(found, key, Origin(COMMAND_LINE, COMMAND_LINE))
    return found


def format_origins(cfg: DictConfig, found: dict[str, Origin], only_changed: bool = False) -> str:
    """An aligned table of key, value and origin; interpolations are shown as written, addresses without a user. What no
    training run reads comes last."""
    rows = []
    for key, value in sorted(
        flatten_leaves(cfg).items(), key=lambda item: (item[0].split(".")[0] in NOT_TRAINING, item[0])
    ):
        origin = _lookup_origin(found, key)
        if not (only_changed and origin.layer == DEFAULT):
            rows.append((key, shorten_value(without_credentials(value)), str(origin)))
    keys = max((len(row[0]) for row in rows), default=0)
    values = max((len(row[1]) for row in rows), default=0)
    return "\n".join(f"{key:<{keys}}  {value:<{values}}  {origin}" for key, value, origin in rows)


def flatten_leaves(cfg: Any) -> dict[str, Any]:
    """Dotted key -> value as written. A list is one leaf, since a layer replaces it whole."""
    plain = OmegaConf.to_container(cfg, resolve=False) if OmegaConf.is_config(cfg) else cfg
    return dict(_iterate_leaves("", plain))


def _iterate_leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and (value or not path):
        for key, inner in value.items():
            if path or key not in ("defaults", "hydra"):
                yield from _iterate_leaves(f"{path}.{key}" if path else str(key), inner)
    else:
        yield path, value


def _set_origin(found: dict[str, Origin], key: str, origin: Origin) -> None:
    """The last writer of a key also replaces what was known of keys below it."""
    for below in [known for known in found if known.startswith(key + ".")]:
        if origin.layer == COMMAND_LINE:
            del found[below]
    found[key] = origin


def _origin_of(default: ResultDefault, overrides: list[Override]) -> Origin:
    path = default.config_path or ""
    owner = path if "/" in path else ""
    group = owner.split("/")[0]
    if group in ("recipe", "size", "debug", "schedule"):
        return Origin(group, owner.split("/", 1)[1])
    if any(override.key_or_group == path.rpartition("/")[0] for override in overrides):
        return Origin(COMMAND_LINE, f"{COMMAND_LINE} ({path})")
    return Origin(DEFAULT, f"{path}.yaml" if path != "schema" else "vlm_train/config/schema.py")


def _written_keys(override: Override) -> list[str]:
    value = override.value()
    key = override.key_or_group
    return [f"{key}.{inner}" for inner in flatten_leaves(value)] if isinstance(value, dict) and value else [key]


def _lookup_origin(found: dict[str, Origin], key: str) -> Origin:
    while key:
        if key in found:
            return found[key]
        key = key.rpartition(".")[0]
    return Origin(DEFAULT, "vlm_train/config/schema.py")


def shorten_value(value: Any) -> str:
    """A value as YAML writes it, in at most 60 characters."""
    text = "null" if value is None else repr(value) if value == "" or "\n" in str(value) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
