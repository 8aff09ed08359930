"""Field notes: a folder with a picture and a text of questions and answers beside it, a raw format of our own.

`heron.png` goes with `heron.txt`, in which every question is a line and its answer the next one:

    Q: Which bird is this?
    A: A grey heron.
"""

from __future__ import annotations

from pathlib import Path

from data_pipelines.errors import BadSample, DataError
from data_pipelines.inputs.files import MediaFolder
from data_pipelines.sample import Annotation, Sample
from data_pipelines.sources import ListSource
from data_pipelines.sources.common.samples import make_exchange, make_sample


class FieldNotes(ListSource):
    """One sample a picture, one annotation a question.

    Args:
        folder: of the pictures and texts.
        name, license, split: what the manifest says of the set.

    Raises:
        DataError: there is no text in the folder.
    """

    def __init__(self, *, folder: str, name: str = "my_notes", license: str = "", split: str = "train") -> None:
        self.name, self.license, self.split = name, license, split
        self.texts = sorted(Path(folder).glob("*.txt"))
        if not self.texts:
            raise DataError(f"folder: {folder} holds no notes; expected <name>.txt beside <name>.png")
        self.pictures = MediaFolder(folder)

    def __len__(self) -> int:
        return len(self.texts)

    def name_record(self, i: int) -> str:
        """The file."""
        return self.texts[i].name

    def read_record(self, i: int) -> tuple[Sample, list[bytes]]:
        """The questions about picture i. Raises `BadSample` for lines that are no questions and answers."""
        text = self.texts[i]
        lines = [line for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
        exchanges = [read_exchange(lines[n : n + 2]) for n in range(0, len(lines), 2)]
        return make_sample(self, text.stem, [self.pictures.read(f"{text.stem}.png")], exchanges)


def read_exchange(lines: list[str]) -> Annotation:
    """A question and its answer."""
    marks = [line.partition(":") for line in lines]
    if [mark for mark, _, _ in marks] != ["Q", "A"] or not all(words.strip() for _, _, words in marks):
        raise BadSample(f"expected a line Q: and a line A:, got {lines}")
    (_, _, question), (_, _, answer) = marks
    return make_exchange(question.strip(), answer.strip())
