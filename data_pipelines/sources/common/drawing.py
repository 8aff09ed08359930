"""Made pictures: coloured shapes in a grid, written words, a moving shape. What is drawn depends on an address only."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipelines.inputs.files import require_module

SHAPES = ("circle", "square", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
NAMES = tuple((color, shape) for color in COLORS for shape in SHAPES)
SIDE = 96  # pixels of a picture
CELL = 32  # pixels of a cell of its grid
FONT = 20  # size of written words
SMALL_FONT = 14  # its digits are 10 pixels high
RATE = 8  # frames a second

T = TypeVar("T")


class Dice:
    """Draws from a hash of an address, so that they depend on no random generator and no version of one."""

    def __init__(self, *address: object) -> None:
        self._address, self._draws = "/".join(map(str, address)), 0

    def draw_below(self, limit: int) -> int:
        """A number from 0 to `limit` - 1."""
        self._draws += 1
        digest = hashlib.sha256(f"{self._address}#{self._draws}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % limit

    def pick_one(self, choices: Sequence[T]) -> T:
        """Draw one of `choices`."""
        return choices[self.draw_below(len(choices))]

    def pick_some(self, choices: Sequence[T], count: int) -> list[T]:
        """`count` different ones of `choices`, in the order drawn."""
        left = list(choices)
        return [left.pop(self.draw_below(len(left))) for _ in range(count)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """A circle, a triangle on its base, or a filled square of `side` pixels."""

    color: str
    shape: str
    left: int
    top: int
    side: int

    @property
    def name(self) -> str:
        """Color and shape, for example "red circle"."""
        return f"{self.color} {self.shape}"

    @property
    def xyxy(self) -> tuple[float, float, float, float]:
        """The box of the thing as fractions of a picture of `SIDE` pixels."""
        edges = (self.left, self.top, self.left + self.side, self.top + self.side)
        x1, y1, x2, y2 = (round(edge / SIDE, 4) for edge in edges)
        return x1, y1, x2, y2


def draw_scene(dice: Dice, count: int, names: Sequence[tuple[str, str]] = NAMES) -> list[Thing]:
    """`count` things (at most 9) of different colors and shapes, of those in `names`, in cells of their own, in reading
    order."""
    cells = sorted(dice.pick_some(range((SIDE // CELL) ** 2), count))
    things = []
    for cell, (color, shape) in zip(cells, dice.pick_some(names, count), strict=True):
        side = 14 + dice.draw_below(14)
        row, column = divmod(cell, SIDE // CELL)
        left, top = (CELL * at + 1 + dice.draw_below(CELL - side - 2) for at in (column, row))
        things.append(Thing(color=color, shape=shape, left=left, top=top, side=side))
    return things


def draw_picture(things: Sequence[Thing], size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    """The things on white; `size` is width and height in pixels."""
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for thing in things:
        right, bottom = thing.left + thing.side, thing.top + thing.side
        if thing.shape == "triangle":
            draw.polygon([(thing.left, bottom), (right, bottom), ((thing.left + right) // 2, thing.top)], thing.color)
        else:
            paint = draw.ellipse if thing.shape == "circle" else draw.rectangle
            paint((thing.left, thing.top, right, bottom), fill=thing.color)
    return image


def draw_word(dice: Dice, word: str) -> Image.Image:
    """A word somewhere on white, in PIL's own font."""
    image = Image.new("RGB", (SIDE, SIDE), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(FONT)
    _, _, width, height = (int(edge) + 1 for edge in draw.textbbox((0, 0), word, font=font))
    place = dice.draw_below(max(1, SIDE - width)), dice.draw_below(max(1, SIDE - height))
    draw.text(place, word, fill="black", font=font)
    return image


def draw_digits(dice: Dice, digits: Sequence[int], columns: int) -> Image.Image:
    """White cells in rows of `columns`, with a small digit somewhere in every one."""
    image = Image.new("RGB", (CELL * columns, CELL * (len(digits) // columns)), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(SMALL_FONT)
    for number, digit in enumerate(digits):
        row, column = divmod(number, columns)
        _, _, width, height = (int(edge) + 1 for edge in draw.textbbox((0, 0), str(digit), font=font))
        left, top = CELL * column + dice.draw_below(CELL - width), CELL * row + dice.draw_below(CELL - height)
        draw.text((left, top), str(digit), fill="black", font=font)
    return image


def draw_motion(thing: Thing, direction: str, frames: int) -> list[Image.Image]:
    """The thing on its way across the picture: left, right, up or down."""
    reach = SIDE - thing.side - 8
    steps = [4 + reach * number // max(1, frames - 1) for number in range(frames)]
    if direction in ("left", "up"):
        steps.reverse()
    axis = "left" if direction in ("left", "right") else "top"
    return [draw_picture([replace(thing, **{axis: step})]) for step in steps]  # type: ignore[arg-type]


def encode_png(image: Image.Image) -> bytes:
    """The picture as a PNG."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def encode_mp4(images: Sequence[Image.Image]) -> bytes:
    """The pictures as an MP4 of `RATE` frames a second (MPEG-4, which every build of PyAV writes); the same bytes every
    time. Raises `DataError` without PyAV."""
    av = require_module("av")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("mpeg4", rate=RATE, options={"flags": "+bitexact"})
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        stream.bit_rate, stream.codec_context.thread_count = 2_000_000, 1
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(image), "rgb24")))
        container.mux(stream.encode())
    return file.getvalue()
