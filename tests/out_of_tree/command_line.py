"""What a user of the package types, and what tests ask of it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.support.small_run import command
from vlm_train.cli import main

HERE = Path(__file__).parent
PACKAGE = HERE / "my_vlm"
CONF = PACKAGE / "conf"

if str(HERE) not in sys.path:  # the folder that a user starts the command in, or has installed from
    sys.path.insert(0, str(HERE))

TRUST = "allow_targets=[my_vlm.,tests.]"
NATIVE = ["vision=my_native_vit", "image=native", "image.max_pixels=6400", "~image.flip"]  # the recipe flips
PREFERENCE = ["objective=my_preference", "data.rejected=true", "reference.model=start", "batch.normalise=token"]
MIXTURE = ["recipe=my_mixture", "params.rules.1.lr=1e-3"]
PIECES = {
    "connector": ["connector=my_resampler"],
    "native": [*NATIVE, "connector=my_resampler"],
    "cross_attention": ["model=my_cross_attention", "params=all"],
    "mixture": MIXTURE,
    "preference": PREFERENCE,
}
"""Piece -> what chooses it, besides a small run."""


def small_run(piece: str, data: Path, runs: Path, *more: str, name: str = "run") -> list[str]:
    """Overrides of two steps of four samples in micro-batches of two, a checkpoint each."""
    steps = ["trainer.max_steps=2", "trainer.save_every=1", "optim.lr=0.01"]
    fixed = command(data, runs, TRUST, *steps, name=name)
    chosen = PIECES[piece]
    if any(one.startswith("recipe=") for one in chosen):
        fixed = [one for one in fixed if not one.startswith("recipe=")]
    return [*fixed, *chosen, *more]


def start(overrides: list[str]) -> int:
    """`python -m vlm_train --config-dir my_vlm/conf ...` in this process; the exit code."""
    return main(["--config-dir", str(CONF), *overrides])


def read_weights(run: Path, step: int = 2) -> dict[str, torch.Tensor]:
    """The weights that a run saved after a step."""
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "weights.safetensors")
