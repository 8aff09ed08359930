"""GQA: compositional questions about Visual Genome images, each with a short and a full answer.

Format: `{question id: {"imageId", "question", "answer", "fullAnswer"}}`, images `<imageId>.jpg`
(cs.stanford.edu/people/dorarad/gqa/download.html).
"""

from __future__ import annotations

from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.inputs.files import MediaFolder, read_json
from data_pipelines.sample import Sample
from data_pipelines.sources import ListSource
from data_pipelines.sources.common.questions import Annotated, Prompt, group_records, one_image, require_text
from data_pipelines.sources.common.samples import check_choice, make_exchange

FIELDS = {"short": "answer", "full": "fullAnswer"}


class GQA(ListSource):
    """One sample per image, one annotation per question.

    `answer`: `short` (one word or phrase) or `full` (a sentence). `prompt` is the user turn. `limit` takes the first
    images only.
    """

    name = "gqa"

    def __init__(
        self,
        *,
        file: str,
        images: str,
        split: str = "train",
        answer: str = "short",
        prompt: str = "{question}",
        license: str = "",
        limit: int | None = None,
    ) -> None:
        self.split, self.license = split, license
        self._answer = FIELDS[check_choice("answer", answer, tuple(FIELDS))]
        self._prompt = Prompt(prompt, "prompt", needs=["question"])
        self._folder = MediaFolder(images)
        questions = read_json(file, "file")
        if not isinstance(questions, dict):
            raise DataError(f"file: {file} holds a {type(questions).__name__}; expected questions by their id")
        self._questions = questions
        images_of = ({"id": id_, "imageId": q.get("imageId")} for id_, q in questions.items() if isinstance(q, dict))
        self._images = [[entry["id"] for entry in group] for group in group_records(images_of, "imageId")][:limit]

    def __len__(self) -> int:
        return len(self._images)

    def name_record(self, i: int) -> str:
        """The first question about the image."""
        return f"image of question {self._images[i][0]}"

    def read_record(self, i: int) -> tuple[Sample, list[bytes]]:
        """All questions about one image."""
        image = require_text(self._questions[self._images[i][0]]["imageId"])
        blob = self._folder.read(f"{image}.jpg")
        return one_image(
            self, f"{self.split}-{image}", blob, self._images[i], self._make_annotation, {"image_id": image}
        )

    def _make_annotation(self, id_: str) -> Annotated:
        question: dict[str, Any] = self._questions[id_]
        prompt = self._prompt.fill_prompt(question=require_text(question["question"]))
        return [(make_exchange(prompt, require_text(question[self._answer])), {"question_id": id_})]
