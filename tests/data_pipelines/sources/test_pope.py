"""POPE's questions, by hand and in numbers."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from data_pipelines.errors import BadSample, DataError
from data_pipelines.lint import sample_problems
from data_pipelines.shards.members import caption_annotation
from data_pipelines.shards.tar_writer import ShardWriter
from data_pipelines.sources.common.samples import make_sample
from data_pipelines.sources.pope import Pope

SHOWN = ["cat dog", "dog bird cat", "cat bird", "dog cat fox", "egg", "cat egg"]


class Origin:
    name, license = "drawn", "CC0-1.0"


@pytest.fixture
def shards(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    made = [
        make_sample(Origin, f"s{i}", [file.getvalue()], [caption_annotation(f"a {text}")], {"list": text.split()})
        for i, text in enumerate(SHOWN)
    ]
    made.append(make_sample(Origin, "text", [], [caption_annotation("cat dog", images=0)]))
    with ShardWriter(tmp_path / "shards", source="drawn", license="CC0", split="test") as writer:
        for sample, blobs in made:
            writer.write_sample(sample, blobs)
    return str(tmp_path / "shards")


VOCABULARY = {name: [] for name in ("cat", "dog", "bird", "fox", "egg")}


def questions(source):
    return {sample.key: [(one.turns[0].text, one.turns[-1].text) for one in sample.annotations] for sample, _ in source}


def test_popular_and_adversarial_choose_as_published(shards):
    popular = questions(Pope(shards=shards, negatives="popular", objects=VOCABULARY, present=2))
    assert popular["s0"] == [
        ("Is there a cat in the image?", "yes"),
        ("Is there a bird in the image?", "no"),  # twice in the pictures with two objects, as others are once
        ("Is there a dog in the image?", "yes"),
        ("Is there an egg in the image?", "no"),  # of those that are once the first by name
    ]
    assert list(popular) == ["s0", "s1", "s2", "s3", "s5"]  # an egg alone is too little, and so is a text
    adversarial = questions(Pope(shards=shards, negatives="adversarial", objects=VOCABULARY, present=1))
    assert adversarial["s5"] == [("Is there a cat in the image?", "yes"), ("Is there a dog in the image?", "no")]
    assert adversarial["s2"][1] == ("Is there a dog in the image?", "no")  # three times beside the cat


@pytest.mark.parametrize("negatives", ["random", "popular", "adversarial"])
def test_half_of_the_questions_are_about_what_is_absent(shards, negatives):
    for options in ({"objects": VOCABULARY}, {"field": "list"}):
        source = Pope(shards=shards, negatives=negatives, present=2, **options)
        assert questions(source) == questions(Pope(shards=shards, negatives=negatives, present=2, **options))
        for sample, blobs in source:
            assert not list(sample_problems(sample, blobs))
            shown = SHOWN[int(sample.key[1:])].split()
            answers = [one.turns[-1].text for one in sample.annotations]
            assert answers == ["yes", "no"] * 2 and len({one.turns[0].text for one in sample.annotations}) == 4
            for one in sample.annotations:
                asked = one.turns[0].text.split()[3]
                assert (asked in shown) == (one.turns[-1].text == "yes")


def test_the_wrong_answer_is_the_rejected_one(shards):
    """One pair a sample: training reads no other one, and the first of a picture is always "yes"."""
    options = {"shards": shards, "objects": VOCABULARY, "present": 2}
    asked = [one for found in questions(Pope(**options)).values() for one in found]
    pairs = list(Pope(**options, rejected=True))
    assert len(pairs) == len(asked) == 20 and len({sample.key for sample, _ in pairs}) == 20
    for (sample, blobs), (question, answer) in zip(pairs, asked, strict=True):
        (one,) = sample.annotations
        assert not list(sample_problems(sample, blobs))
        assert (one.turns[0].text, one.turns[-1].text) == (question, answer)
        assert one.rejected.text == {"yes": "no", "no": "yes"}[answer]


def test_another_seed_asks_for_others(shards):
    found = [questions(Pope(shards=shards, objects=VOCABULARY, present=1, seed=seed)) for seed in range(6)]
    assert any(one != found[0] for one in found[1:])


def test_what_cannot_be_asked(shards):
    few = {name: [] for name in ("cat", "dog")}
    (record, *_) = list(Pope(shards=shards, objects=few, present=2))
    assert isinstance(record, BadSample) and "none can be absent" in str(record)
    for options, message in (
        ({}, "objects, field: give one of them"),
        ({"objects": VOCABULARY, "field": "list"}, "objects, field: give one of them"),
        ({"objects": VOCABULARY, "present": 0}, "present 0"),
        ({"objects": VOCABULARY, "question": "Is it there?"}, "one {}"),
        ({"objects": VOCABULARY, "present": 4}, "no picture with 4 known objects"),
        ({"objects": VOCABULARY, "negatives": "rare"}, "negatives: got 'rare'"),
    ):
        with pytest.raises(DataError, match=message):
            Pope(shards=shards, **options)
