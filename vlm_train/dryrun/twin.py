"""A save and load round trip of a small twin: the same parts and wiring, a few thousand parameters."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from vlm_train.config import config_dir, small_connector
from vlm_train.errors import CheckpointError
from vlm_train.overlay import fitting

TINY_GROUPS = ("vision", "llm")
VOCABULARY = 300


def small(cfg: DictConfig) -> DictConfig:
    """`cfg` with the overlays of size=tiny on its parts and a small vocabulary, and nothing quantised."""
    cfg = cfg.copy()
    if cfg.peft is not None and "bits" in cfg.peft:
        cfg.peft.bits = None
    for group in TINY_GROUPS:
        if cfg[group] is not None:
            overlay = OmegaConf.load(config_dir() / group / "_tiny.yaml")
            with open_dict(cfg):
                cfg[group] = OmegaConf.merge(cfg[group], fitting(overlay, cfg[group]))
    if OmegaConf.is_dict(cfg.connector):
        cfg.connector = small_connector(cfg.connector)
    if cfg.llm is not None:
        cfg.llm.config.vocab_size = VOCABULARY
    return cfg


def round_trip(cfg: DictConfig) -> int:
    """Save the twin's weights, load them into another one, and return how many tensors came back equal.

    Raises:
        CheckpointError: keys or values differ, before days of training end in a failing save.
    """
    from safetensors.torch import load_model, save_model

    from vlm_train.build import build_model

    cfg = small(cfg)
    torch.manual_seed(0)
    first = build_model(cfg)
    torch.manual_seed(1)
    second = build_model(cfg)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "weights.safetensors")
        save_model(first, path)
        missing, unexpected = load_model(second, path, strict=False)
    if missing or unexpected:
        raise CheckpointError(f"round trip of a small twin: missing {sorted(missing)}, unexpected {sorted(unexpected)}")
    loaded = second.state_dict()
    differing = [name for name, tensor in first.state_dict().items() if not torch.equal(tensor, loaded[name])]
    if differing:
        raise CheckpointError(
            f"round trip of a small twin: {len(differing)} tensors differ, for example {differing[0]}"
        )
    return len(loaded)
