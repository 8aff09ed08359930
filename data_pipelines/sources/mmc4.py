"""Multimodal C4: web pages as sentences and images, each image with the sentence that it matches best.

JSON Lines, one document a line: `text_list`, `image_info` (`image_name`, `raw_url`, `matched_text_index`,
`matched_sim`), `similarity_matrix`, `url` (github.com/allenai/mmc4; the images are downloaded by their names).
"""

from __future__ import annotations

import base64
import io
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

from data_pipelines.errors import BadSample, DataError
from data_pipelines.inputs.files import MediaFolder, find_files, parse_json
from data_pipelines.inputs.records import MAX_LINE
from data_pipelines.media.video import MAX_BYTES
from data_pipelines.sample import Sample
from data_pipelines.shards.members import check_end, is_plain
from data_pipelines.sources.common.documents import make_document, read_image
from data_pipelines.sources.common.samples import Record, make_sample, try_record

Read = Callable[[str], bytes]
UNREADABLE = (OSError, EOFError, zipfile.BadZipFile, zlib.error)
"""What reading a damaged zip can raise."""


class MMC4:
    """One sample per document, one part per file (`.jsonl` or `.jsonl.zip`); the document is one learned turn.

    The rule is OpenFlamingo's (open_flamingo/train/data.py, preprocess_interleaved; arXiv:2308.01390): an image stands
    before the sentence that it matches, unless its similarity is below `min_similarity` or its file smaller than
    `min_bytes`, and only the first `max_images` count. Images that are not there or do not read are left out, and
    documents with fewer than `min_images`, too. Its random drops and shifts are not made.

    `images` holds `<file>/<image_name>`, `<file>.tar` or `<image_name>`, where `<file>` is the name of the document's
    file up to its first dot; without `images`, the records' own `image_base64` is read.
    """

    name = "mmc4"

    def __init__(
        self,
        *,
        folder: str,
        images: str | None = None,
        min_similarity: float = 0.24,
        min_bytes: int = 11_000,
        max_images: int = 6,
        min_images: int = 1,
        license: str = "ODC-BY-1.0",
        split: str = "train",
    ) -> None:
        if not 1 <= min_images <= max_images:
            raise DataError(f"min_images {min_images}, max_images {max_images}; allowed: 1 <= min_images <= max_images")
        self.license, self.split = license, split
        self.min_similarity, self.min_bytes = min_similarity, min_bytes
        self.max_images, self.min_images = max_images, min_images
        self._images = MediaFolder(images, "images")
        self._files = find_files(folder, ".jsonl", ".jsonl.zip")

    @property
    def parts(self) -> int:
        """Number of parts: one for each file."""
        return len(self._files)

    def read(self, part: int) -> Iterator[Record]:
        """The documents of one file that have enough images. Raises `DataError` if the file cannot be read."""
        path = self._files[part]
        stem = path.name.partition(".")[0]
        try:
            with _open_lines(path) as file, self._open_images(stem) as image:
                number = -1
                while line := file.readline(MAX_LINE):
                    number += 1
                    make = partial(self._make_sample, line, f"{stem}-{number:06d}", image)
                    record = try_record(make, partial("{}, line {}".format, path.name, number + 1))
                    if isinstance(record, BadSample) or len(record[1]) >= self.min_images:
                        yield record
        except UNREADABLE as error:
            raise DataError(f"{path}: {error}") from error
        except tarfile.TarError as error:
            raise DataError(f"images: {stem}.tar: truncated or not an uncompressed tar: {error}") from error

    def _make_sample(self, line: bytes, key: str, image: Read) -> tuple[Sample, list[bytes]]:
        record = parse_json(line)
        shown: dict[int, list[bytes]] = {}
        for info in record["image_info"]:
            if sum(map(len, shown.values())) == self.max_images:
                break
            if info["matched_sim"] < self.min_similarity:
                continue
            if blob := read_image(partial(_read_image, info, image), self.min_bytes):
                shown.setdefault(info["matched_text_index"], []).append(blob)
        sentences = record["text_list"]
        if unknown := sorted(set(shown) - set(range(len(sentences)))):
            raise BadSample(f"images match the sentences {unknown}, but there are {len(sentences)}")
        pieces = [piece for number, text in enumerate(sentences) for piece in (*shown.get(number, ()), text)]
        annotation, blobs = make_document(pieces, joint=" ")
        return make_sample(self, key, blobs, [annotation], {"url": record.get("url")})

    @contextmanager
    def _open_images(self, stem: str) -> Iterator[Read]:
        """How the images of a file's documents are read by name."""
        folder = self._images.path
        if folder is not None and (folder / f"{stem}.tar").is_file():
            with tarfile.open(folder / f"{stem}.tar", "r:") as tar:
                yield _tar_reader(tar)
        elif folder is not None and (folder / stem).is_dir():
            yield MediaFolder(folder / stem, "images").read
        else:
            yield self._images.read


def _read_image(info: Mapping[str, Any], image: Read) -> bytes:
    if info.get("image_base64"):
        return base64.b64decode(info["image_base64"], validate=True)
    return image(info["image_name"])


def _tar_reader(tar: tarfile.TarFile) -> Read:
    places = {Path(info.name).name: info for info in tar if is_plain(info)}
    check_end(tar)

    def read_member(name: str) -> bytes:
        info = places.get(name)
        file = tar.extractfile(info) if info is not None and info.size <= MAX_BYTES else None
        if file is None:
            raise BadSample(f"no image {name!r}")
        return file.read()

    return read_member


@contextmanager
def _open_lines(path: Path) -> Iterator[IO[bytes]]:
    if path.suffix != ".zip":
        with open(path, "rb") as file:
            yield file
        return
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".jsonl")]
        if len(names) != 1:
            raise DataError(f"{path} holds {names}; expected one .jsonl")
        try:
            member = archive.open(names[0])
        except RuntimeError as error:  # encrypted, or compressed in a way that Python does not know
            raise DataError(f"{path}: {error}") from error
        with member:
            yield io.BufferedReader(member)  # type: ignore[type-var]
