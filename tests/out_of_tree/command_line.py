"""What a user of the package types, and what tests ask of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
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

SEARCH = f'hydra.searchpath=["file://{CONF}"]'
"""What `--config-dir` comes to, as an override: for runs on several ranks, which take no flags."""

TRUST = "allow_targets=[my_vlm.,tests.]"
NATIVE = ["vision=my_native_vit", "image=native", "image.max_pixels=6400", "~image.flip"]  # the recipe flips
PREFERENCE = ["objective=my_preference", "data.rejected=true", "reference.model=start", "batch.normalize=token"]
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
    steps = ["trainer.max_steps=2", "trainer.save_every=1", "optim.lr=0.01", "lr_schedule.warmup_ratio=0"]
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


STOP = "+callbacks.stop={_target_: tests.support.audit.Stop, after: 1}"


def assert_resumes_exactly(job: Callable[[str], list[str]], runs: Path) -> None:
    """Two steps are one step, an interruption, and another one. `job` gives the overrides of a run by its name."""
    assert start(job("whole")) == 0
    assert start([*job("cut"), STOP]) == 143
    assert not (runs / "cut/checkpoints/step-00000002").exists()
    assert start(job("cut")) == 0
    whole, resumed = read_weights(runs / "whole"), read_weights(runs / "cut")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    before = read_weights(runs / "whole", step=1)
    assert any(not torch.equal(whole[name], before[name]) for name in whole), "the second step changed nothing"


def assert_equal_weights(one: Path, other: Path) -> None:
    """The weights after the second step, to tolerance."""
    weights, others = read_weights(one), read_weights(other)
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        assert (tensor - others[name]).abs().max() <= 1e-5 * tensor.abs().max() + 1e-8, name
