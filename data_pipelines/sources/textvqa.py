"""TextVQA: questions about text in OpenImages pictures, with 10 human answers each.

Format: `{"data": [{"question_id", "image_id", "question", "answers": [str], "set_name"}]}`, images `<image_id>.jpg`;
OCR: `{"data": [{"image_id", "ocr_tokens": [str]}]}` (textvqa.org/dataset, textvqa.org/textcaps/dataset).
"""

from __future__ import annotations

from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.inputs.files import MediaFolder, read_list
from data_pipelines.sample import Sample
from data_pipelines.sources import ListSource
from data_pipelines.sources.common.questions import (
    ANSWERS,
    Annotated,
    Prompt,
    group_records,
    make_answers,
    of_split,
    one_image,
    require_text,
    require_texts,
)
from data_pipelines.sources.common.samples import check_choice


class TextVQA(ListSource):
    """One sample per image, one annotation per question; all human answers stand in `meta["annotations"]`.

    `answers`: `majority` or `all_weighted`, as for VQAv2. `prompt` is the user turn. Its field `{ocr}`, which needs the
    file `ocr`, is the image's OCR tokens with commas between, and its line is left out where there are none. `limit`
    takes the first images only.
    """

    name = "textvqa"

    def __init__(
        self,
        *,
        file: str,
        images: str,
        ocr: str | None = None,
        split: str = "train",
        answers: str = "majority",
        prompt: str = "{question}",
        license: str = "CC-BY-4.0",
        limit: int | None = None,
    ) -> None:
        self.split, self.license = split, license
        self._answers = check_choice("answers", answers, ANSWERS)
        self._prompt = Prompt(prompt, "prompt", needs=["question"], may=["ocr"])
        if ("ocr" in self._prompt.fields) != (ocr is not None):
            raise DataError(f"ocr: got {ocr!r} with prompt {prompt!r}; give the file and the field {{ocr}}, or neither")
        self._folder = MediaFolder(images)
        records = of_split(read_list(file, "file", "data"), "set_name", split)
        self._images = group_records(records, "image_id")[:limit]
        self._tokens = _read_ocr_tokens(ocr) if ocr is not None else {}

    def __len__(self) -> int:
        return len(self._images)

    def name_record(self, i: int) -> str:
        """The name of record i in messages: its image."""
        return f"image {self._images[i][0].get('image_id')!r}"

    def read_record(self, i: int) -> tuple[Sample, list[bytes]]:
        """All questions about one image."""
        image = require_text(self._images[i][0]["image_id"])
        blob = self._folder.read(f"{image}.jpg")
        meta = {"image_id": image}
        return one_image(self, f"{self.split}-{image}", blob, self._images[i], self._make_annotation, meta)

    def _make_annotation(self, question: dict[str, Any]) -> Annotated:
        tokens = ", ".join(self._tokens.get(question["image_id"], ()))
        prompt = self._prompt.fill_prompt(question=require_text(question["question"]), ocr=tokens)
        return make_answers(
            prompt, require_texts(question["answers"]), self._answers, {"question_id": question["question_id"]}
        )


def _read_ocr_tokens(path: str) -> dict[Any, list[str]]:
    """OCR tokens by image; their places and confidences are dropped to save memory."""
    records = read_list(path, "ocr", "data")
    try:
        return {
            record["image_id"]: [token for token in record["ocr_tokens"] if isinstance(token, str)]
            for record in records
        }
    except (KeyError, TypeError) as error:
        raise DataError(f"ocr: {path}: not Rosetta OCR: {type(error).__name__}: {error}") from error
