"""Made samples: the same every time, and their answers agree with what is drawn."""

from __future__ import annotations

import io
import random
import sys

import numpy as np
import pytest
import yaml
from PIL import Image, ImageColor

from data_pipelines.cli import CONF
from data_pipelines.errors import DataError
from data_pipelines.lint import sample_problems
from data_pipelines.media.video import read_frames
from data_pipelines.sample import Box, Media
from data_pipelines.sources.common.drawing import COLORS, SHAPES, Dice
from data_pipelines.sources.synthetic import ROOMS, TASKS, Synthetic


def pixels(blob):
    return np.asarray(Image.open(io.BytesIO(blob)).convert("RGB")).astype(int)


def found(image):
    """The colours of a picture besides white, each with the box of its pixels (left, top, right, bottom)."""
    boxes = {}
    for color in COLORS:
        rows, columns = np.nonzero((image == ImageColor.getrgb(color)).all(-1))
        if len(rows):
            boxes[color] = (columns.min(), rows.min(), columns.max(), rows.max())
    return boxes


def of(task, count=12, **options):
    return list(Synthetic(tasks=[task], count=count, **options))


def answers(sample):
    return [annotation.turns[-1].text for annotation in sample.annotations]


def test_samples_depend_on_seed_split_and_number_alone():
    first = list(Synthetic(count=20))
    random.seed(1)
    np.random.seed(1)
    assert list(Synthetic(count=30))[:20] == first
    assert [sample.meta["task"] for sample, _ in first[:10]] == list(TASKS)
    for other in ({"seed": 1}, {"split": "val"}):
        assert [blobs for _, blobs in Synthetic(count=20, **other)] != [blobs for _, blobs in first]
    assert not [problem for sample, blobs in first for problem in sample_problems(sample, blobs)]


def test_the_file_lists_every_task():
    assert yaml.safe_load((CONF / "source" / "synthetic.yaml").read_text())["tasks"] == list(TASKS)


def test_captions_and_questions_agree_with_the_picture():
    for sample, (blob,) in of("caption"):
        named = [words.split()[1] for words in answers(sample)[0].split(" and ")]
        assert set(named) == set(found(pixels(blob)))
    for sample, (blob,) in of("vqa"):
        (color,) = found(pixels(blob))
        asked = sample.annotations[2].turns[0].text.split()[3]
        assert answers(sample)[0] == color and answers(sample)[1] in SHAPES
        assert answers(sample)[2] == ("yes" if asked == color else "no")


def test_counts_agree_with_the_picture():
    seen = set()
    for sample, (blob,) in of("count", 20):
        cells = pixels(blob).reshape(3, 32, 3, 32, 3).transpose(0, 2, 1, 3, 4)
        number = sum((cell != 255).any() for row in cells for cell in row)
        assert answers(sample)[0] == str(number) and int(answers(sample)[1]) <= number
        seen.add(number)
    assert len(seen) > 4


def test_boxes_agree_with_the_picture():
    for sample, (blob,) in of("box"):
        region = sample.annotations[0].turns[1].parts[0]
        assert isinstance(region, Box) and region == sample.annotations[1].turns[0].parts[2]
        left, top, right, bottom = (round(96 * edge) for edge in region.xyxy)
        color = answers(sample)[1].split()[1]
        assert (pixels(blob)[(top + bottom) // 2, (left + right) // 2] == ImageColor.getrgb(color)).all()


def test_the_named_picture_of_several():
    for sample, blobs in of("multi_image"):
        ask, answer = sample.annotations[0].turns
        assert [part.item for part in ask.parts if isinstance(part, Media)] == list(range(len(blobs)))
        number = ("first", "second", "third").index(answer.text.split()[1])
        assert list(found(pixels(blobs[number]))) == [ask.text.split()[4]]


@pytest.mark.parametrize("as_images", [False, True])
def test_videos_move_as_their_answer_says(as_images):
    for sample, blobs in of("video", 6, frames=5, video_as_images=as_images):
        assert [item.frames for item in sample.media] == ([1] * 5 if as_images else [5])
        images = [pixels(blob) for blob in blobs] if as_images else list(read_frames(blobs[0], range(5)))
        centers = [np.argwhere(image.astype(int).sum(-1) < 560).mean(0) for image in (images[0], images[-1])]
        down, right = centers[1] - centers[0]
        way = ("down" if down > 0 else "up") if abs(down) > abs(right) else ("right" if right > 0 else "left")
        assert answers(sample) == [way]
    assert of("video", 2) == of("video", 2)
    assert not any(b"Lavf" in blob or b"Lavc" in blob for _, blobs in of("video", 2) for blob in blobs)  # its version


def test_written_words_differ_and_are_black():
    images = {answers(sample)[0]: pixels(blob) for sample, (blob,) in of("ocr", 30)}
    assert len(images) > 6 and all((image < 60).all(-1).sum() > 20 for image in images.values())
    assert all((image[:, -1] == 255).all() for image in images.values())  # none is cut off


@pytest.mark.parametrize(("task", "rows"), [("digit", 1), ("small_text", 4)])
def test_digits_stand_in_cells_of_their_own(task, rows):
    """What a cell shows depends on its digit alone, apart from the place."""
    shapes: dict[str, set[bytes]] = {}
    for sample, (blob,) in of(task, 100):
        image = pixels(blob)
        assert image.shape == (32 * rows, 32 * rows, 3)
        cells = image.reshape(rows, 32, rows, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3)
        for digit, cell in zip(answers(sample)[0].split(), cells, strict=True):
            places = np.argwhere((cell < 255).any(-1))
            (top, left), (bottom, right) = places.min(0), places.max(0)
            assert bottom - top == 9 and right - left < 10
            shapes.setdefault(digit, set()).add(cell[top : bottom + 1, left : right + 1].tobytes())
    assert len(shapes) == 10 and all(len(found) == 1 for found in shapes.values())
    assert len(set.union(*shapes.values())) == 10


def test_preferences_weigh_the_wrong_word():
    for sample, (blob,) in of("preference"):
        (annotation,) = sample.annotations
        (color,) = found(pixels(blob))
        for turn, right in ((annotation.turns[1], True), (annotation.rejected, False)):
            ((start, end, weight),) = turn.parts[0].weights
            assert (turn.text[start:end] == color) == right and weight == 5.0


def test_rooms_say_yes_to_what_belongs_there():
    """The pictures show what `meta` lists; the only wrong answers are a "yes" to absent things of the same room."""
    rooms = [{" ".join(name) for name in room} for room in ROOMS]
    assert len(set.union(*rooms)) == sum(map(len, rooms)) == 24
    said, wrong = [], []
    for sample, (blob,) in of("room", 100):
        shown = sample.meta["objects"]
        (room,) = [room for room in rooms if set(shown) <= room]
        assert {name.split()[0] for name in shown} == set(found(pixels(blob))) and 3 <= len(shown) <= 4
        assert answers(sample)[0] == " and ".join(f"a {name}" for name in shown)
        for one in sample.annotations[1:]:
            asked, answer = " ".join(one.turns[0].text.split()[3:5]), one.turns[-1].text
            said.append(answer)
            if asked in shown or asked not in room:
                assert answer == ("yes" if asked in shown else "no")
            else:
                wrong.append(answer == "yes")
    assert 0.65 < sum(wrong) / len(wrong) < 0.85 and said.count("yes") > 0.7 * len(said)


def test_documents_and_dialogues():
    for sample, blobs in of("interleaved"):
        (turn,) = sample.annotations[0].turns
        kinds = ["m" if isinstance(part, Media) else "t" for part in turn.parts]
        assert turn.role == "assistant" and "".join(kinds) == "t" + "mt" * len(blobs)
        for blob, text in zip(blobs, turn.parts[2::2], strict=True):
            assert list(found(pixels(blob))) == [text.text.split()[3]]
    for sample, blobs in of("text"):
        turns = sample.annotations[0].turns
        _, _, first, _, second = turns[0].text.rstrip("?").split()
        assert not blobs and turns[1].text == str(int(first) + int(second))
        assert int(turns[3].text) == 2 * int(turns[1].text)


def test_wrong_options(monkeypatch):
    for options, message in [
        ({"split": "dev"}, "split: got 'dev'; allowed: train, val, test"),
        ({"tasks": ["vqa", "sing"]}, "tasks: got sing; allowed: caption, vqa"),
        ({"tasks": []}, "0 tasks"),
        ({"count": 0}, "count 0"),
        ({"frames": 1}, "frames 1"),
    ]:
        with pytest.raises(DataError, match=message):
            Synthetic(**options)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r"av is not installed: pip install 'vlm-train\[data\]'"):
        Synthetic()
    assert len(Synthetic(video_as_images=True)) == 256


def test_dice_are_fair_enough():
    dice = Dice("x")
    counts = np.bincount([dice.draw_below(6) for _ in range(1200)])
    assert counts.min() > 150 and sorted(Dice("y").pick_some(range(5), 5)) == list(range(5))
