"""Export to InternVL and back: the processor cuts and counts as ours, answers are the same, refusals say why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, GotOcr2ImageProcessorPil, InternVLForConditionalGeneration

from data_pipelines.sample import Annotation, Media, MediaItem, Sample, Text, Turn
from tests.models.families.test_internvl_parity import INTERN_VIT
from tests.support.components import component
from tests.support.parity import encode, noise
from tests.support.tiny_models import assert_close, llama_config, tiny_llm, tiny_vision, tiny_vlm
from vlm_train.contracts.layout import MediaSize
from vlm_train.data.collate import collate_prompts
from vlm_train.data.images.tiles import Tiles
from vlm_train.data.media_layout import make_layout
from vlm_train.data.processor import Processor
from vlm_train.data.text.render import RenderOptions
from vlm_train.data.text.tokenizer import byte_level
from vlm_train.errors import AssetError, ConfigError
from vlm_train.export.internvl import CONTEXT, InternVLExporter, InternVLImporter, load_images_only
from vlm_train.models.connectors.pixel_shuffle import PixelShuffleMLP
from vlm_train.models.families.prefix_vlm import PrefixVLM

MARKS = ["<img>", "</img>"]


def tiny_internvl(seed: int = 0, **connector: Any) -> PrefixVLM:
    """With the vocabulary of the byte-level tokenizer, the marks being new tokens."""
    torch.manual_seed(seed)
    vision = tiny_vision(INTERN_VIT, layer=-1)
    numbers = llama_config(model_type="qwen2", vocab_size=len(byte_level()), max_position_embeddings=4096)
    llm = tiny_llm(numbers, new_tokens=2)
    shuffle = PixelShuffleMLP(in_dim=vision.out_dim, out_dim=llm.dim, **connector)
    model = PrefixVLM(vision=vision, connector=shuffle, llm=llm).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
        for table in (llm.model.get_input_embeddings().new_embeddings, llm.model.get_output_embeddings().new_head):
            table.normal_()
    return model


def processor_of(model: PrefixVLM, template: str = "internvl25", tokenizer: Any = None, **plan: Any) -> Processor:
    tiles = Tiles(size=model.vision.image_size, patch_grid=model.vision.patch_grid, max_tiles=6, **plan)
    return Processor(
        tokenizer=tokenizer or byte_level(add=MARKS),
        template=hydra.utils.instantiate(component("template", template)),
        layout=make_layout(model, {"vision": tiles}),
        images={"vision": tiles},
    )


@pytest.fixture
def exported(tmp_path: Path) -> tuple[PrefixVLM, Path]:
    model, exporter = tiny_internvl(), InternVLExporter()
    assert exporter.problems(model) == []
    said = exporter.write(model, processor_of(model), tmp_path)
    assert said == (
        "a chat template that gives the prompts of training; its processor writes 'Frame{number}: <img>' before a "
        "frame of a video, training 'Frame-{number}: <img>'"
    )
    assert exporter.verify(model, tmp_path) < 1e-5
    return model, tmp_path


@pytest.mark.parametrize("sizes", [[(90, 60)], [(61, 97)], [(32, 32)], [(300, 2)], [(333, 77), (20, 20)], []])
def test_a_served_prompt_gives_our_ids_pixels_logits_and_answers(
    exported: tuple[PrefixVLM, Path], sizes: list[tuple[int, int]]
) -> None:
    model, folder = exported
    processor, ours = load_images_only(folder), processor_of(model)
    served = InternVLForConditionalGeneration.from_pretrained(folder).eval()
    pictures = [noise(*size) for size in sizes]
    message = {"role": "user", "content": [{"type": "image"} for _ in sizes] + [{"type": "text", "text": "Which?"}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(images=[Image.fromarray(one) for one in pictures] or None, text=text, return_tensors="pt")

    media = tuple(MediaItem(name=f"{n}.png", width=w, height=h) for n, (w, h) in enumerate(sizes))
    turn = Turn(role="user", parts=(*(Media(item=n) for n in range(len(sizes))), Text(text="Which?")))
    sample = Sample(key="one", media=media, annotations=(Annotation(turns=(turn,)),))
    rendered = ours.render(sample, RenderOptions(annotations="first", generation=True))
    batch = collate_prompts([(rendered, ours.make_views([encode(one) for one in pictures], media=media))], ours.images)
    stream, shown = batch.text["llm"], batch.media.inputs["vision"]
    assert torch.equal(inputs["input_ids"], torch.where(stream.ids < 0, served.config.image_token_id, stream.ids))
    if sizes:
        pixels = (shown.values.float() / 255 - model.vision.get_buffer("mean")) / model.vision.get_buffer("std")
        assert (inputs["pixel_values"] - pixels).abs().max() <= 1e-6 * pixels.abs().max()
    with torch.no_grad():
        assert_close(served(**inputs).logits[..., : model.llm.vocab_size], model.logits(model(batch)))
    answer = served.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=[], pad_token_id=0)[:, -5:]
    assert torch.equal(model.generate(batch, max_new_tokens=5, eos_ids=[]), answer)


def test_what_was_exported_comes_back(exported: tuple[PrefixVLM, Path]) -> None:
    model, folder = exported
    other, importer = tiny_internvl(seed=1), InternVLImporter()
    assert importer.problems(folder) == []
    importer.read(other, folder)
    for (key, a), b in zip(other.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b), key


def test_the_files_are_those_of_the_published_conversions(exported: tuple[PrefixVLM, Path]) -> None:
    _, folder = exported
    read = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert read["config.json"]["model_type"] == "internvl"
    assert (read["config.json"]["image_seq_length"], read["config.json"]["downsample_ratio"]) == (4, 0.5)
    assert read["processor_config.json"] == {"processor_class": "InternVLProcessor", "image_seq_length": 4}
    assert read["preprocessor_config.json"]["image_processor_type"] == "GotOcr2ImageProcessor"
    assert read["video_preprocessor_config.json"]["video_processor_type"] == "InternVLVideoProcessor"
    images = GotOcr2ImageProcessorPil.from_pretrained(folder)
    assert (images.crop_to_patches, images.min_patches, images.max_patches) == (True, 1, 6)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.start_image_token, tokenizer.end_image_token) == ("<img>", "</img>")
    assert tokenizer.context_image_token == CONTEXT and tokenizer.chat_template


def test_a_template_without_the_marks_is_not_written(tmp_path: Path) -> None:
    model = tiny_internvl()
    said = InternVLExporter().write(model, processor_of(model, "chatml"), tmp_path)
    assert said.startswith("no chat template: its ids for a user conversation differ from training's")


def test_images_that_shared_their_tiles_in_training_are_told_of(tmp_path: Path) -> None:
    model = tiny_internvl()
    said = InternVLExporter().write(model, processor_of(model, share_tiles=True), tmp_path)
    assert "; its processor gives each of several images 6 tiles, training let them share" in said
    pictures = [Image.fromarray(noise(150, 90))] * 2
    served = load_images_only(tmp_path).image_processor(pictures, return_tensors="pt")["num_patches"]
    size = MediaSize(width=150, height=90, images=2)
    assert int(served[0]) > len(processor_of(model, share_tiles=True).images["vision"].grids(size))


def test_what_the_exported_processor_would_not_make_is_refused(tmp_path: Path) -> None:
    model, exporter = tiny_internvl(), InternVLExporter()
    with pytest.raises(ConfigError, match=r"image\.thumbnail: got false"):
        exporter.write(model, processor_of(model, thumbnail=False), tmp_path)
    with pytest.raises(ConfigError, match=r"tokenizer: has no token <img>, </img>"):
        exporter.write(model, processor_of(model, tokenizer=byte_level()), tmp_path)


def test_another_norm_is_not_accepted(exported: tuple[PrefixVLM, Path]) -> None:
    model, folder = exported
    with torch.no_grad():
        model.connector.norm.weight.add_(0.1)
    with pytest.raises(AssetError, match=r"logits of .* differ by"):
        InternVLExporter().verify(model, folder)


@pytest.mark.parametrize(
    ("connector", "said"),
    [
        ({"wide": True}, "connector: InternVL's layers have a bias, and the width of the language model (wide=false)"),
        ({"bias": False}, "connector: InternVL's layers have a bias, and the width of the language model (wide=false)"),
        ({"eps": 1e-6}, "connector.eps: got 1e-06; InternVL has 1e-5"),
        (
            {"norm": None},
            "connector: PixelShuffleMLP; InternVL has only the pixel shuffle with its norm and two layers",
        ),
        ({"depth": 3}, "connector: PixelShuffleMLP; InternVL has only the pixel shuffle with its norm and two layers"),
    ],
)
def test_connectors_without_an_equivalent_have_problems(connector: dict[str, Any], said: str) -> None:
    assert InternVLExporter().problems(tiny_internvl(**connector)) == [said]


def test_other_models_have_problems() -> None:
    (problem,) = InternVLExporter().problems(tiny_vlm())
    assert problem.startswith("connector: MLP; InternVL has only the pixel shuffle")
    assert "no InternVL equivalent" in InternVLExporter().problems(torch.nn.Linear(1, 1))[0]
