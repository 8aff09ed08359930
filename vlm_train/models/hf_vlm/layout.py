"""Where the images of a whole model of `transformers` stand: the tokens that its own processor writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlm_train.contracts.layout import MediaSize, Piece, Slot


@dataclass(frozen=True)
class LibraryLayout:
    """The pieces of every item as its processor expands it; those of every used frame of a video.

    Attributes:
        plan: the image plan, which knows the processor and the used frames; or one that only counts.
    """

    plan: Any

    def __call__(self, sizes: Sequence[MediaSize]) -> list[list[Piece]]:
        return [self._lay_out(item, size) for item, size in enumerate(sizes)]

    def _lay_out(self, item: int, size: MediaSize) -> list[Piece]:
        processor = getattr(self.plan, "processor", None)
        if processor is None:  # dry runs ask for one view
            return [Slot(item, grid.size, grid) for grid in self.plan.grids(size)]
        pieces: list[Piece] = processor.list_pieces(item, size)
        return pieces * self.plan.count_frames(size)
