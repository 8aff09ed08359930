"""`transformers` models from explicit architecture numbers, and their weights: everything checked, nothing guessed.

Building needs no file and no network, and works under `torch.device("meta")`. Loading reads safetensors or GGUF only,
and treats every key that the model misses, or does not know, as an error unless the caller declares it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from vlm_train.config.architecture import CONFIG_JSON, build_config, list_contradictions
from vlm_train.config.hub_files import read_json_file
from vlm_train.config.package_files import resolve_package_file
from vlm_train.errors import AssetError, ConfigError
from vlm_train.models.layers import flash, flex

ATTENTION = ("sdpa", "eager")
REGISTERED = {flash.FLASH: flash.REGISTERED, flex.FLEX: flex.REGISTERED}
"""Names in `transformers` of attentions that are called otherwise there."""

SINGLE = "model.safetensors"
"""The file of a model that is not cut into several."""


def with_vocabulary(config: Mapping[str, Any], vocab_size: int | None) -> dict[str, Any]:
    """A language model's numbers, where `vocab_size: null` takes the tokenizer's. Raises `ConfigError` without one."""
    numbers = dict(config)
    if numbers.get("vocab_size") is None:
        if vocab_size is None:
            raise ConfigError("llm.config.vocab_size: null takes the tokenizer's size, but no tokenizer gave one")
        numbers["vocab_size"] = vocab_size
    return numbers


def build_model(
    auto_class: Any, part: str, values: Mapping[str, Any], attention: str, allowed: Sequence[str] = ATTENTION
) -> Any:
    """A randomly initialised model of `auto_class` (such as AutoModel) for the part named `part`.

    Raises:
        ConfigError: as `build_config`, or the architecture does not run with this attention implementation.
    """
    if attention not in allowed:
        raise ConfigError(f"{part}.attention: {attention!r}; allowed: {', '.join(allowed)}")
    if attention == flash.FLASH:
        flash.register_flash()
        flash.load_kernels()  # says at once if there are none
    if attention == flex.FLEX:
        flex.register_flex()
    config = build_config(f"{part}.config", values)
    try:
        model = auto_class.from_config(config, attn_implementation=REGISTERED.get(attention, attention))
    except ValueError as error:
        if type(config) not in auto_class._model_mapping:  # the library lists every class that it has
            raise ConfigError(
                f"{part}.config.model_type: {config.model_type!r} is not of the kind {auto_class.__name__}"
                f"{_name_other_part(config)}"
            ) from error
        raise ConfigError(
            f"{part}: cannot build {config.model_type!r} with attention {attention!r}: {error}"
        ) from error
    if attention in REGISTERED and not model.is_backend_compatible():  # it would attend by its own, without a word
        raise ConfigError(f"{part}.attention: {config.model_type!r} cannot run {attention}; choose another")
    return model


def _name_other_part(config: Any) -> str:
    """Which language model of ours takes an architecture, if another one does."""
    from transformers import AutoModelForSeq2SeqLM

    if type(config) in AutoModelForSeq2SeqLM._model_mapping:
        return "; an encoder-decoder is llm=auto_seq2seq, with model=prefix_seq2seq"
    if config.model_type in ("clip_text_model", "siglip_text_model"):
        return "; a text tower is llm=auto_text, with model=two_tower"
    return ""


def load_pretrained(
    model: Any,
    source: str,
    *,
    setting: str,
    declared: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
) -> Any:
    """A copy of `model` (same class and configuration, not on meta) with the weights of `source`.

    Args:
        model: a `transformers` model built from `build_config`.
        source: a hub name, a local folder, or a `*.gguf` file (a path, or `package:<package>/<file>`).
        setting: dotted config path of `source`, for messages.
        declared: regexes of checkpoint keys that this model leaves out on purpose.
        config: the architecture numbers the user gave; a checkpoint that contradicts one of them is an error.

    Raises:
        AssetError: the source cannot be read, or its keys or numbers are not those of the model.
    """
    where = f"{setting}: {source!r}"
    arguments: dict[str, Any] = {"use_safetensors": True}
    folder = source = resolve_package_file(source)
    if source.endswith(".gguf"):
        folder, arguments = str(Path(source).parent), {"gguf_file": Path(source).name}
    elif config is not None:
        require_same_numbers(source, config, setting)
    parameter = next(model.parameters())
    model_config = model.config
    try:
        loaded, report = type(model).from_pretrained(
            folder,
            config=model_config,
            dtype=parameter.dtype,
            attn_implementation=model_config._attn_implementation,
            output_loading_info=True,
            **arguments,
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise AssetError(f"{where} cannot be loaded: {error}") from error
    unexpected = [k for k in report["unexpected_keys"] if not any(re.search(pattern, k) for pattern in declared)]
    missing, mismatched = list(report["missing_keys"]), list(report["mismatched_keys"])
    if unexpected or missing or mismatched:
        raise AssetError(
            f"{where} does not fit {type(model).__name__}: missing {list_some(missing)}, "
            f"unexpected {list_some(unexpected)}, "
            f"other shape {list_some(mismatched)}"
        )
    device = torch.device("cpu") if parameter.device.type == "meta" else parameter.device
    return loaded.to(device)


def read_state(source: str, *, setting: str, wanted: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    """The tensors with `wanted` names from the safetensors files of a local folder or a hub name; others are not read.

    Raises:
        AssetError: there are no such files, or they cannot be read.
    """
    found: dict[str, torch.Tensor] = {}
    for path in _list_tensor_files(source, setting, wanted):
        with _open_tensors(path, source, setting) as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys() if wanted(name)}  # noqa: SIM118
    return found


def list_tensors(source: str, *, setting: str) -> set[str]:
    """The names of all tensors that `read_state` can read. Raises as it does."""
    if (index := _read_index(source, setting)) is not None:
        return set(index)
    with _open_tensors(partial(_locate_file, source, SINGLE), source, setting) as opened:
        return set(opened.keys())


@contextmanager
def _open_tensors(path: Callable[[], Path], source: str, setting: str) -> Iterator[Any]:
    from huggingface_hub.errors import HfHubHTTPError
    from safetensors import safe_open

    try:
        with safe_open(path(), "pt") as opened:
            yield opened
    except (OSError, ValueError, HfHubHTTPError, SafetensorError) as error:
        raise AssetError(f"{setting}: {source!r}: no safetensors could be read: {error}") from error


def _list_tensor_files(source: str, setting: str, wanted: Callable[[str], bool]) -> list[Callable[[], Path]]:
    """Where the files with `wanted` tensors are, each found (or downloaded) when it is asked for."""
    index = _read_index(source, setting)
    files = [SINGLE] if index is None else sorted({file for name, file in index.items() if wanted(name)})
    return [partial(_locate_file, source, file) for file in files]


def _read_index(source: str, setting: str) -> dict[str, str] | None:
    """Name of a tensor -> the file that holds it; None where there is one file for all."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        index = json.loads(_locate_file(source, "model.safetensors.index.json").read_text(encoding="utf-8"))
        return {str(name): str(file) for name, file in index["weight_map"].items()}
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError):
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AssetError(f"{setting}: {source!r}: its model.safetensors.index.json cannot be read: {error}") from error


def _locate_file(source: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    folder = Path(source).expanduser()
    return folder / name if folder.is_dir() else Path(hf_hub_download(source, name))


def require_same_numbers(source: str, config: Mapping[str, Any], setting: str) -> None:
    """Raises `AssetError` where config.json of the weights is missing or contradicts `config`."""
    if read_json_file(source, CONFIG_JSON, setting) is None:
        raise AssetError(f"{setting}: {source!r} has no readable configuration: it holds no {CONFIG_JSON}")
    if problems := list_contradictions(setting, source, config, "vision" if setting.startswith("vision") else "text"):
        raise AssetError(problems)


def list_some(keys: Sequence[Any], limit: int = 3) -> str:
    """How many, and the first `limit` of them by name."""
    shown = ", ".join(str(key) for key in sorted(keys, key=str)[:limit])
    return f"{len(keys)} ({shown}{', ...' if len(keys) > limit else ''})" if keys else "none"
