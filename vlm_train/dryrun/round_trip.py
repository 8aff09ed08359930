"""A save and load round trip of a tiny copy: the same parts and wiring, a few thousand parameters."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from omegaconf import DictConfig

from vlm_train.config.size import shrink
from vlm_train.errors import CheckpointError

VOCABULARY = 300


def tiny_copy(cfg: DictConfig) -> DictConfig:
    """`cfg` with its parts as small as size=tiny makes them, a small vocabulary, and nothing quantized."""
    cfg = cfg.copy()
    if cfg.peft is not None and "bits" in cfg.peft:
        cfg.peft.bits = None
    shrink(cfg, cfg.tiny)
    if cfg.llm is not None:
        cfg.llm.config.vocab_size = VOCABULARY
    return cfg


def round_trip(cfg: DictConfig) -> int:
    """Save the copy's weights, load them into another one, and return how many tensors came back equal.

    Raises:
        CheckpointError: keys or values differ, before days of training end in a failing save.
    """
    from safetensors.torch import load_model, save_model

    from vlm_train.build import build_model

    cfg = tiny_copy(cfg)
    torch.manual_seed(0)
    first = build_model(cfg)
    torch.manual_seed(1)
    second = build_model(cfg)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "weights.safetensors")
        save_model(first, path)
        missing, unexpected = load_model(second, path, strict=False)
    if missing or unexpected:
        raise CheckpointError(f"round trip of a tiny copy: missing {sorted(missing)}, unexpected {sorted(unexpected)}")
    loaded = second.state_dict()
    differing = [name for name, tensor in first.state_dict().items() if not torch.equal(tensor, loaded[name])]
    if differing:
        raise CheckpointError(f"round trip of a tiny copy: {len(differing)} tensors differ, for example {differing[0]}")
    return len(loaded)
