"""BLIP: the numbers of `transformers` with the same weights, both ways, and generation."""

from __future__ import annotations

import pytest
import torch

from tests.support.tiny_models import MEAN, STD, assert_close, batch_of, text_stream, with_views
from vlm_train.errors import AssetError, BatchError, ConfigError
from vlm_train.export.blip import from_library, library_config, verify_blip, write_blip
from vlm_train.models.families.blip import Blip
from vlm_train.models.llms.blip_text import BlipTextModel
from vlm_train.models.vision.hf import HFVision
from vlm_train.models.weights.blip_names import CAPTIONING, RETRIEVAL, bert_state

ROWS = [[2, 6, 7, 8, 3], [2, 9, 3], [2, 4, 5, 3]]
EOS = 3
NUMBERS = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}


def med(**changes) -> BlipTextModel:
    return BlipTextModel(config={"vocab_size": 42, **NUMBERS} | changes)


def tower(**arguments) -> HFVision:
    config = {"model_type": "blip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "image_size": 32, "patch_size": 16, "initializer_range": 0.2}
    options = {"layer": -1, "keep_cls": True, "final_norm": True, "attention": "eager"} | arguments
    return HFVision(config=config, image_mean=MEAN, image_std=STD, **options)


def blip(seed: int = 0) -> Blip:
    """Random, in eval mode, with weights large enough for images and order to matter."""
    torch.manual_seed(seed)
    model = Blip(vision=tower(), llm=med(), embed_dim=24).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("llm.") and parameter.ndim > 1:
                parameter.mul_(5)
            elif parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(rows=ROWS, left: bool = False):
    return batch_of(text_stream(rows, left=left), list(range(len(rows))), tokens=0)


def pixels_of(model, given):
    return (given.media.inputs["vision"].values / 255 - model.vision.mean) / model.vision.std


def library(model, kind: str, folder):
    from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval

    write_blip(model, folder)
    assert verify_blip(model, folder) == 0.0
    return (
        {RETRIEVAL: BlipForImageTextRetrieval, CAPTIONING: BlipForConditionalGeneration}[kind]
        .from_pretrained(folder / kind)
        .eval()
    )


def started(given, start: int):
    ids = given.text["llm"].ids.clone()
    ids[:, 0] = start
    return ids


def test_similarities_and_matching_are_those_of_transformers(tmp_path):
    model, given = blip(), batch()
    theirs = library(model, RETRIEVAL, tmp_path)
    text = given.text["llm"]
    mask, pixels = (text.segment_ids != 0).long(), pixels_of(model, given)
    expected = theirs(text.ids, pixels, use_itm_head=False, attention_mask=mask).itm_score
    assert_close(model.image_vectors(given)[:, 0] @ model.text_vectors(given).T, expected)
    expected = theirs(started(given, model.llm.encoder_start), pixels, attention_mask=mask).itm_score
    found = model.match(model.image_keys_values(given), text.ids, text.segment_ids != 0)
    assert_close(found, expected)
    assert (found.std(dim=0) > 1e-3).all(), "the images and texts matter"


def test_logits_are_those_of_transformers(tmp_path):
    model, given = blip(), batch()
    theirs = library(model, CAPTIONING, tmp_path)
    token_mask = given.text["llm"].segment_ids != 0
    ids = started(given, model.llm.decoder_start)
    expected = theirs(pixels_of(model, given), ids, attention_mask=token_mask.long()).logits
    assert_close(model.logits(model(given))[token_mask], expected[token_mask])


@pytest.mark.parametrize("kind", [RETRIEVAL, CAPTIONING])
def test_weights_come_back(tmp_path, kind):
    model, other, given = blip(0), blip(1), batch()
    theirs = library(model, kind, tmp_path)
    before = other.llm.layers[0].encoder_attention.query.weight.clone()
    from_library(other, kind, theirs.state_dict())
    if kind == CAPTIONING:
        assert_close(other.logits(other(given)), model.logits(model(given)))
        assert torch.equal(before, other.llm.layers[0].encoder_attention.query.weight)
    else:
        text = given.text["llm"]
        asked = text.ids, text.segment_ids != 0
        assert_close(
            other.match(other.image_keys_values(given), *asked), model.match(model.image_keys_values(given), *asked)
        )
        assert_close(other.text_vectors(given), model.text_vectors(given))
    broken = {name: tensor for name, tensor in theirs.state_dict().items() if "layer.1.crossattention" not in name}
    with pytest.raises(AssetError, match="crossattention"):
        from_library(other, kind, broken)


@pytest.mark.parametrize("left", [False, True])
def test_a_row_does_not_depend_on_its_padding(left):
    model, given = blip(), batch(left=left)
    token_mask = given.text["llm"].segment_ids != 0
    vectors, found = (
        model.text_vectors(given),
        model.match(model.image_keys_values(given), given.text["llm"].ids, token_mask),
    )
    for number, row in enumerate(ROWS):
        alone = with_views(batch([row]), given.media.inputs["vision"].values[number][None])
        assert_close(vectors[number], model.text_vectors(alone)[0])
        ids = alone.text["llm"].ids
        assert_close(found[number], model.match(model.image_keys_values(alone), ids, torch.ones_like(ids) > 0)[0])


def test_encoding_looks_both_ways_and_decoding_back_only():
    model = blip()
    one, other = batch([[2, 6, 7, 8, 3]]), batch([[2, 6, 7, 9, 3]])
    assert not torch.allclose(model.text_vectors(one), model.text_vectors(other))
    hidden, changed = model(one), model(other)
    assert_close(hidden[:, :3], changed[:, :3])
    assert not torch.allclose(hidden[:, 3], changed[:, 3])


def test_encoder_and_decoder_share_all_but_self_attention():
    model = blip()
    given = batch()

    def reached(loss) -> set[str]:
        model.zero_grad()
        loss.backward()
        return {name for name, parameter in model.named_parameters() if parameter.grad is not None}

    text = given.text["llm"]
    lm = reached(model.logits(model(given)).sum())
    itm = reached(model.match(model.image_keys_values(batch()), text.ids, text.segment_ids != 0).sum())
    itc = reached((model.image_vectors(batch())[:, 0] * model.text_vectors(batch()) * model.temperature).sum())
    assert not any("encoder_attention" in name for name in lm) and any("decoder_attention" in name for name in lm)
    assert not any("decoder_attention" in name for name in itm | itc)
    assert {"llm.layers.1.cross.key.weight", "llm.layers.1.feed.up.weight", "llm.words.weight"} <= lm & itm
    assert not any("cross" in name for name in itc)
    unreached = {name for name, _ in model.named_parameters()} - (lm | itm | itc)
    assert unreached == set(model.unused_parameters())


def test_the_tower_runs_once_a_batch(monkeypatch):
    model, given, calls = blip(), batch(), []
    encode = model.vision.encode
    monkeypatch.setattr(model.vision, "encode", lambda media: calls.append(len(media)) or encode(media))
    model(given), model.image_vectors(given), model.image_keys_values(given)
    assert calls == [3]


def test_a_batch_of_padding_reaches_the_same_parameters():
    model, empty = blip(), batch_of(text_stream([[0]], segments=[[0]]), [])
    model(empty).sum().backward()
    assert model.llm.layers[0].cross.key.weight.grad is not None and model.image_vectors(empty).shape == (0, 1, 24)
    with pytest.raises(BatchError, match="2 views of 2 images for 3 texts"):
        model(batch_of(text_stream(ROWS), [0, 1], tokens=0))


@pytest.mark.parametrize("left", [False, True])
def test_generation_is_that_of_transformers(tmp_path, left):
    model, prompts = blip(), [[2, 6, 7], [2, 9, 8], [2, 4, 5]]
    theirs, given = library(model, CAPTIONING, tmp_path), batch(prompts, left=left)
    ids = torch.tensor([[*row, EOS] for row in prompts])  # it takes the last one off
    options = {"max_new_tokens": 6, "min_new_tokens": 2, "repetition_penalty": 1.1, "do_sample": False}
    theirs.config.text_config.sep_token_id = EOS
    starts = [model.llm.decoder_start, model.llm.encoder_start]
    expected = theirs.generate(pixels_of(model, given), ids, suppress_tokens=starts, **options)[:, 3:]
    options.pop("do_sample")
    found = model.generate(given, eos_ids=[EOS], **options)
    for ours, other in zip(found.tolist(), expected.tolist(), strict=True):
        ends = other.index(EOS) + 1 if EOS in other else len(other)
        assert ours[:ends] == other[:ends]


def test_prompts_of_different_lengths_do_not_meet():
    model, prompts = blip(), [[2, 6, 7, 11], [2, 9]]
    given = batch(prompts)
    together = model.generate(given, max_new_tokens=5, eos_ids=[])
    for number, row in enumerate(prompts):
        alone = with_views(batch([row]), given.media.inputs["vision"].values[number][None])
        assert model.generate(alone, max_new_tokens=5, eos_ids=[]).tolist()[0] == together[number].tolist()


def test_temperature_is_bounded():
    model = blip()
    for value, bound in ((-0.1, 0.001), (0.9, 0.5), (0.2, 0.2)):
        model.temperature.data.fill_(value)
        model.clamp_()
        assert model.temperature.item() == pytest.approx(bound)
    model.temperature.requires_grad_(False).fill_(0.9)
    model.clamp_()
    assert model.temperature.item() == pytest.approx(0.9)


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="keep_cls"):
        Blip(vision=tower(keep_cls=False), llm=med())
    with pytest.raises(ConfigError, match="hidden_dim: not a setting of BlipTextModel"):
        med(hidden_dim=3)
    with pytest.raises(ConfigError, match="7 more"):
        BlipTextModel(config={"vocab_size": 42, **NUMBERS}, new_tokens=7)


def test_both_self_attentions_start_from_bert(tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=40, **NUMBERS)).save_pretrained(tmp_path)
    model = BlipTextModel(config={"vocab_size": 42, **NUMBERS}, weights=str(tmp_path))
    starts = model.words.weight[40:].clone()
    model.load_weights()
    state = bert_state(str(tmp_path), 2)
    assert torch.equal(model.words.weight[:40], state["words.weight"]) and torch.equal(model.words.weight[40:], starts)
    layer = model.layers[1]
    assert torch.equal(layer.encoder_attention.query.weight, layer.decoder_attention.query.weight)
    bert = BertForMaskedLM.from_pretrained(tmp_path).eval()
    assert torch.equal(layer.feed.down.weight, bert.bert.encoder.layer[1].output.dense.weight)
    with pytest.raises(AssetError, match="no BERT of this architecture"):
        other = {**NUMBERS, "num_hidden_layers": 3}
        BlipTextModel(config={"vocab_size": 42, **other}, weights=str(tmp_path)).load_weights()


def test_config_names_the_start_token():
    assert library_config(blip()).text_config.bos_token_id == 40
