"""Visual Genome: described regions, and questions, of 108,077 images.

Format: `region_descriptions.json`: `[{"id": image, "regions": [{"region_id", "phrase", "x", "y", "width", "height"}]}]`
with boxes in pixels; `question_answers.json`: `[{"id": image, "qas": [{"qa_id", "question", "answer"}]}]`;
`image_data.json`: `[{"image_id", "width", "height"}]`, `id` in version 1.0. Images are `VG_100K/<image>.jpg` or
`VG_100K_2/<image>.jpg` (homes.cs.washington.edu/~ranjay/visualgenome; ranjaykrishna/visual_genome_python_driver).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.inputs.files import MediaFolder, read_list
from data_pipelines.media.limits import image_item
from data_pipelines.sample import Sample
from data_pipelines.sources import ListSource
from data_pipelines.sources.common.questions import Annotated, Prompt, one_image, require_text, require_whole_number
from data_pipelines.sources.common.regions import (
    GROUNDING_PROMPT,
    REFERRING_PROMPT,
    TASKS,
    RegionTask,
    box_from_xywh,
    check_size,
    hash_name,
)
from data_pipelines.sources.common.samples import check_choice, make_exchange

QA = "qa"


class VisualGenome(ListSource):
    """One sample per image, one annotation per region or question.

    `task`: `grounding` asks for the box of a phrase, `referring` for the phrase of a box, `mixed` draws one for each
    region, `qa` takes the questions; `file` is the JSON that the task needs. `per_image` draws at most so many regions
    or questions of an image. With `image_data`, images that are not of the size the boxes are for are unusable.
    `prompt` is the user turn of a question. `limit` takes the first images only.
    """

    name = "visual_genome"

    def __init__(
        self,
        *,
        file: str,
        images: str,
        image_data: str | None = None,
        task: str = "mixed",
        grounding_prompt: str = GROUNDING_PROMPT,
        referring_prompt: str = REFERRING_PROMPT,
        prompt: str = "{question}",
        per_image: int | None = None,
        split: str = "train",
        license: str = "CC-BY-4.0",
        limit: int | None = None,
    ) -> None:
        self.split, self.license = split, license
        self._task = check_choice("task", task, (*TASKS, QA))
        if per_image is not None and per_image < 1:
            raise DataError(f"per_image: got {per_image}; allowed: null, or 1 or more")
        self._per_image = per_image
        self._regions = RegionTask(task if task != QA else "mixed", grounding_prompt, referring_prompt)
        self._prompt = Prompt(prompt, "prompt", needs=["question"])
        self._folder = MediaFolder(images)
        self._images = read_list(file, "file")[:limit]
        self._sizes = _read_sizes(image_data) if image_data is not None else {}

    def __len__(self) -> int:
        return len(self._images)

    def name_record(self, i: int) -> str:
        """The name of record i in messages: its image."""
        return f"image {_record_id(self._images[i]) if isinstance(self._images[i], dict) else f'at {i}'}"

    def read_record(self, i: int) -> tuple[Sample, list[bytes]]:
        """All regions or questions of one image."""
        image = require_whole_number(_record_id(self._images[i]))
        blob = self._folder.read(f"VG_100K/{image}.jpg", f"VG_100K_2/{image}.jpg", f"{image}.jpg")
        key, meta = f"{self.split}-{image:07d}", {"image_id": image}
        if self._task == QA:
            return one_image(
                self, key, blob, self._choose_some(self._images[i]["qas"], "qa_id"), self._make_answer, meta
            )
        item = image_item(0, blob)
        check_size(self._sizes.get(image, (item.width, item.height)), item.width, item.height)
        describe = partial(self._describe_region, width=item.width, height=item.height)
        return one_image(self, key, blob, self._choose_some(self._images[i]["regions"], "region_id"), describe, meta)

    def _choose_some(self, raw: list[dict[str, Any]], id_: str) -> list[dict[str, Any]]:
        if self._per_image is None or len(raw) <= self._per_image:
            return raw
        chosen = sorted(range(len(raw)), key=lambda n: hash_name(str(raw[n][id_])))[: self._per_image]
        return [raw[n] for n in sorted(chosen)]

    def _describe_region(self, region: dict[str, Any], width: int, height: int) -> Annotated:
        xywh = [region[side] for side in ("x", "y", "width", "height")]
        return self._regions.make_annotation(region["region_id"], region["phrase"], box_from_xywh(xywh, width, height))

    def _make_answer(self, qa: dict[str, Any]) -> Annotated:
        prompt = self._prompt.fill_prompt(question=require_text(qa["question"]))
        return [(make_exchange(prompt, require_text(qa["answer"])), {"question_id": qa["qa_id"]})]


def _record_id(record: dict[str, Any]) -> Any:
    return record.get("id", record.get("image_id"))


def _read_sizes(path: str) -> dict[Any, tuple[Any, Any]]:
    records = read_list(path, "image_data")
    try:
        return {_record_id(record): (record["width"], record["height"]) for record in records}
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"image_data: {path}: not image_data.json: {type(error).__name__}: {error}") from error
