"""To the native LLaVA of `transformers`, which vLLM, TGI, SGLang and lmms-eval load."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm_train.contracts.media import MediaInput
from vlm_train.data.processor import Processor
from vlm_train.errors import AssetError, ConfigError
from vlm_train.export.chat import IMAGE_TOKEN, add_chat_template, describe_chat_template
from vlm_train.export.merged import find_quantized, merged_state
from vlm_train.export.vocabulary import pad_rows, rows_with
from vlm_train.models.connectors.mlp import MLP
from vlm_train.models.families.prefix_vlm import PrefixVLM
from vlm_train.models.llms.hf import HFCausalLM
from vlm_train.models.vision.example import typical_size
from vlm_train.models.vision.hf import HFVision

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}
_LOGIT_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "final_logit_softcapping")


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


def save_model(
    kind: Any, config: Any, state: dict[str, Tensor], tokenizer: Any, eos_ids: Sequence[int], folder: Path
) -> None:
    """Write a model of `transformers` of class `kind` with the weights `state`."""
    from transformers import GenerationConfig

    with torch.device("meta"):
        model = kind(config)
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    eos = list(eos_ids) or tokenizer.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=tokenizer.pad_token_id, do_sample=False)
    model.save_pretrained(folder)


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


def load_served(kind: Any, model: PrefixVLM, folder: str | Path) -> Any:
    """The model in `folder`, of class `kind`. Raises `AssetError` if weights are missing or too many."""
    parameter = next(model.llm.parameters())
    loaded, report = kind.from_pretrained(folder, dtype=parameter.dtype, output_loading_info=True)
    if report["missing_keys"] or report["unexpected_keys"]:
        raise AssetError(
            f"export: {folder} is missing {report['missing_keys']}, has {report['unexpected_keys']} too many"
        )
    return loaded.to(parameter.device).eval()


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


def find_end_problems(model: Any, name: str) -> list[str]:
    """Every reason why the models called `name` cannot express the tower and the language model of `model`."""
    if type(model) is not PrefixVLM:  # one that derives from it computes something else
        return [f"model: {type(model).__name__} has no {name} equivalent; only PrefixVLM does"]
    problems = []
    if not isinstance(model.vision, HFVision) or model.vision.final_norm:
        problems.append(f"vision: {name} takes a transformers tower without its final norm")
    elif model.vision.interpolates:
        problems.append(f"vision.image_size: {name} does not interpolate positions; use null")
    if not isinstance(model.llm, HFCausalLM):
        problems.append(f"llm: {name} takes a transformers causal language model")
    else:
        config, head = model.llm.model.config, model.llm.model.get_output_embeddings()
        if scaled := [one for one in _LOGIT_SCALES if getattr(config, one, None) is not None]:
            problems.append(f"llm.config.{scaled[0]}: {name} does not scale its logits")
        if getattr(head, "bias", None) is not None:
            problems.append(f"llm: {name}'s head has no bias")
    if layer := find_quantized(model):
        problems.append(f"{layer}: is quantized; its adapter can only be merged into an unquantized base model")
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
    name = embedding_name(model.llm)
    state = {f"model.vision_tower.{key}": value for key, value in merged_state(model.vision.model).items()}
    for key, value in merged_state(model.connector.layers).items():
        layer, _, kind = key.partition(".")
        state[f"model.multi_modal_projector.linear_{1 if layer == '0' else 2}.{kind}"] = value
    for key, value in merged_state(model.llm.decoder).items():
        if not key.startswith(f"{name}."):
            state[f"model.language_model.{key}"] = value
    embedding, head = _vocabulary_tables(model.llm)
    state[f"model.language_model.{name}.weight"] = pad_rows(embedding, rows)
    state["lm_head.weight"] = pad_rows(head, rows)
    return state


def _vocabulary_tables(llm: HFCausalLM) -> tuple[Tensor, Tensor]:
    """Embedding and head tables `[V, D]`, the new tokens included."""
    embedding, head = llm.model.get_input_embeddings(), llm.model.get_output_embeddings()
    if not llm.new_tokens:
        return embedding.weight.detach(), head.weight.detach()
    tables = ((embedding.weight, embedding.new_embeddings), (head.weight, head.new_head))
    return tuple(torch.cat([base, new]).detach() for base, new in tables)  # type: ignore[return-value]


def embedding_name(llm: HFCausalLM) -> str:
    """Name of the embedding table inside the decoder."""
    table = llm.model.get_input_embeddings()
    return next(name for name, module in llm.decoder.named_modules() if module is table)


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


@torch.no_grad()
def compare_logits(model: PrefixVLM, served: Any, media: MediaInput, folder: str | Path, **inputs: Any) -> float:
    """The largest difference between the logits of both for one image and a text, relative to the largest logit.

    Args:
        served: as `transformers` reads it from `folder`.
        media: uint8 views `[V, 3, H, W]` of the image.
        inputs: what `served` is given besides ids and pixels.

    Raises:
        AssetError: it is too large.
    """
    parameter, config = next(model.llm.parameters()), served.config
    image_token = config.image_token_index if hasattr(config, "image_token_index") else config.image_token_id
    media = replace(media, values=media.values.to(parameter.device))
    features = model.connector(model.vision.encode(media))
    if model.stitcher is not None:
        features = model.stitcher(features, media)
    image = features.values[None, : features.lengths[0]] if model.stitcher else features.values[None]
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, min(model.llm.vocab_size, image_token), (1, 8), generator=generator).to(parameter.device)
    slots = torch.full(image.shape[:2], image_token, device=parameter.device)
    ids = torch.cat([text[:, :4], slots, text[:, 4:]], dim=1)

    dtype = next(model.vision.parameters()).dtype
    mean, std = (model.vision.get_buffer(name).to(dtype) for name in ("mean", "std"))
    pixels = (media.values.to(dtype) / 255 - mean) / std
    theirs = served(input_ids=ids, pixel_values=pixels[None] if inputs else pixels, **inputs).logits

    embeds = model.llm.embed(torch.where(ids == image_token, 0, ids))
    embeds = torch.cat([embeds[:, :4], image.to(embeds.dtype), embeds[:, 4 + image.shape[1] :]], dim=1)
    positions = torch.arange(ids.shape[1], device=parameter.device)[None, None]
    ours = model.llm.head(model.llm.decode(embeds, positions, None)).float()
    difference = ((theirs[..., : model.llm.vocab_size].float() - ours).abs().max() / ours.abs().max()).item()
    tolerance = _TOLERANCE.get(parameter.dtype, 1e-5)
    if not difference <= tolerance:
        raise AssetError(
            f"export: logits of {folder} differ by {difference:.2e} of their maximum, allowed {tolerance:.0e}"
        )
    return float(difference)
