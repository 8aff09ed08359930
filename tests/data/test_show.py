from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from data_pipelines.shards.shard_set import ShardSet
from tests.data.text.rendering import assistant, layout, load, sample, user
from tests.support.render import render_sample
from tests.support.small_run import make_data
from vlm_train.data.images.transform import ImageTransform
from vlm_train.data.processor import Processor
from vlm_train.data.show import format_tokens, learned_tokens, save_views, show_sample
from vlm_train.data.text.tokenizer import byte_level


def test_marks_show_what_is_learned() -> None:
    tokenizer = byte_level()
    item = sample((user("A?", 0), assistant("é")), (user("B?", 0), assistant("no")), media=1)
    shown = format_tokens(render_sample(item, load("qa"), tokenizer, layout), tokenizer, color=False)
    assert shown.splitlines() == [
        "stream llm: 16 tokens, 8 learned, 1 media",
        "",
        "shared: tokens 0-3, positions 0-3",
        "<bos>[image 0 x3]",
        "",
        "branch 1: tokens 4-9, positions 4-9",
        "A?« é<eos>»",
        "",
        "branch 2: tokens 10-15, positions 4-9",
        "B?« no<eos>»",
    ]


def test_an_image_without_placeholders_is_marked() -> None:
    tokenizer = byte_level(add=["<image>"])
    item = sample((user("A?", 0), assistant("no")), media=1)
    rendered = render_sample(item, load("qa"), tokenizer, lambda sizes: [["<image>"] for _ in sizes])
    assert format_tokens(rendered, tokenizer, color=False).endswith("<bos>[image 0]<image>A?« no<eos>»")


def test_colors_carry_the_same_text() -> None:
    tokenizer = byte_level()
    rendered = render_sample(sample((user("A?"), assistant("yes"))), load("qa"), tokenizer, layout)
    assert "\033[32m yes<eos>\033[0m" in format_tokens(rendered, tokenizer, color=True)
    assert learned_tokens(rendered.llm).sum() == rendered.llm.supervised == 5


def test_views_are_saved_as_they_are(tmp_path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 4, 5), dtype=np.uint8)
    saved = np.asarray(Image.open(save_views(pixels, tmp_path / "deep" / "view.png")))
    assert saved.shape == (8, 10, 3)
    for index, (top, left) in enumerate([(0, 0), (0, 5), (4, 0)]):
        np.testing.assert_array_equal(saved[top : top + 4, left : left + 5], pixels[index].transpose(1, 2, 0))
    with pytest.raises(ValueError, match=r"uint8 \[3, H, W\] each"):
        save_views(pixels.astype(np.float32), tmp_path / "x.png")


def test_the_shown_sample_is_named(tmp_path, monkeypatch, capsys) -> None:
    folder = make_data(tmp_path) / "tiny" / "train"
    image = ImageTransform(mode="resize", size=(8, 8))
    processor = Processor(template=load("qa"), tokenizer=byte_level(), layout=layout, images={"vision": image})
    options = {"annotations": "first", "max_length": None, "over_length": "drop"}
    show_sample(processor, ShardSet(folder), options, seed=1, folder=tmp_path)
    assert capsys.readouterr().out.startswith(f"sample sample-00, number 0 of 12 in {folder}, source test\n")
    assert np.asarray(Image.open(tmp_path / "show.png")).shape == (8, 8, 3)
    processor = replace(
        processor, images={"vision": ImageTransform(mode="resize", size=(8, 8), random_resized_crop=[0.5, 0.6])}
    )
    show_sample(processor, ShardSet(folder), options, seed=1, folder=tmp_path)
    assert "then as training does in passes 0 to 2" in capsys.readouterr().out
    sheet = np.asarray(Image.open(tmp_path / "show.png"))
    views = [sheet[top : top + 8, left : left + 8].tobytes() for top in (0, 8) for left in (0, 8)]
    assert len(set(views)) == 4
