"""`debug=profile`: where the time of a step goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch.profiler import ProfilerActivity, profile, schedule


class Profile(pl.Callback):
    """Profiles a few batches; a Chrome trace and a table of the costliest operators land in the run folder.

    Args:
        skip: batches before the first profiled one (caches warm up).
        steps: batches profiled.
    """

    def __init__(self, *, skip: int = 5, steps: int = 5) -> None:
        self.batches = skip + 1 + steps
        self.profiler = profile(
            activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA],
            schedule=schedule(wait=skip, warmup=1, active=steps),
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.profiler.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx < self.batches:
            self.profiler.step()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.profiler.stop()
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            self.profiler.export_chrome_trace(str(folder / "trace.json"))
            table = self.profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20)
            (folder / "profile.txt").write_text(table, encoding="utf-8")
            print(f"profile: {folder / 'trace.json'} and profile.txt", flush=True)
