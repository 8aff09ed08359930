"""Encoder-decoder language models: parity with `transformers`, and the prefix family that is wired from one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import hydra
import pytest
import torch
from torch import Tensor, nn
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2QFormerConfig, Blip2VisionConfig, T5Config

from tests.models.layers.test_qformer import QUERIES, VISION, tiny_connector
from tests.models.layers.test_qformer import tiny_vision as blip2_vision
from tests.support.components import component
from tests.support.tiny_models import IMAGE, assert_close, batch_of, text_stream, tiny_vision
from vlm_train.contracts.batch import IGNORE, Batch, TokenStream
from vlm_train.contracts.layout import PLACEHOLDER_ID
from vlm_train.contracts.objective import StepContext
from vlm_train.errors import AssetError
from vlm_train.models.connectors.linear import Linear
from vlm_train.models.families.prefix_seq2seq import PrefixSeq2Seq
from vlm_train.models.llms.hf_seq2seq import HFSeq2Seq
from vlm_train.models.weights.qformer_names import to_library
from vlm_train.objectives.lm import LanguageModeling

ANSWERS = [[11, 12, 1], [13, 1]]
"""Token ids that are learned; 1 ends a text."""


def t5_config(**changes) -> dict:
    return {
        "model_type": "t5",
        "vocab_size": 50,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
    } | changes


def tiny_t5(seed: int = 0, words: int = 50, **arguments) -> HFSeq2Seq:
    """A random Flan-T5 in training mode without dropout, its head apart from its embedding."""
    torch.manual_seed(seed)
    llm = HFSeq2Seq(config=t5_config(dropout_rate=0.0, vocab_size=words), **arguments)
    nn.init.normal_(llm.model.lm_head.weight, std=0.3)
    return llm


def library(llm: HFSeq2Seq):
    """The library's own model with the same weights, built from its own configuration."""
    from transformers import T5Config, T5ForConditionalGeneration

    numbers = {key: value for key, value in llm.numbers.items() if key != "model_type"}
    model = T5ForConditionalGeneration(T5Config(**numbers))
    if numbers["tie_word_embeddings"] is False:
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    model.load_state_dict(llm.model.state_dict())
    return model.eval()


def tiny_family() -> PrefixSeq2Seq:
    llm = tiny_t5()
    vision = tiny_vision()
    return PrefixSeq2Seq(vision=vision, connector=Linear(in_dim=vision.out_dim, out_dim=llm.dim), llm=llm)


def decoder_stream(answers: list[list[int]]) -> TokenStream:
    """Inputs shifted by one, first token 7: the family puts the model's own start token there."""
    stream = text_stream([[7, *answer[:-1]] for answer in answers])
    labels = torch.full_like(stream.ids, IGNORE)
    for row, answer in enumerate(answers):
        labels[row, : len(answer)] = torch.tensor(answer)
    weights, supervised = (labels != IGNORE).float(), (labels.flatten() != IGNORE).nonzero().squeeze(1)
    return replace(
        stream, labels=labels, weights=weights, supervised=supervised, alignment="seq2seq", plain_causal=True
    )


def tiny_batch() -> Batch:
    prompts = text_stream([[*IMAGE, 21, 22, 1], [*IMAGE, 1]], learn_from=99)
    batch = batch_of(prompts, [0, 1])
    return replace(batch, text={"llm": prompts, "decoder": decoder_stream(ANSWERS)})


def by_hand(model: PrefixSeq2Seq, batch: Batch) -> tuple[Tensor, Tensor]:
    """The encoder's embeddings and mask, put together row by row."""
    patches = model.vision.encode(batch.media.inputs["vision"])
    features = model.connector(patches).rectangular()
    words = model.llm.model.shared
    first = torch.cat([features[0], words(torch.tensor([21, 22, 1]))])
    second = torch.cat([features[1], words(torch.tensor([1])), torch.zeros(2, model.llm.dim)])
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return torch.stack([first, second]), mask


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_and_loss_are_the_library_s(tied: bool, attention: str) -> None:
    torch.manual_seed(0)
    llm = HFSeq2Seq(config=t5_config(tie_word_embeddings=tied), attention=attention).eval()
    if not tied:
        nn.init.normal_(llm.model.lm_head.weight, std=0.3)
    assert bool(llm.head_parameters()) == (not tied)
    embeds, labels = torch.randn(2, 6, llm.dim), torch.tensor(([5, 6, 1], [7, 1, IGNORE]))
    token_mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    ids = torch.tensor([[0, 5, 6], [0, 7, 1]])
    encoded = llm.encode(embeds, token_mask[:, None, None])
    logits = llm.head(llm.decode(llm.embed(ids), torch.arange(3).expand(1, 2, 3), None, encoded=encoded))
    expected = library(llm)(inputs_embeds=embeds, attention_mask=token_mask.long(), labels=labels)
    assert_close(logits[0], expected.logits[0], "logits")
    assert_close(logits[1, :2], expected.logits[1, :2], "logits of the shorter row")
    assert_close(nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), expected.loss, "loss")
    causal = torch.ones(3, 3, dtype=torch.bool).tril().expand(2, 1, 3, 3)
    masked = llm.head(llm.decode(llm.embed(ids), torch.arange(3).expand(1, 2, 3), causal, encoded=encoded))
    assert_close(masked, logits, "explicit mask")


def test_another_architecture_fits_the_contract() -> None:
    sides = ("encoder", "decoder")
    numbers = {f"{side}_{name}": n for side in sides for name, n in (("layers", 2), ("attention_heads", 4))}
    numbers |= {f"{side}_ffn_dim": 64 for side in sides} | {"d_model": 32, "vocab_size": 50, "scale_embedding": True}
    torch.manual_seed(0)
    llm = HFSeq2Seq(config={"model_type": "bart", "decoder_start_token_id": 2} | numbers).eval()
    ids, answer = torch.randint(3, 50, (2, 6)), torch.tensor([[2, 7, 8], [2, 9, 3]])
    token_mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    encoded = llm.encode(llm.embed(ids), token_mask[:, None, None])
    logits = llm.head(llm.decode(llm.embed(answer), torch.arange(3)[None, None], None, encoded=encoded))
    expected = llm.model(input_ids=ids, attention_mask=token_mask.long(), decoder_input_ids=answer).logits
    assert_close(logits, expected)
    assert (len(llm.layers), llm.start_id) == (4, 2)


def test_family_trains_as_a_reference_by_hand() -> None:
    model, batch = tiny_family(), tiny_batch()
    loss = LanguageModeling(stream="decoder", chunk=2)(model, batch, StepContext())["lm"]
    embeds, mask = by_hand(model, batch)
    labels = batch.text["decoder"].labels
    expected = library(model.llm)(inputs_embeds=embeds, attention_mask=mask, labels=labels).loss
    assert loss.count == 5
    assert_close(loss.sum / loss.count, expected, "loss")


@torch.no_grad()
def test_logits_behind_a_q_former_are_blip2_s() -> None:
    """`Blip2ForConditionalGeneration` with T5, built by hand."""
    llm = tiny_t5().eval()
    model = PrefixSeq2Seq(vision=blip2_vision(), connector=tiny_connector(llm.dim, text=False), llm=llm).eval()
    rows = [[PLACEHOLDER_ID] * QUERIES + words for words in ([21, 22, 1], [23, 1])]
    batch = batch_of(text_stream(rows), [0, 1], tokens=QUERIES)
    batch = replace(batch, text={**batch.text, "decoder": decoder_stream(ANSWERS)})
    former = Blip2QFormerConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, encoder_hidden_size=24
    )
    text = {key: value for key, value in llm.numbers.items() if key != "model_type"}
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**VISION), qformer_config=former, text_config=T5Config(**text),
        num_query_tokens=QUERIES, image_token_index=49,
    )  # fmt: skip
    theirs = Blip2ForConditionalGeneration(config).eval()
    theirs.language_model.lm_head.weight = nn.Parameter(torch.empty_like(llm.model.lm_head.weight))
    state = to_library(model.connector.state_dict(), list(theirs.state_dict()))
    state |= {f"vision_model.{name}": tensor for name, tensor in model.vision.model.state_dict().items()}
    state |= {f"language_model.{name}": tensor for name, tensor in llm.model.state_dict().items()}
    theirs.load_state_dict(state, strict=True)
    asked, answer = batch.text["llm"], batch.text["decoder"].ids.clone()
    answer[:, 0] = llm.start_id
    out = theirs(
        pixel_values=(batch.media.inputs["vision"].values.float() / 255 - model.vision.mean) / model.vision.std,
        input_ids=torch.where(asked.ids < 0, 49, asked.ids),
        attention_mask=(asked.segment_ids != 0).long(),
        decoder_input_ids=answer,
    )
    assert_close(model.logits(model(batch))[0], out.logits[0])
    assert_close(model.logits(model(batch))[1, :2], out.logits[1, :2])


def test_a_frozen_model_passes_gradients_on_to_the_connector() -> None:
    model = tiny_family()
    model.llm.requires_grad_(False)
    LanguageModeling(stream="decoder")(model, tiny_batch(), StepContext())["lm"].sum.backward()
    assert all(parameter.grad is None for parameter in model.llm.parameters())
    assert all(parameter.grad.abs().max() > 0 for parameter in model.connector.parameters())


def test_a_rank_without_samples_gets_numbers() -> None:
    model = tiny_family()
    empty = text_stream([[0]], segments=[[0]], learn_from=9)
    batch = replace(batch_of(empty, []), text={"llm": empty, "decoder": empty})
    loss = LanguageModeling(stream="decoder")(model, batch, StepContext())["lm"]
    loss.sum.backward()
    assert loss.sum == 0 and all(torch.isfinite(p.grad).all() for p in model.connector.parameters())


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_the_library_s(beams: int) -> None:
    from transformers import GenerationConfig

    model, batch = tiny_family().eval(), tiny_batch()
    got = model.generate(batch, max_new_tokens=6, eos_ids=[1], num_beams=beams)
    embeds, mask = by_hand(model, batch)
    settings = GenerationConfig(
        max_new_tokens=6, num_beams=beams, decoder_start_token_id=0, eos_token_id=1, pad_token_id=1
    )
    expected = library(model.llm).generate(inputs_embeds=embeds, attention_mask=mask, generation_config=settings)
    assert got.tolist() == expected[:, 1:].tolist()
    assert len({tuple(row) for row in got.tolist()}) == 2  # the prompts matter


def test_a_head_of_its_own_survives_loading(tmp_path: Path) -> None:
    llm = tiny_t5()
    llm.model.save_pretrained(tmp_path)
    other = HFSeq2Seq(config=t5_config(), weights=str(tmp_path))
    other.load_weights()
    assert torch.equal(other.model.lm_head.weight, llm.model.lm_head.weight)
    assert torch.equal(other.embed(torch.tensor([[3]])), llm.embed(torch.tensor([[3]])))


def test_blip2_runs_other_weights_activation(tmp_path: Path) -> None:
    llm = tiny_t5()
    llm.model.save_pretrained(tmp_path)
    other = HFSeq2Seq(config=t5_config(dense_act_fn="gelu"), weights=str(tmp_path))
    other.load_weights()
    acts = [type(block.layer[-1].DenseReluDense.act).__name__ for block in (*llm.layers, *other.layers)]
    assert acts == ["NewGELUActivation"] * 4 + ["GELUActivation"] * 4
    with pytest.raises(AssetError, match=r"has d_kv = 8, the config says 16"):
        HFSeq2Seq(config=t5_config(d_kv=16), weights=str(tmp_path)).load_weights()


def test_new_tokens_reach_both_sides() -> None:
    llm = tiny_t5(new_tokens=2)
    assert llm.vocab_size == 52
    encoded = llm.encode(llm.embed(torch.tensor([[50, 3]])), torch.ones(1, 1, 1, 2, dtype=torch.bool))
    logits = llm.head(
        llm.decode(llm.embed(torch.tensor([[0, 51]])), torch.arange(2)[None, None], None, encoded=encoded)
    )
    assert logits.shape == (1, 2, 52)
    logits.sum().backward()
    learned = {name for name, p in llm.named_parameters() if "new_" in name and p.grad.abs().max() > 0}
    assert len(learned) == 2


@pytest.mark.parametrize(("name", "count"), [("flant5_xl", 2_849_757_184), ("flant5_xxl", 11_135_332_352)])
def test_published_size(name: str, count: int) -> None:
    with torch.device("meta"):
        llm = hydra.utils.instantiate(component("llm", name))
    assert sum(parameter.numel() for parameter in llm.parameters()) == count
