"""Steps read one after the other leave nothing behind."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path

import torch

from tests.data.test_datamodule import data
from tests.support.small_run import make_data
from vlm_train.data.loader import WindowStream
from vlm_train.data.order.cost import Cost


def test_a_process_keeps_nothing_of_what_it_has_read(tmp_path: Path) -> None:
    made = data(make_data(tmp_path) / "tiny/train", shuffle="full")
    plan = made.make_plan(batch=4, tokens=None, epochs=50, most=None, world=1, cost=Cost())
    windows = WindowStream(made.train, plan, 0, 0, "token")

    def read(first: int, last: int) -> tuple[int, int, int]:
        """Bytes, tensors and open files that are held afterwards."""
        for step in range(first, last):
            windows.load_window(step)
        gc.collect()
        tensors = sum(isinstance(one, torch.Tensor) for one in gc.get_objects())
        return tracemalloc.get_traced_memory()[0], tensors, len(list(Path("/proc/self/fd").iterdir()))

    tracemalloc.start()
    try:
        read(0, 15)  # each of the twelve samples some times
        held, *before = read(15, 30)
        now, *after = read(30, 130)
    finally:
        tracemalloc.stop()
    assert after == before and now - held < 400 * 64  # of 400 samples less than a key each
