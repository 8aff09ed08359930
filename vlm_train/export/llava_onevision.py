"""To LLaVA-OneVision of `transformers`, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from vlm_train.contracts.layout import MediaSize
from vlm_train.data.images.anyres import AnyRes
from vlm_train.data.processor import Processor
from vlm_train.errors import ConfigError
from vlm_train.export.chat import IMAGE_TOKEN, ServedImages, add_chat_template, describe_chat_template
from vlm_train.export.llava import add_image_token, choose_select_strategy, describe_parts, llava_state
from vlm_train.export.llava_import import find_wrong_kind, read_parts_later, read_weights
from vlm_train.export.llava_next import find_tile_problems, list_pinpoints, verify_tiles
from vlm_train.export.shared import load_served, load_without_videos, save_model, write_json_files
from vlm_train.runs.record import read_json

VIDEO_TOKEN = "<video>"
NAME = "LlavaOnevisionForConditionalGeneration"


class LlavaOnevisionExporter:
    """Writes LLaVA-OneVision. Its processor needs torchvision where it is used. No test runs its video processor."""

    def problems(self, model: Any) -> list[str]:
        return find_problems(model)

    def write(self, model: Any, processor: Processor, folder: Path) -> str:
        from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

        plan, tokenizer = require_plan(processor), add_image_token(processor.tokenizer)
        if VIDEO_TOKEN not in tokenizer.get_vocab():
            tokenizer.add_special_tokens({"extra_special_tokens": [VIDEO_TOKEN]}, replace_extra_special_tokens=False)
        image, video = (tokenizer.convert_tokens_to_ids(token) for token in (IMAGE_TOKEN, VIDEO_TOKEN))
        options = describe_parts(model, max(image, video))
        options["image_token_index"] = image
        config = LlavaOnevisionConfig(
            **options,
            video_token_index=video,
            image_grid_pinpoints=list_pinpoints(plan),
            vision_aspect_ratio=f"anyres_max_{model.stitcher.max_tiles}",
        )
        state = llava_state(model, config.text_config.vocab_size)
        state["model.image_newline"] = model.stitcher.newline.detach()
        save_model(LlavaOnevisionForConditionalGeneration, config, state, tokenizer, processor.end_ids, folder)
        write_processor(folder, model, plan, tokenizer)
        size = MediaSize(width=plan.size[1] * 5 // 3, height=plan.size[0])
        said = describe_chat_template(add_chat_template(folder, processor, size, ServedImages(load=load_images_only)))
        if plan.tile_several:
            return said
        return f"{said}; its processor tiles several images unless they come as a list in a list, training did not"

    def verify(self, model: Any, folder: Path) -> float:
        from transformers import LlavaOnevisionForConditionalGeneration

        return verify_tiles(model, load_served(LlavaOnevisionForConditionalGeneration, model, folder), folder)


class LlavaOnevisionImporter:
    """Reads local folders of a `LlavaOnevisionForConditionalGeneration`: config.json, safetensors and tokenizer.

    The recipe's `image` has to name its grids.
    """

    def problems(self, folder: Path) -> list[str]:
        return find_wrong_kind(folder, ("llava_onevision",), NAME)

    def adapt(self, cfg: DictConfig, folder: Path) -> None:
        read_parts_later(cfg, folder)

    def read(self, model: Any, folder: Path) -> None:
        from transformers import LlavaOnevisionForConditionalGeneration

        if problems := find_problems(model):
            raise ConfigError(problems)
        state = read_weights(model, folder, LlavaOnevisionForConditionalGeneration)
        model.stitcher.newline.data.copy_(state["model.image_newline"])


def find_problems(model: Any) -> list[str]:
    """Every reason why LLaVA-OneVision cannot express `model`. Reads no weight: it may be on meta."""
    if problems := find_tile_problems(model):
        return problems
    stitcher = model.stitcher
    if stitcher.max_tiles is None or stitcher.video_pool != 2:
        return [
            f"parts.stitcher: max_tiles {stitcher.max_tiles}, video_pool {stitcher.video_pool}; LLaVA-OneVision scales "
            "the tokens of many tiles down, and those of a frame by 2 (parts=unpad_newline_max9)"
        ]
    return []


def require_plan(processor: Processor) -> AnyRes:
    """The image plan of the processor. Raises `ConfigError` if it makes no AnyRes tiles."""
    plan = processor.images["vision"]
    if not isinstance(plan, AnyRes):
        raise ConfigError(f"image: {type(plan).__name__}; LLaVA-OneVision's images are tiles (image=anyres_max9)")
    return plan


def write_processor(folder: Path, model: Any, plan: AnyRes, tokenizer: Any) -> None:
    """Write the files of a LLaVA-OneVision processor. The class itself cannot be made without torchvision."""
    from transformers import LlavaOnevisionImageProcessorPil

    vision, size = model.vision, {"height": plan.size[0], "width": plan.size[1]}
    statistics = {"image_mean": list(vision.image_mean), "image_std": list(vision.image_std)}
    images = LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=list_pinpoints(plan), **statistics)
    images.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json_files(
        folder,
        video_preprocessor_config={"video_processor_type": "LlavaOnevisionVideoProcessor", "size": size, **statistics},
        processor_config={
            "processor_class": "LlavaOnevisionProcessor",
            "num_image_tokens": vision.grid.h * vision.grid.w,
            "vision_feature_select_strategy": choose_select_strategy(vision),
            "vision_aspect_ratio": f"anyres_max_{model.stitcher.max_tiles}",
        },
    )


def load_images_only(folder: Path) -> Any:
    """The processor of a folder without its videos."""
    from transformers import LlavaOnevisionImageProcessorPil, LlavaOnevisionProcessor

    own = read_json(folder / "processor_config.json")
    del own["processor_class"]
    images = LlavaOnevisionImageProcessorPil.from_pretrained(folder)
    return load_without_videos(LlavaOnevisionProcessor, folder, images, **own)
