"""OBELICS: web pages as interleaved images and texts.

Parquet with `images` and `texts`, lists of equal length of which exactly one has a value at every place; images are
URLs (huggingface.co/datasets/HuggingFaceM4/OBELICS, CC BY 4.0) or, in sets that carry them, bytes or {bytes, path}.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from data_pipelines.errors import BadSample, DataError
from data_pipelines.inputs.files import MediaFolder, find_files, open_parquet, parquet_rows
from data_pipelines.sample import Sample
from data_pipelines.sources.common.documents import make_document, read_image
from data_pipelines.sources.common.samples import Record, check_choice, make_sample, try_record

NAMING = ("sha256", "md5", "basename")
EXTENSIONS = ("", ".jpg", ".jpeg", ".png", ".webp")
COLUMNS = ("images", "texts", "general_metadata")


class Obelics:
    """One sample per document, one part per parquet file; the document is one learned turn.

    `images` is the folder of the downloaded images, `naming` how a file is named after its URL: the hash of the URL
    (`sha256`, `md5`) or the last piece of its path (`basename`), with or without an extension. Images that are not
    there or do not read are left out, images beyond `max_images` and documents with fewer than `min_images`, too.
    """

    name = "obelics"

    def __init__(
        self,
        *,
        folder: str,
        images: str | None = None,
        naming: str = "sha256",
        max_images: int | None = None,
        min_images: int = 1,
        license: str = "CC-BY-4.0",
        split: str = "train",
    ) -> None:
        check_choice("naming", naming, NAMING)
        if min_images < 0 or (max_images is not None and max_images < max(min_images, 1)):
            raise DataError(f"min_images {min_images}, max_images {max_images}; allowed: 0 <= min_images <= max_images")
        self.license, self.split, self.naming = license, split, naming
        self.max_images, self.min_images = max_images, min_images
        self._images = MediaFolder(images, "images")
        self._files = find_files(folder, ".parquet")

    @property
    def parts(self) -> int:
        """Number of parts: one for each file."""
        return len(self._files)

    def read(self, part: int) -> Iterator[Record]:
        """The documents of one file that have enough images. Raises `DataError` if the file cannot be read."""
        path = self._files[part]
        known = open_parquet(path).schema_arrow.names
        for number, row in enumerate(parquet_rows(path, [name for name in COLUMNS if name in known])):
            make = partial(self._make_sample, row, f"{path.stem}-{number:07d}")
            record = try_record(make, partial("{}, row {}".format, path.name, number))
            if isinstance(record, BadSample) or len(record[1]) >= self.min_images:
                yield record

    def _make_sample(self, row: Mapping[str, Any], key: str) -> tuple[Sample, list[bytes]]:
        images, texts = row["images"], row["texts"]
        if len(images) != len(texts) or any((a is None) == (b is None) for a, b in zip(images, texts, strict=False)):
            raise BadSample(f"{len(images)} images and {len(texts)} texts that do not complete each other")
        pieces: list[str | bytes] = []
        left = len(images) if self.max_images is None else self.max_images
        for image, text in zip(images, texts, strict=True):
            if image is None:
                pieces.append(text)
            elif left and (blob := read_image(partial(self._read_image, image))):
                pieces.append(blob)
                left -= 1
        annotation, blobs = make_document(pieces, joint="\n\n")
        if not any(piece.strip() for piece in pieces if isinstance(piece, str)):
            raise BadSample("no text")
        return make_sample(self, key, blobs, [annotation], {"general_metadata": row.get("general_metadata")})

    def _read_image(self, image: Any) -> bytes:
        if isinstance(image, Mapping):
            image = image["bytes"] or image["path"]
        if isinstance(image, bytes):
            return image
        name = file_name(image, self.naming)
        folder = self._images.path or Path()
        found = next((name + end for end in EXTENSIONS if (folder / (name + end)).is_file()), name)
        return self._images.read(found)


def file_name(url: str, naming: str) -> str:
    """What the file of a downloaded image is called, without an extension of its own."""
    if naming == "basename":
        return unquote(urlsplit(url).path).rpartition("/")[2] or "_"
    return hashlib.new(naming, url.encode(), usedforsecurity=False).hexdigest()
