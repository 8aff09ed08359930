"""Folders of whole vision-language models, as the hub has them: tiny, random, made and saved by `transformers`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from transformers.processing_utils import ProcessorMixin

from tests.support.tiny_models import llama_config
from vlm_train.data.text.tokenizer import byte_level
from vlm_train.models.hf_vlm.processor import without_videos

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


def llava_onevision() -> Made:
    tok = make_tokenizer("<video>")
    grids = [[32, 32], [32, 64], [64, 32], [64, 64]]
    image = tf.LlavaOnevisionImageProcessorPil(size={"height": 32, "width": 32}, image_grid_pinpoints=grids)
    config = tf.LlavaOnevisionConfig(
        vision_config=tower("siglip_vision_model", vision_use_head=False), text_config=text("qwen2", tok),
        image_token_id=tok.convert_tokens_to_ids("<image>"), video_token_id=tok.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=grids,
    )  # fmt: skip
    kind = without_videos(tf.LlavaOnevisionProcessor)
    return config, kind(image, tok, num_image_tokens=16, vision_feature_select_strategy="full")


def internvl() -> Made:
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tok = make_tokenizer(image="<IMG_CONTEXT>", video_token="<video>", **named)
    image = tf.GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=4, **HALF)
    vision = tower("internvl_vision", image_size=[32, 32], patch_size=[8, 8])
    config = tf.InternVLConfig(
        vision_config=vision, text_config=text("qwen2", tok), image_seq_length=4,
        image_token_id=tok.convert_tokens_to_ids("<IMG_CONTEXT>"),
    )  # fmt: skip
    return config, without_videos(tf.InternVLProcessor)(image, tok, image_seq_length=4)


def qwen(kind: str) -> Made:
    """Qwen2-VL and those after it, `kind` in the library's spelling."""
    marks = ("<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
    tok = make_tokenizer(*marks, image="<|image_pad|>")
    tok.chat_template = CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    ids = {
        f"{name}_token_id": tok.convert_tokens_to_ids(token)
        for name, token in zip(("vision_start", "vision_end", "video", "image"), (*marks, "<|image_pad|>"), strict=True)
    }
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
    vision: dict[str, Any] = {"depth": 2, "num_heads": 4, "patch_size": 8, "hidden_size": 32}
    numbers = text("llama", tok, rope_parameters=rope)
    del numbers["model_type"]
    if kind == "Qwen2VL":
        vision |= {"embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2}
        del numbers["head_dim"]
    else:
        vision |= {"out_hidden_size": 48, "intermediate_size": 64}
    if kind == "Qwen2_5_VL":
        vision |= {"fullatt_block_indexes": [1], "window_size": 32}
    if kind in ("Qwen3VL", "Qwen3_5"):
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    if kind == "Qwen3_5":
        del vision["deepstack_visual_indexes"]
        numbers |= {"layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8}
        numbers |= {"linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
        numbers["rope_parameters"] |= {"partial_rotary_factor": 1.0}
    config = getattr(tf, f"{kind}Config")(vision_config=vision, text_config=numbers, **ids)
    image = tf.Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 256, "longest_edge": 4096}
    )
    name = {"Qwen3_5": "Qwen3VL"}.get(kind, kind)
    return config, without_videos(getattr(tf, f"{name}Processor"))(image, tok)


def gemma3() -> Made:
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tok = make_tokenizer(image="<start_of_image>", **named)
    image = tf.Gemma3ImageProcessorPil(size={"height": 32, "width": 32}, **HALF)
    numbers = text("gemma3_text", tok, sliding_window=64, layer_types=["sliding_attention", "full_attention"])
    config = tf.Gemma3Config(
        vision_config=tower("siglip_vision_model", vision_use_head=False), text_config=numbers, mm_tokens_per_image=4,
        boi_token_index=tok.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tok.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=tok.convert_tokens_to_ids("<image_soft_token>"),
    )  # fmt: skip
    return config, tf.Gemma3Processor(image, tok, chat_template=tok.chat_template, image_seq_length=4)


def gemma4() -> Made:
    named = {"boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>"}
    audio = {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}
    tok = make_tokenizer("<|video|>", image="<|image|>", **named, **audio)
    image = tf.Gemma4ImageProcessorPil(patch_size=8, pooling_kernel_size=2, max_soft_tokens=70)
    numbers = text("gemma4_text", tok, sliding_window=64, layer_types=["sliding_attention", "full_attention"])
    numbers |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": len(tok), "global_head_dim": 12}
    vision = tower("gemma4_vision", num_key_value_heads=4, head_dim=8, pooling_kernel_size=2)
    del vision["image_size"]
    config = tf.Gemma4Config(
        vision_config=vision | {"position_embedding_size": 64}, text_config=numbers, audio_config=None,
        **{f"{name}_id": tok.convert_tokens_to_ids(token) for name, token in named.items()},
        video_token_id=tok.convert_tokens_to_ids("<|video|>"),
    )  # fmt: skip
    return config, without_videos(tf.Gemma4Processor)(
        tf.Gemma4AudioFeatureExtractor(), image, tok, None, image_seq_length=70
    )


def paligemma() -> Made:
    tok = make_tokenizer(template=False)
    image = tf.SiglipImageProcessorPil(size={"height": 32, "width": 32}, **HALF)
    image.image_seq_length = 16
    processor = tf.PaliGemmaProcessor(image, tok)
    tok = processor.tokenizer
    config = tf.PaliGemmaConfig(
        vision_config=tower("siglip_vision_model", vision_use_head=False, projection_dim=48),
        text_config=text("gemma", tok), projection_dim=48, hidden_size=48, vocab_size=len(tok),
        image_token_index=tok.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    return config, processor


def idefics(kind: str) -> Made:
    """Idefics3, and SmolVLM, whose own processor needs the package num2words: Idefics3's does the same for images."""
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    marks = ("<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
    tok = make_tokenizer(*marks, *tiles)
    image = tf.Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, **HALF)
    processor = tf.Idefics3Processor(image, tok, image_seq_len=4, chat_template=tok.chat_template)
    numbers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = getattr(tf, f"{kind}Config")(
        vision_config=numbers | {"image_size": 32, "patch_size": 8}, text_config=text("llama", tok), scale_factor=2,
        image_token_id=tok.convert_tokens_to_ids("<image>"), pad_token_id=0,
    )  # fmt: skip
    return config, processor


class PixtralStandIn(ProcessorMixin):
    """Pixtral's processor, whose own file cannot be imported without torchvision: the same expansion."""

    def __init__(self, image_processor=None, tokenizer=None, patch_size=16, spatial_merge_size=1, chat_template=None):
        self.patch_size, self.spatial_merge_size = patch_size, spatial_merge_size
        self.image_token, self.image_token_id = "[IMG]", tokenizer.convert_tokens_to_ids("[IMG]")
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        side = self.patch_size * self.spatial_merge_size
        height, width = (int(one) // side for one in image_inputs["image_sizes"][image_idx])
        rows = (["[IMG]"] * width + ["[IMG_BREAK]"]) * height
        return "".join([*rows[:-1], "[IMG_END]"])


class _StandInConfig(tf.PretrainedConfig):
    """Only names the processor: the library finds a class by its name among those of configurations."""

    model_type = "pixtral_stand_in"


tf.AutoProcessor.register(_StandInConfig, PixtralStandIn, exist_ok=True)


def pixtral(kind: str = "Llava") -> Made:
    """Pixtral, a LLaVA with another tower, and Mistral 3."""
    tok = make_tokenizer("[IMG_BREAK]", "[IMG_END]", image="[IMG]")
    merge = 2 if kind == "Mistral3" else 1
    image = tf.PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size={"height": 8, "width": 8})
    if kind == "Mistral3":
        image = tf.PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size={"height": 16, "width": 16})
    own = {"spatial_merge_size": 2} if kind == "Mistral3" else {"vision_feature_select_strategy": "full"}
    config = getattr(tf, f"{kind}Config")(
        vision_config=tower("pixtral", image_size=64, head_dim=8),
        text_config=text("mistral", tok, sliding_window=None),
        vision_feature_layer=-1, image_token_id=tok.convert_tokens_to_ids("[IMG]"), **own,
    )  # fmt: skip
    return config, PixtralStandIn(image, tok, patch_size=8, spatial_merge_size=merge, chat_template=tok.chat_template)


def blip2() -> Made:
    tok = make_tokenizer(template=False)
    image = tf.BlipImageProcessorPil(size={"height": 32, "width": 32})
    processor = tf.Blip2Processor(image, tok, num_query_tokens=4)
    numbers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    opt = {"model_type": "opt", "hidden_size": 48, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = tf.Blip2Config(
        vision_config=numbers | {"image_size": 32, "patch_size": 8}, num_query_tokens=4,
        qformer_config=numbers | {"encoder_hidden_size": 32, "vocab_size": 50},
        text_config=opt | {"vocab_size": len(tok), "word_embed_proj_dim": 48, "dropout": 0.0, "pad_token_id": 0},
        image_token_index=tok.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    return config, processor


def mllama() -> Made:
    tok = make_tokenizer("<|python_tag|>", image="<|image|>")
    tok.chat_template = "{{ bos_token }}" + tok.chat_template  # the processor adds one where there is none
    image = tf.MllamaImageProcessorPil(size={"height": 32, "width": 32}, max_image_tiles=4)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_global_layers": 1}
    vision |= {"attention_heads": 4, "image_size": 32, "patch_size": 8, "vision_output_dim": 64}
    vision |= {"intermediate_layers_indices": [0], "max_num_tiles": 4}
    numbers = text("mllama_text_model", tok, num_hidden_layers=3, cross_attention_layers=[1])
    del numbers["head_dim"]
    numbers["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    config = tf.MllamaConfig(
        vision_config=vision, text_config=numbers, image_token_index=tok.convert_tokens_to_ids("<|image|>")
    )
    return config, tf.MllamaProcessor(image, tok, chat_template=tok.chat_template)


MAKERS: dict[str, Callable[[], Made]] = {
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "internvl": internvl,
    "qwen2_vl": partial(qwen, "Qwen2VL"),
    "qwen2_5_vl": partial(qwen, "Qwen2_5_VL"),
    "qwen3_vl": partial(qwen, "Qwen3VL"),
    "qwen3_5": partial(qwen, "Qwen3_5"),
    "gemma3": gemma3,
    "gemma4": gemma4,
    "paligemma": paligemma,
    "smolvlm": partial(idefics, "SmolVLM"),
    "idefics3": partial(idefics, "Idefics3"),
    "pixtral": pixtral,
    "mistral3": partial(pixtral, "Mistral3"),
    "blip2": blip2,
    "mllama": mllama,
}
"""Name of a kind -> what makes it."""


def make_folder(kind: str, folder: Path, seed: int = 0, spread: float = 2.0) -> Path:
    """A folder of this kind, with weights large enough for images to matter."""
    spread = 1.5 if kind == "gemma4" else spread  # its norms make rounding large
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
