"""Videos with captions, questions and LLaVA-Video conversations."""

from __future__ import annotations

import json

import pytest

from data_pipelines.errors import BadSample, DataError
from data_pipelines.sample import Media, Text
from data_pipelines.sources.video_folder import VideoFolder
from tests.support.videos import video


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "videos" / "a").mkdir(parents=True)
    (tmp_path / "videos" / "a" / "1.mp4").write_bytes(video(3))
    (tmp_path / "videos" / "2.webm").write_bytes(video(4, codec="libvpx", container="webm"))
    return tmp_path


def read(folder, rows, name="rows.json", **options):
    text = "".join(json.dumps(row) + "\n" for row in rows) if name.endswith("l") else json.dumps(rows)
    (folder / name).write_text(text if isinstance(rows, list) else rows)
    return list(VideoFolder(file=str(folder / name), videos=str(folder / "videos"), **options))


def test_rows_of_a_video_are_annotations_of_one_sample(folder):
    text = 'videoid,caption,question,answer\na/1.mp4,"A ""grey"" video, brighter",,\n2,,Which?,this\na/1.mp4,,How?,so\n'
    (first, blobs), (second, _) = read(folder, text, "rows.csv", column="videoid")
    assert first.key == "0000000-1" and first.meta == {"video": "a/1.mp4"} and len(blobs) == 1
    assert (first.media[0].name, first.media[0].kind, first.media[0].frames) == ("0.mp4", "video", 3)
    assert [[turn.parts for turn in annotation.turns] for annotation in first.annotations] == [
        [(Media(item=0),), (Text(text='A "grey" video, brighter'),)],
        [(Media(item=0), Text(text="How?")), (Text(text="so"),)],
    ]
    assert second.media[0].name == "0.webm" and second.annotations[0].turns[0].parts[1] == Text(text="Which?")


@pytest.mark.parametrize("tag", ["<image>\n", "<video>\n", ""])
def test_llava_video_conversations(folder, tag):
    talk = [{"from": "human", "value": f"{tag}What?"}, {"from": "gpt", "value": "<image> no tag"}]
    row = {"id": "1", "data_source": "0_30_s", "video": "a/1.mp4", "conversations": talk}
    ((sample, _),) = read(folder, [row], "rows.jsonl")
    ask, answer = sample.annotations[0].turns
    assert ask.parts == (Media(item=0), Text(text="What?")) and answer.text == "<image> no tag"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"video": "a/9.mp4", "caption": "x"}, "video 'a/9.mp4': .*9.mp4: No such file"),
        ({"video": "../rows.json", "caption": "x"}, "leaves the folder"),
        ({"video": "/etc/passwd", "caption": "x"}, "leaves the folder"),
        ({"video": "a/1.mp4", "caption": " "}, "video 'a/1.mp4': its answer or caption is empty"),
        ({"video": "a/1.mp4"}, "malformed: KeyError: 'caption'"),
        ({"caption": "x"}, r"record 0: names no video \(video=<path>\)"),
        ({"video": "a/1.mp4", "conversations": [{"from": "human", "value": "<video><video>"}]}, "2 <video> tags .* 1"),
        ({"video": "a/1.mp4", "conversations": [{"from": "bot", "value": "x"}]}, "turn of 'bot'; allowed: human"),
        ({"video": "a/1.mp4", "conversations": [{"from": "gpt", "value": "x"}]}, "no turn of a user"),
    ],
)
def test_unusable_rows(folder, row, reason):
    bad, (good, _) = read(folder, [row, {"video": "2.webm", "caption": "fine"}])
    assert good.meta == {"video": "2.webm"}
    with pytest.raises(BadSample, match=reason):
        raise bad


def test_files_are_checked_first(folder):
    with pytest.raises(DataError, match="videos: no such folder"):
        VideoFolder(file="x.json", videos=str(folder / "none"))
    with pytest.raises(DataError, match=r"rows.txt; allowed: .json, .jsonl, .ndjson, .csv, .tsv, .parquet"):
        read(folder, [], "rows.txt")
    with pytest.raises(DataError, match="holds a dict; expected a list"):
        (folder / "x.json").write_text("{}")
        VideoFolder(file=str(folder / "x.json"), videos=str(folder / "videos"))
