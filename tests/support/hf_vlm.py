"""Batches of whole models of `transformers` as a run makes them, and the same as their own processors make them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from data_pipelines.media.limits import media_item
from data_pipelines.sample import Annotation, Media, Sample, Text, Turn
from tests.support.parity import encode, noise
from vlm_train.contracts.batch import Batch
from vlm_train.data.collate import Example, collate_rows
from vlm_train.data.images.library import LibraryPlan
from vlm_train.data.media_layout import make_layout
from vlm_train.data.processor import Processor
from vlm_train.data.text.library_template import LibraryTemplate
from vlm_train.data.text.template import ChatTemplate
from vlm_train.models.families.hf_vlm import HFVLM

SHOWN: list[list[tuple[int, int]]] = [[(90, 60)], [], [(61, 97), (32, 40)], [(40, 40)]]
"""Sizes of the images of each sample: one, none, several, one."""


def make_processor(model: HFVLM, **options: Any) -> Processor:
    """What a run of `model` reads samples with."""
    images = {"vision": LibraryPlan(processor=model.processor, **options)}
    tokenizer = model.processor.tokenizer
    template: Any = LibraryTemplate()
    if not tokenizer.chat_template:
        template = ChatTemplate(
            bos=False,
            media="front",
            media_suffix="",
            user_prefix="{bos}",
            assistant_prefix="\n",
            assistant_suffix="{eos}",
        )
    return Processor(tokenizer=tokenizer, template=template, layout=make_layout(model, images), images=images)


def make_sample(number: int, sizes: Sequence[tuple[int, int]]) -> tuple[Sample, list[bytes]]:
    """A question about its images, and an answer."""
    blobs = [encode(noise(*size)) for size in sizes]
    media = tuple(media_item(place, blob) for place, blob in enumerate(blobs))
    ask = Turn(
        role="user", parts=(*(Media(item=place) for place in range(len(blobs))), Text(text=f"What is {number}?"))
    )
    answer = Turn(role="assistant", parts=(Text(text=f"It is number {number}." + " So." * number),))
    return Sample(key=f"s{number}", media=media, annotations=(Annotation(turns=(ask, answer)),), source="test"), blobs


def make_examples(processor: Processor, shown: Sequence[Sequence[tuple[int, int]]] = SHOWN) -> list[Example]:
    """Samples as a loader hands them to collate."""
    found = []
    for number, sizes in enumerate(shown):
        sample, blobs = make_sample(number, sizes)
        found.append(Example(processor.render(sample), processor.make_views(blobs, media=sample.media), source="test"))
    return found


def make_batch(processor: Processor, rows: Sequence[Sequence[Example]]) -> Batch:
    """Rows of samples."""
    return collate_rows(rows, processor.images)


def library_batch(model: HFVLM, batch: Batch, shown: Sequence[Sequence[tuple[int, int]]]) -> dict[str, Any]:
    """What the model's own processor makes of the same texts and images: the text it is given is that of the batch, its
    images not expanded yet."""
    inner, tokenizer = model.processor.inner, model.processor.tokenizer
    if not tokenizer.chat_template:
        return _library_pairs(model, batch, shown)
    texts, images = [], []
    for row, sizes in enumerate(shown):
        real = batch.text["llm"].segment_ids[row] != 0
        ids = batch.text["llm"].ids[row][real].tolist()
        text = tokenizer.decode([model.image_id if one < 0 else one for one in ids], skip_special_tokens=False)
        for size in sizes:
            expanded = tokenizer.decode(list(model.processor.prepare(noise(*size))[1]), skip_special_tokens=False)
            assert expanded in text, (expanded, text)
            text = text.replace(expanded, "\ue000", 1)
        texts.append(text.replace("\ue000", model.processor.media_text))
        images.append([Image.open(io.BytesIO(encode(noise(*size)))) for size in sizes])
    nested = [one for one in images if one]
    flat = [one for row in images for one in row]
    options = {"return_tensors": "pt", "padding": True, "padding_side": "right", "add_special_tokens": False}
    try:
        return dict(inner(text=texts, images=flat or None, **options))
    except (ValueError, TypeError, IndexError):
        return dict(inner(text=texts, images=images if len(nested) < len(images) else nested, **options))


def _library_pairs(model: HFVLM, batch: Batch, shown: Sequence[Sequence[tuple[int, int]]]) -> dict[str, Any]:
    """The same of processors that put an image before a text by themselves, and know no conversation."""
    images = [Image.open(io.BytesIO(encode(noise(*size)))) for ((size,),) in zip(shown, strict=True)]
    texts = [f"What is {number}?" for number in range(len(images))]
    answers = [f"It is number {number}." + " So." * number for number in range(len(images))]
    options = {"images": images, "return_tensors": "pt", "padding": True, "padding_side": "right"}
    if model.whole.config.model_type == "paligemma":
        return dict(model.processor.inner(text=["<image>" + one for one in texts], suffix=answers, **options))
    bos, eos = model.processor.tokenizer.bos_token, model.processor.tokenizer.eos_token
    whole = [f"{bos}{text}\n{answer}{eos}" for text, answer in zip(texts, answers, strict=True)]
    return dict(model.processor.inner(text=whole, **options))


@lru_cache(maxsize=4)
def reference_model(folder: Path) -> Any:
    """The library's model as its users load it."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
