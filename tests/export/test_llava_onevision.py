"""Export to LLaVA-OneVision and back: the processor cuts and counts as ours, answers are the same, refusals say why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LlavaOnevisionForConditionalGeneration

from tests.export.test_llava import tokenizer_of
from tests.models.families.test_anyres_parity import make_plan, tiny_anyres
from tests.support.parity import encode, noise
from tests.support.tiny_models import assert_close, text_stream, tiny_vlm
from vlm_train.contracts.batch import Batch, MediaBatch
from vlm_train.contracts.layout import PLACEHOLDER_ID, MediaSize
from vlm_train.data.collate import join_views
from vlm_train.data.images.anyres import AnyRes
from vlm_train.data.media_layout import make_layout
from vlm_train.data.processor import Processor
from vlm_train.data.text.template import ChatTemplate
from vlm_train.errors import AssetError, ConfigError
from vlm_train.export.llava import LlavaExporter
from vlm_train.export.llava_import import LlavaNextImporter
from vlm_train.export.llava_onevision import LlavaOnevisionExporter, LlavaOnevisionImporter, load_images_only


def processor_of(model: Any, **changes: Any) -> Processor:
    plan = make_plan(model, "onevision")
    for name, value in changes.items():
        setattr(plan, name, value)
    layout = make_layout(model, {"vision": plan})
    template = ChatTemplate(system=None, user_prefix="w2 ", user_suffix=" w3 ", media="first", media_suffix=" ")
    return Processor(tokenizer=tokenizer_of(96), template=template, layout=layout, images={"vision": plan})


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Any, Path]:
    model = tiny_anyres("onevision").eval()
    exporter = LlavaOnevisionExporter()
    assert exporter.problems(model) == []
    assert exporter.write(model, processor_of(model), tmp_path) == "a chat template that gives the prompts of training"
    assert exporter.verify(model, tmp_path) < 1e-5
    return model, tmp_path


@pytest.mark.parametrize("sizes", [[(90, 60)], [(61, 97)], [(32, 32)], [(300, 2)], [(333, 77)], [(90, 60), (20, 70)]])
def test_served_images_give_our_logits_and_answers(exported: tuple[Any, Path], sizes: list[tuple[int, int]]) -> None:
    model, folder = exported
    processor = load_images_only(folder)
    served = LlavaOnevisionForConditionalGeneration.from_pretrained(folder).eval()
    pixels = [noise(*size) for size in sizes]
    shown = [Image.fromarray(one) for one in pixels]
    text = "w5 " + "<image> " * len(sizes) + "w6 w7"
    inputs = processor(images=[shown] if len(sizes) > 1 else shown, text=text, return_tensors="pt")

    plan = AnyRes(
        size=model.vision.image_size,
        patch_grid=model.vision.patch_grid,
        mean=model.vision.image_mean,
        grids=3,
        tile_several=False,
    )
    several = {"images": len(sizes)}
    slots = make_layout(model, {"vision": plan})([MediaSize(*size, **several) for size in sizes])
    counts = [slot.count for (slot,) in slots]
    views = join_views([plan(encode(one), images=len(sizes)) for one in pixels], plan)
    media = MediaBatch(
        inputs={"vision": views},
        slot_counts=tuple(counts),
        row=torch.zeros(len(sizes), dtype=torch.long),
        keys=("one",) * len(sizes),
    )
    batch = Batch(text={"llm": text_stream([[5, *[PLACEHOLDER_ID] * sum(counts), 6, 7]])}, media=media)
    stream = batch.text["llm"]
    expected = torch.where(stream.ids == PLACEHOLDER_ID, served.config.image_token_index, stream.ids)
    assert torch.equal(inputs["input_ids"], expected)
    with torch.no_grad():
        assert_close(served(**inputs).logits[..., :96], model.logits(model(batch))[..., :96])
    answer = served.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=[], pad_token_id=0)[:, -5:]
    assert torch.equal(model.generate(batch, max_new_tokens=5, eos_ids=[]), answer)


def test_what_was_exported_comes_back(exported: tuple[Any, Path]) -> None:
    model, folder = exported
    other = tiny_anyres("onevision")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    importer = LlavaOnevisionImporter()
    assert (
        importer.problems(folder) == []
        and "'llava_onevision'; allowed: llava_next" in LlavaNextImporter().problems(folder)[0]
    )
    importer.read(other, folder)
    for (key, a), b in zip(other.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b), key


def test_the_files_are_those_of_the_published_models(exported: tuple[Any, Path]) -> None:
    _, folder = exported
    read = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    config, processor = read["config.json"], read["processor_config.json"]
    assert (config["model_type"], config["vision_aspect_ratio"]) == ("llava_onevision", "anyres_max_2")
    assert (processor["num_image_tokens"], processor["vision_aspect_ratio"]) == (16, "anyres_max_2")
    assert read["preprocessor_config.json"]["image_processor_type"] == "LlavaOnevisionImageProcessor"
    assert config["image_token_index"] != config["video_token_index"] < config["text_config"]["vocab_size"]


def test_another_newline_is_not_accepted(exported: tuple[Any, Path]) -> None:
    model, folder = exported
    with torch.no_grad():
        model.stitcher.newline.add_(0.1)
    with pytest.raises(AssetError, match=r"logits of .* differ by"):
        LlavaOnevisionExporter().verify(model, folder)


def test_several_images_are_told_of(tmp_path: Path) -> None:
    model = tiny_anyres("onevision").eval()
    said = LlavaOnevisionExporter().write(model, processor_of(model, tile_several=False), tmp_path)
    assert said.endswith("; its processor tiles several images unless they come as a list in a list, training did not")


def test_what_it_cannot_express_is_refused(tmp_path: Path) -> None:
    exporter, model = LlavaOnevisionExporter(), tiny_anyres("onevision")
    assert exporter.problems(tiny_vlm())[0].startswith("parts.stitcher: null")
    (problem,) = exporter.problems(tiny_anyres("next"))
    assert problem.startswith("parts.stitcher: max_tiles None, video_pool None; LLaVA-OneVision scales")
    (problem,) = LlavaExporter().problems(model)
    assert problem == "parts.stitcher: UnpadNewline; LLaVA joins no tiles"
    processor = processor_of(model)
    processor.images["vision"].__class__ = type("Other", (), {})  # type: ignore[attr-defined, index]
    with pytest.raises(ConfigError, match="image: Other; LLaVA-OneVision's images are tiles"):
        exporter.write(model, processor, tmp_path)
