"""`auto` in a part of the model: what the files of its own `weights` say, read when the configuration is composed.

The configuration then holds plain values, so that a run's name follows from what was read, and its folder says it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from vlm_train.config.architecture import Side, find_image_size, fit_tiny_numbers, read_architecture
from vlm_train.config.hub_files import find_local_file, read_json_file
from vlm_train.config.schema import MODEL_PARTS
from vlm_train.config.trust import iterate_components
from vlm_train.errors import AssetError

AUTO = "auto"
"""The value of an option that stands for what the files of `weights` say."""

PREPROCESSORS = (("preprocessor_config.json", None), ("processor_config.json", "image_processor"))
"""Where a model says how its images are made: the file, and the key inside it."""

STATISTICS = ("image_mean", "image_std")
FILLED = ("config", *STATISTICS, "image_size")
"""The options that may be `auto`."""


def fill_auto(cfg: DictConfig, blocks: dict[str, Any]) -> set[str]:
    """Replace every `auto` of a part by what its source says, and make its `tiny:` block one for that architecture.

    Returns:
        Dotted paths of options that size=tiny decides alone: the source of a part that is made small. A part without
        `weights` stays as it is; its small values need no source, and `vlm_train.check.sources` tells the rest.

    Raises:
        AssetError: a source cannot be had, or does not say what is asked of it.
    """
    decided: set[str] = set()
    for path, group, node in list(iterate_components(cfg)):
        asked = list_auto(node)
        if group not in (*MODEL_PARTS, "parts") or not asked:
            continue
        decided |= {f"{path}.{key}" for key in (*asked, "weights")}
        source = node.get("weights")
        found = {}
        if isinstance(source, str) and source != "???":
            found = _read_values(path, group, source, asked)
            if "config" in asked and isinstance(own := node.get("config"), Mapping):  # a recipe's numbers stand on top
                found["config"] = found["config"] | {key: value for key, value in own.items() if key != "model_type"}
            with open_dict(cfg):
                for key in asked:
                    OmegaConf.update(cfg, f"{path}.{key}", found[key], merge=False, force_add=True)
        block = blocks.get(path)
        if block is not None and "_target_" not in block:
            plain = OmegaConf.to_container(block, resolve=False) if OmegaConf.is_config(block) else block
            blocks[path] = _fit_block(dict(plain), found)  # type: ignore[arg-type]
    return decided


def list_auto(node: Mapping[str, Any] | DictConfig) -> list[str]:
    """The options of a part that are `auto`; `config` also where its `model_type` is."""
    config = node.get("config")
    within = isinstance(config, Mapping | DictConfig) and config.get("model_type") == AUTO
    return [key for key in FILLED if node.get(key) == AUTO or (key == "config" and within)]


def side_of(group: str) -> Side:
    """The half of a model that a part of the group is."""
    return "vision" if group == "vision" else "text"


def _read_values(path: str, group: str, source: str, asked: list[str]) -> dict[str, Any]:
    """Option -> its value in the files of `source`."""
    setting, found = f"{path}.weights", dict.fromkeys(asked)
    if "config" in asked:
        found["config"] = read_architecture(source, side_of(group), setting)
    if images := [key for key in asked if key != "config"]:
        said = read_image_settings(source, setting) or {}
        for key in images:
            if key in STATISTICS and said.get(key) is None:
                raise AssetError(
                    f"{path}.{key}: {source} does not say it: no preprocessor_config.json gives {key}. Give three "
                    f"numbers, {path}.{key}=[0.5,0.5,0.5]."
                )
            found[key] = said.get(key)
        if "image_size" in asked:
            numbers = found.get("config") or read_architecture(source, side_of(group), setting)
            found["image_size"] = find_image_size(numbers, said.get("image_size"), path, source)
    return found


def _fit_block(block: dict[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """A `tiny:` block with the small values of the architecture that was read, or else of its own `model_type`; images
    keep the statistics that were read."""
    fitted = {key: value for key, value in block.items() if key not in STATISTICS or key not in found}
    small = block.get("config")
    if isinstance(small, dict) and "model_type" in small:
        numbers = found.get("config") or {"model_type": small["model_type"]}
        fitted["config"] = {"model_type": numbers["model_type"]} | fit_tiny_numbers(small, numbers)
    return fitted


def read_image_settings(source: str, setting: str, *, local: bool = False) -> dict[str, Any] | None:
    """How a model's images are made: `image_mean`, `image_std` (per channel, of pixels in [0, 1]) and `image_size`
    (height, width); None where it does not say.

    Args:
        local: read only what this machine has.
    """
    for name, key in PREPROCESSORS:
        if local and find_local_file(source, name) is None:
            continue
        raw = read_json_file(source, name, setting)
        raw = raw if raw is None or key is None else raw.get(key)
        if isinstance(raw, dict):
            return _select_image_settings(raw)
    return None


def _select_image_settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    factor = raw.get("rescale_factor", 1 / 255) if raw.get("do_rescale", True) else 1.0
    scale = 255.0 * factor if isinstance(factor, (int, float)) and factor > 0 else 1.0
    scale = 1.0 if math.isclose(scale, 1.0, rel_tol=1e-6) else scale  # else (scale x - mean) / std, x in [0, 1]
    normalizes = raw.get("do_normalize", True)
    found: dict[str, Any] = {}
    for key, nothing in zip(STATISTICS, (0.0, 1.0), strict=True):
        value = raw.get(key) if normalizes else nothing
        values = [value] * 3 if isinstance(value, (int, float)) else value
        said = isinstance(values, list) and all(isinstance(one, (int, float)) for one in values)
        found[key] = [one / scale for one in values or ()] if said else None
    crops = raw.get("do_center_crop", "crop_size" in raw)
    found["image_size"] = _to_size(raw.get("crop_size") if crops and raw.get("crop_size") else raw.get("size"))
    return found


def _to_size(value: Any) -> list[int] | None:
    """(height, width) of the views; None where pictures keep a size of their own."""
    if isinstance(value, int):
        return [value, value]
    if not isinstance(value, dict):
        return None
    edge = value.get("shortest_edge") if "longest_edge" not in value else None
    sides = [value.get("height", edge), value.get("width", edge)]
    found = [side for side in sides if isinstance(side, int)]
    return found if len(found) == len(sides) else None
