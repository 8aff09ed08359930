"""FineVision: exchanges about the images of a row, with ratings of their quality.

Parquet with `images`, a list of {bytes, path}, `texts`, a list of {user, assistant}, and `<kind>_ratings`, 1 (bad) to 5
for every exchange, or null (huggingface.co/datasets/HuggingFaceM4/FineVision).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from data_pipelines.errors import BadSample, DataError
from data_pipelines.inputs.files import MediaFolder, find_files, open_parquet, parquet_rows
from data_pipelines.sample import Annotation, Media, Sample, Text, Turn
from data_pipelines.sources.common.samples import Record, make_sample, try_record
from data_pipelines.sources.messages import read_media

KINDS = ("relevance", "image_correspondence", "visual_dependency", "formatting")


class FineVision:
    """One sample per row, one part per parquet file. The images stand before the first question.

    An exchange with a rating below `min_rating` is left out and counted; one without a rating stays. Rows that lose all
    of them, and rows with more than `max_images`, are left out. `media` is the folder for images that are stored as
    paths without bytes.
    """

    name = "finevision"

    def __init__(
        self,
        *,
        folder: str,
        min_rating: int = 1,
        max_images: int | None = None,
        media: str | None = None,
        license: str = "",
        split: str = "train",
    ) -> None:
        if not 1 <= min_rating <= 5 or (max_images is not None and max_images < 0):
            raise DataError(f"min_rating {min_rating}, max_images {max_images}; allowed: 1 to 5, and 0 or more or null")
        self.license, self.split = license, split
        self.min_rating, self.max_images = min_rating, max_images
        self._media = MediaFolder(media, "media")
        self._files = find_files(folder, ".parquet")
        for path in self._files:
            if missing := {"images", "texts"} - set(names := open_parquet(path).schema_arrow.names):
                raise DataError(f"{path} has no column {', '.join(sorted(missing))}; it has {', '.join(names)}")

    @property
    def parts(self) -> int:
        """Number of parts: one for each file."""
        return len(self._files)

    def read(self, part: int) -> Iterator[Record]:
        """The rows of one file that have an exchange left. Raises `DataError` if the file cannot be read."""
        path, wanted = self._files[part], ("images", "texts", "source", *(f"{kind}_ratings" for kind in KINDS))
        known = open_parquet(path).schema_arrow.names
        for number, row in enumerate(parquet_rows(path, [name for name in wanted if name in known])):
            make = partial(self._make_sample, row, f"{path.stem}-{number:07d}")
            if (record := try_record(make, partial("{}, row {}".format, path.name, number))) is not None:
                yield record

    def _make_sample(self, row: Mapping[str, Any], key: str) -> tuple[Sample, list[bytes]] | None:
        """None: the row is left out."""
        images, texts = row["images"] or [], row["texts"]
        if self.max_images is not None and len(images) > self.max_images:
            return None
        if None in images:
            raise BadSample(f"image {images.index(None)} of its {len(images)} images is null")
        turns, skipped = list[Turn](), list[str]()
        for number, exchange in enumerate(texts):
            low = next((kind for kind in KINDS if self._is_low(row.get(f"{kind}_ratings"), number)), None)
            if low is not None:
                skipped.append(f"{low} rating below {self.min_rating}")
                continue
            shown = () if turns else tuple(Media(item=item) for item in range(len(images)))
            turns.append(Turn(role="user", parts=(*shown, Text(text=exchange["user"]))))
            turns.append(Turn(role="assistant", parts=(Text(text=exchange["assistant"]),)))
        if texts and not turns:
            return None
        if not turns or not any(turn.text.strip() for turn in turns if turn.role == "assistant"):
            raise BadSample("no answer")
        about = {name: value for name, value in (("source", row.get("source")), ("skipped", skipped)) if value}
        blobs = [read_media(item, self._media) for item in images]
        return make_sample(self, key, blobs, [Annotation(turns=tuple(turns))], about)

    def _is_low(self, ratings: list[int | None] | None, number: int) -> bool:
        rating = ratings[number] if ratings else None
        return rating is not None and rating < self.min_rating
