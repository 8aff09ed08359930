"""Instruction-aware prefix models: the numbers of `InstructBlipForConditionalGeneration`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import (
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
)

from tests.models.layers.test_qformer import QUERIES, VISION, WORDS, tiny_connector
from tests.support.tiny_models import MEAN, STD, assert_close, batch_of, llama_config, text_stream, tiny_llm
from vlm_train.contracts.batch import Batch
from vlm_train.contracts.layout import PLACEHOLDER_ID
from vlm_train.errors import ConfigError
from vlm_train.models.families.instructblip import InstructVLM
from vlm_train.models.vision.hf import HFVision
from vlm_train.models.weights.qformer_names import to_library

INSTRUCTIONS = [[3, 4, 5, 6], [7, 8]]


def model() -> InstructVLM:
    torch.manual_seed(0)
    numbers = {"model_type": "instructblip_vision_model", **VISION}
    vision = HFVision(config=numbers, image_mean=MEAN, image_std=STD, layer=-1, keep_cls=True, final_norm=True)
    llm = tiny_llm()
    made = InstructVLM(vision=vision, connector=tiny_connector(llm.dim), llm=llm).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return made


def questions(instructions: list[list[int]] = INSTRUCTIONS) -> Batch:
    rows = [[PLACEHOLDER_ID] * QUERIES + words for words in ([5, 6, 7, 8], [9, 10, 11, 12])]
    batch = batch_of(text_stream(rows), [0, 1], tokens=QUERIES)
    return replace(batch, text={**batch.text, "qformer": text_stream(instructions)})


@torch.no_grad()
def test_logits_are_those_of_the_library() -> None:
    ours, batch = model(), questions()
    former = InstructBlipQFormerConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, encoder_hidden_size=24,
        vocab_size=WORDS, max_position_embeddings=20,
    )  # fmt: skip
    text = {key: value for key, value in llama_config().items() if key != "model_type"}
    config = InstructBlipConfig(
        vision_config=InstructBlipVisionConfig(**VISION),
        qformer_config=former,
        text_config=LlamaConfig(**text),
        num_query_tokens=QUERIES,
        image_token_index=96,
    )
    theirs = InstructBlipForConditionalGeneration(config).eval()
    state = to_library(ours.connector.state_dict(), list(theirs.state_dict()))
    state |= {f"vision_model.{name}": tensor for name, tensor in ours.vision.model.state_dict().items()}
    state |= {f"language_model.{name}": tensor for name, tensor in ours.llm.model.state_dict().items()}
    theirs.load_state_dict(state, strict=True)
    asked, ids = batch.text["qformer"], batch.text["llm"].ids
    out = theirs(
        pixel_values=(batch.media.inputs["vision"].values.float() / 255 - ours.vision.mean) / ours.vision.std,
        qformer_input_ids=asked.ids,
        qformer_attention_mask=(asked.segment_ids != 0).long(),
        input_ids=torch.where(ids < 0, 96, ids),
        attention_mask=torch.ones_like(ids),
    )
    assert_close(ours.logits(ours(batch)), out.logits)


@torch.no_grad()
def test_the_features_depend_on_the_instruction() -> None:
    ours = model()
    one, other = (ours.features(questions(asked)).rectangular() for asked in (INSTRUCTIONS, [[3, 4, 5, 6], [9, 8]]))
    assert torch.equal(one[0], other[0]) and not torch.allclose(one[1], other[1])


@torch.no_grad()
def test_the_features_do_not_depend_on_padding() -> None:
    """Instructions are padded on the right while training, and on the left where answers are generated."""
    ours, right = model(), questions()
    left = replace(right, text={**right.text, "qformer": text_stream(INSTRUCTIONS, left=True)})
    assert_close(ours.features(left).values, ours.features(right).values)


def test_a_q_former_without_text_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"connector.text=true"):
        InstructVLM(vision=None, connector=tiny_connector(48, text=False), llm=None)
