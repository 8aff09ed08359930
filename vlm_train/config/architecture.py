"""`transformers` configurations: from our settings, from the config.json of a model, and whether both agree."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from vlm_train.config.hub_files import find_local_file, read_json_file
from vlm_train.config.own_code_models import translate_config
from vlm_train.errors import AssetError, ConfigError

Side = Literal["vision", "text"]
"""Which half of a model that reads images and text."""

NESTED: dict[Side, tuple[str, ...]] = {
    "vision": ("vision_config",),
    "text": ("text_config", "llm_config", "language_config"),
}
"""Where the config.json of a model of several parts describes each of them."""

FLAT = ("qwen2_vl", "qwen2_5_vl")
"""Models of several parts whose published config.json has the language model's numbers among those of the whole."""

OF_ONE_AXIS = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2"}
"""Language models whose positions have three axes -> the one that they start from, which computes the same of text."""

CONFIG_JSON = "config.json"

ANY_SIZE = ("dinov2", "dinov2_with_registers")
"""Towers that interpolate their positions, and whose images are smaller than the `image_size` of their training."""

# Part of every transformers configuration, but not an architecture number: never set from ours.
_INTERNAL = {"transformers_version", "architectures", "return_dict", "dtype", "output_hidden_states"}

# Of a published configuration, what says nothing about the architecture.
_NO_NUMBER = {"use_cache", "id2label", "label2id", "problem_type", "chunk_size_feed_forward", "is_encoder_decoder"}

# Taken by configurations that do not list them as fields.
_UNLISTED = {"rope_theta", "rope_scaling", "tie_word_embeddings", "decoder_start_token_id", "dense_act_fn"}


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
    allowed = list_fields(config_class)
    problems = [
        f"{setting}.{key}: not a setting of {config_class.__name__}{_did_you_mean(key, allowed)}"
        for key in fields
        if key not in allowed
    ]
    if problems:
        raise ConfigError(problems)
    try:
        config = config_class(**fields)
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"{setting}: {config_class.__name__} refuses these values: {error}") from error
    except Exception as error:  # the strict dataclass checks raise classes of their own
        if type(error).__module__.startswith("huggingface_hub"):
            raise ConfigError(f"{setting}: {config_class.__name__} refuses these values: {error}") from error
        raise
    heads, shared = (getattr(config, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
    if isinstance(heads, int) and isinstance(shared, int) and (shared < 1 or heads % shared):
        raise ConfigError(f"{setting}.num_key_value_heads: got {shared}; allowed: divisors of the {heads} heads")
    return config


def read_architecture(source: str, side: Side, setting: str) -> dict[str, Any]:
    """The architecture that a model's own config.json gives one side of it, as `build_config` takes it.

    Raises:
        AssetError: there is no config.json, or `transformers` has no such architecture.
    """
    raw = read_json_file(source, CONFIG_JSON, setting)
    if raw is None:
        raise AssetError(f"{setting}: {source} has no {CONFIG_JSON}: it is no model that transformers saved")
    return select_numbers(raw, side, f"{setting}: {CONFIG_JSON} of {source}")


def select_numbers(raw: Mapping[str, Any], side: Side, where: str) -> dict[str, Any]:
    """What the content of a config.json says of one side of the model, and nothing else. Raises `AssetError`."""
    import transformers

    mapping: Any = transformers.CONFIG_MAPPING
    key = find_nested_key(raw, side)
    described = find_nested(raw, side) or raw
    part = translate_config(described)
    whole = raw.get("model_type")
    if key is not None and "model_type" not in part and whole in mapping:
        part["model_type"] = getattr(mapping[whole].sub_configs.get(key), "model_type", None)
    model_type = part.get("model_type")
    if model_type not in mapping:
        code = " Its own code (auto_map) is never executed." if "auto_map" in raw else ""
        raise AssetError(
            f"{where} names the model_type {model_type!r}, which transformers {transformers.__version__} does not "
            f"know.{code} Choose a model of the library, or write the part yourself (docs/extending.md)."
        )
    if "quantization_config" in raw or "quantization_config" in described:
        raise AssetError(f"{where}: its weights are quantized. Give the model that it was made from; see peft=qlora.")
    config_class = mapping[model_type]
    if side == "vision" and not {"image_size", "patch_size"} <= list_fields(config_class):
        raise AssetError(
            f"{where} describes {model_type!r}, which has no image_size and patch_size: it is no vision transformer "
            "of one input size."
        )
    if side == "text" and "vocab_size" not in list_fields(config_class):
        raise AssetError(f"{where} describes {model_type!r}, which has no vocabulary: it is no language model.")
    known = list_fields(config_class) - _NO_NUMBER
    numbers = {name: value for name, value in part.items() if name in known}
    if model_type == "clip_text_model" and numbers.get("eos_token_id") == 2:
        del numbers["eos_token_id"]  # a mistake of the first conversions, which the library corrects, too
    if part.get("scale_decoder_outputs") is False:
        numbers["tie_word_embeddings"] = False  # transformers 5 writes true for every T5, and this beside it
    if side == "text":
        numbers.setdefault("vocab_size", config_class().vocab_size)  # left out, it would be the tokenizer's
    return {"model_type": model_type} | numbers


def find_nested_key(raw: Mapping[str, Any], side: Side) -> str | None:
    """The key of a config.json that describes one side of a model of several parts; None: no such key."""
    return next((name for name in NESTED[side] if isinstance(raw.get(name), dict)), None)


def find_nested(raw: Mapping[str, Any], side: Side) -> dict[str, Any] | None:
    """What a config.json says of one side of a model of several parts; None: it describes one model alone."""
    key = find_nested_key(raw, side)
    if key is not None:
        return dict(raw[key])
    if side == "text" and raw.get("model_type") in FLAT:
        from transformers import CONFIG_MAPPING

        whole: Any = CONFIG_MAPPING[raw["model_type"]](**{k: v for k, v in raw.items() if k not in _INTERNAL})
        numbers = whole.get_text_config().to_dict()
        numbers["tie_word_embeddings"] = bool(raw.get("tie_word_embeddings"))
        (numbers.get("rope_parameters") or {}).pop("type", None)  # an older name of rope_type
        return numbers
    return None


def list_contradictions(setting: str, source: str, wanted: Mapping[str, Any], side: Side) -> list[str]:
    """A line for every number of `wanted` that config.json of `source` gives otherwise (a wrong RoPE base is silent).

    Left out are how weights began, the activation of T5 (BLIP-2 runs it with another one), the `model_type` of vision
    towers, which go by several names, and the position axes of a language model that starts from one without. None
    where this machine has no config.json of it. Raises as `build_config` and `read_architecture` do.
    """
    if find_local_file(source, CONFIG_JSON) is None:
        return []
    given = {key: value for key, value in wanted.items() if value is not None}
    expected = build_config(f"{setting.rpartition('.')[0]}.config", given)
    found = build_config(f"{setting}: {source!r}", read_architecture(source, side, setting))
    ignored = ("initializer", "dense_act_fn") + (("model_type",) if side == "vision" else ())
    if OF_ONE_AXIS.get(expected.model_type) == found.model_type:
        expected.rope_parameters.pop("mrope_section", None)
        ignored = (*ignored, "model_type")
    names = [key for key in given if not key.startswith(ignored) and getattr(expected, key, None) is not None]
    return [
        f"{setting}: {source!r} has {key} = {getattr(found, key, None)!r}, the config says {getattr(expected, key)!r}"
        for key in names
        if getattr(found, key, None) != getattr(expected, key)
    ]


def fit_tiny_numbers(small: Mapping[str, Any], numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the small values `small` that the architecture `numbers` has, under its own names; lists with an entry a
    layer become as short as it has layers then."""
    from transformers import CONFIG_MAPPING

    config_class: Any = CONFIG_MAPPING[numbers["model_type"]]
    known, names = list_fields(config_class), getattr(config_class, "attribute_map", {})
    fitted = {names.get(key, key): value for key, value in small.items() if key in known and key != "model_type"}
    depth = names.get("num_hidden_layers", "num_hidden_layers")
    if depth in fitted and depth in numbers:
        for key, value in numbers.items():
            if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == numbers[depth]:
                fitted[key] = list(value)[-fitted[depth] :]
    return fitted


def find_image_size(
    numbers: Mapping[str, Any], prepared: Sequence[int] | None, path: str, source: str
) -> list[int] | None:
    """(height, width) of the views of a tower, as its images are prepared; None: those of its own `image_size`.

    Raises:
        AssetError: the two differ, and the tower has learned positions of one size only.
    """
    own = getattr(build_config(f"{path}.config", numbers), "image_size", None)
    own = [own, own] if isinstance(own, int) else list(own or ())
    if prepared is None or not own or own == list(prepared):
        return None
    if numbers["model_type"] not in ANY_SIZE:
        raise AssetError(
            f"{path}.image_size: preprocessor_config.json of {source} makes images of {prepared[0]} x {prepared[1]} "
            f"pixels, its {CONFIG_JSON} says image_size = {own[0]} x {own[1]}. Say which: "
            f"{path}.image_size=[{own[0]},{own[1]}], or the other one, for which positions are interpolated."
        )
    return list(prepared)


def list_fields(config_class: Any) -> set[str]:
    """The names that a `transformers` configuration takes, those that stand for another one too."""
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


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
