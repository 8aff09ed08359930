"""VQAv2 and OK-VQA: questions about COCO images with 10 human answers each.

Format: `questions`: `{"data_subtype": "train2014", "questions": [{"question_id", "image_id", "question"}]}`;
`annotations`: `{"annotations": [{"question_id", "answers": [{"answer"}], "multiple_choice_answer"}]}`, where OK-VQA has
no `multiple_choice_answer` (visualqa.org/download.html, okvqa.allenai.org).
"""

from __future__ import annotations

from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.inputs.files import MediaFolder, read_json, read_list
from data_pipelines.sample import Sample
from data_pipelines.sources import ListSource
from data_pipelines.sources.common.questions import (
    ANSWERS,
    Annotated,
    Prompt,
    group_records,
    make_answers,
    one_image,
    require_text,
    require_whole_number,
)
from data_pipelines.sources.common.samples import check_choice, make_exchange


class VQA(ListSource):
    """One sample per image, one annotation per question; all human answers stand in `meta["annotations"]`.

    `answers`: `majority` trains the published `multiple_choice_answer`, or the most frequent answer where there is
    none; `all_weighted` makes every different answer an annotation whose weight is the share of people who gave it, as
    BLIP trains (salesforce/LAVIS, coco_vqa_datasets.py). `prompt` is the user turn. `split` must begin the file's
    `data_subtype`. `limit` takes the first images only.
    """

    def __init__(
        self,
        *,
        questions: str,
        annotations: str,
        images: str,
        name: str = "vqav2",
        split: str = "train",
        answers: str = "majority",
        prompt: str = "{question}",
        license: str = "CC-BY-4.0",
        limit: int | None = None,
    ) -> None:
        self.name, self.split, self.license = name, split, license
        self._answers = check_choice("answers", answers, ANSWERS)
        self._prompt = Prompt(prompt, "prompt", needs=["question"])
        self._folder = MediaFolder(images)
        self._subset, records = _read_questions(questions, split)
        self._images = group_records(records, "image_id")[:limit]
        self._answered = _by_question(annotations)

    def __len__(self) -> int:
        return len(self._images)

    def name_record(self, i: int) -> str:
        """The name of record i in messages: its image."""
        first = self._images[i][0]
        return f"image {first.get('image_id') if isinstance(first, dict) else i!r}"

    def read_record(self, i: int) -> tuple[Sample, list[bytes]]:
        """All questions about one image."""
        image = require_whole_number(self._images[i][0]["image_id"])
        # COCO 2014 and 2017 hold the same images under two names.
        blob = self._folder.read(f"COCO_{self._subset}_{image:012d}.jpg", f"{image:012d}.jpg")
        key, meta = f"{self._subset}-{image:012d}", {"image_id": image}
        return one_image(self, key, blob, self._images[i], self._make_annotation, meta)

    def _make_annotation(self, question: dict[str, Any]) -> Annotated:
        answers, best = self._answered[question["question_id"]]
        prompt = self._prompt.fill_prompt(question=require_text(question["question"]))
        note = {"question_id": question["question_id"]}
        if best is not None and self._answers == "majority":
            return [(make_exchange(prompt, require_text(best)), {**note, "answers": list(answers)})]
        return make_answers(prompt, answers, self._answers, note)


def _read_questions(path: str, split: str) -> tuple[str, list[Any]]:
    """The `data_subtype` and the questions."""
    data = read_json(path, "questions")
    if not isinstance(data, dict) or not isinstance(data.get("questions"), list):
        raise DataError(f"questions: {path}: not VQA questions: expected a list under 'questions'")
    subset = data.get("data_subtype", f"{split}2014")
    if not isinstance(subset, str) or not subset.startswith(split):
        raise DataError(f"split: got {split!r}; {path} holds data_subtype {subset!r}")
    return subset, data["questions"]


def _by_question(path: str) -> dict[Any, tuple[tuple[str, ...], str | None]]:
    """Human answers and the published best one, by question; what else a record holds is dropped to save memory."""
    records = read_list(path, "annotations", "annotations")
    try:
        return {
            record["question_id"]: (
                tuple(answer["answer"] for answer in record["answers"]),
                record.get("multiple_choice_answer"),
            )
            for record in records
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"annotations: {path}: not VQA annotations: {type(error).__name__}: {error}") from error
