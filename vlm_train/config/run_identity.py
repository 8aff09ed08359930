"""What a composed configuration is called, and which of its keys decide the trained weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from vlm_train.config.moved_targets import restore_first_targets
from vlm_train.config.renamed_keys import restore_first_names
from vlm_train.config.resolve import resolve_key
from vlm_train.config.schema import MODEL_PARTS, Paths

TRAINING_KEYS = (
    "seed", "init_from", "model", *MODEL_PARTS, "parts", "tokenizer", "image", "template", "instruction", "objective",
    "reference", "params", "peft", "data", "batch", "optim", "lr_schedule", "trainer",
)  # fmt: skip
"""What decides the trained weights, hence the run id."""


COSMETIC_KEYS = {
    "trainer": ("val_every", "save_every", "log_every", "async_save", "keep_last", "keep_best", "keep_every", "best",
                "activation_checkpointing", "compile", "accelerator", "threads", "max_bad_samples", "max_bad_share",
                "strict", "guard", "skip_steps", "largest_first", "export", "peak_tflops",
                "watchdog_minutes", "halve_frozen", "evaluate_first"),
    "data": ("workers", "prefetch", "cache", "shard_cache", "shard_cache_bytes"),
}  # fmt: skip
"""Keys below `TRAINING_KEYS` that may change while a run goes on: they say how to watch it or on what to run it."""

LATER_KEYS = {
    "params.rules.*.decay_norms_and_biases": None,
    "params.rules.*.frozen_mode": None,
    "params.rules.*.warmup_steps": None,
    "objective.lm.z_loss": 0.0,
    "lr_schedule.start_ratio": 0.0,
    "lr_schedule.warmup_counts": False,
    "llm.response_residual_dropout": 0.0,
    "vision.attention": "packed",
    "vision.*.attention": "packed",
    "vision.init_std": 0.02,
    "vision.*.init_std": 0.02,
}
"""Keys that came later, with the value that changes nothing: with it a run keeps the id that it had without them."""

LATER_CONNECTOR_KEYS = {"mlp.MLP": ("weights",), "pixel_shuffle.PixelShuffleMLP": ("weights", "init_std")}
"""Connectors below `vlm_train.models.connectors` -> their keys that came later, null at first."""

COSMETIC_IMAGE_KEYS = ("decode",)
"""Keys of an image plan that change no pixel."""

LATER_IMAGE_KEYS = {"upright": True, "background": [255, 255, 255], "resize": "pillow"}
"""Keys of an image plan that came later, with their first values: runs of before keep their ids."""


def training_config(cfg: DictConfig, with_packing: bool = False) -> dict[str, Any]:
    """The resolved part of `cfg` that decides the trained weights. It does not depend on where folders lie.

    Args:
        with_packing: `data.pack` and `data.pack_patches` are part of it even if `batch.samples` says what a step learns
            from. They were once.
    """
    cfg = cfg.copy()
    for name in Paths.__dataclass_fields__:
        cfg.paths[name] = name
    plain = {key: resolve_key(cfg, key) for key in TRAINING_KEYS}
    if plain["reference"]["model"] is None:  # runs of before this key keep their ids
        del plain["reference"]
    if not plain["parts"]:  # so do those
        del plain["parts"]
    for plan in (plain["image"], *plain["image"].values()) if isinstance(plain["image"], dict) else ():
        for key in COSMETIC_IMAGE_KEYS if isinstance(plan, dict) else ():
            plan.pop(key, None)
        for key, first in LATER_IMAGE_KEYS.items():
            if isinstance(plan, dict) and plan.get(key) == first:
                del plan[key]
    connector = plain["connector"] if isinstance(plain["connector"], dict) else {}
    for key in LATER_CONNECTOR_KEYS.get(
        str(connector.get("_target_")).removeprefix("vlm_train.models.connectors."), ()
    ):
        if connector.get(key) is None:
            connector.pop(key, None)
    if isinstance(plain["optim"], dict) and plain["optim"].get("fused") in ("auto", None):
        plain["optim"].pop("fused", None)  # a kernel, chosen by the device or by what a run began with
    if plain["batch"].get("samples") is not None:  # a token budget is rounded to whole micro-batches
        plain["batch"].pop("micro")
        for key in ("pack", "pack_patches") if isinstance(plain["data"], dict) and not with_packing else ():
            if key in plain["data"]:
                plain["data"][key] = None  # rows that share out the same samples
    for group, keys in COSMETIC_KEYS.items():
        for key in keys if isinstance(plain[group], dict) else ():
            plain[group].pop(key, None)
    for key, neutral in LATER_KEYS.items():
        _drop_neutral(plain, key.split("."), neutral)
    return plain


def _drop_neutral(plain: Any, path: list[str], neutral: Any) -> None:
    """Remove a key whose value is `neutral`; `*` stands for every item of a list or a mapping."""
    first, *rest = path
    if first == "*":
        for item in plain.values() if isinstance(plain, dict) else plain if isinstance(plain, list) else ():
            _drop_neutral(item, rest, neutral)
    elif isinstance(plain, dict) and first in plain:
        if rest:
            _drop_neutral(plain[first], rest, neutral)
        elif plain[first] == neutral:
            del plain[first]


def training_hash(cfg: DictConfig, with_packing: bool = False) -> str:
    """Eight hexadecimal digits that name the training-relevant configuration, see `training_config`."""
    plain = training_config(cfg, with_packing)
    restore_first_names(plain)  # a renamed key makes no other run, nor does a renamed component
    text = json.dumps(restore_first_targets(plain), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def run_id(cfg: DictConfig) -> str:
    """`run_name`, or `<recipe>-<hash of the training-relevant configuration>`. No clock: the same command resumes. A
    folder that an earlier version named otherwise is kept."""
    if cfg.run_name:
        return str(cfg.run_name)
    earlier = f"{cfg.recipe_name}-{training_hash(cfg, with_packing=True)}"
    if (Path(cfg.paths.runs) / earlier).is_dir():  # began when `data.pack` was part of the id
        return earlier
    return f"{cfg.recipe_name}-{training_hash(cfg)}"


def run_dir(cfg: DictConfig) -> Path:
    """The folder of this run: `run` where an existing one was named, else `<paths.runs>/<run_id>`."""
    return Path(cfg.run).absolute() if cfg.run else Path(cfg.paths.runs).absolute() / run_id(cfg)
