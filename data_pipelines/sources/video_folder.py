"""A folder of videos and a file of captions, questions or conversations about them.

Rows of a CSV, JSON, JSON Lines or parquet file: `video` (a path; without an extension, one of the extensions of videos
is tried) with `caption`, with `question` and `answer`, or with `conversations` as in LLaVA-Video-178K
(huggingface.co/datasets/lmms-lab/LLaVA-Video-178K: `[{"from": "human", "value": "<image>\\n..."}, ...]`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipelines.errors import BadSample
from data_pipelines.inputs.files import MediaFolder
from data_pipelines.inputs.records import describe_record, read_records
from data_pipelines.media.video import DEMUXERS
from data_pipelines.sample import Annotation, Sample
from data_pipelines.shards.members import caption_annotation
from data_pipelines.sources import ListSource
from data_pipelines.sources.common.conversations import make_dialogue
from data_pipelines.sources.common.layouts import hint_at_source
from data_pipelines.sources.common.samples import make_exchange, make_sample


class VideoFolder(ListSource):
    """One sample per video; its rows are independent annotations, in the order of the file.

    `videos` is the folder that the rows' paths start from. `column` names the field of the path. A row that cannot be
    used makes its video's sample unusable.
    """

    def __init__(
        self,
        *,
        file: str,
        videos: str,
        column: str = "video",
        name: str = "video_folder",
        license: str = "",
        split: str = "train",
        limit: int | None = None,
    ) -> None:
        self.name, self.license, self.split = name, license, split
        self._videos = MediaFolder(videos, "videos")
        self._column, self._records = column, read_records(file)
        groups: dict[str, list[int]] = {}
        for number in range(len(self._records))[:limit]:
            # A row without a path stands alone, under a name that no path has.
            groups.setdefault(self._path_of_row(number) or f"\0{number}", []).append(number)
        self._rows = list(groups.values())

    def __len__(self) -> int:
        return len(self._rows)

    def name_record(self, i: int) -> str:
        """The video's path, or the row without one."""
        first = self._rows[i][0]
        path = self._path_of_row(first)
        return f"video {path!r}" if path else describe_record(self._records, first)

    def read_record(self, i: int) -> tuple[Sample, list[bytes]]:
        """All rows of one video."""
        rows = [self._records[number] for number in self._rows[i]]
        path = self._path_of_row(self._rows[i][0])
        if path is None:
            hint = hint_at_source(rows[0], ("video_folder",))
            raise BadSample(f"names no video ({self._column}=<path>): {str(rows[0])[:80]!r}{hint}")
        annotations = [_make_annotation(row) for row in rows]
        return make_sample(self, f"{i:07d}-{Path(path).stem}", [self._read_video(path)], annotations, {"video": path})

    def _path_of_row(self, number: int) -> str | None:
        """The path in a row; None without one."""
        try:
            row = self._records[number]
        except BadSample:
            return None
        path = row.get(self._column) if isinstance(row, Mapping) else None
        return path if isinstance(path, str) and path else None

    def _read_video(self, path: str) -> bytes:
        folder = self._videos.path
        if folder is not None and not Path(path).suffix:
            found = (extension for extension in DEMUXERS if (folder / f"{path}.{extension}").is_file())
            path = f"{path}.{next(found, 'mp4')}"
        return self._videos.read(path)


def _make_annotation(row: Mapping[str, Any]) -> Annotation:
    if row.get("conversations"):
        return make_dialogue(row, videos=1)
    ask = (row.get("question") or "").strip()
    answer = row["answer"] if ask else row["caption"]
    if not isinstance(answer, str) or not answer.strip():
        raise BadSample("its answer or caption is empty")
    return make_exchange(ask, answer.strip()) if ask else caption_annotation(answer.strip())
