"""To the native LLaVA of `transformers`, which vLLM, TGI, SGLang and lmms-eval load."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm_train.contracts.media import MediaInput
from vlm_train.data.processor import Processor
from vlm_train.errors import ConfigError
from vlm_train.export.chat import IMAGE_TOKEN, add_chat_template, describe_chat_template
from vlm_train.export.merged import merged_state
from vlm_train.export.shared import compare_logits, find_end_problems, language_state, load_served, save_model
from vlm_train.export.vocabulary import rows_with
from vlm_train.models.connectors.mlp import MLP
from vlm_train.models.families.prefix_vlm import PrefixVLM
from vlm_train.models.vision.example import typical_size
from vlm_train.models.vision.hf import HFVision


class LlavaExporter:
    """Writes LLaVA."""

    def problems(self, model: Any) -> list[str]:
        return find_problems(model)

    def write(self, model: Any, processor: Processor, folder: Path) -> str:
        mode = require_image_mode(processor, "pad")
        write_llava(model, processor.tokenizer, folder, image_mode=mode, eos_ids=processor.end_ids)
        return describe_chat_template(add_chat_template(folder, processor, typical_size(model.vision)))

    def verify(self, model: Any, folder: Path) -> float:
        return verify_llava(model, folder)


def require_image_mode(processor: Processor, default: str) -> str:
    """How the images of a processor become one view each: `crop`, `pad` or `resize`; `default` where it has none.

    Raises:
        ConfigError: its plan makes other views, which the exported processor would not make.
    """
    plan = processor.images.get("vision")
    if plan is None:
        return default
    if (mode := getattr(plan, "mode", None)) is None:
        raise ConfigError(f"image: {type(plan).__name__}; this export takes one view an image: crop, pad or resize")
    return str(mode)


def write_llava(
    model: PrefixVLM,
    tokenizer: Any,
    folder: str | Path,
    *,
    image_mode: str = "pad",
    eos_ids: Sequence[int] = (),
) -> None:
    """Write `model` as a `LlavaForConditionalGeneration` folder with tokenizer and processor.

    The processor has no chat template, not even the tokenizer's own; see `chat.add_chat_template`.

    Args:
        model: a composition that LLaVA can express, in eval mode; adapters on its llm are merged into the copy.
        tokenizer: the tokenizer it was trained with; the copy that is written gains `<image>` if it has none.
        folder: where to write; created. A failure leaves what it had written: `write_export` gives a temporary one.
        image_mode: `crop`, `pad` or `resize`, see `ImageTransform`.
        eos_ids: end-of-turn token ids for `generation_config.json`; empty: the tokenizer's end-of-text.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    tokenizer = add_image_token(tokenizer)
    options = describe_parts(model, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    state = llava_state(model, options["text_config"]["vocab_size"])
    save_model(LlavaForConditionalGeneration, LlavaConfig(**options), state, tokenizer, eos_ids, Path(folder))
    make_processor(model.vision, tokenizer, image_mode).save_pretrained(folder)


def add_image_token(tokenizer: Any) -> Any:
    """A copy of a tokenizer that knows `<image>`, and has no chat template."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = None
    if tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    return tokenizer


def verify_llava(model: PrefixVLM, folder: str | Path) -> float:
    """Read `folder` with plain `transformers` and compare logits on a random image and text.

    Returns:
        The largest difference, relative to the largest logit. Raises `AssetError` if it is too large.
    """
    from transformers import LlavaForConditionalGeneration

    loaded = load_served(LlavaForConditionalGeneration, model, folder)
    height, width = model.vision.image_size
    pixels = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return compare_logits(model, loaded, MediaInput(pixels, view_counts=(1,)), folder)


def find_problems(model: Any) -> list[str]:
    """Every reason why LLaVA cannot express `model`. Reads no weight: it may be on meta."""
    problems = find_part_problems(model)
    if getattr(model, "stitcher", None) is not None:
        problems.append(f"parts.stitcher: {type(model.stitcher).__name__}; LLaVA joins no tiles")
    return problems


def find_part_problems(model: Any) -> list[str]:
    """Every reason why LLaVA and its successors cannot express the parts of `model` but for its stitcher."""
    problems = find_end_problems(model, "LLaVA")
    if type(model) is PrefixVLM and not (isinstance(model.connector, MLP) and len(model.connector.layers) == 3):
        problems.append(f"connector: {type(model.connector).__name__}; LLaVA has only the two-layer MLP (mlp2x_gelu)")
    return problems


def describe_parts(model: PrefixVLM, image_token_id: int) -> dict[str, Any]:
    """The options of a `LlavaConfig`, and of those of LLaVA's successors."""
    vision, text = model.vision, copy.deepcopy(model.llm.model.config)
    text.vocab_size = rows_with(image_token_id, model.llm.vocab_size)
    text.dtype = next(model.llm.parameters()).dtype
    return {
        "vision_config": vision.model.config.to_dict(),
        "text_config": text.to_dict(),
        "image_token_index": image_token_id,
        "image_seq_length": vision.grid.size + (vision.prefix_tokens if vision.keep_cls else 0),
        "projector_hidden_act": "gelu",
        "vision_feature_select_strategy": choose_select_strategy(vision),
        "vision_feature_layer": vision.layer if isinstance(vision.layer, int) else list(vision.layer),
        "tie_word_embeddings": text.tie_word_embeddings,
        "dtype": text.dtype,
    }


def choose_select_strategy(vision: HFVision) -> str:
    """LLaVA's word for whether the tokens in front of the patches are kept; "full" too where there are none."""
    return "full" if vision.keep_cls or not vision.prefix_tokens else "default"


def llava_state(model: PrefixVLM, rows: int) -> dict[str, Tensor]:
    """Our weights under LLaVA's names, the vocabulary filled up with mean rows."""
    state = {f"model.vision_tower.{key}": value for key, value in merged_state(model.vision.model).items()}
    for key, value in merged_state(model.connector.layers).items():
        layer, _, kind = key.partition(".")
        state[f"model.multi_modal_projector.linear_{1 if layer == '0' else 2}.{kind}"] = value
    return state | language_state(model.llm, rows)


def make_processor(vision: HFVision, tokenizer: Any, image_mode: str) -> Any:
    """LLaVA's processor for a tower and a tokenizer that has `<image>`; without a chat template."""
    # The PIL variant runs without torchvision; it is saved under the name that both variants share.
    from transformers import LlavaImageProcessorPil, LlavaProcessor

    height, width = vision.image_size
    whole = {"height": height, "width": width}
    squashed = image_mode == "resize"
    images = LlavaImageProcessorPil(
        do_pad=image_mode == "pad",
        do_center_crop=not squashed,
        size=whole if squashed else {"shortest_edge": min(height, width)},
        crop_size=whole,
        image_mean=list(vision.image_mean),
        image_std=list(vision.image_std),
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=height // vision.grid.h,
        vision_feature_select_strategy=choose_select_strategy(vision),
        num_additional_image_tokens=vision.prefix_tokens,
        image_token=IMAGE_TOKEN,
    )
