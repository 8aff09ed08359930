"""Export to Qwen2-VL and Qwen2.5-VL and back: the processor cuts and counts as ours, answers are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from data_pipelines.sample import Annotation, Media, MediaItem, Sample, Text, Turn
from tests.models.vision.test_qwen import ours
from tests.support.components import component
from tests.support.parity import encode, noise
from tests.support.tiny_models import assert_close, llama_config, tiny_llm, tiny_vlm
from vlm_train.data.collate import collate_prompts
from vlm_train.data.images.native import NativeResolution
from vlm_train.data.media_layout import make_layout
from vlm_train.data.processor import Processor
from vlm_train.data.text.render import RenderOptions
from vlm_train.data.text.tokenizer import byte_level
from vlm_train.errors import AssetError, ConfigError
from vlm_train.export.qwen_vl import QwenVLExporter, choose_classes, load_images_only
from vlm_train.export.qwen_vl_import import QwenVLImporter
from vlm_train.models.connectors.pixel_shuffle import PixelShuffleMLP
from vlm_train.models.families.prefix_vlm import PrefixVLM

KINDS = {"qwen2": "qwen2_vl_text", "qwen2.5": "qwen2_5_vl_text"}


def tiny_qwen(kind: str, seed: int = 0, **changes: Any) -> PrefixVLM:
    vision = ours(changes.get("vision", kind))
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
    numbers = llama_config(model_type=KINDS[kind], rope_parameters=rope, tie_word_embeddings=False)
    numbers |= {"vocab_size": len(byte_level()), "max_position_embeddings": 4096}
    torch.manual_seed(seed)
    llm = tiny_llm(numbers, tokens_per_second=None if kind == "qwen2" else 4)
    norm: Any = "patch" if kind == "qwen2" else "patch_rms"
    options = {"norm": norm, "wide": True, "eps": 1e-6} | changes.get("connector", {})
    connector = PixelShuffleMLP(in_dim=vision.out_dim, out_dim=llm.dim, **options)
    model = PrefixVLM(vision=vision, connector=connector, llm=llm).eval()
    with torch.no_grad():
        for parameter in (*connector.parameters(), *llm.parameters()):
            parameter.mul_(3.0) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
        for parameter in vision.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model


def processor_of(model: PrefixVLM, **changes: Any) -> Processor:
    plan = NativeResolution(
        patch_size=model.vision.patch_size,
        patch_grid=model.vision.patch_grid,
        frames_per_patch=2,
        **{"min_pixels": 64, "max_pixels": 2048, **changes},
    )
    return Processor(
        tokenizer=byte_level(),
        template=hydra.utils.instantiate(component("template", "qwen2_vl")),
        layout=make_layout(model, {"vision": plan}),
        images={"vision": plan},
    )


@pytest.fixture(params=list(KINDS))
def exported(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, PrefixVLM, Path]:
    model, exporter = tiny_qwen(request.param), QwenVLExporter()
    assert exporter.problems(model) == []
    assert exporter.write(model, processor_of(model), tmp_path) == "a chat template that gives the prompts of training"
    assert exporter.verify(model, tmp_path) < 1e-5
    return request.param, model, tmp_path


@pytest.mark.parametrize("sizes", [[(40, 24)], [(300, 2)], [(333, 77), (16, 16)], []])
def test_a_served_prompt_gives_our_ids_pixels_logits_and_answers(
    exported: tuple[str, PrefixVLM, Path], sizes: list[tuple[int, int]]
) -> None:
    kind, model, folder = exported
    processor, mine = load_images_only(folder), processor_of(model)
    served = choose_classes(KINDS[kind])[0].from_pretrained(folder).eval()
    pictures = [noise(*size) for size in sizes]
    message = {"role": "user", "content": [{"type": "image"} for _ in sizes] + [{"type": "text", "text": "Which?"}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(images=[Image.fromarray(one) for one in pictures] or None, text=text, return_tensors="pt")

    media = tuple(MediaItem(name=f"{n}.png", width=w, height=h) for n, (w, h) in enumerate(sizes))
    turn = Turn(role="user", parts=(*(Media(item=n) for n in range(len(sizes))), Text(text="Which?")))
    sample = Sample(key="one", media=media, annotations=(Annotation(turns=(turn,)),))
    rendered = mine.render(sample, RenderOptions(annotations="first", generation=True))
    batch = collate_prompts([(rendered, mine.make_views([encode(one) for one in pictures], media=media))], mine.images)
    stream = batch.text["llm"]
    assert torch.equal(inputs["input_ids"], torch.where(stream.ids < 0, served.config.image_token_id, stream.ids))
    with torch.no_grad():
        assert_close(served(**inputs).logits[..., : model.llm.vocab_size], model.logits(model(batch)))
    answer = served.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=[], pad_token_id=0)[:, -5:]
    assert torch.equal(model.generate(batch, max_new_tokens=5, eos_ids=[]), answer)


def test_what_was_exported_comes_back(exported: tuple[str, PrefixVLM, Path]) -> None:
    kind, model, folder = exported
    other, importer = tiny_qwen(kind, seed=1), QwenVLImporter()
    assert importer.problems(folder) == []
    importer.read(other, folder)
    for (key, a), b in zip(other.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.parametrize("part", ["vision", "connector"])
def test_a_part_reads_its_own_weights_out_of_it(exported: tuple[str, PrefixVLM, Path], part: str) -> None:
    kind, model, folder = exported
    mine, other = getattr(model, part), getattr(tiny_qwen(kind, seed=1), part)
    other.weights = str(folder)
    other.load_weights()
    for (key, a), b in zip(other.named_parameters(), mine.parameters(), strict=True):
        assert torch.equal(a, b), key


def test_the_files_are_those_of_the_published_models(exported: tuple[str, PrefixVLM, Path]) -> None:
    kind, _, folder = exported
    read = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert read["config.json"]["model_type"] == ("qwen2_vl" if kind == "qwen2" else "qwen2_5_vl")
    assert read["preprocessor_config.json"]["image_processor_type"] == "Qwen2VLImageProcessor"
    assert read["video_preprocessor_config.json"]["video_processor_type"] == "Qwen2VLVideoProcessor"
    expected = "Qwen2VLProcessor" if kind == "qwen2" else "Qwen2_5_VLProcessor"
    assert read["processor_config.json"] == {"processor_class": expected}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == read["config.json"]["image_token_id"]


def test_another_merger_is_not_accepted(exported: tuple[str, PrefixVLM, Path]) -> None:
    _, model, folder = exported
    with torch.no_grad():
        model.connector.layers[0].weight.add_(0.1)
    with pytest.raises(AssetError, match=r"logits of .* differ by"):
        QwenVLExporter().verify(model, folder)


def test_compositions_without_an_equivalent_have_problems() -> None:
    exporter = QwenVLExporter()
    assert exporter.problems(tiny_vlm()) == [
        "llm: llama; Qwen-VL has qwen2_vl_text and qwen2_5_vl_text (llm=qwen25_vl_3b)"
    ]
    (problem,) = exporter.problems(tiny_qwen("qwen2.5", vision="qwen2"))
    assert problem == "vision: norm, gated and window are not those of qwen2_5_vl_text"
    (problem,) = exporter.problems(tiny_qwen("qwen2", connector={"wide": False}))
    assert problem == "connector: PixelShuffleMLP; qwen2_vl_text goes with connector=qwen2_merger"


def test_another_plan_is_refused(tmp_path: Path) -> None:
    model = tiny_qwen("qwen2")
    with pytest.raises(ConfigError, match=r"image\.merge: the connector joins 2 patches a side"):
        QwenVLExporter().write(model, processor_of(model, merge=4, min_pixels=256), tmp_path)
