"""Blocks inserted into a language model: who sees which image, generation, checkpointing, adapters, compilation."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.gated import GatedCrossAttention, GatedVLM
from tests.support.tiny_models import assert_close, llama_config, text_stream, tiny_llm, tiny_vision
from vlm_train.config.schema import Rule
from vlm_train.contracts.batch import Batch, MediaBatch
from vlm_train.contracts.cross_states import CrossStates
from vlm_train.contracts.media import MediaInput
from vlm_train.errors import ConfigError
from vlm_train.models.adapters.lora import adapted_layers, lora
from vlm_train.models.connectors.mlp import MLP
from vlm_train.models.families.text_only import TextOnly
from vlm_train.models.layers.activation_checkpointing import checkpoint_layers
from vlm_train.models.layers.inserted_blocks import check_ownership
from vlm_train.models.layers.passes import decode_stream, generate_from
from vlm_train.training.params import apply_policy
from vlm_train.training.strategies.spread import list_units

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "vocab_size": 60}
FAMILIES = {  # decoders that read something of their layers, or call them in their own way
    "llama": {"model_type": "llama"},
    "qwen2": {"model_type": "qwen2"},
    "qwen2 with windows": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 3,
                           "max_window_layers": 1},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 8, "sliding_window": 3,
               "layer_types": ["sliding_attention", "full_attention"]},
    "opt": {"model_type": "opt", "dropout": 0.0},
}  # fmt: skip
ROWS = [[5, 6, 7, 8, 9, 10, 11], [3, 4, 5, 6]]
MEDIA = [[-1, 0, 0, 1, 1, 1, 1], [2, 2, 2, 2]]  # two images in the first row, one in the second


def gated_vlm(config: dict | None = None, *, every: int = 1, gate: float = 1.0, seed: int = 0) -> GatedVLM:
    """A random model whose images matter."""
    torch.manual_seed(seed)
    vision, llm = tiny_vision(), tiny_llm(config)
    connector = MLP(in_dim=vision.out_dim, out_dim=llm.dim)
    model = GatedVLM(vision=vision, connector=connector, llm=llm, every=every, gate=gate)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model.eval()


def gated_batch(rows: list[list[int]] = ROWS, media: list[list[int]] = MEDIA, *, left: bool = False) -> Batch:
    """Rows of ids, and the image that each token sees; one random image for each number."""
    stream = text_stream(rows, left=left)
    width = stream.ids.shape[1]
    padding = [[-1] * (width - len(row)) for row in media]
    seen = [[*pad, *row] if left else [*row, *pad] for row, pad in zip(media, padding, strict=True)]
    count = max(map(max, media)) + 1
    pixels = torch.randint(
        0, 256, (max(count, 1), 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    text = replace(stream, media_of_token=torch.tensor(seen))
    return Batch(text={"llm": text}, media=media_of(pixels, count))


def media_of(pixels: torch.Tensor, count: int) -> MediaBatch:
    """So many images of one view each, or a blank view."""
    images = MediaInput(pixels, view_counts=(1,) * count)
    return MediaBatch(inputs={"vision": images}, slot_counts=(0,) * count, row=torch.zeros(count, dtype=torch.long))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_closed_gate_is_the_model_without_blocks(family):
    model, batch = gated_vlm(SMALL | FAMILIES[family], gate=0.0), gated_batch()
    plain = tiny_llm(SMALL | FAMILIES[family]).eval()
    plain.load_state_dict(model.llm.state_dict())  # the names are the same, too
    assert torch.equal(model.logits(model(batch)), plain.head(TextOnly(llm=plain)(batch)))
    with torch.no_grad():
        for block in model.blocks:
            block.gate.fill_(1.0)
    assert not torch.equal(model.logits(model(batch)), plain.head(TextOnly(llm=plain)(batch)))


def test_blocks_stand_before_every_nth_layer():
    calls = []

    class Note(nn.Module):
        def forward(self, hidden, cross_states):
            calls.append("block")
            return hidden

    llm = tiny_llm(llama_config(num_hidden_layers=5))
    for index, layer in enumerate(llm.layers):
        layer.register_forward_hook(lambda *_, index=index: calls.append(index))
    assert len(llm.insert(Note, every=2)) == 2
    batch = gated_batch()
    states = CrossStates(features=torch.zeros(3, 1, 48), media_of_token=batch.text["llm"].media_of_token)
    decode_stream(llm, llm.embed(batch.text["llm"].ids), batch.text["llm"], cross_states=states)
    assert calls == [0, "block", 1, 2, "block", 3, 4]
    for every in (0, 6):
        with pytest.raises(ConfigError, match=f"blocks every {every} layers, .* has 5; allowed: 1 to 5"):
            llm.insert(Note, every=every)


@pytest.mark.parametrize("left", [False, True])
def test_a_token_sees_only_the_last_image_before_it(left):
    model = gated_vlm()
    torch.manual_seed(0)
    features = torch.randn(3, 4, model.llm.dim, requires_grad=True)
    text = gated_batch(left=left).text["llm"]
    # Without self-attention a token's own image is all that it can learn of.
    block = model.blocks[0]
    embeds = model.llm.embed(text.ids).detach()
    hidden = block(embeds, CrossStates(features=features, media_of_token=text.media_of_token))
    for row, token in np.ndindex(*text.ids.shape):
        gradient = torch.autograd.grad(hidden[row, token].sum(), features, retain_graph=True)[0]
        reached = gradient.flatten(1).abs().sum(1).nonzero().flatten().tolist()
        seen = int(text.media_of_token[row, token])
        assert reached == ([] if seen < 0 else [seen])


def test_rows_of_a_batch_are_those_of_batches_of_one():
    """Different numbers of images, and one row without any; gradients too."""
    model = gated_vlm()
    rows, media = [*ROWS, [9, 8, 7]], [*MEDIA, [-1, -1, -1]]
    whole = gated_batch(rows, media)
    logits = model.logits(model(whole))
    for number, (row, seen) in enumerate(zip(rows, media, strict=True)):
        text, first = (
            gated_batch([row], [[0] * len(row)]).text["llm"],
            max(min([s for s in seen if s >= 0], default=0), 0),
        )
        text = replace(text, media_of_token=torch.tensor([[s - first if s >= 0 else -1 for s in seen]]))
        count = len({s for s in seen if s >= 0})
        pixels = whole.media.inputs["vision"].values[first : first + max(count, 1)]
        one = Batch(text={"llm": text}, media=media_of(pixels, count))
        assert_close(logits[number, : len(row)], model.logits(model(one))[0])


def test_a_batch_without_media_runs_the_blocks_too():
    """They read the blank view: same calls, gradients of zero, and the text as if there were no blocks."""
    model, batch = gated_vlm(), gated_batch(media=[[-1] * 7, [-1] * 4])
    hidden = model(batch)
    plain = decode_stream_without_blocks(model, batch)
    assert_close(hidden, plain)
    hidden.square().sum().backward()
    for name, parameter in [*model.blocks.named_parameters(), *model.connector.named_parameters()]:
        assert parameter.grad is not None and not parameter.grad.any(), name


def decode_stream_without_blocks(model, batch):
    plain = tiny_llm()
    plain.load_state_dict(model.llm.state_dict())
    return TextOnly(llm=plain.eval())(batch)


def test_cross_states_and_blocks_need_each_other():
    llm, text = tiny_llm(), gated_batch().text["llm"]
    states = CrossStates(features=torch.zeros(3, 1, 48), media_of_token=text.media_of_token)
    with pytest.raises(ConfigError, match="got cross states, but has no blocks"):
        decode_stream(llm, llm.embed(text.ids), text, cross_states=states)
    llm.insert(lambda: GatedCrossAttention(48))
    with pytest.raises(ConfigError, match="blocks got no cross states"):
        decode_stream(llm, llm.embed(text.ids), text)
    with pytest.raises(ConfigError, match="blocks got no cross states"):
        generate_from(llm, llm.embed(text.ids), text, max_new_tokens=1, eos_ids=[])


@pytest.mark.parametrize("selective", [False, True])
def test_checkpointed_blocks_give_the_same_gradients(selective):
    batch, gradients = gated_batch(), []
    for checkpointed in (False, True):
        model = gated_vlm()
        if checkpointed:
            *layers, _ = list_units(model)
            assert {id(block) for block in model.blocks} <= {id(layer) for layer in layers}
            checkpoint_layers(layers, selective=selective)
        runs = []
        model.blocks[0].query.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        model.logits(model(batch)).square().mean().backward()
        assert len(runs) == 1 + checkpointed  # computed again in backward, long after `decode`
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, again = gradients
    assert plain.keys() == again.keys() and any(name.startswith("vision") for name in plain)
    for name, gradient in plain.items():
        assert_close(again[name], gradient, name)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2 with windows", "gemma3", "opt"])
def test_generation_with_a_cache_is_generation_without(family, left):
    """Rows with two images, one and none; the tokens made see what the last token of their prompt sees."""
    model = gated_vlm(SMALL | FAMILIES[family])
    rows, media = [*ROWS, [9, 8, 7]], [*MEDIA, [-1, -1, -1]]
    made = model.generate(gated_batch(rows, media, left=left), max_new_tokens=5, eos_ids=[])
    whole = gated_batch(rows, media)
    for row, answer in enumerate(made.tolist()):
        ids, seen = list(rows[row]), list(media[row])
        for token in answer:
            text = replace(text_stream([ids]), media_of_token=torch.tensor([seen]))
            logits = model.logits(model(replace(whole, text={"llm": text})))[0, -1]
            assert logits.argmax() == token
            ids.append(token)
            seen.append(seen[-1])
    blind = gated_batch(rows, [[-1] * len(row) for row in rows], left=left)
    assert not torch.equal(model.generate(blind, max_new_tokens=5, eos_ids=[]), made)  # the images decide


def test_beams_see_the_images_of_their_row():
    model, media = gated_vlm(), [[-1, 0, 0, 1, 1, 1, 1], [2, 2, 2, 2]]
    whole = gated_batch(ROWS, media)
    ask = {"max_new_tokens": 4, "eos_ids": [], "num_beams": 3}
    together = model.generate(whole, **ask)
    for row, first in ((0, 0), (1, 2)):
        count = 2 - row
        text = replace(
            text_stream([ROWS[row]]), media_of_token=torch.tensor([[max(m - first, -1) for m in media[row]]])
        )
        one = media_of(whole.media.inputs["vision"].values[first : first + count], count)
        alone = model.generate(Batch(text={"llm": text}, media=one), **ask)
        assert together[row].tolist() == alone[0].tolist()


def test_adapters_and_rules_of_the_llm_leave_blocks_alone():
    model = gated_vlm()
    names = lora(model=model, match=r"llm\..*")
    assert names and not any("blocks" in name for name in names)
    policy = apply_policy(
        model,
        [Rule(match=r"blocks\..*", lr=1e-3), Rule(match=r"llm\..*", lr=None), Rule(match=".*", lr=None)],
        weight_decay=0.0,
    )
    assert {name.split(".")[0] for name in policy.named} == {"blocks"}
    named = gated_vlm()
    lora(model=named, match=r"(llm|blocks)\..*")
    assert any(name.startswith("blocks.0.") for name in adapted_layers(named))
    model.logits(model(gated_batch())).sum().backward()  # adapted blocks are those that run
    named.logits(named(gated_batch())).sum().backward()
    assert named.blocks[0].query.lora_B["default"].weight.grad.any()


def test_weights_of_blocks_are_saved_and_loaded(tmp_path):
    from safetensors.torch import load_model, save_model

    model, other = gated_vlm(seed=0), gated_vlm(seed=1)
    save_model(model, str(tmp_path / "weights.safetensors"))
    assert load_model(other, str(tmp_path / "weights.safetensors")) == (set(), [])
    assert torch.equal(other(gated_batch()), model(gated_batch()))


def test_a_deep_copy_has_blocks_of_its_own():
    model, batch = gated_vlm(), gated_batch()
    expected, twin = model(batch).detach(), copy.deepcopy(model)
    with torch.no_grad():
        for block in model.blocks:
            block.gate.zero_()
    assert torch.equal(twin(batch), expected) and not torch.equal(model(batch), expected)


def test_a_family_that_drops_its_blocks_is_an_error():
    class Forgets(TextOnly):
        def __init__(self, *, llm):
            super().__init__(llm=llm)
            llm.insert(lambda: GatedCrossAttention(llm.dim))

    with pytest.raises(ConfigError, match=r"Forgets inserted blocks but .* self\.blocks = llm\.insert"):
        check_ownership(Forgets(llm=tiny_llm()))
    check_ownership(gated_vlm())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_layers_with_blocks_compile(checkpointed):
    torch._dynamo.reset()
    batch, gradients = gated_batch(), []
    for compiled in (False, True):
        model = gated_vlm()
        *layers, _ = list_units(model)
        if checkpointed:
            checkpoint_layers(layers)
        for layer in layers if compiled else ():
            layer.compile(backend="aot_eager")
        for _ in range(2):
            model.zero_grad()
            model.logits(model(batch)).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, compiled = gradients
    assert plain.keys() == compiled.keys()
    for name, gradient in plain.items():
        assert_close(compiled[name], gradient, name)
