"""What a sample can hold."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from data_pipelines.build import QUARANTINE, write_shards
from data_pipelines.cli import check_same
from data_pipelines.errors import BadSample, DataError
from data_pipelines.sample import Annotation, Sample, Text, Turn
from data_pipelines.shards.manifest import Manifest
from data_pipelines.shards.shard_set import ShardSet
from data_pipelines.shards.tar_writer import ShardWriter
from data_pipelines.sources.messages import Messages

LONE = json.loads('"\\ud800"')


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"annotations": (Annotation(turns=(Turn(role="user", parts=(Text(text=LONE),)),)),)}, "surrogates"),
        ({"meta": {"url": LONE}}, "surrogates"),
        ({"license": LONE}, "surrogates"),
        ({"meta": {"score": float("nan")}}, "Out of range float"),
        ({"meta": {"image": b"x"}}, "bytes is not JSON serializable"),
    ],
)
def test_only_what_json_can_hold_is_written(sample, change, reason):
    one, _ = sample(1)
    with pytest.raises(BadSample, match=f"sample 'sample-001': not JSON in UTF-8: .*{reason}"):
        replace(one, **change).to_json()


def test_lone_surrogates_of_a_source_are_bad_samples(tmp_path):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    lines = [{"messages": talk}, {"messages": [talk[0], {**talk[1], "content": LONE}]}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_shards(Messages(file=str(tmp_path / "x.jsonl")), tmp_path / "out")
    assert len(ShardSet(tmp_path / "out")) == 1
    assert "surrogates not allowed" in (tmp_path / "out" / QUARANTINE).read_text()


def test_the_older_spelling_of_license_is_read(sample, tmp_path):
    record, blobs = sample(0)
    data = record.to_json()
    data["licence"] = data.pop("license")
    assert Sample.from_json(record.key, data) == record

    about = {"source": "s", "split": "train", "build": {"license": "MIT"}}
    with ShardWriter(tmp_path / "set", license="MIT", **about) as writer:
        writer.write_sample(record, blobs)
    written = Manifest.read(tmp_path / "set")
    file = tmp_path / "set" / "manifest.json"
    file.write_text(file.read_text().replace('"license"', '"licence"'))
    assert '"licence"' in file.read_text() and Manifest.read(tmp_path / "set") == written
    check_same(tmp_path / "set", {"license": "MIT"})


def test_a_source_that_lacks_something_is_told(tmp_path):
    class Mine:
        name, licence, split, parts = "mine", "MIT", "train", 1

        def read(self, part):
            return iter(())

    with pytest.raises(DataError, match="^Mine has no license; see "):
        write_shards(Mine(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def _json(sample, change=lambda data: data, **fields):
    data = json.loads(json.dumps(sample(1)[0].to_json())) | fields
    change(data)
    return data


def _set_part(**part):
    return lambda data: data["annotations"][0]["turns"][0]["parts"].__setitem__(0, part)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data["media"][0].update(name=5), "media item 5"),
        (lambda data: data["media"][0].update(kind="sound"), "of kind 'sound'; allowed: a name, image or video"),
        (lambda data: data["media"][0].update(width=-3), "-3 x .* pixels"),
        (lambda data: data["media"][0].update(seconds=float("nan")), "nan seconds"),
        (_set_part(media=float("inf")), "OverflowError"),
        (_set_part(text=None), "a text part holds None"),
        (_set_part(text=7), "a text part holds 7"),
        (_set_part(text="bad \ud800"), "surrogates not allowed"),
        (lambda data: data["meta"].update(url="\ud800"), "surrogates not allowed"),
        (lambda data: data["annotations"][0]["turns"][0]["parts"].__setitem__(0, "text"), "AttributeError"),
        (lambda data: data.update(weight=10**400), "OverflowError"),
        (lambda data: data.update(weight=float("nan")), "weight nan; allowed: 0 to 1000000"),
        (lambda data: data.update(weight=1e300), r"weight 1e\+300"),
        (lambda data: data["annotations"][0].update(weight=float("inf")), "weight inf"),
        (lambda data: data["annotations"][0]["turns"][1].update(weight=-1), "weight -1.0"),
        (_set_part(text="abc", weights=[[0, 2, -7.0]]), "weight -7.0"),
    ],
)
def test_malformed_samples_are_bad_samples(sample, change, reason):
    with pytest.raises(BadSample, match=f"^sample 'k': malformed: .*{reason}"):
        Sample.from_json("k", _json(sample, change))


def test_what_is_not_ours_in_meta_stays(sample):
    assert math.isnan(Sample.from_json("k", _json(sample, meta={"score": float("nan")})).meta["score"])
