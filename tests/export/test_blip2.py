"""BLIP-2 exports: the same numbers in plain `transformers`, and what it cannot express is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoProcessor,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    InstructBlipForConditionalGeneration,
)

from tests.models.families.test_instructblip import model as instructed
from tests.models.families.test_prefix_seq2seq import t5_config
from tests.models.layers.test_qformer import QUERIES, tiny_blip2, tiny_connector, tiny_vision
from tests.support.tiny_models import assert_close, batch_of, text_stream
from tests.support.tiny_models import tiny_vision as clip_vision
from vlm_train.contracts.layout import PLACEHOLDER_ID
from vlm_train.data.text.tokenizer import byte_level
from vlm_train.errors import AssetError
from vlm_train.export.blip2 import find_problems, verify_blip2, write_blip2
from vlm_train.models.families.instructblip import InstructSeq2Seq
from vlm_train.models.families.prefix_seq2seq import PrefixSeq2Seq
from vlm_train.models.families.prefix_vlm import PrefixVLM
from vlm_train.models.llms.hf import HFCausalLM
from vlm_train.models.llms.hf_seq2seq import HFSeq2Seq

TEXT = {"ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}


def export_blip2(model: object, tokenizer: object, folder: Path, **options: object) -> None:
    """Write and verify."""
    write_blip2(model, tokenizer, folder, **options)
    assert verify_blip2(model, folder) < 1e-5


def blip2(tokens: int) -> PrefixVLM:
    torch.manual_seed(0)
    numbers = {"model_type": "opt", "vocab_size": tokens, "hidden_size": 48, "word_embed_proj_dim": 48, **TEXT}
    llm = HFCausalLM(config=numbers)
    model = PrefixVLM(vision=tiny_vision(), connector=tiny_connector(llm.dim, text=False), llm=llm).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model


@torch.no_grad()
def test_a_language_model_behind_a_q_former(tmp_path: Path) -> None:
    tokenizer = byte_level(add=["<image>"])
    model = blip2(len(tokenizer))
    export_blip2(model, tokenizer, tmp_path)
    theirs = Blip2ForConditionalGeneration.from_pretrained(tmp_path).eval()
    rows = [[PLACEHOLDER_ID] * QUERIES + words for words in ([5, 6, 7, 8], [9, 10, 11, 12])]
    batch = batch_of(text_stream(rows), [0, 1], tokens=QUERIES)
    pixels = (batch.media.inputs["vision"].values.float() / 255 - model.vision.mean) / model.vision.std
    ids = torch.where(batch.text["llm"].ids < 0, theirs.config.image_token_index, batch.text["llm"].ids)
    out = theirs(pixel_values=pixels, input_ids=ids, attention_mask=torch.ones_like(ids))
    assert_close(model.logits(model(batch)), out.logits)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert processor.num_query_tokens == QUERIES and processor.image_processor.size["height"] == 32


@pytest.mark.parametrize("reads", [False, True])
def test_an_encoder_decoder_behind_a_q_former(reads: bool, tmp_path: Path) -> None:
    """BLIP-2 and InstructBLIP with T5: the logits of the folder are the model's, with gelu in place of gelu_new."""
    tokenizer = byte_level(add=["<image>"])
    llm = HFSeq2Seq(config=t5_config(dropout_rate=0.0, vocab_size=len(tokenizer), dense_act_fn="gelu"))
    family = InstructSeq2Seq if reads else PrefixSeq2Seq
    model = family(vision=tiny_vision(), connector=tiny_connector(llm.dim, text=reads), llm=llm).eval()
    export_blip2(model, tokenizer, tmp_path, instruction=byte_level())
    assert json.loads((tmp_path / "config.json").read_text())["text_config"]["dense_act_fn"] == "gelu"
    with torch.no_grad():
        model.llm.model.lm_head.weight.add_(0.1 * torch.randn_like(model.llm.model.lm_head.weight))
    with pytest.raises(AssetError, match="differs by"):
        verify_blip2(model, tmp_path)


def test_an_instruction_aware_q_former(tmp_path: Path) -> None:
    model = instructed()
    export_blip2(model, byte_level(), tmp_path, instruction=byte_level())
    theirs = InstructBlipForConditionalGeneration.from_pretrained(tmp_path)
    assert theirs.config.qformer_config.vocab_size == len(model.connector.text.words.weight)
    assert AutoProcessor.from_pretrained(tmp_path).qformer_tokenizer is not None
    with torch.no_grad():
        model.connector.text.words.weight.add_(torch.randn_like(model.connector.text.words.weight))
    with pytest.raises(AssetError, match="differs by"):
        verify_blip2(model, tmp_path)


def test_an_aligned_q_former(tmp_path: Path) -> None:
    model = tiny_blip2(cross_attention_frequency=3, num_hidden_layers=4).eval()
    export_blip2(model, byte_level(), tmp_path)
    theirs = Blip2ForImageTextRetrieval.from_pretrained(tmp_path)
    assert theirs.config.qformer_config.cross_attention_frequency == 3
    with torch.no_grad():
        model.match_head.weight.add_(0.1 * torch.randn_like(model.match_head.weight))
    with pytest.raises(AssetError, match="differs by"):
        verify_blip2(model, tmp_path)


def test_what_blip2_is_not_has_problems() -> None:
    model = blip2(300)
    model.vision = clip_vision()
    model.connector = tiny_connector(48, text=True)
    tower, text = find_problems(model)
    assert "blip_2_vision_model" in tower and "drops the text branch" in text
