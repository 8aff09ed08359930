"""What only a GPU can run: offloading, and the strategies over NCCL."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.jobs import train_on_ranks
from tests.support.small_run import make_data
from tests.training.strategies.test_parity import CASES, assert_equal_runs, jobs

OFFLOADED = {
    "zero1_offload": [],
    "zero2_offload": [],
    "zero3_offload": ["strategy.persistent_parameters=0"],
    "zero3_nvme": ["strategy.persistent_parameters=0", "strategy.nvme_path={}"],
    "fsdp2_offload": [],
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", OFFLOADED)
def test_offloaded_training_is_ddps(strategy: str, tmp_path: Path) -> None:
    data, ranks = make_data(tmp_path / "data"), min(2, torch.cuda.device_count())
    more = [one.format(tmp_path / "nvme") for one in OFFLOADED[strategy]]
    for name, options in (("ddp", []), (strategy, more)):
        own = [
            [*job, f"strategy={name}", "trainer.accelerator=gpu", *options]
            for job in jobs("ddp", data, tmp_path / name)
        ]
        train_on_ranks(*own, ranks=ranks, limit=500)
    for case in CASES:
        assert_equal_runs(tmp_path / "ddp" / f"ddp-{case}", tmp_path / strategy / f"ddp-{case}")
