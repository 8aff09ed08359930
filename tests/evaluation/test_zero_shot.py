"""Zero-shot classification, with towers that read a colour from pixels and from bytes."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from data_pipelines.media.limits import image_item
from data_pipelines.sample import Sample
from data_pipelines.shards.members import caption_annotation
from data_pipelines.shards.tar_writer import ShardWriter
from tests.data.text.rendering import load
from vlm_train.check.model import check_evaluators
from vlm_train.contracts.layout import NoMedia
from vlm_train.data.images.transform import ImageTransform
from vlm_train.data.processor import Processor
from vlm_train.data.text.tokenizer import byte_level
from vlm_train.errors import ConfigError
from vlm_train.evaluation.zero_shot import ZeroShot, class_of

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
TOKENIZER = byte_level()


class Towers(torch.nn.Module):
    """Channels of an image; of a text the channel it names. Prompts that say "dark" point elsewhere, a little."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.asked: list[str] = []

    def encode_image(self, media) -> torch.Tensor:
        return torch.nn.functional.normalize(media.inputs["vision"].values.float().mean(dim=(2, 3)), dim=-1)

    def encode_text(self, stream) -> torch.Tensor:
        texts = [
            TOKENIZER.decode(row[real != 0], skip_special_tokens=True)
            for row, real in zip(stream.ids, stream.segment_ids, strict=True)
        ]
        self.asked += texts
        vectors = torch.tensor([[float(name in text) for name in COLORS] for text in texts])
        vectors += torch.tensor([[0.0, 0.0, 1.5 * text.startswith("dark")] for text in texts])
        return torch.nn.functional.normalize(vectors, dim=-1)


@pytest.fixture
def built() -> SimpleNamespace:
    image = ImageTransform(mode="resize", size=(8, 8))
    processor = Processor(tokenizer=TOKENIZER, template=load("caption"), layout=NoMedia(), images={"vision": image})
    return SimpleNamespace(model=Towers(), processor=processor)


def shards(folder: Path, captions: list[tuple[str, str]]) -> str:
    """Pictures of a colour, each with a caption."""
    with ShardWriter(folder, source="test", license="CC0", split="val", samples_per_shard=9) as writer:
        for number, (color, caption) in enumerate(captions):
            file = io.BytesIO()
            Image.new("RGB", (9, 9), COLORS[color]).save(file, "PNG")
            blob = file.getvalue()
            media = (image_item(0, blob),)
            writer.write_sample(
                Sample(key=f"s{number}", media=media, annotations=(caption_annotation(caption),)), [blob]
            )
    return str(folder)


def test_images_are_given_the_nearest_class(built: SimpleNamespace, tmp_path: Path) -> None:
    pairs = [
        ("red", "a red thing"),
        ("green", "Green"),
        ("blue", "a red one"),
        ("blue", "red and blue"),
        ("red", "what"),
    ]
    folder = shards(tmp_path / "set", pairs)
    evaluator = ZeroShot(shards=folder, classes=list(COLORS), templates=["a {}", "the {} one"], batch=2, name="color")
    found = evaluator.run(built.model, built.processor, tmp_path, final=True)
    assert found.metrics == {"accuracy": pytest.approx(2 / 3)}
    assert built.model.asked == [text for name in COLORS for text in (f"a {name}", f"the {name} one")]
    (row,) = found.rows
    assert (row.name, row.value, row.n) == ("color", found.metrics["accuracy"], 3)
    assert row.note == ("nearest of 3 classes, 2 prompts each (chance 0.333, most frequent class 0.667), 2 left out")
    assert evaluator.run(built.model, built.processor, tmp_path, final=False).rows == ()


def test_prompts_are_averaged_as_unit_vectors(built: SimpleNamespace) -> None:
    evaluator = ZeroShot(shards="", classes=["red", "green"], templates=["a {}", "dark {}"])
    plain, dark = torch.tensor([1.0, 0, 0]), torch.tensor([1.0, 0, 1.5]) / 3.25**0.5
    expected = (plain + dark) / (plain + dark).norm()
    assert torch.allclose(evaluator.class_vectors(built.model, built.processor)[0], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("caption", "label"),
    [
        ("a Hot Dog", "hot dog"),
        ("a dog", "dog"),
        ("dogs", None),
        ("a dog and a cat", None),
        ("", None),
        ("cat.", "cat"),
    ],
)
def test_class_of_a_caption(caption: str, label: str | None) -> None:
    assert class_of(caption, ["dog", "hot dog", "cat"]) == label


def test_wrong_settings_are_refused(built: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"zero-shot\.classes: needs two or more different names, got \['a', 'a'\]"):
        ZeroShot(shards="", classes=["a", "a"], templates=["{}"])
    with pytest.raises(ConfigError, match=r"zero-shot\.templates: each needs one \{\}"):
        ZeroShot(shards="", classes=["a", "b"], templates=["a photo"])
    folder = shards(tmp_path / "set", [("red", "a red thing")])
    with pytest.raises(ConfigError, match="no caption of .* says one of up, down"):
        evaluator = ZeroShot(shards=folder, classes=["up", "down"], templates=["{}"])
        evaluator.run(built.model, built.processor, tmp_path, final=True)
    evaluator = ZeroShot(shards=folder, classes=["red", "blue"], templates=["{}"])
    (found,) = check_evaluators({"shape": evaluator}, torch.nn.Linear(1, 1))
    assert found.startswith("eval.shape: needs a model that EmbedsImagesAndTexts. Linear lacks encode_image, encode_te")
    assert list(check_evaluators({"shape": evaluator}, built.model)) == []
