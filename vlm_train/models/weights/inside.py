"""Weights of a part out of the checkpoint of a whole model, or of a model that brings code of its own."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from vlm_train.config.architecture import CONFIG_JSON, Side, find_nested
from vlm_train.config.hub_files import read_json_file
from vlm_train.config.own_code_models import find_own_code_type
from vlm_train.config.package_files import resolve_package_file
from vlm_train.errors import AssetError
from vlm_train.models.weights.hub import list_some, list_tensors, read_state, require_same_numbers
from vlm_train.models.weights.own_code_names import CHECKPOINT_NAMES


def load_inside(model: Any, source: str, *, side: Side, setting: str, config: Mapping[str, Any]) -> bool:
    """Load a part from the checkpoint of a whole model, reading nothing else of it; or a model that brings code of its
    own, which is not executed.

    Args:
        model: a `transformers` model, a vision tower or a language model with its head; one on meta is left alone.
        side: which half of the whole model it is.
        config: the architecture numbers the user gave.

    Returns:
        Whether `source` is such a model and holds the part in one place. Raises `AssetError` if its numbers or shapes
        are other ones.
    """
    if next(model.parameters()).is_meta or Path(resolve_package_file(source)).expanduser().is_file():
        return False
    whole = read_json_file(source, CONFIG_JSON, setting)
    if whole is None:
        return False
    part = find_nested(whole, side)
    names = CHECKPOINT_NAMES.get(find_own_code_type(part or whole))
    if part is None and names is None:
        return False
    ours, listed = model.state_dict(), list_tensors(source, setting=setting)
    theirs = {name: name if names is None else names.name_in_checkpoint(name) for name in ours}
    base = f"{model.base_model_prefix}."
    places = find_places({theirs[name]: ours[name] for name in ours}, listed, base)
    if places is None:
        if missing := list_missing([*theirs.values()], listed, base):
            raise AssetError(f"{setting}: {source!r} does not fit {type(model).__name__}: missing {list_some(missing)}")
        return False
    require_same_numbers(source, config, setting)
    found = read_state(source, setting=setting, wanted=set(places.values()).__contains__)
    state = {name: found[places[other]] for name, other in theirs.items() if other in places}
    if names is not None:
        _refuse_unknown(places, listed, source, setting)
        heads = model.config.num_attention_heads
        key_heads = getattr(model.config, "num_key_value_heads", heads)
        try:
            state = {name: names.cut(name, tensor, heads, key_heads) for name, tensor in state.items()}
        except RuntimeError as error:
            raise AssetError(f"{setting}: {source!r} does not fit {type(model).__name__}: {error}") from error
    if other := [name for name, tensor in state.items() if ours[name].shape != tensor.shape]:
        raise AssetError(f"{setting}: {source!r} does not fit {type(model).__name__}: other shape {list_some(other)}")
    model.load_state_dict(state, strict=False)  # a tied head is not there
    model.tie_weights()
    return True


def _refuse_unknown(places: Mapping[str, str], listed: set[str], source: str, setting: str) -> None:
    """Raises `AssetError` for tensors beside those at `places` that no parameter takes, such as biases."""
    inside = os.path.commonprefix([*places.values()]).rpartition(".")[0]
    unknown = [name for name in listed - set(places.values()) if name.startswith(f"{inside}." if inside else "")]
    if unknown := [name for name in unknown if not name.endswith("inv_freq")]:
        raise AssetError(f"{setting}: {source!r} does not fit: unexpected {list_some(unknown)}")


def find_places(own: Mapping[str, torch.Tensor], names: Collection[str], base: str) -> dict[str, str] | None:
    """Own name -> name in a whole model's checkpoint; None unless all lie below one and the same prefix there.

    The prefix stands before the name or in place of its `base`: `model.layers.0` may be `language_model.model.layers.0`
    or `model.language_model.layers.0`. The head of a language model lies beside it, or, tied, nowhere.
    """
    body = _list_body(own, base)
    prefixes = _list_prefixes(body, names)
    prefixes = {one for one in prefixes if all(one + tail in names for tail in body.values())}
    if len(prefixes) != 1:
        return None
    (prefix,) = prefixes
    places = {name: prefix + tail for name, tail in body.items()}
    for name in own.keys() - body.keys():
        beside = (prefix.removesuffix(base) + name, name)
        if place := next((one for one in beside if one in names), None):
            places[name] = place
    tied = {own[name].data_ptr() for name in body}
    return None if any(own[name].data_ptr() not in tied for name in own.keys() - places.keys()) else places


def list_missing(own: Collection[str], names: Collection[str], base: str) -> list[str]:
    """What a whole model's checkpoint lacks of a part that it has, by its first tensor, in one place."""
    body = _list_body(own, base)
    prefixes = _list_prefixes(body, names)
    return [one + tail for one in prefixes for tail in body.values() if one + tail not in names and len(prefixes) == 1]


def _list_body(own: Iterable[str], base: str) -> dict[str, str]:
    """Own names below `base`, all if there is none -> the names below it."""
    own = list(own)
    return {name: name.removeprefix(base) for name in own if name.startswith(base)} or {name: name for name in own}


def _list_prefixes(body: Mapping[str, str], names: Collection[str]) -> set[str]:
    """What stands before the first name of `body` in a checkpoint."""
    first = next(iter(body.values()))
    return {name.removesuffix(first) for name in names if f".{name}".endswith(f".{first}")}
