"""`transformers` models from explicit architecture numbers, and their weights: everything checked, nothing guessed.

Building needs no file and no network, and works under `torch.device("meta")`. Loading reads safetensors or GGUF only,
and treats every key that the model misses, or does not know, as an error unless the caller declares it.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vlm_train.config.package_files import resolve_package_file
from vlm_train.errors import AssetError, ConfigError
from vlm_train.models.layers.flash import FLASH, REGISTERED, load_kernels, register_flash

ATTENTION = ("sdpa", "eager")

# Part of every transformers configuration, but not an architecture number: never set from ours.
_INTERNAL = {"transformers_version", "architectures", "return_dict", "dtype", "output_hidden_states"}

# Taken by configurations that do not list them as fields.
_UNLISTED = {"rope_theta", "tie_word_embeddings", "decoder_start_token_id", "dense_act_fn"}


def with_vocabulary(config: Mapping[str, Any], vocab_size: int | None) -> dict[str, Any]:
    """A language model's numbers, where `vocab_size: null` takes the tokenizer's. Raises `ConfigError` without one."""
    numbers = dict(config)
    if numbers.get("vocab_size") is None:
        if vocab_size is None:
            raise ConfigError("llm.config.vocab_size: null takes the tokenizer's size, but no tokenizer gave one")
        numbers["vocab_size"] = vocab_size
    return numbers


def build_config(setting: str, values: Mapping[str, Any]) -> Any:
    """A `transformers` configuration from `{model_type: ..., <its fields>}`.

    Raises:
        ConfigError: `model_type` is unknown, a key is not a field of that configuration, or a value is refused.
    """
    from transformers import CONFIG_MAPPING

    fields = {key: _to_plain(value) for key, value in values.items()}
    model_type = fields.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        raise ConfigError(
            f"{setting}.model_type: unknown {model_type!r}{_did_you_mean(str(model_type), CONFIG_MAPPING)}"
        )
    config_class = CONFIG_MAPPING[model_type]
    allowed = _fields_of(config_class)
    problems = [
        f"{setting}.{key}: not a setting of {config_class.__name__}{_did_you_mean(key, allowed)}"
        for key in fields
        if key not in allowed
    ]
    if problems:
        raise ConfigError(problems)
    try:
        config = config_class(**fields)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{setting}: {config_class.__name__} refuses these values: {error}") from error
    except Exception as error:  # the strict dataclass checks raise classes of their own
        if type(error).__module__.startswith("huggingface_hub"):
            raise ConfigError(f"{setting}: {config_class.__name__} refuses these values: {error}") from error
        raise
    heads, shared = (getattr(config, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
    if isinstance(heads, int) and isinstance(shared, int) and (shared < 1 or heads % shared):
        raise ConfigError(f"{setting}.num_key_value_heads: got {shared}; allowed: divisors of the {heads} heads")
    return config


def build_model(
    auto_class: Any, part: str, values: Mapping[str, Any], attention: str, allowed: Sequence[str] = ATTENTION
) -> Any:
    """A randomly initialised model of `auto_class` (such as AutoModel) for the part named `part`.

    Raises:
        ConfigError: as `build_config`, or the architecture does not run with this attention implementation.
    """
    if attention not in allowed:
        raise ConfigError(f"{part}.attention: {attention!r}; allowed: {', '.join(allowed)}")
    if attention == FLASH:
        register_flash()
        load_kernels()  # says at once if there are none
    config = build_config(f"{part}.config", values)
    try:
        model = auto_class.from_config(config, attn_implementation=REGISTERED if attention == FLASH else attention)
    except ValueError as error:
        raise ConfigError(
            f"{part}: cannot build {config.model_type!r} with attention {attention!r}: {error}"
        ) from error
    if attention == FLASH and not model.is_backend_compatible():  # it would attend by its own, without a word
        raise ConfigError(f"{part}.attention: {config.model_type!r} cannot run flash; choose another")
    return model


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
        _check_numbers(type(model.config), source, config, setting)
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
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise AssetError(f"{where} cannot be loaded: {error}") from error
    unexpected = [k for k in report["unexpected_keys"] if not any(re.search(pattern, k) for pattern in declared)]
    missing, mismatched = list(report["missing_keys"]), list(report["mismatched_keys"])
    if unexpected or missing or mismatched:
        raise AssetError(
            f"{where} does not fit {type(model).__name__}: missing {_list_some(missing)}, "
            f"unexpected {_list_some(unexpected)}, "
            f"other shape {_list_some(mismatched)}"
        )
    device = torch.device("cpu") if parameter.device.type == "meta" else parameter.device
    return loaded.to(device)


def read_state(source: str, *, setting: str, wanted: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    """The tensors with `wanted` names from the safetensors files of a local folder or a hub name; others are not read.

    Raises:
        AssetError: there are no such files, or they cannot be read.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    from safetensors import SafetensorError, safe_open

    def locate_file(name: str) -> Path:
        folder = Path(source).expanduser()
        return folder / name if folder.is_dir() else Path(hf_hub_download(source, name))

    def wanted_files() -> list[str]:
        try:
            index = json.loads(locate_file("model.safetensors.index.json").read_text(encoding="utf-8"))
        except (OSError, HfHubHTTPError, LocalEntryNotFoundError):
            return ["model.safetensors"]
        return sorted({file for name, file in index["weight_map"].items() if wanted(name)})

    found: dict[str, torch.Tensor] = {}
    try:
        for file in wanted_files():
            with safe_open(locate_file(file), "pt") as opened:
                found |= {name: opened.get_tensor(name) for name in opened.keys() if wanted(name)}  # noqa: SIM118
    except (OSError, ValueError, HfHubHTTPError, SafetensorError) as error:
        raise AssetError(f"{setting}: {source!r}: no safetensors could be read: {error}") from error
    return found


def load_inside(model: Any, source: str, *, prefix: str, setting: str) -> bool:
    """Load what a whole model's checkpoint at `source` holds under `prefix`, reading nothing else of it.

    Returns:
        Whether there is anything. Raises `AssetError` if it is another architecture's.
    """
    found = read_state(source, setting=setting, wanted=lambda name: name.startswith(prefix))
    if not found:
        return False
    own = model.state_dict()
    state = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    other = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    missing, unexpected = own.keys() - state.keys(), state.keys() - own.keys()
    if missing or unexpected or other:
        raise AssetError(
            f"{setting}: {prefix}* of {source!r} does not fit {type(model).__name__}: "
            f"missing {_list_some([*missing])}, "
            f"unexpected {_list_some([*unexpected])}, other shape {_list_some(other)}"
        )
    model.load_state_dict(state)
    return True


def _check_numbers(config_class: Any, source: str, wanted: Mapping[str, Any], setting: str) -> None:
    """Raise `AssetError` where the checkpoint's configuration contradicts `wanted` (a wrong RoPE base is silent)."""
    try:
        found = config_class.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise AssetError(f"{setting}: {source!r} has no readable configuration: {error}") from error
    expected = build_config(setting, {k: v for k, v in wanted.items() if v is not None})
    problems = [
        f"{setting}: {source!r} has {key} = {getattr(found, key)!r}, the config says {getattr(expected, key)!r}"
        for key, value in wanted.items()
        if key != "model_type" and value is not None and getattr(found, key, None) != getattr(expected, key)
    ]
    if problems:
        raise AssetError(problems)


def _fields_of(config_class: Any) -> set[str]:
    names = (
        {field.name for field in dataclasses.fields(config_class)} if dataclasses.is_dataclass(config_class) else set()
    )
    return (names | set(getattr(config_class, "attribute_map", {})) | _UNLISTED) - _INTERNAL


def _to_plain(value: Any) -> Any:
    """OmegaConf containers as plain lists and dicts, recursively (transformers serialises its configurations)."""
    if isinstance(value, Mapping):
        return {key: _to_plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_to_plain(item) for item in value]
    return value


def _did_you_mean(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _list_some(keys: Sequence[Any], limit: int = 3) -> str:
    shown = ", ".join(str(key) for key in sorted(keys, key=str)[:limit])
    return f"{len(keys)} ({shown}{', ...' if len(keys) > limit else ''})" if keys else "none"
