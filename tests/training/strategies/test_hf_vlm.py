"""Whole models of `transformers` on two ranks, of which one has text only and the other pictures."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.families.test_hf_vlm_run import command
from tests.support.hf_vlm_folders import make_folder
from tests.support.jobs import train_on_ranks
from tests.support.small_run import make_data, train
from tests.training.strategies.test_parity import STRATEGIES, assert_equal_runs

KINDS = ("smolvlm", "llava_next", "qwen3_vl", "gemma3", "mllama", "blip2")
"""With a connector inside the encoder (Qwen), single parameters (LLaVA-NeXT, BLIP-2), masks and layers of their own."""
SGD = ["optim=sgd", "optim.lr=0.01", "params=all", "trainer.export=false", "data.shuffle=none"]
SHARDED = ("zero3", "fsdp2")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every second sample is text only: in order, one rank of two never sees a picture."""
    return make_data(tmp_path_factory.mktemp("data"), text_only=True)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    return {kind: make_folder(kind, root / kind, spread=1.0) for kind in KINDS}


def job(folder: Path, data: Path, runs: Path, *more: str, micro: int) -> list[str]:
    own = [*SGD, "batch.samples=2", f"batch.micro={micro}", "trainer.max_steps=4"]
    return command(folder, data, runs, *own, *more, name=folder.name)


@pytest.fixture(scope="session")
def alone(data: Path, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs on one rank, whose batches hold both kinds."""
    runs = tmp_path_factory.mktemp("alone")
    for folder in folders.values():
        train(job(folder, data, runs, micro=2))
    return runs


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "zero1"])
def test_one_rank_has_text_only(
    strategy: str, data: Path, folders: dict[str, Path], alone: Path, tmp_path: Path
) -> None:
    kinds = [kind for kind in KINDS if kind != "mllama"]  # whose texts see the library's fill-in picture beside others
    train_on_ranks(*(job(folders[k], data, tmp_path, *STRATEGIES[strategy], micro=1) for k in kinds), limit=500)
    for kind in kinds:
        assert_equal_runs(alone / kind, tmp_path / kind)
