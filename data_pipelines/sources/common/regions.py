"""What sources of described regions share: a phrase and its box in pixels become a question and an answer.

Boxes are `Box` parts in fractions of the image; the template spells them.
"""

from __future__ import annotations

import hashlib
from typing import Any

from data_pipelines.errors import BadSample
from data_pipelines.sample import Box
from data_pipelines.sources.common.questions import Annotated, Prompt, require_text
from data_pipelines.sources.common.samples import check_choice, make_exchange

# The wording of LLaVA-1.5's mix (llava_v1_5_mix665k.json)
GROUNDING_PROMPT = "Please provide the bounding box coordinate of the region this sentence describes: {phrase}."
REFERRING_PROMPT = "Please provide a short description for this region: {box}."

TASKS = ("grounding", "referring", "mixed")
TOLERANCE = 1.0
"""Pixels that a box may leave its image by and still be cut to it: published boxes are rounded, or count from 1."""


class RegionTask:
    """`grounding` asks for the box of a phrase, `referring` for a phrase of a box, `mixed` draws one of them."""

    def __init__(self, task: str, grounding_prompt: str, referring_prompt: str) -> None:
        self.task = check_choice("task", task, TASKS)
        self._grounding = Prompt(grounding_prompt, "grounding_prompt", needs=["phrase"])
        self._referring = Prompt(referring_prompt, "referring_prompt", needs=["box"])

    def make_annotation(self, region: Any, phrase: Any, box: Box) -> Annotated:
        """The annotation of the region with this id. Raises `BadSample`."""
        phrase, note = require_text(phrase), {"region_id": region}
        # A hash draws, so that a region's task depends on nothing but its id and phrase.
        drawn = TASKS[hash_name(f"{region}-{phrase}")[0] % 2] if self.task == "mixed" else self.task
        if drawn == "grounding":
            return [(make_exchange(self._grounding.fill_prompt(phrase=phrase), box), note)]
        return [(make_exchange(self._referring.fill_prompt(box=box), phrase), note)]


def hash_name(name: str) -> bytes:
    """32 bytes that look random and depend on `name` alone."""
    return hashlib.sha256(name.encode()).digest()


def check_size(stated: tuple[Any, Any], width: int, height: int) -> None:
    """Raise `BadSample` unless the image is as large as the one its boxes were drawn on."""
    if tuple(stated) != (width, height):
        raise BadSample(f"image of {width} x {height} pixels, its boxes are for {stated[0]} x {stated[1]}")


def box_from_xywh(xywh: Any, width: int, height: int) -> Box:
    """The box with corner x, y and size w, h in pixels, as fractions. Raises `BadSample`.

    Up to `TOLERANCE` pixels outside the image are cut off; more, and boxes without area, are not usable.
    """
    try:
        x, y, w, h = (float(value) for value in xywh)
    except (TypeError, ValueError, OverflowError) as error:
        raise BadSample(f"box {xywh!r}; expected x, y, w, h in pixels") from error
    what = f"box x, y, w, h = {x:g}, {y:g}, {w:g}, {h:g}"
    if min(x, y) < -TOLERANCE or x + w > width + TOLERANCE or y + h > height + TOLERANCE:
        raise BadSample(f"{what} leaves the image of {width} x {height} pixels")
    x1, y1, x2, y2 = max(x, 0.0) / width, max(y, 0.0) / height, min((x + w) / width, 1.0), min((y + h) / height, 1.0)
    if not (x1 < x2 and y1 < y2):  # also false for NaN
        raise BadSample(f"{what} has no area in the image of {width} x {height} pixels")
    return Box(item=0, xyxy=(x1, y1, x2, y2))
