"""Models whose checkpoints bring Python code of their own, as models of `transformers` that compute the same.

Nothing of that code is executed: their numbers are read here, their weights by
`vlm_train.models.weights.own_code_names`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vlm_train.errors import AssetError

INTERNLM2, INTERN_VIT = "internlm2", "intern_vit_6b"
"""`model_type` of InternLM2 and 2.5; of InternViT in every size."""


def find_own_code_type(part: Mapping[str, Any]) -> str:
    """The `model_type` of a config.json. Early InternLM2 calls itself "internlm", as the model before it."""
    found = str(part.get("model_type"))
    return INTERNLM2 if found == "internlm" and "InternLM2ForCausalLM" in (part.get("architectures") or ()) else found


def translate_config(part: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a config.json under the names of `transformers`; that of a model which it knows as it is.

    Raises:
        AssetError: a kind of RoPE that the model's own code does not have.
    """
    translate = _TRANSLATIONS.get(find_own_code_type(part))
    return dict(part) if translate is None else translate(part)


def _translate_internlm2(part: Mapping[str, Any]) -> dict[str, Any]:
    """A Llama; what is left out has the defaults of `InternLM2Config`, not of Llama
    (internvl_chat/internvl/model/internlm2/configuration_internlm2.py of github.com/OpenGVLab/InternVL)."""
    rope = dict(part.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "dynamic"):
        raise AssetError(f"config.json: rope_scaling: got {kind!r}; InternLM2 has linear, dynamic, or none")
    kept = {name: part[name] for name in _LLAMA_FIELDS if name in part}
    return kept | {
        "model_type": "llama",
        "vocab_size": part.get("vocab_size", 103_168),
        "num_key_value_heads": part.get("num_key_value_heads") or part.get("num_attention_heads"),
        "attention_bias": part.get("bias", True),
        "rope_parameters": {
            "rope_type": kind,
            "rope_theta": float(part.get("rope_theta", 10_000)),
            **({"factor": float(rope["factor"])} if "factor" in rope else {}),
        },
    }


def _translate_intern_vit(part: Mapping[str, Any]) -> dict[str, Any]:
    """InternVL's tower; defaults are those of `InternVisionConfig` (configuration_intern_vit.py, likewise)."""
    size, patch = part.get("image_size", 224), part.get("patch_size", 14)
    return {
        "model_type": "internvl_vision",
        "hidden_size": part.get("hidden_size", 3200),
        "intermediate_size": part.get("intermediate_size", 12800),
        "num_hidden_layers": part.get("num_hidden_layers", 48),
        "num_attention_heads": part.get("num_attention_heads", 25),
        "hidden_act": part.get("hidden_act", "gelu"),
        "norm_type": part.get("norm_type", "rms_norm"),
        "layer_norm_eps": part.get("layer_norm_eps", 1e-6),
        "use_qk_norm": part.get("qk_normalization", True),
        "attention_bias": part.get("qkv_bias", False),
        "layer_scale_init_value": part.get("initializer_factor", 0.1),
        "image_size": [size, size],
        "patch_size": [patch, patch],
    }


_LLAMA_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_TRANSLATIONS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    INTERNLM2: _translate_internlm2,
    INTERN_VIT: _translate_intern_vit,
}
