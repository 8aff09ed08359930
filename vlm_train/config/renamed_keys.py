"""Keys of the configuration under the names that earlier versions gave them; `renamed_keys.yaml` is the table.

A command line or a recipe with an old key is told the new one. A run folder's configuration is read with the new keys,
and its run keeps its id, which is a hash of the first names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from vlm_train.config.signatures import UnknownTarget, is_ours, read_signature
from vlm_train.errors import ConfigError


@dataclass(frozen=True)
class RenamedKey:
    """What an old key is called now, dotted; see `renamed_keys.yaml` for the other fields."""

    now: str
    fields: tuple[str, ...] = ()
    note: str = ""


@cache
def _table() -> Mapping[str, RenamedKey]:
    loaded = OmegaConf.to_container(OmegaConf.load(Path(__file__).with_suffix(".yaml")))
    assert isinstance(loaded, dict)
    written = {str(old): {"now": new} if isinstance(new, str) else new for old, new in loaded.items()}
    return {
        old: RenamedKey(new["now"], tuple(new.get("fields", ())), new.get("note", "")) for old, new in written.items()
    }


@cache
def _first_names() -> Mapping[str, tuple[str, RenamedKey]]:
    """Today's key -> the first key that the table has for it."""
    found: dict[str, tuple[str, RenamedKey]] = {}
    for old, key in _table().items():
        found.setdefault(key.now, (old, key))
    return found


def find_renamed_key(key: str) -> RenamedKey | None:
    """What an old key is called now, also below a named component of its group; None for every other key."""
    if key in _table():
        return _table()[key]
    group, _, rest = key.partition(".")
    name, _, inner = rest.partition(".")
    found = _table().get(f"{group}.{inner}")
    return None if found is None else replace(found, now=_below_name(found.now, name))


def describe_renamed_key(key: str) -> str | None:
    """One sentence that names what to write instead of an old key; None for every other key."""
    found = find_renamed_key(key)
    if found is None:
        return None
    fields = f", with {{{', '.join(f'{one}: ...' for one in found.fields)}}} in place of a list" if found.fields else ""
    return f"{key}: it is {found.now} now{fields}{': ' + found.note if found.note else ''}."


def rename_keys(cfg: dict[Any, Any]) -> None:
    """Gives the old keys of a saved configuration their new names, in place; an option that still has that name stays,
    and so does every option of a component of another package.

    Raises ConfigError for a key whose value means something else now.
    """
    renamed = {}
    for path in list(_list_paths(cfg)):
        key = find_renamed_key(".".join(path))
        if key is None or _is_option(cfg, path):
            continue
        if not key.fields:  # their values are written otherwise now
            renamed[".".join(path)] = key.now
        value = _pop_value(cfg, path)
        if value is not None and key.note:
            raise ConfigError(f"{describe_renamed_key('.'.join(path))} Write it so in this file.")
        if isinstance(value, list) and key.fields:
            value = dict(zip(key.fields, value, strict=True))
        _put_value(cfg, key.now.split("."), value)
    for path, text in list(_list_texts(cfg)):
        _put_value(cfg, path, re.sub(r"(?<=\$\{)[\w.]+(?=\})", lambda found: renamed.get(found[0], found[0]), text))


def restore_first_names(cfg: dict[str, Any]) -> None:
    """Gives renamed keys the names and values that they first had, in place: for hashes that outlive a renaming.

    A key whose value means something else now had its first name in a run only where the value is null.
    """
    for path in list(_list_paths(cfg)):
        group, *rest = path
        name, exact = "", _first_names().get(".".join(path))
        if exact is None and len(rest) > 1:
            name, exact = rest[0], _first_names().get(".".join([group, *rest[1:]]))
        if exact is None or not is_ours(_target_around(cfg, path) or "vlm_train"):  # other packages renamed nothing
            continue
        old, key = exact
        value = _pop_value(cfg, path)
        if value is not None and key.note:
            _put_value(cfg, path, value)
            continue
        if isinstance(value, dict) and value.keys() == set(key.fields):  # its component refuses other fields
            value = [value[field] for field in key.fields]
        _put_value(cfg, (_below_name(old, name) if name else old).split("."), value)


def _below_name(key: str, name: str) -> str:
    group, _, inner = key.partition(".")
    return f"{group}.{name}.{inner}"


def _list_paths(cfg: dict[Any, Any], parents: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all keys, of the innermost first."""
    for key, value in cfg.items():
        if isinstance(value, dict):
            yield from _list_paths(value, (*parents, str(key)))
        yield *parents, str(key)


def _list_texts(node: Any, parents: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], str]]:
    """The path and value of every text, in lists too."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(value, str):
            yield (*parents, key), value
        elif isinstance(value, (dict, list)):
            yield from _list_texts(value, (*parents, key))


def _is_option(cfg: dict[Any, Any], path: tuple[str, ...]) -> bool:
    """Whether the component that holds the key takes it under this name, as those of other packages do."""
    target = _target_around(cfg, path)
    try:
        return target is not None and (not is_ours(target) or path[-1] in read_signature(target).parameters)
    except UnknownTarget:
        return False


def _target_around(cfg: dict[Any, Any], path: tuple[str, ...]) -> str | None:
    """The `_target_` of the innermost component that holds the key; None outside of components."""
    found = None
    for key in path[:-1]:
        cfg = cfg[key]
        found = cfg.get("_target_", found)
    return found if isinstance(found, str) else None


def _pop_value(cfg: dict[Any, Any], path: tuple[str, ...]) -> Any:
    for key in path[:-1]:
        cfg = cfg[key]
    return cfg.pop(path[-1])


def _put_value(cfg: Any, path: Sequence[Any], value: Any) -> None:
    for key in path[:-1]:
        cfg = cfg.setdefault(key, {}) if isinstance(cfg, dict) else cfg[key]
    cfg[path[-1]] = value
