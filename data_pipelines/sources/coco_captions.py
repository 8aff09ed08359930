"""COCO captions: the official annotations, and the Karpathy split, which exists for Flickr8k and Flickr30k, too.

Official: `{"images": [{"id", "file_name", ...}], "annotations": [{"image_id", "caption", ...}]}` (cocodataset.org,
format-data). Karpathy: `{"images": [{"filepath"?, "filename", "split", "sentences": [{"raw"}], "cocoid"?, "imgid"}]}`
(cs.stanford.edu/people/karpathy/deepimagesent).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from data_pipelines.errors import EMPTY, BadSample, DataError
from data_pipelines.inputs.files import MediaFolder, read_json
from data_pipelines.sample import Sample
from data_pipelines.shards.members import caption_annotation
from data_pipelines.sources import ListSource
from data_pipelines.sources.common.samples import MALFORMED, check_choice, make_sample

CAPTIONS = ("all", "first")
KARPATHY_SPLITS = ("train", "val", "test")


class Image(NamedTuple):
    """An image's number, its path below the image folder, and its captions."""

    number: int
    path: str
    captions: tuple[Any, ...]  # as the file has them


class _Captions(ListSource):
    """One sample per image; each caption, or the first alone, is an independent annotation."""

    def __init__(self, *, found: list[Image], images: str, captions: str) -> None:
        self._first = check_choice("captions", captions, CAPTIONS) == "first"
        self._found, self._images = found, MediaFolder(images)

    def __len__(self) -> int:
        return len(self._found)

    def name_record(self, i: int) -> str:
        """The name of record i in messages: the path of the image."""
        return f"image {self._found[i].path!r}"

    def read_record(self, i: int) -> tuple[Sample, list[bytes]]:
        """Image i of the file."""
        number, path, found = self._found[i]
        captions = [text for caption in found if isinstance(caption, str) and (text := caption.strip())]
        if not captions:
            raise BadSample("has no caption", kind=EMPTY)
        blob = self._images.read(path)
        annotations = [caption_annotation(caption) for caption in captions[: 1 if self._first else None]]
        about: dict[str, Any] = {"id": number, "images": [path]}
        if lacking := len(found) - len(captions):
            about["skipped"] = ["empty caption"] * lacking
        return make_sample(self, f"{number:012d}", [blob], annotations, about)


class CocoCaptions(_Captions):
    """The official annotations. `images` is the folder of the split's pictures."""

    def __init__(
        self,
        *,
        file: str,
        images: str,
        captions: str = "all",
        name: str = "coco_captions",
        license: str = "",
        split: str = "train",
    ) -> None:
        self.name, self.license, self.split = name, license, split
        super().__init__(found=_read_official(Path(file)), images=images, captions=captions)


class KarpathyCaptions(_Captions):
    """The Karpathy split. `images` is the folder that holds `train2014` and `val2014`.

    `restval`, the images of val2014 that are neither in val nor in test, joins train unless it is left out.
    """

    def __init__(
        self,
        *,
        file: str,
        images: str,
        split: str = "train",
        restval: bool = True,
        captions: str = "all",
        name: str = "coco_karpathy",
        license: str = "",
    ) -> None:
        self.name, self.license, self.split = name, license, check_choice("split", split, KARPATHY_SPLITS)
        splits = ("train", "restval") if split == "train" and restval else (split,)
        super().__init__(found=_read_karpathy(Path(file), splits), images=images, captions=captions)


def _read_official(path: Path) -> list[Image]:
    data = read_json(path)
    try:
        captions: dict[int, list[Any]] = {image["id"]: [] for image in data["images"]}
        for annotation in data["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"])
        return [Image(int(i["id"]), _require_path(i["file_name"]), tuple(captions[i["id"]])) for i in data["images"]]
    except MALFORMED as error:
        raise _layout_error(path, "the official captions", error) from error


def _read_karpathy(path: Path, splits: tuple[str, ...]) -> list[Image]:
    data = read_json(path)
    try:
        return [_karpathy_image(image) for image in data["images"] if image["split"] in splits]
    except MALFORMED as error:
        raise _layout_error(path, "a Karpathy split", error) from error


def _karpathy_image(image: dict[str, Any]) -> Image:
    path = "/".join(filter(None, (image.get("filepath"), _require_path(image["filename"]))))
    number = int(image["cocoid"] if "cocoid" in image else image["imgid"])
    return Image(number, path, tuple(sentence["raw"] for sentence in image["sentences"]))


def _require_path(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"file name {value!r}")
    return value


def _layout_error(path: Path, what: str, error: Exception) -> DataError:
    return DataError(f"file: {path} is not laid out as {what}: {type(error).__name__}: {error}")
