"""To InternVL of `transformers`, whose images are tiles, and back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from vlm_train.contracts.layout import MediaSize
from vlm_train.contracts.media import MediaInput
from vlm_train.data.images.tiles import Tiles
from vlm_train.data.processor import Processor
from vlm_train.errors import AssetError, ConfigError
from vlm_train.export.chat import ServedImages, add_chat_template, describe_chat_template
from vlm_train.export.llava import llava_state
from vlm_train.export.llava_import import find_wrong_kind, read_parts_later, read_weights
from vlm_train.export.shared import (
    compare_logits,
    find_end_problems,
    load_served,
    load_without_videos,
    save_model,
    write_json_files,
)
from vlm_train.export.vocabulary import rows_with
from vlm_train.models.connectors.pixel_shuffle import PixelShuffleMLP
from vlm_train.runs.record import read_json

MARKS = ("<img>", "</img>")
CONTEXT, VIDEO = "<IMG_CONTEXT>", "<video>"
NAME = "InternVLForConditionalGeneration"
FRAME = "Frame{{number}}: {}"
"""What `InternVLProcessor` writes before a frame, whose first mark follows."""


class InternVLExporter:
    """Writes InternVL. Its processor needs torchvision where it is used. No test runs its video processor."""

    def problems(self, model: Any) -> list[str]:
        return find_problems(model)

    def write(self, model: Any, processor: Processor, folder: Path) -> str:
        from transformers import InternVLConfig, InternVLForConditionalGeneration

        plan, tokenizer = require_plan(processor), name_image_tokens(processor.tokenizer)
        image_token = tokenizer.convert_tokens_to_ids(CONTEXT)
        text = copy.deepcopy(model.llm.model.config)
        text.vocab_size = rows_with(image_token, model.llm.vocab_size)
        text.dtype = next(model.llm.parameters()).dtype
        tokens = model.connector.token_grid(model.vision.grid).size
        config = InternVLConfig(
            vision_config=model.vision.model.config.to_dict(),
            text_config=text.to_dict(),
            image_token_id=image_token,
            image_seq_length=tokens,
            downsample_ratio=1 / model.connector.factor,
            vision_feature_layer=model.vision.layer,
            tie_word_embeddings=text.tie_word_embeddings,
            dtype=text.dtype,
        )
        state = llava_state(model, text.vocab_size)
        for name, value in model.connector.norm.state_dict().items():
            state[f"model.multi_modal_projector.layer_norm.{name}"] = value
        save_model(InternVLForConditionalGeneration, config, state, tokenizer, processor.end_ids, folder)
        write_processor(folder, model.vision, plan, tokenizer, tokens)
        size = MediaSize(width=plan.size[1] * 5 // 3, height=plan.size[0])
        served = ServedImages(CONTEXT, MARKS, load_images_only)
        said = [describe_chat_template(add_chat_template(folder, processor, size, served))]
        if plan.share_tiles:
            said.append(f"its processor gives each of several images {plan.max_tiles} tiles, training let them share")
        if (before := processor.template.style.views.get("frame")) != (theirs := FRAME.format(MARKS[0])):
            said.append(f"its processor writes {theirs!r} before a frame of a video, training {before!r}")
        return "; ".join(said)

    def verify(self, model: Any, folder: Path) -> float:
        from transformers import InternVLForConditionalGeneration

        served = load_served(InternVLForConditionalGeneration, model, folder)
        height, width = model.vision.image_size
        views = (3, 3, height, width)  # two tiles and all of the image
        pixels = torch.randint(0, 256, views, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        media = MediaInput(pixels, (model.vision.patch_grid(MediaSize(width=width, height=height)),) * 3, (3,))
        return compare_logits(model, served, media, folder)


class InternVLImporter:
    """Reads local folders of an `InternVLForConditionalGeneration`: config.json, safetensors and tokenizer."""

    def problems(self, folder: Path) -> list[str]:
        return find_wrong_kind(folder, ("internvl",), NAME)

    def adapt(self, cfg: DictConfig, folder: Path) -> None:
        read_parts_later(cfg, folder)

    def read(self, model: Any, folder: Path) -> None:
        from transformers import InternVLForConditionalGeneration

        if problems := find_problems(model):
            raise ConfigError(problems)
        state = read_weights(model, folder, InternVLForConditionalGeneration)
        norm = {name: state[f"model.multi_modal_projector.layer_norm.{name}"] for name in ("weight", "bias")}
        try:
            model.connector.norm.load_state_dict(norm)
        except RuntimeError as error:
            raise AssetError(f"import: {str(folder)!r} does not fit the model: {error}") from error


def find_problems(model: Any) -> list[str]:
    """Every reason why InternVL cannot express `model`. Reads no weight: it may be on meta."""
    if problems := find_end_problems(model, "InternVL"):
        return problems
    vision, connector = model.vision, model.connector
    if not isinstance(connector, PixelShuffleMLP) or connector.norm is None or len(connector.layers) != 3:
        kind = type(connector).__name__
        return [f"connector: {kind}; InternVL has only the pixel shuffle with its norm and two layers"]
    if connector.layers[0].bias is None or connector.layers[0].out_features != connector.layers[2].out_features:
        problems.append("connector: InternVL's layers have a bias, and the width of the language model (wide=false)")
    if connector.norm.eps != 1e-5:
        problems.append(f"connector.eps: got {connector.norm.eps}; InternVL has 1e-5")
    if model.stitcher is not None:
        problems.append(f"parts.stitcher: {type(model.stitcher).__name__}; InternVL joins no tiles")
    if vision.model.config.model_type != "internvl_vision" or not isinstance(vision.layer, int):
        problems.append("vision: InternVL has one layer of a tower of its own (vision=intern_vit_300m)")
    if vision.keep_cls:
        problems.append("vision.keep_cls: true; InternVL joins patches alone")
    return problems


def require_plan(processor: Processor) -> Tiles:
    """The image plan of the processor. Raises `ConfigError` if it makes other tiles than InternVL's."""
    plan = processor.images["vision"]
    if not isinstance(plan, Tiles):
        raise ConfigError(f"image: {type(plan).__name__}; InternVL's images are tiles (image=tiles)")
    if not plan.thumbnail:
        raise ConfigError("image.thumbnail: got false; InternVL always adds it; allowed: true")
    return plan


def name_image_tokens(tokenizer: Any) -> Any:
    """A copy of a tokenizer whose InternVL tokens have the names that its processor asks for, without a chat template.

    Raises:
        ConfigError: it has no marks for an image.
    """
    from transformers import PreTrainedTokenizerFast

    missing = [mark for mark in MARKS if mark not in tokenizer.get_vocab()]
    if missing:
        raise ConfigError(f"tokenizer: has no token {', '.join(missing)}; InternVL's prompts do (tokenizer=internvl)")
    tokenizer = copy.deepcopy(tokenizer)
    named = {"start_image_token": MARKS[0], "end_image_token": MARKS[1]}
    named |= {"context_image_token": CONTEXT, "video_token": VIDEO}
    kept = {name: getattr(tokenizer, name) for name in ("padding_side", "model_max_length")}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        extra_special_tokens=named,
        **kept,
        **{name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)},
    )


def write_processor(folder: Path, vision: Any, plan: Tiles, tokenizer: Any, tokens: int) -> None:
    """Write the files of an `InternVLProcessor`. The class itself cannot be made without torchvision."""
    from transformers import GotOcr2ImageProcessorPil

    height, width = vision.image_size
    whole: dict[str, Any] = {"size": {"height": height, "width": width}}
    whole |= {"image_mean": list(vision.image_mean), "image_std": list(vision.image_std)}
    images = GotOcr2ImageProcessorPil(
        crop_to_patches=True, min_patches=plan.min_tiles, max_patches=plan.max_tiles, use_thumbnail=True, **whole
    )
    images.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    videos = {"video_processor_type": "InternVLVideoProcessor", "num_frames": plan.frames, **whole}
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": tokens}
    write_json_files(folder, video_preprocessor_config=videos, processor_config=processor)


def load_images_only(folder: Path) -> Any:
    """The InternVL processor of a folder without its videos."""
    from transformers import GotOcr2ImageProcessorPil, InternVLProcessor

    images = GotOcr2ImageProcessorPil.from_pretrained(folder)
    tokens = read_json(folder / "processor_config.json")["image_seq_length"]
    return load_without_videos(InternVLProcessor, folder, images, image_seq_length=tokens)
