"""Mirrors in the run folder: a table and event files."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.atomic_write import atomic_write
from vlm_train.errors import ConfigError
from vlm_train.loggers.metrics_logger import ImageSample
from vlm_train.runs import record
from vlm_train.runs.folder import RunFolder

CSV, EVENTS = "metrics.csv", "tensorboard"


class Csv:
    """metrics.jsonl as a table. Made anew from it whenever a process starts or a column is added, so the two agree."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._write_rows(record.read_metrics(folder))
        path = RunFolder(folder).metrics
        self.read = path.stat().st_size if path.is_file() else 0

    def row(self, step: int, row: Mapping[str, float]) -> None:
        """Append the lines that metrics.jsonl has gained."""
        new = [json.loads(line) for line in self._read_new_lines()]
        if any(name not in self.columns for one in new for name in one):
            self._write_rows(record.read_metrics(self.folder))
            return
        with open(self.folder / CSV, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns).writerows(new)

    def _read_new_lines(self) -> list[bytes]:
        """The lines that metrics.jsonl has gained."""
        with open(RunFolder(self.folder).metrics, "rb") as file:
            file.seek(self.read)
            lines = file.readlines()
        self.read += sum(map(len, lines))
        return lines

    def _write_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        names = dict.fromkeys(name for row in rows for name in row)
        with atomic_write(self.folder / CSV, newline="") as file:
            writer = csv.DictWriter(file, list(names))
            writer.writeheader()
            writer.writerows(rows)
        self.columns = list(names)

    def config(self, content: Mapping[str, Any]) -> None:
        """Do nothing: the configuration is in config.yaml."""

    def pictures(self, step: int, pictures: Sequence[ImageSample]) -> None:
        """Do nothing: the pictures are in the run folder."""

    def pause(self, *, good: bool) -> None:
        """Do nothing: every row is already written."""


class TensorBoard:
    """Event files. Points that a killed process logged after the checkpoint are hidden by those that replace them."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise ConfigError("logger: TensorBoard is not installed: pip install 'vlm-train[loggers]'.") from error
        events, rows = folder / EVENTS, record.read_metrics(folder)
        again = events.is_dir() and any(events.iterdir())
        first = (rows[-1]["step"] if rows else 0) + 1
        self.writer: Any = SummaryWriter(str(events), purge_step=first if again else None)

    def config(self, content: Mapping[str, Any]) -> None:
        """Write the configuration as a text, which TensorBoard shows as Markdown."""
        self.writer.add_text("config", f"```json\n{json.dumps(content, indent=2, default=str)}\n```")

    def row(self, step: int, row: Mapping[str, float]) -> None:
        """Write each value as a point of its curve."""
        for name, value in row.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def pictures(self, step: int, pictures: Sequence[ImageSample]) -> None:
        """Write every picture, and a text with all answers."""
        import numpy as np
        from PIL import Image

        for number, picture in enumerate(pictures):
            with Image.open(picture.path) as image:
                self.writer.add_image(
                    f"predictions/{number}", np.asarray(image.convert("RGB")), step, dataformats="HWC"
                )
        self.writer.add_text("predictions", "\n\n".join(f"    {p.caption}" for p in pictures), step)
        self.writer.flush()

    def pause(self, *, good: bool) -> None:
        """Do nothing: every row is already written."""
