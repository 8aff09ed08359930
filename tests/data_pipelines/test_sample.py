"""What a sample can hold."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from data_pipelines.build import QUARANTINE, write_shards
from data_pipelines.errors import BadSample
from data_pipelines.sample import Annotation, Text, Turn
from data_pipelines.shards.shard_set import ShardSet
from data_pipelines.sources.messages import Messages

LONE = json.loads('"\\ud800"')


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"annotations": (Annotation(turns=(Turn(role="user", parts=(Text(text=LONE),)),)),)}, "surrogates"),
        ({"meta": {"url": LONE}}, "surrogates"),
        ({"licence": LONE}, "surrogates"),
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
