"""To the native BLIP-2 and InstructBLIP of `transformers`: an aligned Q-Former, or one in front of a language model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm_train.contracts.batch import Batch, MediaBatch, Slots, TokenStream
from vlm_train.contracts.media import MediaInput
from vlm_train.data.processor import Processor
from vlm_train.errors import AssetError
from vlm_train.export.chat import IMAGE_TOKEN, add_chat_template, describe_chat_template
from vlm_train.export.llava import require_image_mode
from vlm_train.export.merged import merged_state
from vlm_train.export.vocabulary import pad_rows, rows_with
from vlm_train.models.connectors.qformer import QFormerConnector
from vlm_train.models.families.blip2_qformer import Blip2QFormerModel
from vlm_train.models.families.instructblip import InstructSeq2Seq, InstructVLM
from vlm_train.models.families.prefix_seq2seq import PrefixSeq2Seq
from vlm_train.models.families.prefix_vlm import PrefixVLM
from vlm_train.models.llms.hf import HFCausalLM
from vlm_train.models.llms.hf_seq2seq import HFSeq2Seq
from vlm_train.models.vision.example import typical_size
from vlm_train.models.vision.hf import HFVision
from vlm_train.models.weights.qformer_names import to_library

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}
_FAMILIES = (PrefixVLM, PrefixSeq2Seq, InstructVLM, InstructSeq2Seq, Blip2QFormerModel)
_TOWERS = ("blip_2_vision_model", "instructblip_vision_model")  # one architecture
_HEADS = {"vision_projection": "image_projection", "text_projection": "text_projection", "itm_head": "match_head"}


class Blip2Exporter:
    """Writes BLIP-2 and InstructBLIP."""

    def problems(self, model: Any) -> list[str]:
        return find_problems(model)

    def write(self, model: Any, processor: Processor, folder: Path) -> str:
        write_blip2(
            model,
            processor.tokenizer,
            folder,
            image_mode=require_image_mode(processor, "resize"),
            eos_ids=processor.end_ids,
            instruction=getattr(processor.instruction, "tokenizer", None),
        )
        return describe_chat_template(add_chat_template(folder, processor, typical_size(model.vision)))

    def verify(self, model: Any, folder: Path) -> float:
        return verify_blip2(model, folder)


def write_blip2(
    model: Any,
    tokenizer: Any,
    folder: str | Path,
    *,
    image_mode: str = "resize",
    eos_ids: Sequence[int] = (),
    instruction: Any = None,
) -> None:
    """Write `model` as a folder of `transformers`, with tokenizer and processor.

    A `Blip2QFormerModel` becomes a `Blip2ForImageTextRetrieval`, an `InstructVLM` an
    `InstructBlipForConditionalGeneration`, another prefix model a `Blip2ForConditionalGeneration`.

    Args:
        image_mode, eos_ids: as in `write_llava`.
        instruction: tokenizer of the text that the Q-Former reads, for an `InstructVLM`.
    """
    from transformers import GenerationConfig

    folder, tokenizer = Path(folder), copy.deepcopy(tokenizer)
    tokenizer.chat_template = None
    if isinstance(model, PrefixVLM) and tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    config = _make_config(model, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    with torch.device("meta"):
        theirs = _model_class(model)(config)
    theirs.load_state_dict(_rename_state(model, theirs), strict=True, assign=True)
    if isinstance(model, PrefixVLM):
        if not (isinstance(model, PrefixSeq2Seq) and model.llm.head_parameters()):
            theirs.tie_weights()  # `transformers` 5 ties every T5
        eos = list(eos_ids) or tokenizer.eos_token_id
        theirs.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=tokenizer.pad_token_id)
    theirs.save_pretrained(folder)
    _make_processor(model, tokenizer, image_mode, instruction).save_pretrained(folder)


@torch.no_grad()
def verify_blip2(model: Any, folder: str | Path) -> float:
    """Read `folder` with plain `transformers` and compare on a random image and text.

    Returns:
        The largest difference, relative to the largest number. Raises `AssetError` if it is too large.
    """
    parameter = next(model.connector.parameters())
    loaded = _model_class(model).from_pretrained(folder, dtype=parameter.dtype).to(parameter.device).eval()
    batch = _make_probe(model, parameter.device)
    text, vision = batch.text["llm"], model.vision
    dtype = next(vision.parameters()).dtype
    mean, std = (vision.get_buffer(name).to(dtype) for name in ("mean", "std"))
    given = {"pixel_values": (batch.media.inputs["vision"].values.to(dtype) / 255 - mean) / std}
    given["attention_mask"] = torch.ones_like(text.ids)
    if isinstance(model, PrefixVLM):
        ids = torch.where(text.ids < 0, loaded.config.image_token_index, text.ids)
        if isinstance(model, InstructVLM):
            asked = batch.text["qformer"].ids
            given |= {"qformer_input_ids": asked, "qformer_attention_mask": torch.ones_like(asked)}
        if isinstance(model, PrefixSeq2Seq):
            answer = batch.text["decoder"].ids.clone()
            answer[:, 0] = model.llm.start_id
            given["decoder_input_ids"] = answer
        theirs = loaded(input_ids=ids, **given).logits[..., : model.llm.vocab_size]
        ours = model.logits(model(batch))
    else:
        theirs = loaded(input_ids=text.ids, use_image_text_matching_head=True, **given).logits_per_image
        ours = model.match(model.image_keys_values(batch), text.ids, text.segment_ids != 0)
    difference = ((theirs - ours).abs().max() / ours.abs().max()).item()
    if not difference <= (tolerance := _TOLERANCE.get(parameter.dtype, 1e-5)):
        raise AssetError(f"export: {folder} differs by {difference:.2e} of the maximum, allowed {tolerance:.0e}")
    return difference


def find_problems(model: Any) -> list[str]:
    """Every reason why BLIP-2 cannot express `model`. Reads no weight."""
    if type(model) not in _FAMILIES:  # one that derives from them computes something else
        return [f"model: {type(model).__name__} has no BLIP-2 equivalent; only prefix and blip2_stage1 do"]
    if not isinstance(model.connector, QFormerConnector):
        return [f"connector: {type(model.connector).__name__}; BLIP-2 has a Q-Former"]
    problems = []
    tower = model.vision
    if not isinstance(tower, HFVision) or tower.model.config.model_type not in _TOWERS:
        problems.append("vision.config.model_type: BLIP-2's tower is blip_2_vision_model")
    elif not (tower.final_norm and tower.keep_cls):
        problems.append("vision: BLIP-2 reads every token after the final norm; set keep_cls and final_norm")
    elif tower.interpolates:
        problems.append("vision.image_size: BLIP-2 does not interpolate positions; use null")
    if isinstance(model, PrefixVLM) and not isinstance(model, InstructVLM) and model.connector.text is not None:
        problems.append("connector.text: BLIP-2 drops the text branch in stage 2")
    if isinstance(model, PrefixVLM) and (not isinstance(model.llm, HFCausalLM | HFSeq2Seq) or model.llm.new_tokens):
        problems.append("llm: BLIP-2 takes a language model of transformers without added tokens")
    return problems


def _model_class(model: Any) -> Any:
    from transformers import (
        Blip2ForConditionalGeneration,
        Blip2ForImageTextRetrieval,
        InstructBlipForConditionalGeneration,
    )

    if isinstance(model, InstructVLM):
        return InstructBlipForConditionalGeneration
    return Blip2ForConditionalGeneration if isinstance(model, PrefixVLM) else Blip2ForImageTextRetrieval


def _make_config(model: Any, image_token_id: int | None) -> Any:
    config = _model_class(model).config_class
    former, text = model.connector.qformer, model.connector.text
    first = former.blocks[0]
    every = next((n for n, layer in enumerate(former.blocks) if n and layer.cross is not None), len(former.blocks))
    words = {} if text is None else {"vocab_size": len(text.words.weight)}
    words |= {} if text is None else {"max_position_embeddings": len(text.positions.weight)}
    words |= {} if isinstance(model, InstructVLM) else {"use_qformer_text_input": text is not None}
    numbers = {
        "hidden_size": former.dim,
        "num_hidden_layers": len(former.blocks),
        "num_attention_heads": first.attention.heads,
        "intermediate_size": first.feed.up.out_features,
        "encoder_hidden_size": first.cross.key.in_features,
        "cross_attention_frequency": every,
        "layer_norm_eps": former.norm.eps,
        **words,
    }
    tower = {key: value for key, value in model.vision.model.config.to_dict().items() if key != "model_type"}
    shared: dict[str, Any] = {"vision_config": tower, "qformer_config": numbers}
    shared["num_query_tokens"] = len(former.queries)
    if isinstance(model, PrefixVLM):
        language = copy.deepcopy(model.llm.model.config)
        language.vocab_size = rows_with(int(image_token_id or 0), model.llm.vocab_size)
        return config(text_config=language, image_token_index=image_token_id, **shared)
    return config(image_text_hidden_size=model.image_projection.out_features, **shared)


def _rename_state(model: Any, theirs: Any) -> dict[str, Tensor]:
    """Our weights under BLIP-2's names."""
    connector = model.connector.state_dict()
    state = {f"vision_model.{name}": tensor for name, tensor in merged_state(model.vision.model).items()}
    state |= {name: tensor.contiguous() for name, tensor in to_library(connector, list(theirs.state_dict())).items()}
    if isinstance(model, PrefixVLM):
        language, rows = model.llm.model, theirs.config.text_config.vocab_size
        tables = [one.weight for one in (language.get_input_embeddings(), language.get_output_embeddings())]
        everywhere = language.named_parameters(remove_duplicate=False)
        long = {name for name, parameter in everywhere if any(parameter is table for table in tables)}
        own = merged_state(language)
        return state | {f"language_model.{n}": pad_rows(one, rows) if n in long else one for n, one in own.items()}
    own = model.state_dict()
    return state | {f"{a}.{kind}": own[f"{b}.{kind}"] for a, b in _HEADS.items() for kind in ("weight", "bias")}


def _make_processor(model: Any, tokenizer: Any, image_mode: str, instruction: Any) -> Any:
    from transformers import Blip2Processor, BlipImageProcessorPil, InstructBlipProcessor

    height, width = model.vision.image_size
    if image_mode != "resize":
        print(f"export: BLIP-2's processor resizes; image={image_mode} is not what it does", flush=True)
    images = BlipImageProcessorPil(
        size={"height": height, "width": width},
        image_mean=list(model.vision.image_mean),
        image_std=list(model.vision.image_std),
    )
    queries = len(model.connector.qformer.queries)
    if isinstance(model, InstructVLM):
        return InstructBlipProcessor(images, tokenizer, instruction or tokenizer, num_query_tokens=queries)
    return Blip2Processor(images, tokenizer, num_query_tokens=queries)


def _make_probe(model: Any, device: torch.device) -> Batch:
    """A random image, and a random text in every stream."""
    from vlm_train.contracts.layout import PLACEHOLDER_ID

    generator = torch.Generator().manual_seed(0)
    height, width = model.vision.image_size
    pixels = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8, generator=generator)
    slots = len(model.connector.qformer.queries) if isinstance(model, PrefixVLM) else 0
    text = {}
    for name in model.streams:
        own = isinstance(model, PrefixVLM) and name != "qformer"
        words = model.llm.vocab_size if own else len(model.connector.text.words.weight)
        places = slots if name == "llm" else 0
        ids = torch.randint(2, words - 1, (1, places + 6), generator=generator)
        ids[:, :places] = PLACEHOLDER_ID
        text[name] = _make_stream(ids, places)
    inputs = {"vision": MediaInput(pixels, view_counts=(1,))}
    media = MediaBatch(inputs=inputs, slot_counts=(slots,), row=torch.zeros(1, dtype=torch.int64))
    return Batch(text=text, media=media).to(device)


def _make_stream(ids: Tensor, places: int) -> TokenStream:
    return TokenStream(
        ids=ids,
        labels=torch.full_like(ids, -100),
        weights=torch.zeros(ids.shape),
        positions=torch.arange(ids.shape[1])[None, None],
        segment_ids=torch.ones_like(ids, dtype=torch.int32),
        attention_group=torch.zeros_like(ids, dtype=torch.int32),
        slots=Slots(index=torch.arange(places), placeholders=places),
        supervised=torch.zeros(0, dtype=torch.int64),
        plain_causal=True,
    )
