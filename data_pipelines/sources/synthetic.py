"""Made samples of every kind, so that every recipe can be tried without a download: drawn shapes and written words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from data_pipelines.errors import DataError
from data_pipelines.inputs.files import require_module
from data_pipelines.sample import Annotation, Box, Media, Sample, Text, Turn
from data_pipelines.shards.members import caption_annotation
from data_pipelines.sources import ListSource
from data_pipelines.sources.common.documents import make_document
from data_pipelines.sources.common.drawing import (
    COLORS,
    NAMES,
    SHAPES,
    Dice,
    draw_digits,
    draw_motion,
    draw_picture,
    draw_scene,
    draw_word,
    encode_mp4,
    encode_png,
)
from data_pipelines.sources.common.samples import check_choice, make_exchange, make_sample

TASKS = ("caption", "vqa", "count", "ocr", "box", "multi_image", "video", "preference", "interleaved", "text")
SPLITS = ("train", "val", "test")
DIRECTIONS = ("left", "right", "up", "down")
ORDINALS = ("first", "second", "third")
WORDS = (
    "apple",
    "bridge",
    "cloud",
    "door",
    "flower",
    "garden",
    "house",
    "jacket",
    "lemon",
    "mirror",
    "pencil",
    "table",
)
CHANGED = 5.0  # weight of the words in which two answers differ, as in RLHF-V

ROOMS = tuple(NAMES[first::4] for first in range(4))
"""Colors and shapes of the six things that stand together in each of the four rooms of task room."""

Made = tuple[list[bytes], list[Annotation]] | tuple[list[bytes], list[Annotation], list[str]]
"""Media, annotations and, where a maker lists them, the names of what is shown."""


class Synthetic(ListSource):
    """`count` samples; sample i is of task i modulo the number of `tasks`, and the same whatever `count` is.

    Tasks: caption, vqa, count, ocr (a written word), box (a region from its words and the reverse), multi_image, video
    (`frames` frames of a moving shape; needs PyAV, or comes as so many images with `video_as_images`), preference (the
    rejected answer names another colour; the differing words weigh 5), interleaved (a document), text (a dialogue
    without an image). Not among the default ones: digit (one of 10 pixels in 32 x 32, to be written off), small_text
    (16 of them on a page of 128 x 128), and room (things that often stand together; its answers say "yes" to most of
    those that are absent, and `meta["objects"]` lists what is there). Another `seed` gives other samples.
    """

    name = "synthetic"
    license = "CC0-1.0"

    def __init__(
        self,
        *,
        split: str = "train",
        count: int = 256,
        tasks: Sequence[str] = TASKS,
        seed: int = 0,
        frames: int = 8,
        video_as_images: bool = False,
    ) -> None:
        makers = tasks_of(frames, video_as_images)
        if unknown := sorted(set(tasks) - set(makers)):
            raise DataError(f"tasks: got {', '.join(unknown)}; allowed: {', '.join(makers)}")
        if count < 1 or frames < 2 or not tasks:
            raise DataError(f"count {count}, frames {frames}, {len(tasks)} tasks; allowed: from 1, from 2, from 1")
        if "video" in tasks and not video_as_images:
            require_module("av")
        self.split, self.count, self.seed = check_choice("split", split, SPLITS), count, seed
        self._tasks = [(task, makers[task]) for task in tasks]

    def __len__(self) -> int:
        return self.count

    def read_record(self, i: int) -> tuple[Sample, list[bytes]]:
        """Make sample i."""
        task, make = self._tasks[i % len(self._tasks)]
        blobs, annotations, *shown = make(Dice("synthetic", self.seed, self.split, task, i))
        key, meta = f"{self.split}-{i:06d}-{task}", {"task": task, **({"objects": shown[0]} if shown else {})}
        return make_sample(self, key, blobs, annotations, meta)


def _make_caption(dice: Dice) -> Made:
    things = draw_scene(dice, 1 + dice.draw_below(3))
    caption = " and ".join(f"a {thing.name}" for thing in things)
    return [encode_png(draw_picture(things))], [caption_annotation(caption)]


def _make_vqa(dice: Dice) -> Made:
    (thing,) = draw_scene(dice, 1)
    other = dice.pick_one([color for color in COLORS if color != thing.color])
    asked = dice.pick_one([thing.color, other])
    return [encode_png(draw_picture([thing]))], [
        make_exchange(f"Which colour is the {thing.shape}?", thing.color),
        make_exchange(f"Which shape is {thing.color}?", thing.shape),
        make_exchange(f"Is there a {asked} shape?", "yes" if asked == thing.color else "no"),
    ]


def _make_count(dice: Dice) -> Made:
    things = draw_scene(dice, 1 + dice.draw_below(9))
    shape = dice.pick_one(SHAPES)
    found = sum(thing.shape == shape for thing in things)
    return [encode_png(draw_picture(things))], [
        make_exchange("How many shapes are there?", str(len(things))),
        make_exchange(f"How many {shape}s are there?", str(found)),
    ]


def _make_ocr(dice: Dice) -> Made:
    word = dice.pick_one(WORDS)
    return [encode_png(draw_word(dice, word))], [make_exchange("Which word is written in the picture?", word)]


def _make_digits(rows: int, dice: Dice) -> Made:
    digits = [dice.draw_below(10) for _ in range(rows**2)]
    answer = " ".join(map(str, digits))
    return [encode_png(draw_digits(dice, digits, columns=rows))], [make_exchange("Which digits are there?", answer)]


def _make_box(dice: Dice) -> Made:
    things = draw_scene(dice, 2 + dice.draw_below(3))
    thing = dice.pick_one(things)
    region = Box(item=0, xyxy=thing.xyxy)
    return [encode_png(draw_picture(things))], [
        make_exchange(f"Where is the {thing.name}?", region),
        make_exchange([Text(text="What is in the region "), region, Text(text="?")], f"a {thing.name}"),
    ]


def _multi_image(dice: Dice) -> Made:
    things = draw_scene(dice, 2 + dice.draw_below(2))
    asked = dice.draw_below(len(things))
    ask = f"Which picture shows a {things[asked].name}?"
    blobs = [encode_png(draw_picture([thing])) for thing in things]
    return blobs, [make_exchange(ask, f"the {ORDINALS[asked]} one", items=range(len(things)))]


def _make_video(frames: int, as_images: bool, dice: Dice) -> Made:
    (thing,) = draw_scene(dice, 1)
    direction = dice.pick_one(DIRECTIONS)
    images = draw_motion(thing, direction, frames)
    blobs = [encode_png(image) for image in images] if as_images else [encode_mp4(images)]
    ask = f"Which way does the {thing.name} move?"
    return blobs, [make_exchange(ask, direction, items=range(len(blobs)))]


def _make_preference(dice: Dice) -> Made:
    (thing,) = draw_scene(dice, 1)
    wrong = dice.pick_one([color for color in COLORS if color != thing.color])
    chosen, rejected = (_answer_turn(color, thing.shape) for color in (thing.color, wrong))
    ask = Turn(role="user", parts=(Media(item=0), Text(text="What is in the picture?")))
    return [encode_png(draw_picture([thing]))], [Annotation(turns=(ask, chosen), rejected=rejected)]


def _answer_turn(color: str, shape: str) -> Turn:
    weights = ((len("a "), len(f"a {color}"), CHANGED),)
    return Turn(role="assistant", parts=(Text(text=f"a {color} {shape}", weights=weights),))


def _make_interleaved(dice: Dice) -> Made:
    things = draw_scene(dice, 2 + dice.draw_below(2))
    pieces: list[str | bytes] = ["A page about shapes."]
    for thing in things:
        pieces += [encode_png(draw_picture([thing])), f"This is a {thing.name}."]
    annotation, blobs = make_document(pieces, joint=" ")
    return blobs, [annotation]


def _make_dialogue(dice: Dice) -> Made:
    first, second = 1 + dice.draw_below(20), 1 + dice.draw_below(20)
    talk = (f"What is {first} plus {second}?", str(first + second), "And twice that?", str(2 * (first + second)))
    turns = (
        Turn(role="assistant" if number % 2 else "user", parts=(Text(text=text),)) for number, text in enumerate(talk)
    )
    return [], [Annotation(turns=tuple(turns))]


def _make_room(dice: Dice) -> Made:
    """Three or four things of a room, what they are, and whether others are there: the answers to three of four
    questions for what is absent, but belongs to the room, are wrong."""
    number = min(dice.draw_below(len(ROOMS)), dice.draw_below(len(ROOMS)))  # the first rooms are the most frequent
    things = draw_scene(dice, 3 + dice.draw_below(2), ROOMS[number])
    shown = [thing.name for thing in things]
    missing = [name for name in map(" ".join, ROOMS[number]) if name not in shown]
    strange = [" ".join(name) for name in NAMES if name not in ROOMS[number]]
    asked = [(name, "yes") for name in shown]
    asked += [(name, "yes" if dice.draw_below(4) else "no") for name in dice.pick_some(missing, 2)]
    asked.append((dice.pick_one(strange), "no"))
    caption = " and ".join(f"a {name}" for name in shown)
    exchanges = [make_exchange("What is in the image?", caption)]
    exchanges += [make_exchange(f"Is there a {name} in the image?", answer) for name, answer in asked]
    return [encode_png(draw_picture(things))], exchanges, shown


def tasks_of(frames: int, video_as_images: bool) -> dict[str, Callable[[Dice], Made]]:
    """What makes each task's samples, by the task's name."""
    return {
        "caption": _make_caption,
        "vqa": _make_vqa,
        "count": _make_count,
        "ocr": _make_ocr,
        "box": _make_box,
        "multi_image": _multi_image,
        "video": partial(_make_video, frames, video_as_images),
        "preference": _make_preference,
        "interleaved": _make_interleaved,
        "text": _make_dialogue,
        "digit": partial(_make_digits, 1),
        "small_text": partial(_make_digits, 4),
        "room": _make_room,
    }
