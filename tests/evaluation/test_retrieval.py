"""Retrieval, with towers that read the number of a sample from its image and its caption."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data_pipelines.media.limits import image_item
from data_pipelines.sample import Annotation, Media, Sample, Turn
from data_pipelines.shards.tar_writer import ShardWriter
from tests.data.text.rendering import assistant, load
from tests.support.small_run import picture
from vlm_train.contracts.layout import NoMedia
from vlm_train.data.images.transform import ImageTransform
from vlm_train.data.processor import Processor
from vlm_train.data.text.tokenizer import byte_level
from vlm_train.errors import ConfigError
from vlm_train.evaluation.retrieval import CaptionRetrieval, image_chance, recall_rows

COUNT = 5


class Towers(torch.nn.Module):
    """Image vectors point at the image's place in the set, caption vectors at the caption's length."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def encode_image(self, media) -> torch.Tensor:
        return torch.eye(COUNT)[: media.inputs["vision"].views_total]

    def encode_text(self, stream) -> torch.Tensor:
        return torch.eye(COUNT)[stream.segment_ids.sum(dim=1) - 3]  # bos, at least one letter, eos


def shards(folder: Path, bad: tuple[int, ...]) -> str:
    with ShardWriter(folder, source="test", license="CC0", split="val", samples_per_shard=5) as writer:
        for number in range(COUNT):
            blob = picture(number)
            if number in bad:
                blob = blob[: len(blob) // 2]
            turns = (Turn(role="user", parts=(Media(item=0),)), assistant("a" * (number + 1)))
            sample = Sample(key=f"s{number}", media=(image_item(0, blob),), annotations=(Annotation(turns=turns),))
            writer.write_sample(sample, [blob])
    return str(folder)


@pytest.fixture
def built() -> SimpleNamespace:
    image = ImageTransform(mode="resize", size=(8, 8))
    processor = Processor(tokenizer=byte_level(), template=load("caption"), layout=NoMedia(), images={"vision": image})
    return SimpleNamespace(model=Towers(), processor=processor)


def test_unusable_samples_are_left_out(
    built: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shards(tmp_path / "set", bad=(COUNT - 1,))
    found = CaptionRetrieval(shards=folder).run(built.model, built.processor, tmp_path, final=True)
    assert (found.metrics["caption_recall_at_1"], found.rows[0].n) == (1.0, COUNT - 1)
    assert found.rows[0].note.endswith("(chance 0.250), 1 sample unusable")
    assert "key 's4': image: cannot decode" in capsys.readouterr().out


def test_nothing_usable_is_an_error(built: SimpleNamespace, tmp_path: Path) -> None:
    folder = shards(tmp_path / "set", bad=tuple(range(COUNT)))
    with pytest.raises(ConfigError, match="none of the 5 samples"):
        CaptionRetrieval(shards=folder, batch=2).run(built.model, built.processor, tmp_path, final=True)


def test_recalls_of_both_directions_by_hand() -> None:
    """Seven images of six captions; the images 0 and 1 bear the same one."""
    own = [0, 0, 1, 2, 3, 4, 5]
    scores = torch.zeros(7, 6)
    scores[range(7), own] = 1.0
    scores[0] = torch.tensor([0.0, 6.0, 5.0, 4.0, 3.0, 2.0])  # its own caption is the last
    scores[2] = torch.tensor([6.0, 1.0, 0.0, 0.0, 0.0, 0.0])  # and this one's the second
    rows = recall_rows(scores, own)
    assert [row.name for row in rows] == [f"{kind} retrieval R@{k}" for kind in ("caption", "image") for k in (1, 5)]
    # Image 2 is the nearest of caption 0, and image 0 that of all others but its own.
    assert [row.value for row in rows] == pytest.approx([5 / 7, 6 / 7, 0.0, 1.0])
    assert [row.n for row in rows] == [7, 7, 6, 6]
    chances = [float(row.note.split("chance ")[1].rstrip(")")) for row in rows]
    assert chances == pytest.approx([1 / 6, 5 / 6, (2 / 7 + 5 / 7) / 6, (20 / 21 + 5 * 5 / 7) / 6], abs=5e-4)


def test_chance_of_finding_an_image() -> None:
    assert image_chance([2, 1, 1], 1) == pytest.approx((2 / 4 + 1 / 4 + 1 / 4) / 3)
    assert image_chance([1, 1], 5) == 1.0
