"""A folder of pictures, each with its text in a file beside it: `cat.jpg` and `cat.txt` or `cat.json`.

A `.txt` is one text, or one a line (`lines`). A `.json` holds a text, a list of texts, or an object whose field
`text_field` is one of these. Of pictures without such files the sub-folder is the text (`label`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipelines.errors import EMPTY, BadSample, DataError
from data_pipelines.inputs.files import MediaFolder, parse_json
from data_pipelines.media.limits import FORMATS
from data_pipelines.sample import Sample
from data_pipelines.shards.members import caption_annotation
from data_pipelines.sources import ListSource
from data_pipelines.sources.common.layouts import hint_at_source
from data_pipelines.sources.common.samples import make_exchange, make_sample

READ = ("jpg", "jpeg", "png", "webp")
PICTURES = (*READ, "gif", "bmp", "tif", "tiff", "heic", "heif", "avif")
TEXTS = ("txt", "json")
OTHERS = {
    "tar": "source=img2dataset reads the tars of img2dataset",
    "parquet": "source=captions file=<one of them> and source=hf_messages read parquet",
    "jsonl": "source=captions file=<one of them> and source=messages read JSON Lines",
    "csv": "source=captions file=<one of them> reads CSV",
    "tsv": "source=captions file=<one of them> reads TSV",
}


class Folder(ListSource):
    """One sample per picture below `folder`, in the order of their paths; each text is an independent annotation.

    With `label`, for example "a photo of a {label}", the text is made of the first sub-folder's name instead. The texts
    answer `question`, which may be "". A picture without a text, or with a blank one, is left out and counted. Hidden
    files and folders are not looked at. `limit` takes the first pictures.

    Raises `DataError` for a folder without pictures, or whose pictures all lack a text.
    """

    def __init__(
        self,
        *,
        folder: str,
        question: str = "",
        lines: bool = False,
        text_field: str = "text",
        label: str | None = None,
        name: str = "folder",
        license: str = "",
        split: str = "train",
        limit: int | None = None,
    ) -> None:
        self.name, self.license, self.split, self.question = name, license, split, question
        self.lines, self.text_field, self.label = lines, text_field, label
        if label is not None and "{label}" not in label:
            raise DataError(
                f'label: got {label!r}; expected a text with {{label}}, for example "a photo of a {{label}}"'
            )
        self._files = MediaFolder(folder, "folder")
        found = sorted(_list_files(Path(folder)))
        texts = {path for path in found if _read_extension(path) in TEXTS}
        pictures = [path for path in found if _read_extension(path) in PICTURES]
        _require_pictures(Path(folder), pictures, found)
        alone = (
            sorted(texts - {text for path in pictures for text in _texts_beside(path, texts)}) if label is None else []
        )
        self._records = [*pictures, *(path for path in alone if not path.name.startswith("."))][:limit]
        self._texts = texts
        if label is None and texts == {*alone}:
            raise DataError(
                f"folder: none of the {len(pictures)} pictures of {folder} has a .txt or .json of its name beside it; "
                'label="{label}" takes the names of sub-folders as texts'
            )

    def __len__(self) -> int:
        return len(self._records)

    def name_record(self, i: int) -> str:
        """The file's path."""
        return str(self._records[i])

    def read_record(self, i: int) -> tuple[Sample, list[bytes]]:
        """Picture i of the folder."""
        path = self._records[i]
        if _read_extension(path) in TEXTS:
            raise BadSample(f"no picture {path.stem}.{'|'.join(READ)} beside it")
        if _read_extension(path) not in READ:
            raise BadSample(f"pictures of this kind are not read, {', '.join(FORMATS)} are; convert it", kind="image")
        texts = [text.strip() for text in self._read_texts(path)]
        if not any(texts):
            raise BadSample("its text is blank", kind=EMPTY)
        annotations = [
            make_exchange(self.question, text) if self.question else caption_annotation(text) for text in texts if text
        ]
        meta = {"images": [path.as_posix()]} | ({"label": path.parts[0]} if len(path.parts) > 1 else {})
        key = f"{i:07d}-{path.with_suffix('').as_posix()}"
        return make_sample(self, key, [self._files.read(str(path))], annotations, meta)

    def _read_texts(self, path: Path) -> list[str]:
        if self.label is not None:
            if len(path.parts) == 1:
                raise BadSample("lies in no sub-folder, whose name is the label")
            return [self.label.replace("{label}", path.parts[0])]
        beside = _texts_beside(path, self._texts)
        if not beside:
            raise BadSample(f"no {path.stem}.txt or {path.stem}.json beside it", kind=EMPTY)
        data = self._files.read(str(beside[0]))
        if _read_extension(beside[0]) == "json":
            return _list_texts(parse_json(data), self.text_field)
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadSample(f"{beside[0]} is not UTF-8: {error}") from error
        return text.splitlines() if self.lines else [text]


def _list_files(folder: Path) -> Iterator[Path]:
    """All files below a folder, as paths from it."""
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(root, name).relative_to(folder) for name in names if not name.startswith("."))


def _read_extension(path: Path) -> str:
    return path.suffix.lower().removeprefix(".")


def _texts_beside(path: Path, texts: set[Path]) -> list[Path]:
    """The text files of a picture, the one that is read first."""
    names = (path.with_suffix(f".{kind}") for extension in TEXTS for kind in (extension, extension.upper()))
    return [name for name in names if name in texts]


def _require_pictures(folder: Path, pictures: list[Path], found: list[Path]) -> None:
    if pictures:
        return
    kinds = {_read_extension(path) for path in found}
    hint = next((f"; {said}" for kind, said in OTHERS.items() if kind in kinds), "")
    raise DataError(f"folder: {folder} holds no pictures ({', '.join(READ)}){hint}")


def _list_texts(value: Any, field: str) -> list[str]:
    """The texts of a JSON file: one, a list, or those in the field of an object. Raises `BadSample`."""
    if isinstance(value, dict):
        if field not in value:
            hint = hint_at_source({"image": "", **value}, ("captions",))
            raise BadSample(f"its json has no field {field!r} (text_field); it has {', '.join(value) or 'none'}{hint}")
        value = value[field]
    texts = value if isinstance(value, list) else [value]
    if wrong := [text for text in texts if text is not None and not isinstance(text, str)]:
        raise BadSample(f"its json holds {wrong[0]!r:.80}; expected text")
    return [text or "" for text in texts]
