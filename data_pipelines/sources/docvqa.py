"""DocVQA (SP-DocVQA): questions about one page of a scanned document, each with one or more accepted answers.

Format: `{"data": [{"questionId", "question", "question_types", "image": "documents/<page>.png", "answers": [str],
"data_split"}]}` (rrc.cvc.uab.es/?ch=17).
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from data_pipelines.inputs.files import MediaFolder, read_list
from data_pipelines.sample import Sample
from data_pipelines.sources import ListSource
from data_pipelines.sources.common.questions import (
    Annotated,
    Prompt,
    group_records,
    of_split,
    one_image,
    require_text,
    require_texts,
)
from data_pipelines.sources.common.samples import make_exchange


class DocVQA(ListSource):
    """One sample per page, one annotation per question, trained on the first answer.

    All accepted answers and the question's types stand in `meta["annotations"]`. `prompt` is the user turn, `limit`
    takes the first pages only.
    """

    name = "docvqa"

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
        self.split, self.license = split, license
        self._prompt = Prompt(prompt, "prompt", needs=["question"])
        self._folder = MediaFolder(images)
        self._pages = group_records(of_split(read_list(file, "file", "data"), "data_split", split), "image")[:limit]

    def __len__(self) -> int:
        return len(self._pages)

    def name_record(self, i: int) -> str:
        """The name of record i in messages: its page."""
        return f"page {self._pages[i][0].get('image')!r}"

    def read_record(self, i: int) -> tuple[Sample, list[bytes]]:
        """All questions about one page."""
        image = require_text(self._pages[i][0]["image"])
        page = PurePosixPath(image)
        blob = self._folder.read(image, page.name)  # spdocvqa_images.tar.gz has no folder documents/
        return one_image(
            self, f"{self.split}-{page.stem}", blob, self._pages[i], self._make_annotation, {"image": image}
        )

    def _make_annotation(self, question: dict[str, Any]) -> Annotated:
        prompt = self._prompt.fill_prompt(question=require_text(question["question"]))
        answers, types = require_texts(question["answers"]), question.get("question_types") or []
        note = {"question_id": question["questionId"], "answers": answers, "types": types}
        return [(make_exchange(prompt, require_text(answers[0])), note)]
