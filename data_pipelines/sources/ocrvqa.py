"""OCR-VQA: questions about book covers.

Format: `{book id: {"questions": [str], "answers": [str], "split": 1 | 2 | 3, "imageURL"}}`; the official script saves
an image as `<book id>` with the extension of its URL, LLaVA keeps all as `.jpg` (ocr-vqa.github.io).
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from data_pipelines.errors import BadSample, DataError
from data_pipelines.inputs.files import MediaFolder, read_json
from data_pipelines.sample import Sample
from data_pipelines.sources import ListSource
from data_pipelines.sources.common.questions import Annotated, Prompt, of_split, one_image, require_text, require_texts
from data_pipelines.sources.common.samples import check_choice, make_exchange

SPLITS = {"train": 1, "val": 2, "test": 3}


class OCRVQA(ListSource):
    """One sample per book, one annotation per question.

    `prompt` is the user turn. `limit` takes the first books only.
    """

    name = "ocrvqa"

    def __init__(
        self,
        *,
        file: str,
        images: str,
        split: str = "train",
        prompt: str = "{question}",
        license: str = "",
        limit: int | None = None,
    ) -> None:
        self.split, self.license = check_choice("split", split, tuple(SPLITS)), license
        self._prompt = Prompt(prompt, "prompt", needs=["question"])
        self._folder = MediaFolder(images)
        books = read_json(file, "file")
        if not isinstance(books, dict):
            raise DataError(f"file: {file} holds a {type(books).__name__}; expected books by their id")
        named = ({**book, "id": id_} for id_, book in books.items() if isinstance(book, dict))
        self._books = of_split(named, "split", SPLITS[split])[:limit]

    def __len__(self) -> int:
        return len(self._books)

    def name_record(self, i: int) -> str:
        """The name of record i in messages: its book."""
        return f"book {self._books[i]['id']!r}"

    def read_record(self, i: int) -> tuple[Sample, list[bytes]]:
        """All questions about one book."""
        book = self._books[i]
        extension = PurePosixPath(str(book.get("imageURL", ""))).suffix
        blob = self._folder.read(f"{book['id']}.jpg", *([f"{book['id']}{extension}"] if extension else []))
        questions, answers = require_texts(book["questions"]), require_texts(book["answers"])
        if len(questions) != len(answers):
            raise BadSample(f"{len(questions)} questions, {len(answers)} answers")
        pairs = list(enumerate(zip(questions, answers, strict=True)))
        return one_image(
            self, f"{self.split}-{book['id']}", blob, pairs, self._make_annotation, {"image_id": book["id"]}
        )

    def _make_annotation(self, pair: tuple[int, tuple[Any, Any]]) -> Annotated:
        number, (question, answer) = pair
        prompt = self._prompt.fill_prompt(question=require_text(question))
        return [(make_exchange(prompt, require_text(answer)), {"question_id": number})]
