"""easy-VQA (MIT, the `easy-vqa` package): one coloured shape per 64 x 64 image, questions with 13 possible answers.

Source: github.com/vzhou842/easy-VQA. 4,000 training images with 38,575 questions, 1,000 test images with 9,673.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from data_pipelines.errors import DataError
from data_pipelines.sample import Sample, Text
from data_pipelines.shards.members import caption_annotation
from data_pipelines.sources import ListSource
from data_pipelines.sources.common.samples import check_choice, make_exchange, make_sample

SPLITS = ("train", "val", "trainval", "test")
SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


class Question(NamedTuple):
    """A question about an image and its one-word answer."""

    text: str
    answer: str


class EasyVQA(ListSource):
    """One sample per image; each question is an independent annotation.

    `split`: `test` is the official one; `val` is a fixed share `val_share` of the official training images, `train` the
    rest, `trainval` all of them. `captions` replaces the questions by one caption such as "a teal
    triangle", derived from the answers; images whose answers settle neither colour nor shape are left out.
    `images=False` leaves the images out and keeps the text; `described` then puts the caption before every question, so
    that a language model learns to answer from a description before it sees. `wrong` gives that share of the images the
    caption of another one, for filters to find; the meta `right` says which are their own.
    """

    name = "easy_vqa"
    license = "MIT"

    def __init__(
        self,
        *,
        split: str = "train",
        captions: bool = False,
        images: bool = True,
        described: bool = False,
        wrong: float = 0.0,
        val_share: float = 0.05,
    ) -> None:
        check_choice("split", split, SPLITS)
        if not 0 <= wrong < 1 or (wrong and not captions):
            raise DataError(f"wrong: got {wrong}; allowed: from 0 to below 1, with captions=true")
        if not 0 < val_share < 1:
            raise DataError(f"val_share: got {val_share}; allowed: between 0 and 1")
        self.split, self.captions, self.images, self.val_share = split, captions, images, val_share
        self.described, self.wrong = described, wrong
        self._official = "test" if split == "test" else "train"
        self._questions, self._paths = _load_questions(self._official)
        self._ids = self._choose_images()

    def __len__(self) -> int:
        return len(self._ids)

    def _choose_images(self) -> list[int]:
        ids = sorted(self._questions)
        if self.split in ("train", "val"):
            # A hash orders the images, so that the held-out ones depend on no random generator and no version of one.
            shuffled = sorted(ids, key=lambda image: hashlib.sha256(f"easy_vqa-{image}".encode()).digest())
            held_out = set(shuffled[: round(self.val_share * len(ids))])
            ids = [image for image in ids if (image in held_out) == (self.split == "val")]
        if self.captions:
            ids = [image for image in ids if make_caption(*describe_thing(self._questions[image]))]
        return ids

    def read_record(self, i: int) -> tuple[Sample, list[bytes]]:
        """All questions about one image, or its caption."""
        image = self._ids[i]
        color, shape = describe_thing(self._questions[image])
        blobs = [self._read_image(image)] if self.images else []
        items = range(len(blobs))
        words, right = self._caption_of(i)
        lead = (Text(text=words + " "),) if self.described and words else ()
        if self.captions:
            annotations = [caption_annotation(words, images=len(blobs))]
        else:
            annotations = [
                make_exchange((*lead, Text(text=question.text)), question.answer, items=items)
                for question in self._questions[image]
            ]
        meta = {"image": image, "color": color, "shape": shape} | ({"right": right} if self.wrong else {})
        return make_sample(self, f"{self._official}-{image:05d}", blobs, annotations, meta)

    def _caption_of(self, i: int) -> tuple[str, bool]:
        """The caption that sample `i` gets, and whether it is its own."""
        own = make_caption(*describe_thing(self._questions[self._ids[i]]))
        draw = hashlib.sha256(f"easy_vqa-wrong-{self._ids[i]}".encode()).digest()
        if int.from_bytes(draw[:4], "big") >= self.wrong * 2**32:
            return own, True
        first = int.from_bytes(draw[4:8], "big")
        turned = (self._ids[(first + step) % len(self)] for step in range(len(self)))
        others = (make_caption(*describe_thing(self._questions[image])) for image in turned)
        return next((other for other in others if other != own), own), False

    def _read_image(self, image: int) -> bytes:
        with open(self._paths[image], "rb") as file:
            return file.read()


def describe_thing(questions: list[Question]) -> tuple[str | None, str | None]:
    """Colour and shape of the one thing in the image, as far as the answers settle them; `None` where they do not."""
    colors, shapes = set(COLORS), set(SHAPES)
    for question in questions:
        words = question.text.rstrip("?").split()
        _narrow_candidates(colors, words, question.answer)
        _narrow_candidates(shapes, words, question.answer)
    return _only_candidate(colors), _only_candidate(shapes)


def make_caption(color: str | None, shape: str | None) -> str:
    """ "a teal triangle", "a teal shape" or "a triangle"; empty if nothing is known."""
    if not color and not shape:
        return ""
    return " ".join(word for word in ("a", color, shape or "shape") if word)


def _narrow_candidates(candidates: set[str], words: list[str], answer: str) -> None:
    """Keep the candidates that a question and its answer leave possible."""
    named = candidates.intersection(words)
    if answer in ("yes", "no"):
        present = (answer == "yes") != ("not" in words or "no" in words)
        if named and present:
            candidates &= named
        else:
            candidates -= named
    elif named or answer in candidates:
        candidates &= named | {answer}


def _only_candidate(candidates: set[str]) -> str | None:
    return next(iter(candidates)) if len(candidates) == 1 else None


def _load_questions(official: str) -> tuple[dict[int, list[Question]], dict[int, str]]:
    try:
        import easy_vqa
    except ImportError as error:
        raise DataError("source easy_vqa needs the easy-vqa package: pip install easy-vqa") from error
    read = easy_vqa.get_test_questions if official == "test" else easy_vqa.get_train_questions
    paths = easy_vqa.get_test_image_paths() if official == "test" else easy_vqa.get_train_image_paths()
    questions: dict[int, list[Question]] = {}
    for text, answer, image in zip(*read(), strict=True):
        questions.setdefault(image, []).append(Question(text, answer))
    return questions, paths
