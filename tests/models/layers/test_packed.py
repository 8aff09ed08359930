"""Packed rows through the real collate: equal to every sample alone, for every attention, and nothing leaks."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import accumulate

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data_pipelines.sample import Sample
from tests.data.text.rendering import assistant, load, sample, user
from tests.support.render import render_sample
from tests.support.tiny_models import assert_close, llama_config, text_stream, tiny_llm, tiny_vision, with_views
from vlm_train.contracts.batch import Batch, PackedSequences, SequenceMask
from vlm_train.contracts.layout import GridLayout, NoMedia
from vlm_train.contracts.media import Grid3
from vlm_train.data.collate import Example, collate_rows, pack_sequences
from vlm_train.data.images.plan import Views
from vlm_train.data.images.transform import ImageTransform
from vlm_train.data.text.tokenizer import byte_level
from vlm_train.errors import ConfigError
from vlm_train.models.connectors.mlp import MLP
from vlm_train.models.families.prefix_vlm import PrefixVLM
from vlm_train.models.families.text_only import TextOnly
from vlm_train.models.layers import attention as attention_module
from vlm_train.models.layers import masks
from vlm_train.models.layers.activation_checkpointing import checkpoint_layers
from vlm_train.models.layers.attention import decoding, layer_mask, packed_attention
from vlm_train.models.layers.passes import decode_stream, generate_from

ATTENTIONS = ["packed", "sdpa", "eager"]
SMALL = llama_config(hidden_size=32, intermediate_size=48)  # 4 heads share 2 key heads
MIXED = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
LLMS = {
    "llama": {},
    "qwen2": {"model_type": "qwen2"},
    "mistral window": {"model_type": "mistral", "sliding_window": 7},
    "gemma3 mixed": {"model_type": "gemma3_text", "head_dim": 8, **MIXED},
    "opt": {"model_type": "opt", "dropout": 0.0},
    "gemma2 soft cap": {"model_type": "gemma2", "head_dim": 8, "attn_logit_softcapping": 2.0, **MIXED},
}
UNROTATED = ("vision", "llm.model.model.decoder")  # the tower, OPT
CASES = [(llm, way) for llm in LLMS for way in ATTENTIONS if llm != "gemma2 soft cap" or way == "eager"]
PLANS = {"vision": ImageTransform(size=(32, 32), patch_grid=lambda size: Grid3(1, 2, 2))}
TOKENIZER, QA = byte_level(), load("qa")

SAMPLES = [
    sample((user("What?", 0), assistant("A cat.")), media=1),
    sample((user("Say so"), assistant("so"))),
    sample((user("Which?", 0, 1), assistant("The left")), media=2),
    sample((user("One?", 1), assistant("yes"), user("Two?", 0), assistant("no")), media=2),
    sample((user("Hi"), assistant("Hello there, you"))),
]
BRANCHED = sample(*((user(f"Q{n}?", 0), assistant("yes" * n)) for n in (1, 2, 3)), media=1)
PACKS = ((0, 1, 2), (3, 4))  # which samples share a row; the second is padded


def tiny_model(llm: str, attention: str, family: type = PrefixVLM) -> PrefixVLM | TextOnly:
    """A random model in training mode, its weights large enough for every token to matter."""
    torch.manual_seed(0)
    language = tiny_llm(SMALL | LLMS[llm] | {"vocab_size": len(TOKENIZER)}, attention=attention)
    if family is TextOnly:
        model = TextOnly(llm=language)
    else:
        vision = tiny_vision()
        model = PrefixVLM(vision=vision, connector=MLP(in_dim=vision.out_dim, out_dim=language.dim), llm=language)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model.train()


def items_of(model: PrefixVLM | TextOnly, samples: list[Sample]) -> list[Example]:
    """The samples as the loader would hand them to collate, with random images of their own."""
    generator = torch.Generator().manual_seed(1)
    layout = NoMedia()
    if isinstance(model, PrefixVLM):
        layout = GridLayout(PLANS["vision"].grids, model.connector.token_grid)
    items = []
    for number, one in enumerate(samples):
        rendered = render_sample(one, QA, TOKENIZER, layout)
        views = [torch.randint(0, 256, (1, 3, 32, 32), generator=generator).byte().numpy() for _ in one.media]
        views = [Views(view, (Grid3(1, 2, 2),)) for view in views] if isinstance(model, PrefixVLM) else []
        shown = replace(rendered, key=f"s{number}", media=rendered.media if views else ())
        items.append(Example(shown, {"vision": views}))
    return items


def lay_out(rows: list[list[int]]) -> PackedSequences:
    """Full rows of causal samples with these lengths."""
    lengths = [length for row in rows for length in row]
    spans = list(zip(accumulate([0, *lengths]), lengths, strict=False))
    return pack_sequences(spans, sum(lengths))


def batch_of(items: list[Example], packs: tuple[tuple[int, ...], ...]) -> Batch:
    return collate_rows([[items[index] for index in row] for row in packs], PLANS)


def token_losses(model: PrefixVLM | TextOnly, batch: Batch) -> torch.Tensor:
    """Losses of the supervised tokens, sample after sample."""
    stream = batch.text["llm"]
    hidden = model(batch).flatten(0, 1)[stream.supervised]
    return F.cross_entropy(model.logits(hidden), stream.labels.flatten()[stream.supervised], reduction="none")


def losses_and_gradients(model: PrefixVLM | TextOnly, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """Token losses, and the gradients of all parameters and of the images, summed over `batches`."""
    model.zero_grad()
    losses, images = [], []
    for batch in batches:
        pixels = batch.media.inputs["vision"].values.float().requires_grad_()
        loss = token_losses(model, with_views(batch, pixels))
        loss.sum().backward()
        losses.append(loss.detach())
        if batch.media.inputs["vision"].views_total:
            images.append(pixels.grad)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"losses": torch.cat(losses)} | ({"images": torch.cat(images)} if images else {})


def assert_packed_equals_alone(model: PrefixVLM | TextOnly, samples: list[Sample], packs=PACKS) -> None:
    assert_packed_items_equal_alone(model, items_of(model, samples), packs)


def assert_packed_items_equal_alone(model: PrefixVLM | TextOnly, items: list[Example], packs=PACKS) -> None:
    alone = losses_and_gradients(model, [batch_of(items, ((n,),)) for row in packs for n in row])
    packed = losses_and_gradients(model, [batch_of(items, packs)])
    assert packed.keys() == alone.keys() and len(alone["losses"]) > 20
    for name, expected in alone.items():
        if name.startswith(UNROTATED) and name.endswith("k_proj.bias"):  # zero in exact arithmetic
            assert packed[name].abs().max() <= 1e-5 * alone[name.replace("k_proj", "q_proj")].abs().max(), name
        else:
            assert_close(packed[name], expected, name)


@pytest.mark.parametrize(("llm", "attention"), CASES)
def test_packed_equals_alone(llm, attention):
    assert_packed_equals_alone(tiny_model(llm, attention), SAMPLES)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_packed_equals_alone_without_images(attention):
    assert_packed_equals_alone(tiny_model("llama", attention, TextOnly), SAMPLES)


def with_image_blocks(item: Example) -> Example:
    """The sample with its images in sight of themselves, each a block of its own."""
    stream = item.rendered.llm
    groups = stream.attention_group.copy()
    for number, placed in enumerate(stream.slots, start=1):
        groups[placed.start : placed.end] = -number
    return replace(item, rendered=replace(item.rendered, streams={"llm": replace(stream, attention_group=groups)}))


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize(("llm", "attention"), CASES[:3] + [CASES[6], ("gemma3 mixed", "packed")])
def test_packed_branches_and_image_blocks_equal_alone(llm, attention, blocks):
    """Next to samples without them."""
    model = tiny_model(llm, attention)
    items = items_of(model, [SAMPLES[0], BRANCHED, SAMPLES[1], BRANCHED, SAMPLES[3]])
    if blocks:
        items = [with_image_blocks(item) if number in (0, 1, 4) else item for number, item in enumerate(items)]
    assert_packed_items_equal_alone(model, items)


def test_neighbors_of_a_branched_sample_take_the_packed_path(monkeypatch):
    """Each function is given the tokens of its samples and no others, in a row or in several."""
    given = []
    functions = {name: getattr(attention_module, name) for name in ("attend_causal", "attend_masked")}
    for name in functions:

        def record(query, *rest, name=name, attend=functions[name]):
            given.append((name, len(query)))
            return attend(query, *rest)

        monkeypatch.setattr(attention_module, name, record)
    model = tiny_model("llama", "packed")
    items = items_of(model, [SAMPLES[0], BRANCHED, SAMPLES[1], SAMPLES[2]])
    lengths = [len(item.rendered.llm) for item in items]
    model(batch_of(items, ((0, 1), (2, 3))))
    padding = abs(lengths[0] + lengths[1] - lengths[2] - lengths[3])
    layer = [("attend_causal", sum(lengths) - lengths[1] + padding), ("attend_masked", lengths[1])]
    assert given == layer * 2
    given.clear()
    model(batch_of(items, ((0,), (2,))))
    assert given == []  # plain rows need neither


MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.25}
THREE_AXES = {
    "model_type": "qwen3_5_text",
    "head_dim": 32,
    "layer_types": ["full_attention"] * 2,
    "rope_parameters": MROPE,
}


def with_three_axes(item: Example) -> Example:
    """The sample with positions as in M-RoPE: an image's tokens stand at one time, in rows and columns."""
    stream = item.rendered.llm
    positions = np.repeat(stream.positions, 3, axis=0)
    for placed in stream.slots:
        tokens, first = np.arange(placed.end - placed.start), stream.positions[0, placed.start]
        positions[:, placed.start : placed.end] = first + np.stack([0 * tokens, tokens // 2, tokens % 2])
        positions[:, placed.end :] -= len(tokens) - 2
    return replace(item, rendered=replace(item.rendered, streams={"llm": replace(stream, positions=positions)}))


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("branched", [False, True])
def test_three_axes_packed_equal_alone(monkeypatch, attention, branched):
    model = three_axes_model(monkeypatch, attention)
    samples = [SAMPLES[0], BRANCHED if branched else SAMPLES[1], *SAMPLES[2:]]
    items = [with_three_axes(item) for item in items_of(model, samples)]
    assert_packed_items_equal_alone(model, items)


def three_axes_model(monkeypatch: pytest.MonkeyPatch, attention: str) -> PrefixVLM:
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5PreTrainedModel

    monkeypatch.setattr(Qwen3_5PreTrainedModel, "_supports_attention_backend", True)  # without its linear layers
    monkeypatch.setitem(LLMS, "three axes", THREE_AXES)
    return tiny_model("three axes", attention)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_three_axes_equal_the_library(monkeypatch, attention):
    """Row by row, without and with a mask; text too, whose axes are alike."""
    model = three_axes_model(monkeypatch, attention).eval()
    items = [with_three_axes(item) for item in items_of(model, SAMPLES)]
    for item in items:
        batch = collate_rows([[item]], PLANS)
        stream = batch.text["llm"]
        assert stream.plain_causal and stream.positions.shape[0] == 3
        embeds = torch.randn(1, stream.ids.shape[1], model.llm.dim, generator=torch.Generator().manual_seed(0))
        expected = model.llm.decoder(inputs_embeds=embeds, position_ids=stream.positions).last_hidden_state
        for one in (stream, replace(stream, plain_causal=False, causal=None)):
            assert_close(decode_stream(model.llm, embeds, one), expected)
        other = replace(stream, positions=stream.positions * 2)
        assert (decode_stream(model.llm, embeds, other) - expected).abs().max() > 1e-3


def test_rows_with_three_axes_take_the_packed_path(monkeypatch):
    model = three_axes_model(monkeypatch, "packed")
    items = [with_three_axes(item) for item in items_of(model, SAMPLES)]
    seen, attend = [], attention_module.attend_causal
    monkeypatch.setattr(attention_module, "attend_causal", lambda q, *rest: seen.append(len(q)) or attend(q, *rest))
    monkeypatch.setattr(masks, "attention_mask", None)
    batch = batch_of(items, PACKS)
    model(batch)
    assert seen == [batch.text["llm"].ids.numel()] * 2


@pytest.mark.parametrize(("llm", "attention"), CASES[:3] + [("gemma3 mixed", "packed")])
def test_packed_equals_alone_with_checkpointed_layers(llm, attention):
    plain, again = tiny_model(llm, attention), tiny_model(llm, attention)
    checkpoint_layers(again.llm.layers)
    assert_packed_equals_alone(again, SAMPLES)
    batch = batch_of(items_of(plain, SAMPLES), PACKS)
    expected, got = (losses_and_gradients(model, [batch]) for model in (plain, again))
    for name, gradient in expected.items():
        assert torch.equal(got[name], gradient), name


@pytest.mark.parametrize(("llm", "attention"), CASES)
def test_nothing_leaks_into_other_samples(llm, attention):
    model = tiny_model(llm, attention)
    before = items_of(model, SAMPLES)
    other = sample((user("Where", 0), assistant("In bed")), media=1)  # as long as the first
    changed = items_of(model, [other, *SAMPLES[1:]])
    changed[0] = replace(
        changed[0], views={"vision": [replace(one, values=255 - one.values) for one in changed[0].views["vision"]]}
    )
    for row in ((0, 1, 2), (1, 0, 2), (1, 2, 0)):
        hidden, stream = [], None
        for items in (before, changed):
            batch = batch_of(items, (row, (3, 4)))
            stream = batch.text["llm"]
            hidden.append(model(batch).detach())
        differs = (hidden[0] != hidden[1]).any(dim=-1)
        own = torch.zeros_like(differs)
        own[0] = stream.segment_ids[0] == row.index(0) + 1
        assert not (differs & ~own).any() and differs[own].sum() > 10


@pytest.mark.parametrize(("llm", "attention"), [*CASES[:3], CASES[6], CASES[9]])
def test_tokens_see_what_the_rule_says(monkeypatch, llm, attention):
    """Of rows with branches and image blocks: changing a token changes what may attend to it, and nothing else."""
    monkeypatch.setitem(SMALL, "num_hidden_layers", 1)
    monkeypatch.setitem(LLMS, "gemma3 mixed", LLMS["gemma3 mixed"] | {"layer_types": ["sliding_attention"]})
    model = tiny_model(llm, attention)
    items = items_of(model, [SAMPLES[1], BRANCHED, SAMPLES[3], SAMPLES[0]])
    items = [items[0], items[1], *map(with_image_blocks, items[2:])]
    stream = batch_of(items, ((0, 1), (2, 3))).text["llm"]
    rows, length = stream.ids.shape
    window = 7 if llm in ("mistral window", "gemma3 mixed") else None
    expected = masks.attention_mask(stream.segment_ids, stream.attention_group, window)[:, 0]
    embeds = torch.randn(rows, length, model.llm.dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = decode_stream(model.llm, embeds, stream)
        for token in range(length):
            changed = embeds.clone()
            changed[:, token] += 1
            differs = (decode_stream(model.llm, changed, stream) != before).any(-1)
            assert torch.equal(differs, expected[:, :, token]), token


@pytest.mark.parametrize("heads", [(4, 2), (6, 2), (4, 4)])
@pytest.mark.parametrize("window", [None, 5])
def test_blocks_equal_the_explicit_mask(monkeypatch, window, heads):
    generator = torch.Generator().manual_seed(0)
    lengths = [30, 7, 150, 13]
    groups = torch.cat([torch.randint(-2, 3, (length,), generator=generator).sort().values for length in lengths])
    mask = SequenceMask(causal=None, masked=lay_out([lengths]), groups=groups.int())
    states = [torch.randn(200, count, 16, generator=generator) for count in (heads[0], heads[1], heads[1])]
    results = []
    for flex in (True, False):
        monkeypatch.setattr(attention_module, "blocks_run", lambda groups, flex=flex: flex)
        layer = layer_mask(mask, window)
        assert (layer.blocks is not None) == flex
        results.append(attention_module.attend_masked(*states, layer, 0.0, 0.3))
    assert_close(*results)
    assert layer_mask(mask, window).blocks is None


@pytest.mark.parametrize("length", [1, 6, 7, 8, 20])
def test_windows_of_a_segment_are_those_of_a_row_of_its_own(length):
    torch.manual_seed(0)
    states = [torch.randn(1, heads, length, 8) for heads in (4, 2, 2)]
    spans = layer_mask(SequenceMask(causal=lay_out([[length]])), window=7)
    index = torch.arange(length)
    back = index[:, None] - index[None]
    expected = F.scaled_dot_product_attention(*states, ((back >= 0) & (back < 7)), enable_gqa=True)
    assert_close(packed_attention(torch.nn.Module(), *states, spans)[0], expected.transpose(1, 2))


def test_packed_computes_no_more_than_the_samples(monkeypatch):
    """No mask is built, and no kernel call is longer than a sample."""
    seen, kernel = [], F.scaled_dot_product_attention

    def record(query, key, value, attn_mask=None, *args, is_causal=False, **options):
        seen.append((query.shape[2], attn_mask is None and is_causal))
        return kernel(query, key, value, attn_mask, *args, is_causal=is_causal, **options)

    model = tiny_model("llama", "packed", TextOnly)
    batch = batch_of(items_of(model, SAMPLES), PACKS)
    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    monkeypatch.setattr(masks, "attention_mask", None)
    model(batch)
    assert seen == [(length, True) for length in batch.text["llm"].causal.lengths] * 2


def flash_by_hand(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """`torch.nn.attention.varlen.varlen_attn` as documented: `window_size` counts the tokens besides the query's."""
    assert cu_seq_q is cu_seq_k and cu_seq_q.dtype == torch.int32 and enable_gqa == (query.shape[1] > key.shape[1])
    starts = cu_seq_q.tolist()
    assert max_q == max_k == max(b - a for a, b in zip(starts, starts[1:], strict=False))
    index = torch.arange(len(query))
    segment = (index[:, None] >= cu_seq_q[None, 1:]).sum(1)
    back, ahead = (len(query) if size < 0 else size for size in window_size)
    near = (index[None] >= index[:, None] - back) & (index[None] <= index[:, None] + ahead)
    mask = near & (segment[:, None] == segment[None])
    q, k, v = (states.transpose(0, 1)[None] for states in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=enable_gqa)[0].transpose(0, 1)


def old_flash(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """The same in torch 2.11, which leaves shared key heads unsaid."""
    return flash_by_hand(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


@pytest.mark.parametrize("flash", [flash_by_hand, old_flash])
@pytest.mark.parametrize("llm", ["llama", "mistral window", "gemma3 mixed"])
def test_the_kernel_is_asked_for_the_same(monkeypatch, llm, flash):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(varlen, "varlen_attn", flash)
    monkeypatch.setattr(attention_module, "kernel_fits", lambda *_: True)
    assert_packed_equals_alone(tiny_model(llm, "packed"), SAMPLES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("window", [None, 7])
def test_the_kernel_itself(window, autocast):
    torch.manual_seed(0)
    lengths = [[5, 30], [17, 12]]
    causal = lay_out(lengths)
    spans = layer_mask(SequenceMask(causal=causal), window=window)
    on_gpu = layer_mask(SequenceMask(causal=replace(causal, cu_seqlens=causal.cu_seqlens.cuda())), window=window)
    given = [torch.randn(2, heads, 35, 64).bfloat16().float() for heads in (4, 2, 2)]
    results = []
    for device, where in (("cpu", spans), ("cuda", on_gpu)):
        dtype = torch.float32 if autocast or device == "cpu" else torch.bfloat16
        states = [one.to(device, dtype, copy=True).requires_grad_() for one in given]
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            out, _ = packed_attention(torch.nn.Module(), *states, where, scaling=0.3)
        out.float().square().sum().backward()
        results.append([one.detach().float().cpu() for one in (out, *(state.grad for state in states))])
    assert results[1][0].shape == (2, 35, 4, 64)
    for got, expected in zip(*results[::-1], strict=True):
        assert_close(got, expected, tolerance=2e-2)


def test_generation_is_that_of_sdpa():
    stream = text_stream([[5, 6, 7, 8], [9, 10]], left=True)
    answers = []
    for attention in ATTENTIONS:
        llm = tiny_model("mistral window", attention, TextOnly).llm.eval()
        answers.append(generate_from(llm, llm.embed(stream.ids), stream, max_new_tokens=12, eos_ids=[]))
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])


def test_saved_models_do_not_name_the_attention(tmp_path):
    """Others could not load them."""
    tiny_llm(SMALL).model.save_pretrained(tmp_path)
    assert "packed" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


def test_models_that_need_more_are_refused():
    segments = SequenceMask(causal=lay_out([[2, 3]]))
    positions, embeds = torch.tensor([[[0, 1, 0, 1, 2]]]), torch.zeros(1, 5, 32)
    with pytest.raises(ConfigError, match=r"llm.attention: 'stablelm' cannot run packed; choose sdpa"):
        tiny_llm(SMALL | {"model_type": "stablelm"})
    with pytest.raises(ConfigError, match=r"packed.*; choose eager"):  # older releases build it all the same
        tiny_model("gemma2 soft cap", "packed").llm.decode(embeds, positions, None)
    with pytest.raises(ConfigError, match=r"llm.attention: sdpa takes no sequences; choose packed"):
        tiny_llm(SMALL, attention="sdpa").decode(embeds, positions, segments)
    both_ways = LLMS["gemma3 mixed"] | {"use_bidirectional_attention": True}
    with pytest.raises(ConfigError, match=r"packed is causal, but this model wants another mask"):
        tiny_llm(SMALL | both_ways).decode(embeds, positions, segments)
    chunked = tiny_llm(SMALL)
    chunked.layer_kinds = frozenset({"chunked_attention"})
    with pytest.raises(ConfigError, match=r"chunked_attention can take neither sequences nor an explicit mask"):
        chunked.decode(embeds, positions, segments)
    states, spans = [torch.zeros(1, 2, 5, 8)] * 3, layer_mask(segments, None)
    with pytest.raises(ConfigError, match=r"packed knows no s_aux, which this model uses; choose eager"):
        packed_attention(torch.nn.Module(), *states, spans, s_aux=torch.zeros(2))
    with decoding(segments), pytest.raises(ConfigError, match=r"this model makes its masks itself; choose sdpa"):
        packed_attention(torch.nn.Module(), *states, None)
