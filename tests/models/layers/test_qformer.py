"""The Q-Former: numbers of `transformers`, who sees whom, what is shared between the passes of the three objectives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Blip2Config,
    Blip2ForImageTextRetrieval,
    Blip2QFormerConfig,
    Blip2VisionConfig,
)
from transformers import Blip2QFormerModel as LibraryQFormer

from tests.support.tiny_models import MEAN, STD, assert_close, batch_of, text_stream
from vlm_train.contracts.batch import Batch
from vlm_train.errors import AssetError
from vlm_train.models.connectors.qformer import QFormerConnector
from vlm_train.models.families.blip2_qformer import Blip2QFormerModel
from vlm_train.models.vision.hf import HFVision
from vlm_train.models.weights.qformer_names import from_bert, from_library, to_library

ROWS = [[5, 6, 7, 40], [8, 9, 40], [10, 11, 12, 13, 40]]
QUERIES, WORDS = 4, 50
VISION = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": 32, "patch_size": 16}


def tiny_vision() -> HFVision:
    numbers = {"model_type": "blip_2_vision_model", **VISION}
    return HFVision(config=numbers, image_mean=MEAN, image_std=STD, layer=-1, keep_cls=True, final_norm=True)


def tiny_connector(out_dim: int | None = None, *, text: bool = True, **changes: Any) -> QFormerConnector:
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    numbers = {"num_query_tokens": QUERIES, "max_positions": 20, **sizes} | changes
    return QFormerConnector(in_dim=24, out_dim=out_dim, text=text, vocab_size=WORDS, **numbers)


def tiny_blip2(seed: int = 0, **changes: Any) -> Blip2QFormerModel:
    torch.manual_seed(seed)
    model = Blip2QFormerModel(vision=tiny_vision(), connector=tiny_connector(**changes), embed_dim=12)
    with torch.no_grad():  # large enough for images to matter
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model


def tiny_bert() -> BertForMaskedLM:
    """Of the Q-Former's numbers, with a word less."""
    config = BertConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, vocab_size=WORDS - 1,
        max_position_embeddings=20,
    )  # fmt: skip
    return BertForMaskedLM(config).eval()


def pairs(rows: list[list[int]] = ROWS, seed: int = 1, left: bool = False) -> Batch:
    return batch_of(text_stream(rows, left=left), list(range(len(rows))), tokens=0, seed=seed)


def library() -> Blip2ForImageTextRetrieval:
    former = Blip2QFormerConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, encoder_hidden_size=24,
        vocab_size=WORDS, max_position_embeddings=20, use_qformer_text_input=True,
    )  # fmt: skip
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**VISION),
        qformer_config=former,
        num_query_tokens=QUERIES,
        image_text_hidden_size=12,
    )
    return Blip2ForImageTextRetrieval(config).eval()


def as_library(model: Blip2QFormerModel) -> Blip2ForImageTextRetrieval:
    theirs = library()
    state = to_library(model.connector.state_dict(), list(theirs.state_dict()))
    tower = {f"vision_model.{name}": tensor for name, tensor in model.vision.model.state_dict().items()}
    heads = {"vision_projection": "image_projection", "text_projection": "text_projection", "itm_head": "match_head"}
    own = model.state_dict()
    state |= {f"{a}.{kind}": own[f"{b}.{kind}"] for a, b in heads.items() for kind in ("weight", "bias")}
    theirs.load_state_dict(tower | state, strict=True)
    return theirs


def inputs(model: Blip2QFormerModel, batch: Batch) -> dict[str, Tensor]:
    pixels = (batch.media.inputs["vision"].values.float() / 255 - model.vision.mean) / model.vision.std
    text = batch.text["llm"]
    return {"pixel_values": pixels, "input_ids": text.ids, "attention_mask": (text.segment_ids != 0).long()}


@torch.no_grad()
def test_similarities_and_matching_are_those_of_the_library() -> None:
    model, batch = tiny_blip2().eval(), pairs()
    theirs, given = as_library(model), inputs(model, batch)
    itc = theirs(**given, use_image_text_matching_head=False)
    assert_close(model.image_vectors(batch), itc.image_embeds)
    assert_close(model.text_vectors(batch), itc.text_embeds)
    ours = torch.einsum("bqe,ge->bgq", model.image_vectors(batch), model.text_vectors(batch)).amax(-1)
    assert_close(ours, itc.logits_per_image)
    itm = theirs(**given, use_image_text_matching_head=True).logits_per_image
    logits = model.match(model.image_keys_values(batch), given["input_ids"], given["attention_mask"].bool())
    assert_close(logits, itm)
    assert (logits[0] - logits[1]).abs().max() > 1e-3


@torch.no_grad()
def test_hidden_states_are_those_of_the_library_s_q_former() -> None:
    """The library's by itself: queries alone, and queries with text that all see each other."""
    model = tiny_blip2().eval()
    former, branch = model.connector.qformer, model.connector.text
    theirs: LibraryQFormer = as_library(model).qformer
    patches, ids = torch.randn(2, 5, 24), torch.tensor([[5, 6, 7], [8, 9, 10]])
    queries = former.queries.expand(2, -1, -1)
    alone = theirs(query_embeds=queries, encoder_hidden_states=patches).last_hidden_state
    context = former.context(patches)
    assert_close(former(queries=queries, context=context).hidden, alone)
    both = torch.cat([queries, branch(ids)], dim=1)
    mixed = theirs(query_embeds=both, query_length=QUERIES, encoder_hidden_states=patches).last_hidden_state
    passed = former(queries=queries, text=branch(ids), branch=branch, context=context)
    assert_close(passed.hidden, mixed)


def test_gradients_are_those_of_the_library() -> None:
    model, batch = tiny_blip2().eval(), pairs()
    theirs, given = as_library(model).eval(), inputs(model, batch)
    theirs(**given, use_image_text_matching_head=True).logits_per_image[:, 1].sum().backward()
    model.match(model.image_keys_values(batch), given["input_ids"], given["attention_mask"].bool())[
        :, 1
    ].sum().backward()
    ours = dict(model.connector.named_parameters())
    expected = from_library({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})
    assert len(expected) > 80
    for name, gradient in expected.items():
        if name.endswith("key.bias"):  # softmax does not see it
            assert ours[name].grad.abs().max() < 1e-5
        else:
            assert_close(ours[name].grad, gradient, name)


@torch.no_grad()
def test_generation_pass_is_a_step_by_step_one() -> None:
    """ITG with cached queries = for every position a whole pass over the queries and the text so far, which no query
    sees."""
    model, batch = tiny_blip2().eval(), pairs()
    hidden, former, branch = model(batch), model.connector.qformer, model.connector.text
    context = model.image_keys_values(batch)
    for row, ids in enumerate(ROWS):
        one = tuple(states[row : row + 1] for states in context)
        written = torch.tensor([[model.start_id, *ids[1:]]])
        for length in range(1, len(ids) + 1):
            mask = torch.ones(QUERIES + length, QUERIES + length).tril().bool()
            mask[:QUERIES, :QUERIES] = True
            passed = former(
                queries=former.queries[None], text=branch(written[:, :length]), branch=branch, context=one, mask=mask
            )
            assert_close(hidden[row, length - 1], passed.hidden[0, -1], f"row {row}, {length} tokens")
    words = model.logits(hidden)
    assert words.shape == (3, 5, WORDS)


def test_text_never_leaks_into_queries_nor_the_future_into_the_past() -> None:
    model, batch = tiny_blip2().eval(), pairs()
    other = pairs([[5, 6, 30, 40], [8, 31, 40], [10, 11, 12, 32, 40]])
    with torch.no_grad():
        assert torch.equal(model.image_vectors(batch), model.image_vectors(other))
        a, b = model(batch), model(other)
        for row, first in enumerate((2, 1, 3)):
            assert torch.equal(a[row, :first], b[row, :first]) and not torch.equal(a[row, first], b[row, first])
        token_mask = batch.text["llm"].segment_ids != 0
        matched = [
            model.match(model.image_keys_values(batch), one.text["llm"].ids, token_mask) for one in (batch, other)
        ]
        assert not torch.allclose(*matched)  # there queries do see text
    image = pairs(seed=2)
    with torch.no_grad():
        assert torch.equal(model.text_vectors(batch), model.text_vectors(image))
        assert not torch.equal(model(batch)[:, 0], model(image)[:, 0])


@pytest.mark.parametrize("left", [False, True])
@torch.no_grad()
def test_padding_changes_nothing(left: bool) -> None:
    model, batch = tiny_blip2().eval(), pairs(left=left)
    token_mask = batch.text["llm"].segment_ids != 0
    matched = model.match(model.image_keys_values(batch), batch.text["llm"].ids, token_mask)
    for row, ids in enumerate(ROWS):
        alone = pairs([ids])
        alone.media.inputs["vision"].values[:] = batch.media.inputs["vision"].values[row]
        assert_close(model.text_vectors(alone)[0], model.text_vectors(batch)[row])
        assert_close(model(alone)[0], model(batch)[row, token_mask[row]])
        words = alone.text["llm"].ids
        assert_close(model.match(model.image_keys_values(alone), words, torch.ones_like(words) > 0)[0], matched[row])


def test_a_batch_without_images_reaches_every_parameter_that_learns() -> None:
    model = tiny_blip2()
    batch = batch_of(text_stream([[0]], segments=[[0]]), [], tokens=0)
    assert model.image_vectors(batch).shape == (0, QUERIES, 12) and model.text_vectors(batch).shape == (0, 12)
    assert model(batch).shape == (1, 1, 32)


def test_it_starts_from_bert() -> None:
    bert = tiny_bert()
    connector = tiny_connector()
    before = {name: tensor.clone() for name, tensor in connector.state_dict().items()}
    taken = from_bert(bert.state_dict(), connector.state_dict())
    connector.load_state_dict(taken, strict=False)
    after = connector.state_dict()
    assert {name for name in before if name not in taken} == {
        name for name in before if ".cross." in name or name == "qformer.queries"
    }
    assert torch.equal(after["text.words.weight"][:-1], bert.bert.embeddings.word_embeddings.weight)
    assert torch.equal(after["text.words.weight"][-1], before["text.words.weight"][-1])
    assert torch.equal(after["qformer.layers.1.feed.up.weight"], after["text.feeds.1.up.weight"])
    assert torch.equal(after["text.feeds.1.up.weight"], bert.bert.encoder.layer[1].intermediate.dense.weight)


def test_a_tower_is_read_out_of_a_whole_blip2(tmp_path: Path) -> None:
    whole = as_library(model := tiny_blip2())
    whole.save_pretrained(tmp_path)
    numbers = {"model_type": "blip_2_vision_model", **VISION}
    own = {"image_mean": MEAN, "image_std": STD, "layer": -1, "keep_cls": True, "final_norm": True}
    tower = HFVision(config=numbers, weights=str(tmp_path), **own)
    tower.load_weights()
    media = pairs().media.inputs["vision"]
    assert torch.equal(tower.encode(media).values, model.vision.encode(media).values)
    other = HFVision(config=numbers | {"num_hidden_layers": 1}, weights=str(tmp_path), **own)
    with pytest.raises(AssetError, match="has num_hidden_layers = 2, the config says 1"):
        other.load_weights()


def test_its_generating_head_starts_from_bert_s(tmp_path: Path) -> None:
    bert = tiny_bert()
    torch.nn.init.normal_(bert.cls.predictions.bias)
    bert.save_pretrained(tmp_path)
    model = tiny_blip2(weights=str(tmp_path))
    model.connector.load_weights()
    model.load_weights()
    hidden = torch.randn(2, 3, 32)
    assert_close(model.logits(hidden)[..., :-1], bert.cls(hidden))


def test_files_are_read_in_both_layouts(tmp_path: Path) -> None:
    """BERT's old names of norms, and a whole BLIP-2 of which only the Q-Former is taken."""
    bert = tiny_bert().state_dict()
    old = {name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t for name, t in bert.items()}
    for name, state in (("bert", old), ("blip2", as_library(tiny_blip2()).state_dict())):
        (tmp_path / name).mkdir()
        save_file(
            {key: tensor.contiguous().clone() for key, tensor in state.items()}, tmp_path / name / "model.safetensors"
        )
    connector = tiny_connector(7, weights=str(tmp_path / "bert"))
    connector.load_weights()
    norm = bert["bert.encoder.layer.2.attention.output.LayerNorm.weight"]
    assert torch.equal(connector.qformer.blocks[2].attention.norm.weight, norm)
    connector, aligner = tiny_connector(7, weights=str(tmp_path / "blip2")), tiny_blip2()
    connector.load_weights()
    for name, tensor in aligner.connector.state_dict().items():
        assert torch.equal(connector.state_dict()[name], tensor), name
    with pytest.raises(AssetError, match="connector.weights: .*missing qformer.layers.3"):
        tiny_connector(weights=str(tmp_path / "blip2"), num_hidden_layers=4).load_weights()
    with pytest.raises(AssetError, match="no safetensors could be read"):
        tiny_connector(weights=str(tmp_path)).load_weights()


@pytest.mark.parametrize(
    ("text", "head", "expected"),
    [(True, False, 185_684_736), (True, True, 186_705_470 - 2_816), (False, False, 105_162_240)],
)
def test_published_counts(text: bool, head: bool, expected: int) -> None:
    """ "188M" in the paper: with `ln_vision` (2,816), which is the tower's final norm here, 186,705,470."""
    with torch.device("meta"):
        connector = QFormerConnector(in_dim=1408, out_dim=None, text=text, vocab_size=30523)
        model: nn.Module = Blip2QFormerModel(vision=nn.Identity(), connector=connector) if head else connector
    assert sum(p.numel() for p in model.parameters()) == expected
