"""Text between the views of an image or a video, as templates write it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from data_pipelines.sample import Annotation, Media, MediaItem, Sample, Text, Turn
from tests.support.components import component
from tests.support.parity import encode, noise
from vlm_train.build import Assembly, build_assembly, instantiate_part
from vlm_train.config.compose import compose_tiny
from vlm_train.contracts.layout import PLACEHOLDER_ID
from vlm_train.data.collate import Example, collate_rows
from vlm_train.data.show import format_tokens
from vlm_train.data.text.render import RenderOptions
from vlm_train.data.text.streams import IGNORE, Stream
from vlm_train.errors import ConfigError

QUESTION, ANSWER = "Where is <row_1_col_1>?", "There."


@pytest.fixture(scope="module")
def nanovlm() -> Assembly:
    return build_assembly(compose_tiny("recipe=nanovlm"))


@pytest.fixture(scope="module")
def internvl() -> Assembly:
    return build_assembly(compose_tiny("recipe=internvl25_8b_stage1"))


def sample(*media: MediaItem, question: str = QUESTION, times: int = 1) -> Sample:
    shown = tuple(Media(item=number) for number in range(len(media)))
    ask = Turn(role="user", parts=(*shown, Text(text=question)))
    answer = Turn(role="assistant", parts=(Text(text=ANSWER),))
    return Sample(key="one", media=media, annotations=(Annotation(turns=(ask, answer)),) * times)


def picture(width: int, height: int, number: int = 0) -> MediaItem:
    return MediaItem(name=f"{number}.png", width=width, height=height)


def read(stream: Stream, tokenizer: Any) -> str:
    """The text of a stream, a run of placeholders as `@` and their count."""
    text, run = "", 0
    for token in [*stream.ids.tolist(), None]:
        if token == PLACEHOLDER_ID:
            run += 1
            continue
        text, run = text + (f"@{run}" if run else ""), 0
        text += "" if token is None else tokenizer.decode([token])
    return text


def image_string(grids: list[tuple[int, int]], tokens: int) -> str:
    """get_image_string of data/processors.py of nanoVLM, runs of image tokens as `@` and their count."""
    text = ""
    for number, (rows, columns) in enumerate(grids):
        text += f"<image: {number}>" if len(grids) > 1 else ""
        text += f"<|global_image|>@{tokens}"
        if (rows, columns) == (1, 1):
            continue
        for row in range(rows):
            for column in range(columns):
                text += f"<row_{row + 1}_col_{column + 1}>@{tokens}"
    return text


@pytest.mark.parametrize("sizes", [[(64, 64)], [(64, 30)], [(30, 64), (64, 64)], [(20, 500), (7, 7), (64, 31)]])
def test_nanovlm_names_every_view(nanovlm: Assembly, sizes: list[tuple[int, int]]) -> None:
    processor = nanovlm.processor
    media = [picture(*size, number) for number, size in enumerate(sizes)]
    stream = processor.render(sample(*media)).llm
    grids = [(2 if h > 32 * w / 64 else 1, 2 if w > 32 * h / 64 else 1) for w, h in sizes]
    shown = image_string(grids, tokens=1)
    expected = f"<|im_start|>user\n{shown}{QUESTION}<|im_end|>\n<|im_start|>assistant\n{ANSWER}<|im_end|>\n"
    assert read(stream, processor.tokenizer) == expected
    learned = stream.labels[stream.labels != IGNORE]
    assert processor.tokenizer.decode(learned.tolist()) == f"{ANSWER}<|im_end|>\n"
    token = processor.tokenizer.convert_tokens_to_ids("<row_1_col_1>")
    assert (stream.ids == token).sum() == sum(grid != (1, 1) for grid in grids), "the question's is plain text"


def test_an_image_of_one_tile_has_one_view(nanovlm: Assembly) -> None:
    cfg = compose_tiny("recipe=nanovlm", "image.enlarge=false")
    processor = build_assembly(cfg, meta=True).processor
    assert "user\n<|global_image|>@1Where" in read(processor.render(sample(picture(20, 20))).llm, processor.tokenizer)


def test_features_go_to_their_views(nanovlm: Assembly) -> None:
    processor, model = nanovlm.processor, nanovlm.model.eval()
    sizes = [(64, 30), (64, 64)]
    media = [picture(*size, number) for number, size in enumerate(sizes)]
    views = processor.make_views([encode(noise(*size)) for size in sizes], media=media)
    plans = processor.images
    batch = collate_rows([[Example(processor.render(sample(*media)), views)]], plans)
    stream = batch.text["llm"]
    assert stream.slots.feature_index is None, "view by view, in the order of the text"
    places = torch.nonzero(stream.ids.flatten() == PLACEHOLDER_ID).flatten()
    assert torch.equal(stream.slots.index, places) and len(places) == 3 + 5
    changed = views["vision"][1].values.copy()
    changed[3] = 255 - changed[3]  # the third tile of the second image: all of it, then four tiles
    other = replace(views["vision"][1], values=changed)
    again = collate_rows([[Example(processor.render(sample(*media)), {"vision": [views["vision"][0], other]})]], plans)
    with torch.no_grad():
        before, after = (model.embed(one) for one in (batch, again))
    moved = (before[0] != after[0]).any(dim=-1)
    assert torch.nonzero(moved).flatten().tolist() == [int(places[3 + 3])]


def test_annotations_share_all_views_of_an_image(nanovlm: Assembly) -> None:
    stream = nanovlm.processor.render(sample(picture(64, 64), times=2), RenderOptions(annotations="independent")).llm
    shared = (stream.attention_group == 0).sum()
    assert read(stream, nanovlm.processor.tokenizer).count("<|global_image|>") == 1
    assert shared == len("<user\n") + 5 * 2, "im_start and the word, then a token and a placeholder of every view"


def test_internvl_numbers_the_frames_of_a_video(internvl: Assembly) -> None:
    processor = internvl.processor
    film = MediaItem(name="0.mp4", width=32, height=32, frames=3, seconds=1.5, kind="video")
    text = read(processor.render(sample(film, question="What moves?")).llm, processor.tokenizer)
    frames = "".join(f"Frame-{number}: <img>@4</img>\n" for number in (1, 2, 3))
    assert f"<|im_start|>user\n{frames}What moves?<|im_end|>" in text
    still = read(processor.render(sample(picture(32, 32), question="What?")).llm, processor.tokenizer)
    assert "<|im_start|>user\n<img>@4</img>\nWhat?" in still, "an image has no number"


def make_template(**options: Any) -> Any:
    node = component("template", "internvl25")
    for name, value in options.items():
        OmegaConf.update(node, name, value, force_add=True, merge=False)
    return instantiate_part("template", node)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"views": {"frame": "a"}}, r"template\.views: frame and frame_end go together"),
        ({"views": {"tiles": "a"}}, r"template\.views: tiles; allowed: whole, tile, frame, frame_end"),
        ({"views": {"tile": "{number}"}}, r"template\.views\.tile: .* allowed in it: \{row\} and \{column\}"),
        ({"views": {"whole": "{"}}, r"template\.views\.whole: .* allowed in it: no counts"),
        ({"several_prefix": "{number.x}"}, r"template\.several_prefix: .* allowed in it: \{number\} and \{index\}"),
        ({"several_prefix": "{}"}, r"template\.several_prefix: .* allowed in it: \{number\} and \{index\}"),
    ],
)
def test_texts_that_count_wrongly_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_template(**options)


def test_views_that_have_no_names_or_are_joined_are_refused() -> None:
    marks = ["+template.views.tile=a"]
    with pytest.raises(ConfigError, match=r"text between the views .* AnyRes does not name them"):
        build_assembly(compose_tiny("recipe=llava_next_vicuna7b", "init_from=[]", *marks), meta=True)


def test_a_mark_that_is_no_token_is_refused(nanovlm: Assembly) -> None:
    """Else its letters would be read one by one."""
    processor = build_assembly(compose_tiny("recipe=nanovlm", "image.longest_side=288")).processor
    with pytest.raises(ConfigError, match=r"has the token '<row_1_col_9>', which is not in the tokenizer's vocabulary"):
        processor.render(sample(picture(288, 32)))
    assert nanovlm.processor.render(sample(picture(64, 64)))


def test_positions_on_three_axes_take_no_text_between_views() -> None:
    """Qwen2.5-VL's count seconds inside a video."""
    marks = ["+template.views={frame: a, frame_end: b}"]
    with pytest.raises(ConfigError, match=r"template\.views: .* llm counts positions inside them on three axes"):
        build_assembly(compose_tiny("recipe=qwen25_vl_3b", *marks), meta=True)


def test_show_names_the_views(nanovlm: Assembly) -> None:
    rendered = nanovlm.processor.render(sample(picture(64, 30)))
    shown = format_tokens(rendered, nanovlm.processor.tokenizer, color=False)
    assert "1 media" in shown and "[image 0 whole x1]" in shown and "[image 0 row 1, column 2 x1]" in shown
