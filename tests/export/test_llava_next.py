"""Export to LLaVA-NeXT and back: the processor cuts and counts as ours, answers are the same, refusals say why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaNextForConditionalGeneration

from tests.export.test_llava import tokenizer_of
from tests.models.families.test_anyres_parity import make_plan, tiny_anyres
from tests.support.parity import encode, noise
from tests.support.tiny_models import assert_close, text_stream, tiny_vlm
from vlm_train.contracts.batch import Batch, MediaBatch
from vlm_train.contracts.layout import PLACEHOLDER_ID, MediaSize
from vlm_train.data.collate import join_views
from vlm_train.data.media_layout import make_layout
from vlm_train.data.processor import Processor
from vlm_train.data.text.template import ChatTemplate
from vlm_train.errors import AssetError, ConfigError
from vlm_train.export.llava import LlavaExporter
from vlm_train.export.llava_import import LlavaImporter, LlavaNextImporter
from vlm_train.export.llava_next import LlavaNextExporter


def processor_of(model: Any) -> Processor:
    plan = make_plan(model, "next")
    layout = make_layout(model, {"vision": plan})
    template = ChatTemplate(system=None, user_prefix="w2 ", user_suffix=" w3 ", media="first", media_suffix=" ")
    return Processor(tokenizer=tokenizer_of(96), template=template, layout=layout, images={"vision": plan})


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Any, Path]:
    model = tiny_anyres("next").eval()
    exporter = LlavaNextExporter()
    assert exporter.problems(model) == []
    exporter.write(model, processor_of(model), tmp_path)
    assert exporter.verify(model, tmp_path) < 1e-5
    return model, tmp_path


@pytest.mark.parametrize("size", [(90, 60), (61, 97), (32, 32), (300, 2), (333, 77)])
def test_a_served_image_gives_our_logits_and_answers(exported: tuple[Any, Path], size: tuple[int, int]) -> None:
    model, folder = exported
    processor = AutoProcessor.from_pretrained(folder)
    served = LlavaNextForConditionalGeneration.from_pretrained(folder).eval()
    pixels = noise(*size)
    inputs = processor(images=Image.fromarray(pixels), text="w5 <image> w6 w7", return_tensors="pt")

    plan = make_plan(model, "next")
    ((slot,),) = make_layout(model, {"vision": plan})([MediaSize(*size)])
    shown = join_views([plan(encode(pixels))], plan)
    media = MediaBatch(
        inputs={"vision": shown}, slot_counts=(slot.count,), row=torch.zeros(1, dtype=torch.long), keys=("one",)
    )
    batch = Batch(text={"llm": text_stream([[5, *[PLACEHOLDER_ID] * slot.count, 6, 7]])}, media=media)
    expected = torch.where(
        batch.text["llm"].ids == PLACEHOLDER_ID, served.config.image_token_index, batch.text["llm"].ids
    )
    assert torch.equal(inputs["input_ids"], expected)
    with torch.no_grad():
        assert_close(served(**inputs).logits[..., :96], model.logits(model(batch))[..., :96])
    answer = served.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=[], pad_token_id=0)[:, -5:]
    assert torch.equal(model.generate(batch, max_new_tokens=5, eos_ids=[]), answer)


def test_what_was_exported_comes_back(exported: tuple[Any, Path]) -> None:
    model, folder = exported
    other = tiny_anyres("next")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    importer = LlavaNextImporter()
    assert importer.problems(folder) == [] and "'llava_next'; allowed: llava" in LlavaImporter().problems(folder)[0]
    importer.read(other, folder)
    for (key, a), b in zip(other.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b), key


def test_another_newline_is_not_accepted(exported: tuple[Any, Path]) -> None:
    model, folder = exported
    with torch.no_grad():
        model.stitcher.newline.add_(0.1)
    with pytest.raises(AssetError, match=r"logits of .* differ by"):
        LlavaNextExporter().verify(model, folder)


def test_images_that_the_exported_processor_would_not_make_are_refused(tmp_path: Path) -> None:
    model = tiny_anyres("next").eval()
    processor = processor_of(model)
    with pytest.raises(ConfigError, match=r"image: AnyRes; this export takes one view an image"):
        LlavaExporter().write(model, processor, tmp_path)
    processor.images["vision"].tile_several = False  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"image\.tile_several: got false; LLaVA-NeXT tiles every image"):
        LlavaNextExporter().write(model, processor, tmp_path)


def test_compositions_without_an_equivalent_have_problems() -> None:
    (problem,) = LlavaExporter().problems(tiny_anyres("next"))
    assert problem == "parts.stitcher: UnpadNewline; LLaVA joins no tiles"
    (problem,) = LlavaNextExporter().problems(tiny_vlm())
    assert problem == "parts.stitcher: null; tiles are joined by UnpadNewline (parts=unpad_newline)"
    (problem,) = LlavaNextExporter().problems(tiny_anyres("onevision"))
    assert problem == "parts.stitcher: LLaVA-NeXT scales no tokens down; max_tiles and video_pool must be null"
