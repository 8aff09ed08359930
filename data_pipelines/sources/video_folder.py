"""A folder of videos and a file of captions, questions or conversations about them.

Rows of a CSV, JSON or JSON Lines file: `video` (a path; without an extension, one of the extensions of videos is
tried) with `caption`, with `question` and `answer`, or with `conversations` as in LLaVA-Video-178K
(huggingface.co/datasets/lmms-lab/LLaVA-Video-178K: `[{"from": "human", "value": "<image>\\n..."}, ...]`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipelines.errors import BadSample
from data_pipelines.members import safe_key
from data_pipelines.sample import Annotation, Sample
from data_pipelines.sources import ListSource
from data_pipelines.sources.conversations import MediaFolder, dialogue, make_sample, question, read_records
from data_pipelines.video import DEMUXERS


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
        licence: str = "",
        split: str = "train",
        limit: int | None = None,
    ) -> None:
        self.name, self.licence, self.split = name, licence, split
        self._videos = MediaFolder(videos, "videos")
        self._rows: dict[str, list[Any]] = {}
        for number, row in enumerate(read_records(Path(file))[:limit]):
            path = row.get(column) if isinstance(row, Mapping) else None
            # A row without a path stands alone, under a name that no path has.
            self._rows.setdefault(path if isinstance(path, str) and path else f"\0{number}", []).append(row)
        self._paths = list(self._rows)
        self._column = column

    def __len__(self) -> int:
        return len(self._paths)

    def label(self, i: int) -> str:
        """The video's path, or the row without one."""
        path = self._paths[i]
        return f"row {path[1:]}" if path.startswith("\0") else f"video {path!r}"

    def record(self, i: int) -> tuple[Sample, list[bytes]]:
        """All rows of one video."""
        path = self._paths[i]
        rows = self._rows[path]
        if isinstance(rows[0], BadSample):
            raise rows[0]
        if path.startswith("\0"):
            raise BadSample(f"names no video ({self._column}=<path>): {str(rows[0])[:80]!r}")
        annotations = [_annotation(row) for row in rows]
        return make_sample(
            safe_key(f"{i:07d}-{Path(path).stem}"),
            [self._read(path)],
            annotations,
            source=self.name,
            licence=self.licence,
            meta={"video": path},
        )

    def _read(self, path: str) -> bytes:
        folder = self._videos.path
        if folder is not None and not Path(path).suffix:
            found = (extension for extension in DEMUXERS if (folder / f"{path}.{extension}").is_file())
            path = f"{path}.{next(found, 'mp4')}"
        return self._videos.read(path)


def _annotation(row: Mapping[str, Any]) -> Annotation:
    if row.get("conversations"):
        return dialogue(row["conversations"], videos=1)
    answer = row["answer"] if row.get("question") else row["caption"]
    if not isinstance(answer, str) or not answer.strip():
        raise BadSample("its answer or caption is empty")
    return question((row.get("question") or "").strip(), answer.strip())
