"""To LLaVA-NeXT and LLaVA-OneVision of `transformers`, whose images are cut into tiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm_train.contracts.layout import MediaSize
from vlm_train.contracts.media import MediaInput
from vlm_train.data.images.anyres import AnyRes
from vlm_train.data.processor import Processor
from vlm_train.errors import ConfigError
from vlm_train.export.chat import IMAGE_TOKEN, add_chat_template, describe_chat_template
from vlm_train.export.llava import (
    add_image_token,
    choose_select_strategy,
    describe_parts,
    find_part_problems,
    llava_state,
)
from vlm_train.export.shared import compare_logits, load_served, save_model
from vlm_train.models.stitchers.unpad_newline import UnpadNewline


class LlavaNextExporter:
    """Writes LLaVA-NeXT."""

    def problems(self, model: Any) -> list[str]:
        problems = find_tile_problems(model)
        stitcher = getattr(model, "stitcher", None)
        if isinstance(stitcher, UnpadNewline) and (stitcher.max_tiles or stitcher.video_pool):
            problems.append("parts.stitcher: LLaVA-NeXT scales no tokens down; max_tiles and video_pool must be null")
        return problems

    def write(self, model: Any, processor: Processor, folder: Path) -> str:
        from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

        plan, tokenizer = require_plan(processor), add_image_token(processor.tokenizer)
        options = describe_parts(model, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
        config = LlavaNextConfig(**options, image_grid_pinpoints=list_pinpoints(plan))
        state = llava_state(model, config.text_config.vocab_size)
        state["model.image_newline"] = model.stitcher.newline.detach()
        save_model(LlavaNextForConditionalGeneration, config, state, tokenizer, processor.end_ids, folder)
        make_next_processor(model.vision, plan, tokenizer).save_pretrained(folder)
        size = MediaSize(width=plan.size[1] * 5 // 3, height=plan.size[0])
        return describe_chat_template(add_chat_template(folder, processor, size))

    def verify(self, model: Any, folder: Path) -> float:
        from transformers import LlavaNextForConditionalGeneration

        served = load_served(LlavaNextForConditionalGeneration, model, folder)
        return verify_tiles(model, served, folder)


def find_tile_problems(model: Any) -> list[str]:
    """Every reason why neither LLaVA-NeXT nor LLaVA-OneVision can express `model`. Reads no weight."""
    if not isinstance(stitcher := getattr(model, "stitcher", None), UnpadNewline):
        kind = "null" if stitcher is None else type(stitcher).__name__
        return [f"parts.stitcher: {kind}; tiles are joined by UnpadNewline (parts=unpad_newline)"]
    problems = find_part_problems(model)
    if not problems and model.vision.image_size[0] != model.vision.image_size[1]:
        problems.append("vision.image_size: tiles are square")
    return problems


def require_plan(processor: Processor) -> AnyRes:
    """The image plan of the processor. Raises `ConfigError` if it makes no AnyRes tiles."""
    plan = processor.images["vision"]
    if not isinstance(plan, AnyRes):
        raise ConfigError(f"image: {type(plan).__name__}; LLaVA-NeXT's images are tiles (image=anyres)")
    if not plan.tile_several:
        raise ConfigError("image.tile_several: got false; LLaVA-NeXT tiles every image; allowed: true")
    return plan


def list_pinpoints(plan: AnyRes) -> list[list[int]]:
    """The grids of tiles as [height, width] in pixels."""
    return [[rows * plan.size[0], columns * plan.size[1]] for rows, columns in plan.tile_grids]


def make_next_processor(vision: Any, plan: AnyRes, tokenizer: Any) -> Any:
    """LLaVA-NeXT's processor for a tower and a tokenizer that has `<image>`; without a chat template."""
    from transformers import LlavaNextImageProcessorPil, LlavaNextProcessor

    side = plan.size[0]
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=list_pinpoints(plan),
        image_mean=list(vision.image_mean),
        image_std=list(vision.image_std),
    )
    return LlavaNextProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=side // vision.grid.h,
        vision_feature_select_strategy=choose_select_strategy(vision),
        num_additional_image_tokens=vision.prefix_tokens,
        image_token=IMAGE_TOKEN,
    )


def verify_tiles(model: Any, served: nn.Module, folder: Path) -> float:
    """Compare logits on a random wide image and a text, see `compare_logits`."""
    config: Any = served.config
    height, width = model.vision.image_size
    pinpoints = [(rows // height, columns // width) for rows, columns in config.image_grid_pinpoints]
    plan = AnyRes(size=(height, width), patch_grid=model.vision.patch_grid, grids=pinpoints)
    size = MediaSize(width=width * 5 // 3, height=height)
    views = (len(plan.grids(size)), 3, height, width)
    pixels = torch.randint(0, 256, views, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    media = MediaInput(pixels, plan.grids(size), (len(pixels),), (plan.shape(size),))
    return compare_logits(model, served, media, folder, image_sizes=torch.tensor([[size.height, size.width]]))
