"""Image plans keep the contract of `vlm_train.data.images.plan`, templates that of `vlm_train.data.text.template`."""

from __future__ import annotations

import inspect
import io
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.sample import Annotation, Sample, Text, Turn
from vlm_train.build import build_image_plan, build_tokenizer
from vlm_train.config.signatures import import_target
from vlm_train.contract.component import Component
from vlm_train.contract.finding import Finding, check_pickle, compare_values, require_members
from vlm_train.contracts.layout import MediaSize, NoMedia
from vlm_train.contracts.media import Grid3
from vlm_train.data.processor import Processor
from vlm_train.data.text.render import RenderOptions

PATCH, SIDE = 8, 128
PICTURES = ((90, 60), (40, 120), (64, 64))
ANSWER = "A cat sits here."


def check_image(component: Component) -> Iterator[Finding]:
    """An image plan, in front of an encoder with patches of 8 pixels: `ImagePlan`."""
    node = component.copy_options(written=True)
    wanted = inspect.signature(import_target(node._target_)).parameters
    sized = "size" in wanted
    encoder = SimpleNamespace(
        image_size=(SIDE, SIDE) if sized else None,
        image_mean=(0.5, 0.5, 0.5),
        patch_grid=partial(count_patches, patch_size=PATCH),
        patch_size=PATCH,
        processor=_make_processor(component) if "processor" in wanted else None,
    )
    plan: Any = build_image_plan(node, encoder)
    yield (found := require_members(plan, ("random", "grids", "blank", "__call__")))
    if found.problem:
        return
    yield check_pickle("can be sent to data workers", plan)
    for width, height in PICTURES:
        views = plan(_draw_picture(width, height))
        known = plan.grids(MediaSize(width, height))
        yield compare_values(
            f"{width} x {height} pixels: views have the grids that were known before", views.grids, known
        )
        yield compare_values("values are uint8, as many as the grids say", _describe_views(views), (np.uint8, True))
        again = plan(_draw_picture(width, height))
        yield compare_values("without a generator nothing is random", np.array_equal(views.values, again.values), True)
        drawn = [plan(_draw_picture(width, height), np.random.default_rng(7)).values for _ in range(2)]
        yield compare_values("the same generator draws the same", np.array_equal(*drawn), True)
    blank = plan.blank()
    found_blank = (len(blank.grids), bool(blank.values.any()), *_describe_views(blank))
    yield compare_values("the blank input is one view of zeros", found_blank, (1, False, np.uint8, True))


def _make_processor(component: Component) -> Any:
    """The processor of the whole model that the configuration names."""
    from vlm_train.build import build_model

    model: Any = build_model(component.small, meta=True)
    return model.processor


def count_patches(size: MediaSize, patch_size: int) -> Grid3:
    """The patch grid of a view."""
    return Grid3(1, size.height // patch_size, size.width // patch_size)


def _describe_views(views: Any) -> tuple[Any, bool]:
    """The kind of the numbers, and whether there are as many as the grids say."""
    flat = views.values.ndim == 2
    rows = sum(grid.size for grid in views.grids) if flat else len(views.grids)
    return views.values.dtype.type, len(views.values) == rows


def _draw_picture(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").resize((width, height)).save(file, "PNG")
    return file.getvalue()


def check_template(component: Component) -> Iterator[Finding]:
    """A template, with a tokenizer of one token a byte: `Template`."""
    template = component.make_small()
    yield (found := require_members(template, ("bos", "style", "make_spans", "answer_end", "check_tokenizer")))
    if found.problem:
        return
    yield check_pickle("can be sent to data workers", template)
    tokenizer = build_tokenizer(component.small)
    template.check_tokenizer(tokenizer)
    ask = Turn(role="user", parts=(Text(text="What?"),))
    answer = Turn(role="assistant", parts=(Text(text=ANSWER),))
    sample = Sample(key="contract", annotations=(Annotation(turns=(ask, answer)),))
    processor = Processor(tokenizer=tokenizer, template=template, layout=NoMedia())
    stream = processor.render(sample).llm
    prompt = processor.render(sample, RenderOptions(generation=True)).llm
    learned = tokenizer.decode(stream.labels[stream.labels >= 0].tolist())
    yield Finding("the answer is learned", "" if ANSWER in learned else f"learned is {learned!r}")
    yield Finding("the question is not", f"learned is {learned!r}" if "What?" in learned else "")
    start = tokenizer.decode(stream.ids[: len(prompt)].tolist())
    given = tokenizer.decode(prompt.ids.tolist())
    yield compare_values("a prompt is how the text for training begins", given, start)
