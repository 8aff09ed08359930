"""What lint finds, and what it says about it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from data_pipelines.index import index_folder
from data_pipelines.lint import find_problems, sample_problems
from data_pipelines.lint import main as lint
from data_pipelines.sample import Annotation, Box, Media, Text, Turn
from data_pipelines.shards.tar_writer import ShardWriter

ANSWER = Turn(role="assistant", parts=(Text(text="yes"),))


def _question(*parts) -> Turn:
    return Turn(role="user", parts=(Media(item=0), *parts))


def _found(sample, **changes) -> list[tuple[str, str]]:
    record, blobs = sample(0)
    return [(problem.kind, problem.text) for problem in sample_problems(replace(record, **changes), blobs)]


def _annotated(sample, *turns, **changes) -> list[tuple[str, str]]:
    return _found(sample, annotations=(Annotation(turns=turns, **changes),))


@pytest.mark.parametrize(
    ("xyxy", "wrong"),
    [
        ((0, 0, 1, 1), False), ((0.2, 0.3, 0.4, 0.5), False), ((0.5, 0, 0.5, 1), True), ((0.5, 0, 0.4, 1), True),
        ((0, 0.5, 1, 0.2), True), ((-0.1, 0, 1, 1), True), ((0, 0, 1.5, 1), True), ((0, 0, float("nan"), 1), True),
    ],
)  # fmt: skip
def test_boxes(sample, xyxy, wrong):
    found = _annotated(sample, _question(Text(text="where?")), Turn(role="assistant", parts=(Box(item=0, xyxy=xyxy),)))
    assert [kind for kind, _ in found] == ["box"] * wrong
    assert not wrong or "annotation 0: turn 1: box" in found[0][1]


def test_weights(sample):
    fine = Turn(role="assistant", parts=(Text(text="yes", weights=((0, 3, 2.0), (1, 2, 0.0))),), weight=0.0)
    assert _annotated(sample, _question(), fine, weight=0.5) == []
    segments = Turn(role="assistant", parts=(Text(text="yes", weights=((0, 4, 1.0), (0, 3, -1.0), (2, 2, 1.0))),))
    assert [kind for kind, _ in _annotated(sample, _question(), segments)] == ["weight"] * 3
    assert _annotated(sample, _question(), ANSWER, weight=-1.0) == [("weight", "annotation 0: weight -1.0")]
    assert _annotated(sample, _question(), replace(ANSWER, weight=float("inf")))[0][0] == "weight"
    assert _found(sample, weight=-0.5) == [("weight", "sample weight -0.5")]


def test_questions_and_answers(sample):
    empty = Turn(role="user", parts=(Text(text=" \n"),))
    assert _annotated(sample, _question(), ANSWER, empty, ANSWER) == [
        ("empty question", "annotation 0: turn 2: neither text nor media")
    ]
    assert _annotated(sample, _question())[0] == ("no answer", "annotation 0: no answer")
    blank = Turn(role="assistant", parts=(Text(text=""),))
    assert _annotated(sample, _question(), ANSWER, rejected=blank)[0] == (
        "empty answer", "annotation 0: turn 2: empty answer"
    )  # fmt: skip


def test_source_and_license_are_warnings(tmp_path, sample, capsys):
    record, blobs = sample(0)
    for name, about in (("none", {}), ("known", {"source": "s", "license": "MIT"})):
        with ShardWriter(tmp_path / name, **about) as writer:
            for key in ("sample-000", "sample-001"):
                writer.write_sample(replace(record, key=key, source="", license=""), blobs)
        assert lint([f"folder={tmp_path / name}"]) == 0
    out = capsys.readouterr().out
    assert "warning: " in out and "shard-000000.tar, key 'sample-000': unknown license" in out
    assert "sample-001" not in out and "2  unknown license (warning)" in out
    assert out.count("unknown source (warning)") == 1 and out.count("no problems") == 2


def test_duplicate_members_and_truncation_name_the_shard(tmp_path, tar, picture):
    tar(tmp_path / "0.tar", [("a.png", picture()), ("a.txt", b"x")])
    tar(tmp_path / "1.tar", [("b.png", picture()), ("b.txt", b"x")])
    index_folder(tmp_path, source="s", license="MIT")
    assert list(find_problems(tmp_path)) == []
    tar(tmp_path / "1.tar", [("b.png", picture()), ("b.png", picture())])
    found = [problem.text for problem in find_problems(tmp_path)]
    assert any("1.tar: sample 'b': member 'png' comes twice" in text for text in found)
    assert any("1.tar: sha256" in text for text in found) and any("key 'b': member" in text for text in found)
    (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:600])
    assert any("0.tar: truncated" in problem.text for problem in find_problems(tmp_path))


def test_counts_by_kind_and_the_limit_of_each(tmp_path, sample, capsys):
    record, blobs = sample(0)
    blank = Turn(role="assistant", parts=(Text(text=""),))
    with ShardWriter(tmp_path / "set") as writer:
        for i in range(5):
            tagged = Turn(role="user", parts=(Media(item=0), Text(text="<image>?")))
            turns = (tagged, blank) if i else (tagged, ANSWER)
            writer.write_sample(replace(record, key=f"k{i}", annotations=(Annotation(turns=turns),)), blobs)
    assert lint([f"folder={tmp_path / 'set'}", "max_problems=2"]) == 1
    out = capsys.readouterr().out
    assert out.count("empty answer\n") == 2 + 1 + 1 and "... and more of this kind: empty answer" in out
    assert "         5  placeholder\n         4  empty answer\n" in out and out.endswith("set: 9 problems\n")


def test_any_number_of_processes_says_the_same(shard_set):
    folder = shard_set(count=90)
    data = bytearray((folder / "shard-000003.tar").read_bytes())
    data[900] ^= 1
    (folder / "shard-000003.tar").write_bytes(data)
    one = list(find_problems(folder, workers=1))
    assert one and one == list(find_problems(folder, workers=2))


def test_a_view_is_checked_in_its_own_samples(tmp_path, shard_set, capsys):
    from data_pipelines.filter import main as filter_command

    folder = shard_set()
    command = [f"folder={folder}", f"output={tmp_path / 'view'}", "filter=[duplicates]"]
    assert filter_command(command) == 0 and lint([f"folder={tmp_path / 'view'}"]) == 0
    data = json.loads((tmp_path / "view" / "manifest.json").read_text())
    data["shards"][0]["sha256"] = "0" * 64
    (tmp_path / "view" / "manifest.json").write_text(json.dumps(data))
    assert lint([f"folder={tmp_path / 'view'}"]) == 1
    assert "view/../set/shard-000000.tar: sha256" in capsys.readouterr().out
