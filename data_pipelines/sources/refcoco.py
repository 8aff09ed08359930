"""RefCOCO, RefCOCO+, RefCOCOg: expressions that single out one object of a COCO train2014 image.

Two JSON layouts are read; boxes are `[x, y, width, height]` in pixels:
- the official refs as JSON, `[{"ref_id", "ann_id", "image_id", "split", "sentences": [{"sent_id", "sent"}]}]`, alone or
  under `"refs"`, with the official `instances.json` (COCO) beside it (github.com/lichengunc/refer);
- MDETR's `finetune_refcoco_train.json` and its like, COCO with one "image" per expression: `{"images": [{"id",
  "file_name", "width", "height", "caption"}], "annotations": [{"image_id", "bbox"}]}` (github.com/ashkamath/mdetr).

The official `refs(unc).p` is a pickle, which runs code when it is loaded, and is never opened.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from data_pipelines.errors import DataError
from data_pipelines.inputs.files import MediaFolder, read_json
from data_pipelines.media.limits import image_item
from data_pipelines.sample import Sample
from data_pipelines.sources import ListSource
from data_pipelines.sources.common.questions import Annotated, of_split, one_image, require_text, require_whole_number
from data_pipelines.sources.common.regions import (
    GROUNDING_PROMPT,
    REFERRING_PROMPT,
    RegionTask,
    box_from_xywh,
    check_size,
)
from data_pipelines.sources.common.samples import MALFORMED

CONVERT = (
    "python -c \"import json, pickle; json.dump(pickle.load(open('refs(unc).p', 'rb'), encoding='latin1'), "
    "open('refs_unc.json', 'w'))\""
)


class Region(NamedTuple):
    """An expression and the box of what it names; both may be missing or malformed until they are read."""

    id: Any
    phrase: Any
    xywh: Any


class RefCOCO(ListSource):
    """One sample per image, one annotation per expression.

    `file` is one of the two layouts above, `instances` the COCO file that the first one needs. `task`: `grounding` asks
    for the box of an expression, `referring` for an expression of a box, `mixed` draws one for each. `split` chooses
    among the refs; an MDETR file is one split. `limit` takes the first images only.
    """

    def __init__(
        self,
        *,
        file: str,
        images: str,
        instances: str | None = None,
        name: str = "refcoco",
        split: str = "train",
        task: str = "mixed",
        grounding_prompt: str = GROUNDING_PROMPT,
        referring_prompt: str = REFERRING_PROMPT,
        license: str = "",
        limit: int | None = None,
    ) -> None:
        self.name, self.split, self.license = name, split, license
        self._task = RegionTask(task, grounding_prompt, referring_prompt)
        self._folder = MediaFolder(images)
        self._images = list(_read_images(file, instances, split).values())[:limit]

    def __len__(self) -> int:
        return len(self._images)

    def name_record(self, i: int) -> str:
        """The name of record i in messages: its image."""
        return f"image {self._images[i][0].get('file_name')!r}"

    def read_record(self, i: int) -> tuple[Sample, list[bytes]]:
        """All expressions about one image."""
        image, regions = self._images[i]
        name = Path(require_text(image["file_name"])).name
        blob = self._folder.read(name)
        item = image_item(0, blob)
        check_size(
            (require_whole_number(image["width"]), require_whole_number(image["height"])), item.width, item.height
        )
        annotate = partial(self._make_annotation, width=item.width, height=item.height)
        return one_image(self, f"{self.split}-{Path(name).stem}", blob, regions, annotate, {"image": name})

    def _make_annotation(self, region: Region, width: int, height: int) -> Annotated:
        return self._task.make_annotation(region.id, region.phrase, box_from_xywh(region.xywh, width, height))


Images = dict[Any, tuple[dict[str, Any], list[Region]]]
"""COCO image entries with their regions, by image."""


def _read_images(file: str, instances: str | None, split: str) -> Images:
    if Path(file).suffix in (".p", ".pkl", ".pickle"):
        raise DataError(
            f"file: {file} is a pickle, which runs code when it is loaded. Convert it once, where you trust it: "
            f"{CONVERT}, or use an MDETR export (finetune_refcoco_train.json)"
        )
    data = read_json(file, "file")
    try:
        if isinstance(data, dict) and "annotations" in data and "refs" not in data:
            return _read_mdetr(data)
        if instances is None:
            raise DataError(f"file: {file} holds refs, whose boxes are in another file: instances=<instances.json>")
        refs = data["refs"] if isinstance(data, dict) else data
        return _read_refs(of_split(refs, "split", split), read_json(instances, "instances"))
    except MALFORMED as error:
        raise DataError(f"file: {file}: neither refs nor an MDETR file: {type(error).__name__}: {error}") from error


def _read_refs(refs: list[dict[str, Any]], instances: dict[str, Any]) -> Images:
    boxes = {annotation["id"]: annotation["bbox"] for annotation in instances["annotations"]}
    entries = {entry["id"]: entry for entry in instances["images"]}
    images: Images = {}
    for ref in refs:
        # A ref's own file_name carries the annotation's number, and no such file exists.
        _, regions = images.setdefault(ref["image_id"], (entries.get(ref["image_id"], {}), []))
        for sentence in ref["sentences"]:
            regions.append(Region(sentence["sent_id"], sentence["sent"], boxes.get(ref["ann_id"])))
    return images


def _read_mdetr(data: dict[str, Any]) -> Images:
    boxes: dict[Any, list[Any]] = {}
    for annotation in data["annotations"]:
        boxes.setdefault(annotation["image_id"], []).append(annotation["bbox"])
    images: Images = {}
    for entry in data["images"]:
        found = boxes.get(entry["id"], [])
        _, regions = images.setdefault(entry["file_name"], (entry, []))
        regions.append(Region(entry["id"], entry["caption"], found[0] if len(found) == 1 else found))
    return images
