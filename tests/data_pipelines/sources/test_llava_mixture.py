"""LLaVA-NeXT mixtures, and what its files need of the LLaVA format."""

from __future__ import annotations

import json
import pickle

import pytest
import yaml

from data_pipelines.errors import BadSample, DataError
from data_pipelines.sample import Media, Text
from data_pipelines.sources.llava_json import LlavaJSON
from data_pipelines.sources.llava_mixture import LlavaMixture

TALK = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]


def _write(path, count, **more):
    records = [{"id": f"{path.stem}{i}", "conversations": TALK, **more} for i in range(count)]
    lines = path.suffix == ".jsonl"
    path.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(records))


@pytest.fixture
def mixture(tmp_path):
    def read(*datasets, **options):
        (tmp_path / "mix.yaml").write_text(yaml.safe_dump({"datasets": list(datasets)}))
        return LlavaMixture(file=str(tmp_path / "mix.yaml"), **options)

    for name, count in {"a.json": 7, "b.jsonl": 5, "c1.json": 2, "c2.json": 2}.items():
        _write(tmp_path / name, count)
    return read


def _ids(source):
    return [sample.meta["id"] for sample, _ in source]


@pytest.mark.parametrize(
    ("strategy", "taken"),
    [
        ("all", range(7)),
        ("first:3", range(3)),
        ("first:30%", range(3)),  # 2.1 records, rounded up
        ("end:2", (5, 6)),
        ("end:1%", (6,)),
        ("first:99", range(7)),
        ("end:99", range(7)),
    ],
)
def test_strategies_take_what_the_reference_takes(mixture, strategy, taken):
    assert _ids(mixture({"json_path": "a.json", "sampling_strategy": strategy})) == [f"a{i}" for i in taken]


def test_random_is_seeded_and_the_same_everywhere(mixture):
    draw = {"json_path": "a.json", "sampling_strategy": "random:50%"}
    assert _ids(mixture(draw)) == _ids(mixture(draw)) == ["a3", "a4", "a6", "a5"]
    assert _ids(mixture(draw, seed=1)) != _ids(mixture(draw)) and len(set(_ids(mixture(draw, seed=1)))) == 4
    twice = mixture(draw, {"json_path": "b.jsonl"}, draw)
    assert len({sample.key for sample, _ in twice}) == len(twice) == 13


def test_datasets_come_in_order_and_braces_are_files(mixture, tmp_path):
    source = mixture({"json_path": "b.jsonl", "sampling_strategy": "end:1"}, {"json_path": "c{1,2}.json"})
    source = pickle.loads(pickle.dumps(source))  # as builds on several processes do
    assert _ids(source) == ["b4", "c10", "c11", "c20", "c21"]
    assert next(iter(source))[0].key == "000-0000004-b4"
    (tmp_path / "other").mkdir()
    (tmp_path / "a.json").rename(tmp_path / "other" / "a.json")
    published = {"json_path": "/mnt/bn/data/a.json", "sampling_strategy": "first:1"}
    assert _ids(mixture(published, json_folder=str(tmp_path / "other"))) == ["a0"]


def test_missing_files_stop_or_are_named(mixture, capsys):
    datasets = ({"json_path": "none.json"}, {"json_path": "b.jsonl"})
    with pytest.raises(DataError, match="none.json: No such file"):
        mixture(*datasets)
    source = mixture(*datasets, missing="skip")
    assert len(source) == 5 and next(iter(source))[0].key.startswith("001-")
    assert "skipped, not there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"json_path": "a.json", "sampling_strategy": "first"}, "datasets.0..sampling_strategy: got 'first'; allowed"),
        ({"json_path": "a.json", "sampling_strategy": "last:3"}, "got 'last:3'; allowed: all, first:N"),
        ({"json_path": "a.json", "sampling_strategy": "first:-3"}, "got 'first:-3'"),
        ({"path": "a.json"}, "datasets.0. has no json_path"),
        ("a.json", "datasets.0. has no json_path"),
    ],
)
def test_wrong_mixtures_are_refused(mixture, dataset, message):
    with pytest.raises(DataError, match=message):
        mixture(dataset)
    with pytest.raises(DataError, match="has no list `datasets`"):
        mixture()


def test_bad_records_say_where_they_are(mixture, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"id": "x", "conversations": []}\n{"broken\n')
    bad = list(mixture({"json_path": "a.json", "sampling_strategy": "first:1"}, {"json_path": "d.jsonl"}))[1:]
    assert [str(error).split(": ")[:2] for error in bad] == [
        ["dataset 1, record 'x'", "no turns"],
        ["dataset 1, line 2", "not JSON"],
    ]


@pytest.fixture
def one(tmp_path, picture):
    (tmp_path / "1.png").write_bytes(picture(1))

    def read(record, **options):
        (tmp_path / "one.jsonl").write_text(json.dumps(record))
        return next(iter(LlavaJSON(file=str(tmp_path / "one.jsonl"), images=str(tmp_path), **options)))

    return read


def test_images_without_a_tag(one):
    record = {"id": 5, "image": ["1.png", "1.png"], "conversations": [{"from": "system", "value": "Be kind."}, *TALK]}
    assert str(one(record)) == "record 5: 0 <image> tags in its human turns, 2 images"
    placed, blobs = one(record, untagged="first")
    assert placed.annotations[0].turns[1].parts == (Media(item=0), Media(item=1), Text(text="Hi")) and len(blobs) == 2
    dropped, blobs = one(record, untagged="drop")
    assert dropped.media == () and blobs == [] and dropped.annotations[0].turns[1].parts == (Text(text="Hi"),)
    assert [turn.role for turn in dropped.annotations[0].turns] == ["system", "user", "assistant"]
    with pytest.raises(DataError, match="untagged: got 'keep'; allowed: bad, first, drop"):
        one(record, untagged="keep")


def test_an_answer_without_a_question_is_dropped_after_a_system_turn(one):
    lead = [{"from": "system", "value": "Be kind."}, {"from": "gpt", "value": "left over"}]
    sample, _ = one({"id": 5, "conversations": [*lead, *TALK]})
    assert [turn.text for turn in sample.annotations[0].turns] == ["Be kind.", "Hi", "Hello"]
    assert "no turns" in str(one({"id": 5, "conversations": lead}))


def test_videos_are_for_another_source(one):
    error = one({"id": 5, "video": "a.mp4", "conversations": [{"from": "human", "value": "<image>\nWhat?"}]})
    assert isinstance(error, BadSample) and "names a video" in str(error)
