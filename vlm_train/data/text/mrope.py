"""M-RoPE: positions of time, row and column for every token (Qwen2-VL, arXiv 2409.12191, section 2.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlm_train.contracts.layout import MediaLayout, MediaSize, Piece
from vlm_train.data.text.streams import PlacedSlot
from vlm_train.errors import ConfigError


@dataclass(frozen=True)
class MRopeLayout:
    """A media layout with positions on three axes.

    Attributes:
        layout: where media stand.
        tokens_per_second: positions on the axis of time that a second of a video takes (Qwen2.5-VL); None: one for
            every row of its grid.
    """

    layout: MediaLayout
    tokens_per_second: float | None = None

    def __call__(self, sizes: Sequence[MediaSize]) -> list[list[Piece]]:
        return self.layout(sizes)

    def positions(self, length: int, slots: Sequence[PlacedSlot]) -> NDArray[np.int64]:
        """`[3, T]` of a conversation of `length` tokens. Text has three equal positions. A medium's are its times, rows
        and columns counted from the position that follows the text; what follows it is one more than its largest."""
        positions = np.empty((3, length), np.int64)
        token, following = 0, 0
        for placed in slots:
            if placed.slot.count == 0:
                continue
            if (grid := placed.slot.grid) is None or grid.size != placed.slot.count:
                raise ConfigError(
                    f"llm: its positions have three axes, but the {placed.slot.count} tokens of an image have no grid; "
                    "choose a connector that keeps the patch grid, and no stitcher"
                )
            positions[:, token : placed.start] = following + np.arange(placed.start - token)
            following += placed.start - token
            times = np.arange(grid.t)
            if placed.slot.seconds and self.tokens_per_second is not None:
                step = np.float32(self.tokens_per_second * placed.slot.seconds / grid.t)
                times = (np.arange(grid.t, dtype=np.float32) * step).astype(np.int64)
            places = np.stack(np.meshgrid(times, np.arange(grid.h), np.arange(grid.w), indexing="ij")).reshape(3, -1)
            positions[:, placed.start : placed.end] = following + places
            following += int(places.max()) + 1
            token = placed.end
        positions[:, token:] = following + np.arange(length - token)
        return positions
