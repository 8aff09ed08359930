"""Each set of questions or regions, written as it is published, builds and lints clean."""

from __future__ import annotations

import pytest

from data_pipelines.build import QUARANTINE, main
from data_pipelines.inspect import main as inspect
from data_pipelines.lint import find_problems
from data_pipelines.shards.shard_set import ShardSet

COUNTS = {  # samples, annotations
    "vqav2": (2, 3),
    "okvqa": (1, 1),
    "gqa": (2, 3),
    "textvqa": (2, 3),
    "ocrvqa": (2, 4),
    "docvqa": (2, 3),
    "visual_genome": (2, 3),
    "refcoco": (1, 3),
}
TASKS = [(name, {}) for name in COUNTS] + [
    ("vqav2", {"prompt": '"{question}\nAnswer the question using a single word or phrase."'}),
    ("visual_genome", {"task": "grounding"}),
    ("refcoco", {"task": "grounding"}),
    ("refcoco", {"task": "referring"}),
]


@pytest.mark.parametrize(("name", "options"), TASKS)
def test_published_sets_build_lint_and_show(name, options, published, tmp_path, capsys):
    output = tmp_path / "set"
    arguments = [f"{key}={value}" for key, value in {**published(name), **options}.items()]
    assert main([f"source={name}", f"output={output}", *arguments]) == 0, capsys.readouterr().err
    assert {problem.kind for problem in find_problems(output)} <= {"unknown license"} and not (
        output / QUARANTINE
    ).exists()
    shards = ShardSet(output)
    samples = [shards.load_sample(i)[0] for i in range(len(shards))]
    assert (len(samples), sum(len(sample.annotations) for sample in samples)) == COUNTS[name]
    assert {sample.source for sample in samples} == {name} and not any("skipped" in s.meta for s in samples)
    assert all(len(sample.meta["annotations"]) == len(sample.annotations) for sample in samples)
    if "prompt" in options:
        assert samples[0].annotations[0].turns[0].text.endswith("?\nAnswer the question using a single word or phrase.")
    assert inspect([f"folder={output}"]) == 0 and samples[0].key in capsys.readouterr().out
