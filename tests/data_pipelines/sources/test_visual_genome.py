"""Visual Genome."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipelines.errors import BadSample, DataError
from data_pipelines.sample import Box
from data_pipelines.sources.visual_genome import VisualGenome

CLOCK = Box(item=0, xyxy=(0.1, 0.1, 0.4, 0.5))


def test_regions_of_an_image_are_annotations_of_one_sample(published):
    (first, _), (second, _) = VisualGenome(**published("visual_genome"), task="grounding")
    assert (first.key, second.key) == ("train-0000001", "train-0000002")
    ask, answer = first.annotations[0].turns
    assert ask.text.endswith("of the region this sentence describes: the clock is green.")
    assert answer.parts == (CLOCK,)
    assert second.annotations[0].turns[1].parts[0].xyxy == (0.0, 0.8, 1.0, 1.0)  # cut to the image
    assert first.meta["annotations"] == [{"region_id": 1382}, {"region_id": 1383}]


def test_referring_asks_about_the_box(published):
    (first, _), _ = VisualGenome(**published("visual_genome"), task="referring")
    ask, answer = first.annotations[0].turns
    assert ask.parts[2] == CLOCK and answer.text == "the clock is green"


def test_questions(published, raw):
    qa = {"a_objects": [], "q_objects": [], "image_id": 1, "qa_id": 986768}
    qas = [{"id": 1, "qas": [{**qa, "question": "What color is the clock?", "answer": "Green."}]}]
    options = published("visual_genome") | {"file": raw.json("question_answers.json", qas)}
    ((sample, _),) = VisualGenome(**options, task="qa", prompt="{question} Briefly.")
    assert [turn.text for turn in sample.annotations[0].turns] == ["What color is the clock? Briefly.", "Green."]
    assert sample.meta["annotations"] == [{"question_id": 986768}]
    (bad,) = VisualGenome(**options, task="referring")
    assert isinstance(bad, BadSample) and str(bad) == "image 1: malformed: KeyError: 'regions'"


def test_images_of_another_size_than_their_boxes_are_unusable(published):
    options = published("visual_genome")
    sizes = json.loads(Path(options["image_data"]).read_text())
    sizes[0] = {"id": 1, "width": 200, "height": 100}  # version 1.0 says id
    Path(options["image_data"]).write_text(json.dumps(sizes))
    bad, (_, blobs) = VisualGenome(**options)
    assert isinstance(bad, BadSample) and "image of 100 x 50 pixels, its boxes are for 200 x 100" in str(bad)
    assert len(list(VisualGenome(**options | {"image_data": None}))) == 2 and len(blobs) == 1


def test_per_image_draws_the_same_regions_in_their_order(published):
    options = published("visual_genome")
    images = json.loads(Path(options["file"]).read_text())[:1]
    images[0]["regions"] = [{**images[0]["regions"][0], "region_id": n} for n in range(20)]
    Path(options["file"]).write_text(json.dumps(images))

    def drawn():
        ((sample, _),) = VisualGenome(**options, per_image=5)
        return [note["region_id"] for note in sample.meta["annotations"]]

    assert drawn() == drawn() == sorted(drawn()) and len(drawn()) == 5 and drawn() != [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match="per_image: got 0"):
        VisualGenome(**options, per_image=0)


def test_unusable_regions_are_left_out_and_named(published):
    options = published("visual_genome")
    images = json.loads(Path(options["file"]).read_text())
    images[0]["regions"][0]["width"] = 300
    images[1]["regions"][0]["phrase"] = " "
    Path(options["file"]).write_text(json.dumps(images))
    (first, _), bad = VisualGenome(**options)
    assert len(first.annotations) == 1 and "0: box" in first.meta["skipped"][0]
    assert isinstance(bad, BadSample) and "no usable annotation among 1; 0: expected text" in str(bad)
