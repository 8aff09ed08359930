"""JSON files of a model in a local folder or on the hub. No code of the source runs. No torch import."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from vlm_train.config.package_files import resolve_package_file
from vlm_train.errors import AssetError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_TIMEOUT = 5.0
"""Seconds to wait for the model hub's answer about one name."""

REFUSALS = {
    "GatedRepoError": "its owner asks for your consent: give it on the model's page, then run `hf auth login`",
    "RepositoryNotFoundError": "the hub has no model of that name, or keeps it private",
}
"""Error of the hub -> what it means. Every other one is a hub that cannot be reached."""


def describe_missing_source(name: str, probe: str, *, ask_hub: bool = True) -> str | None:
    """Why a model cannot be had, or None: a local path, a name in the hub's cache or on the hub, or a package's file.

    Args:
        probe: a small file that every such model has.
        ask_hub: look for names that only the hub can know; else they pass.
    """
    try:
        if Path(resolve_package_file(name)).expanduser().exists():
            return None
    except AssetError as error:
        return f"cannot be had: {str(error).removeprefix(f'{name}: ')}"
    if not HUB_NAME.fullmatch(name) or name.endswith((".gguf", ".safetensors")):
        return "does not exist."
    if not ask_hub:
        return None
    import huggingface_hub

    if isinstance(huggingface_hub.try_to_load_from_cache(name, probe), str):
        return None
    if huggingface_hub.constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE") == "1":
        return "is not a local path and not in the hub's cache, and the hub is switched off (HF_HUB_OFFLINE)."
    try:
        huggingface_hub.HfApi().model_info(name, timeout=HUB_TIMEOUT)
    except Exception as error:  # any failure to reach or find it means that the run cannot have it
        kind = type(error).__name__
        reason = f"{kind}: {REFUSALS[kind]}" if kind in REFUSALS else kind
        return f"is not a local path, not in the hub's cache and cannot be loaded from the hub ({reason})."
    return None


def find_local_file(source: str, name: str) -> Path | None:
    """The file `name` of a local folder, or of a hub name in the hub's cache; None where this machine has none."""
    folder = Path(source).expanduser()
    if folder.exists():
        return folder / name if (folder / name).is_file() else None
    if not HUB_NAME.fullmatch(source):
        return None
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(source, name)
    return Path(cached) if isinstance(cached, str) else None


def read_json_file(source: str, name: str, setting: str) -> dict[str, Any] | None:
    """The content of one JSON file of a model, downloaded if need be; None: the model has no such file.

    Args:
        source: a local folder or a hub name.
        setting: dotted path that named it, for messages.

    Raises:
        AssetError: the source cannot be had, or the file holds no JSON object.
    """
    if (reason := describe_missing_source(source, "config.json")) is not None:
        raise AssetError(f"{setting}: {source} {reason}")
    path = find_local_file(source, name)
    if path is None and not Path(source).expanduser().exists():
        path = _download_file(source, name, setting)
    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AssetError(f"{setting}: {path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise AssetError(f"{setting}: {path} holds a {type(content).__name__}; allowed: a JSON object")
    return content


def _download_file(source: str, name: str, setting: str) -> Path | None:
    """One file of a hub name; None: the model has no such file."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if huggingface_hub.constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE") == "1":
        return None
    try:
        return Path(huggingface_hub.hf_hub_download(source, name, etag_timeout=HUB_TIMEOUT))
    except EntryNotFoundError as error:
        if not isinstance(error, LocalEntryNotFoundError):  # that one is a hub that cannot be reached
            return None
        raise AssetError(f"{setting}: {name} of {source} cannot be loaded from the hub") from error
    except Exception as error:  # the hub's errors have no common base
        reason = REFUSALS.get(type(error).__name__, type(error).__name__)
        raise AssetError(f"{setting}: {name} of {source} cannot be loaded from the hub ({reason})") from error
