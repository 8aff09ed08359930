"""The same few held-out samples are answered at every validation, with pictures."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines.media.limits import image_item
from data_pipelines.sample import Annotation, Media, Sample, Text, Turn
from data_pipelines.shards.shard_set import ShardSet
from tests.data.text.rendering import load
from tests.loggers.test_loggers import crash, tensorboard_of
from tests.out_of_tree.my_vlm.native_vit import count_patches
from tests.support.small_run import command, make_data, picture, train
from vlm_train.build import build_assembly
from vlm_train.checkpoint.weights import load_run_weights
from vlm_train.config.run_file import load_config
from vlm_train.contracts.layout import NoMedia
from vlm_train.data.images.native import NativeResolution
from vlm_train.data.processor import Processor
from vlm_train.data.text.tokenizer import byte_level
from vlm_train.errors import ConfigError
from vlm_train.evaluation.answers import QuestionAnswering
from vlm_train.models.families.prefix_vlm import PrefixVLM
from vlm_train.training.callbacks.predictions import Predictions


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def test_answers_are_the_models_and_pictures_what_it_sees(data: Path, tmp_path: Path) -> None:
    more = ["trainer.val_every=2", "trainer.max_steps=3", "callbacks.predictions.samples=2", "logger=[tensorboard]"]
    run = train(command(data, tmp_path, *more, "callbacks.predictions.max_new_tokens=6"))
    paths = sorted((run / "predictions").glob("*.json"))
    assert [path.name for path in paths] == ["step-00000002.json", "step-00000003.json"]
    rows = json.loads(paths[-1].read_text())
    assert [row["key"] for row in rows] == ["sample-00", "sample-02"]  # spread over the four
    assert [row["question"] for row in rows] == ["Which number is 0?", "Which number is 2?"]
    assert rows[1]["reference"] == "shape shape shape 2"
    cfg = load_config(run / "config.yaml")
    built = build_assembly(cfg)
    load_run_weights(built.model, [], run)
    evaluator = QuestionAnswering(shards=str(data / "tiny/val"), max_new_tokens=6)
    evaluator.run(built.model, built.processor, tmp_path / "eval", final=True)
    found = [json.loads(line) for line in (tmp_path / "eval/predictions.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in rows] == [found[number]["prediction"] for number in (0, 2)]
    _, (blob,) = ShardSet(data / "tiny/val").load_sample(2)
    seen = np.asarray(Image.open(run / "predictions" / rows[1]["image"]))
    assert np.array_equal(seen, built.processor.images["vision"](blob).values[0].transpose(1, 2, 0))
    events = tensorboard_of(run)
    assert [image.step for image in events.Images("predictions/1")] == [2, 3]
    assert "Which number is 2?" in (run / "report.html").read_text()


def test_answers_after_the_resumed_step_are_dropped(data: Path, tmp_path: Path) -> None:
    more = ["trainer.val_every=1", "trainer.max_steps=4"]
    crash(data, tmp_path, *more)
    folder = tmp_path / "run" / "predictions"
    before = (folder / "step-00000003.json").read_text()
    (folder / "step-00000009.json").write_text("of a longer run")
    train(command(data, tmp_path, *more))
    assert [path.name[-6] for path in sorted(folder.glob("*.json"))] == ["1", "2", "3", "4"]
    assert (folder / "step-00000003.json").read_text() == before


def test_a_model_that_fails_to_answer_trains_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def generate(self: PrefixVLM, *_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(PrefixVLM, "generate", generate)
    run = train(command(data, tmp_path, "trainer.val_every=1", "trainer.max_steps=2"))
    assert json.loads((run / "run.json").read_text())["status"] == "done"
    assert capsys.readouterr().out.count("callbacks.predictions: none any more: RuntimeError: out of memory") == 1


def test_two_towers_answer_nothing(data: Path, tmp_path: Path) -> None:
    more = ["trainer.val_every=1", "trainer.max_steps=1", "batch.micro=4"]
    run = train(["recipe=easyvqa_clip", *command(data, tmp_path, *more)[1:]])
    assert not (run / "predictions").exists()


def test_a_picture_of_another_size_than_its_entry_says_is_passed_over(tmp_path: Path) -> None:
    """It is unusable in training, too; the others are asked."""
    image = NativeResolution(patch_size=8, patch_grid=partial(count_patches, patch_size=8), min_pixels=256)
    processor = Processor(tokenizer=byte_level(), template=load("caption"), layout=NoMedia(), images={"vision": image})
    question = Turn(role="user", parts=(Media(item=0), Text(text="How many?")))
    held = []
    for number, width in enumerate((40, 60, 40)):
        item = replace(image_item(0, picture(number)), width=width)  # they are 40 x 30
        turns = (question, Turn(role="assistant", parts=(Text(text=str(number)),)))
        held.append(
            (Sample(key=f"s{number}", media=(item,), annotations=(Annotation(turns=turns),)), [picture(number)])
        )

    class HeldOut:
        def __len__(self) -> int:
            return len(held)

        def locate_sample(self, index: int) -> tuple[Any, int, int]:
            return SimpleNamespace(shards=SimpleNamespace(load_sample=lambda number: held[number])), index, 0

    samples: Any = HeldOut()
    samples.processor = processor
    callback = Predictions(samples=3)
    callback._render_questions(samples, tmp_path)
    assert callback.asked is not None and [one.key for one in callback.asked] == ["s0", "s2"]


def test_numbers_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="got 0, 48"):
        Predictions(samples=0)
