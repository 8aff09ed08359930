"""What the exporters of models with images share: names and tables of the language model, saving, comparing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm_train.contracts.media import MediaInput
from vlm_train.errors import AssetError
from vlm_train.export.merged import find_quantized, merged_state
from vlm_train.export.vocabulary import pad_rows
from vlm_train.models.families.prefix_vlm import PrefixVLM
from vlm_train.models.llms.hf import HFCausalLM
from vlm_train.models.vision.hf import HFVision

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}
_LOGIT_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "final_logit_softcapping")


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


def language_state(llm: HFCausalLM, rows: int) -> dict[str, Tensor]:
    """A language model's weights under the names of models with images, the vocabulary filled up with mean rows."""
    name, state = embedding_name(llm), dict[str, Tensor]()
    for key, value in merged_state(llm.decoder).items():
        if not key.startswith(f"{name}."):
            state[f"model.language_model.{key}"] = value
    embedding, head = _vocabulary_tables(llm)
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


def load_served(kind: Any, model: PrefixVLM, folder: str | Path) -> Any:
    """The model in `folder`, of class `kind`. Raises `AssetError` if weights are missing or too many."""
    parameter = next(model.llm.parameters())
    loaded, report = kind.from_pretrained(folder, dtype=parameter.dtype, output_loading_info=True)
    if report["missing_keys"] or report["unexpected_keys"]:
        raise AssetError(
            f"export: {folder} is missing {report['missing_keys']}, has {report['unexpected_keys']} too many"
        )
    return loaded.to(parameter.device).eval()


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
    ours = model.llm.head(model.llm.decode(embeds, positions, None))
    return require_same_logits(ours, theirs, folder)


def require_same_logits(ours: Tensor, theirs: Tensor, folder: str | Path) -> float:
    """The largest difference of logits, relative to the largest; `theirs` may have more rows of the vocabulary.

    Raises:
        AssetError: it is too large for their type.
    """
    tolerance = _TOLERANCE.get(ours.dtype, 1e-5)
    ours = ours.float()
    difference = ((theirs[..., : ours.shape[-1]].float() - ours).abs().max() / ours.abs().max()).item()
    if not difference <= tolerance:
        raise AssetError(
            f"export: logits of {folder} differ by {difference:.2e} of their maximum, allowed {tolerance:.0e}"
        )
    return float(difference)


def load_without_videos(kind: Any, folder: Path, images: Any, **options: Any) -> Any:
    """The processor of class `kind` in a folder, given its image processor: the class itself asks for one of videos,
    which needs torchvision."""
    from transformers import AutoTokenizer

    class ImagesOnly(kind):
        """Looks for no class of videos."""

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return type(argument)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return ImagesOnly(image_processor=images, tokenizer=tokenizer, chat_template=tokenizer.chat_template, **options)


def write_json_files(folder: Path, **contents: Any) -> None:
    """Write every content as `<its name>.json`."""
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
