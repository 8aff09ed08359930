"""Steps read one after the other leave nothing behind."""

from __future__ import annotations

import gc
import tracemalloc
from itertools import pairwise
from pathlib import Path

import torch

from tests.data.test_datamodule import data
from tests.support.small_run import make_data
from vlm_train.data.loader import WindowStream
from vlm_train.data.order.cost import Cost


def test_a_process_keeps_nothing_of_what_it_has_read(tmp_path: Path) -> None:
    made = data(make_data(tmp_path) / "tiny/train", shuffle="full")
    plan = made.make_plan(batch=4, tokens=None, epochs=60, most=None, world=1, cost=Cost())
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
        read(0, 90)  # Python's and Pillow's stocks of free objects fill up
        held = [read(start, start + 30) for start in (90, 120, 150)]
    finally:
        tracemalloc.stop()
    sizes, tensors, files = zip(*held, strict=True)
    assert len({*tensors}) == 1 and len({*files}) == 1
    # What other threads of the process keep, they keep now and then; what the stream kept, it would keep each time.
    assert min(after - before for before, after in pairwise(sizes)) < 120 * 64  # of 120 samples less than a key each
