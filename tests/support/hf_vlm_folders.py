"""Folders of whole vision-language models, as the hub has them: tiny, random, made and saved by `transformers`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf

from tests.support.tiny_models import llama_config
from vlm_train.data.text.tokenizer import byte_level

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A chat template that takes contents in parts, as those of whole models do; IMAGE is what each writes for one."""
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def make_tokenizer(*added: str, image: str = "<image>", template: bool = True, **named: str) -> Any:
    """Byte-level, with the special tokens `added` and those with a name of their own."""
    tokenizer = byte_level(add=[image, *added, *named.values()])
    tokenizer.chat_template = CHAT.replace("IMAGE", image) if template else None
    if named:
        tokenizer._set_model_specific_special_tokens(special_tokens=named)
        tokenizer.init_kwargs |= {"extra_special_tokens": named}
    return tokenizer


def text(model_type: str, tokenizer: Any, **changes: Any) -> dict[str, Any]:
    """Numbers of a language model of two layers."""
    numbers = llama_config(model_type=model_type, vocab_size=len(tokenizer), max_position_embeddings=2048)
    return numbers | {"head_dim": 12, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | changes


def tower(model_type: str = "clip_vision_model", **changes: Any) -> dict[str, Any]:
    """Numbers of a tower of three layers and 4 x 4 patches."""
    numbers = {"model_type": model_type, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    return numbers | {"num_attention_heads": 4, "image_size": 32, "patch_size": 8} | changes


Made = tuple[Any, Any]
"""A configuration and a processor."""


def llava() -> Made:
    tok = make_tokenizer()
    image = tf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    config = tf.LlavaConfig(
        vision_config=tower(), text_config=text("llama", tok), image_token_id=tok.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )  # fmt: skip
    return config, tf.LlavaProcessor(
        image, tok, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def llava_next() -> Made:
    tok = make_tokenizer()
    grids = [[32, 64], [64, 32], [64, 64]]
    image = tf.LlavaNextImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=grids
    )
    config = tf.LlavaNextConfig(
        vision_config=tower(), text_config=text("llama", tok), image_token_id=tok.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=grids, image_seq_length=16,
    )  # fmt: skip
    return config, tf.LlavaNextProcessor(
        image, tok, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


MAKERS: dict[str, Callable[[], Made]] = {"llava": llava, "llava_next": llava_next}


def make_folder(kind: str, folder: Path, seed: int = 0, spread: float = 2.0) -> Path:
    """A folder of this kind, with weights large enough for images to matter."""
    config, processor = MAKERS[kind]()
    torch.manual_seed(seed)
    model = tf.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(spread)
            elif not parameter.any():
                parameter.normal_(std=0.1)  # gates and biases at zero hide what is behind them
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
