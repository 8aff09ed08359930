"""Made pictures for `size=tiny`: a coloured shape each, with a question that asks for both and one for the colour; each
has a rejected answer, too, with another colour, for recipes that learn from pairs."""

from __future__ import annotations

import hashlib

from data_pipelines.errors import DataError
from data_pipelines.sample import Sample
from data_pipelines.sources import ListSource
from data_pipelines.sources.common.drawing import COLORS, Thing, draw_picture, encode_png
from data_pipelines.sources.common.samples import check_choice, make_exchange, make_sample

SPLITS = ("train", "val", "test")
SHAPES = ("circle", "rectangle", "triangle")
SIZE = (48, 40)  # width, height


class Tiny(ListSource):
    """`count` samples with one picture and two independent annotations, each a pair; equal on every machine.

    Sample n of a split is the same whatever `count` is.
    """

    name = "tiny"
    license = "CC0-1.0"

    def __init__(self, *, split: str = "train", count: int = 64) -> None:
        if count < 1:
            raise DataError(f"count: got {count}; allowed: 1 or more")
        self.split, self.count = check_choice("split", split, SPLITS), count

    def __len__(self) -> int:
        return self.count

    def read_record(self, i: int) -> tuple[Sample, list[bytes]]:
        """Make picture i and its caption."""
        # A hash chooses, so that the pictures depend on no random generator and no version of one.
        draw = hashlib.sha256(f"tiny-{self.split}-{i}".encode()).digest()
        color, shape = COLORS[draw[0] % len(COLORS)], SHAPES[draw[1] % len(SHAPES)]
        thing = Thing(color=color, shape=shape, left=draw[2] % 20, top=draw[3] % 16, side=12 + draw[4] % 12)
        blob = encode_png(draw_picture([thing], SIZE))
        wrong = COLORS[(draw[0] + 1) % len(COLORS)]
        annotations = [
            make_exchange("What is in the picture?", f"a {color} {shape}", rejected=f"a {wrong} {shape}"),
            make_exchange(f"Which colour is the {shape}?", color, rejected=wrong),
        ]
        return make_sample(self, f"{self.split}-{i:05d}", [blob], annotations, {"color": color, "shape": shape})
