"""PrefixVLM beyond parity: attention groups, packing, frozen parts, dummy views, checkpointing."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from tests.support.tiny_models import IMAGE, assert_close, batch_of, text_stream, tiny_vlm, with_views
from vlm_train.contracts.objective import StepContext
from vlm_train.errors import BatchError
from vlm_train.models.layers.activation_checkpointing import checkpoint_layers
from vlm_train.objectives.lm import LanguageModeling

PREFIX = [5, *IMAGE, 6]
BRANCHES = [[10, 11, 12], [20, 21], [30, 31, 32, 33]]


def branched_batch(branches=BRANCHES):
    """One image, several questions that share it: each continues the prefix at the same positions."""
    row, group, position = list(PREFIX), [0] * len(PREFIX), list(range(len(PREFIX)))
    for number, branch in enumerate(branches, start=1):
        row += branch
        group += [number] * len(branch)
        position += range(len(PREFIX), len(PREFIX) + len(branch))
    return batch_of(text_stream([row], groups=[group], positions=[position]), [0])


def test_branches_equal_separate_rows():
    model = tiny_vlm()
    hidden = model(branched_batch())[0]
    start = len(PREFIX)
    for branch in BRANCHES:
        alone = model(batch_of(text_stream([PREFIX + branch]), [0]))[0]
        assert_close(hidden[start : start + len(branch)], alone[len(PREFIX) :])
        start += len(branch)


def test_branches_do_not_see_each_other():
    model = tiny_vlm()
    before = model(branched_batch())[0]
    after = model(branched_batch([[40, 41, 42], *BRANCHES[1:]]))[0]
    changed = (before != after).any(dim=-1)
    assert changed.nonzero().squeeze(1).tolist() == [6, 7, 8]


def test_packed_samples_equal_separate_rows():
    model = tiny_vlm()
    first, second = [5, *IMAGE, 6, 7], [8, *IMAGE, 9]
    segments = [[1] * len(first) + [2] * len(second)]
    positions = [[*range(len(first)), *range(len(second))]]
    packed = batch_of(text_stream([first + second], segments=segments, positions=positions), [0, 0])
    hidden = model(packed)[0]
    rows = model(batch_of(text_stream([first, second]), [0, 1]))
    assert_close(hidden[: len(first)], rows[0])
    assert_close(hidden[len(first) :], rows[1, : len(second)])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_plain_rows_with_images_need_no_mask(attention):
    stream = text_stream([[5, *IMAGE, 6, 7, 8, *IMAGE, 9], [10, *IMAGE, 11]], learn_from=4)
    batch = batch_of(stream, [0, 0, 1])
    gradients, hidden = [], []
    for plain in (False, True):
        model = tiny_vlm().train()
        model.llm.model.set_attn_implementation(attention)
        model.llm.takes_packed = False
        one = replace(batch, text={"llm": replace(stream, plain_causal=plain)})
        hidden.append(model(one)[stream.segment_ids != 0])
        LanguageModeling()(model, one, StepContext())["lm"].sum.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert_close(hidden[1], hidden[0])
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        if not name.endswith("k_proj.bias"):
            assert_close(gradient, gradients[0][name], name)


def saved_shapes(function):
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        function()
    return shapes


@pytest.mark.parametrize("trained", ["connector", "llm"])
def test_frozen_parts_keep_no_graph_and_no_gradient(trained):
    model = tiny_vlm()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    batch = branched_batch()
    assert not saved_shapes(lambda: model.vision.encode(batch.media.inputs["vision"]))
    recording = []
    model.vision.layers[0].register_forward_hook(lambda *_: recording.append(torch.is_grad_enabled()))
    assert model.features(batch).values.requires_grad == (trained == "connector")
    assert recording == [False]
    loss = LanguageModeling()(model, batch, StepContext())["lm"]
    loss.sum.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith(trained), name


def test_trained_vision_is_recorded():
    model = tiny_vlm()
    assert saved_shapes(lambda: model.features(branched_batch()))


def test_a_batch_without_images_makes_the_same_calls_and_gradients_of_zero():
    model = tiny_vlm()
    calls = []
    for part in (model.vision.layers[0], model.connector):
        part.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    with_image, without = branched_batch(), batch_of(text_stream([[5, 6, 7]]), [])
    model(with_image)
    expected, calls[:] = list(calls), []
    model(without).sum().backward()
    assert calls == expected
    unused = {f"vision.{name}" for name in model.vision.unused_parameters()} | {"llm.model.lm_head.weight"}
    for name, parameter in model.named_parameters():
        if name not in unused:
            assert parameter.grad is not None, name
            assert name.startswith("llm") or not parameter.grad.any(), name


def test_the_blank_view_changes_nothing():
    model = tiny_vlm()
    stream = text_stream([[5, 6, 7]])
    blank = batch_of(stream, [])
    noise = with_views(blank, torch.full((1, 3, 32, 32), 200, dtype=torch.uint8))
    assert torch.equal(model(blank), model(noise))


def test_several_views_of_one_item_are_joined():
    model = tiny_vlm()
    two_items = batch_of(text_stream([[5, *IMAGE, *IMAGE, 6]]), [0, 0])
    inputs = {"vision": replace(two_items.media.inputs["vision"], view_counts=(2,))}
    one_item = replace(two_items.media, inputs=inputs, slot_counts=(8,), row=torch.tensor([0]), keys=("a",))
    assert torch.equal(model(two_items), model(replace(two_items, media=one_item)))


def test_a_slot_mismatch_names_the_sample():
    batch = batch_of(text_stream([[5, *IMAGE, 6]]), [0])
    wrong = replace(batch, media=replace(batch.media, slot_counts=(3,)))
    with pytest.raises(BatchError, match="sample 'sample0'.* 4 image features but 3 placeholders"):
        tiny_vlm()(wrong)


def test_a_placeholder_without_feature_is_an_error():
    batch = batch_of(text_stream([[5, *IMAGE, 6]]), [0])
    stream = batch.text["llm"]
    for change in ({"index": stream.slots.index[:3]}, {"placeholders": 8}, {"feature_index": torch.tensor([0, 1])}):
        slots = replace(stream.slots, **change)
        with pytest.raises(
            BatchError, match=r"merge: (4|8) placeholders in the text, but [24] media features for [34]"
        ):
            tiny_vlm()(replace(batch, text={"llm": replace(stream, slots=slots)}))


def test_streams_see_their_own_placements():
    """The second stream of a batch is wider than the first, has its images in another order, one of them twice."""
    model = tiny_vlm()
    two, orders = text_stream([[5, *IMAGE, 6, *IMAGE, 7]]), text_stream([[5, 6, *IMAGE, *IMAGE, 8, *IMAGE]])
    feature_index = torch.tensor([4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7])
    other = replace(orders, slots=replace(orders.slots, feature_index=feature_index))
    batch = batch_of(two, [0, 0])
    both = replace(batch, text={"llm": two, "rejected": other})
    features = model.features(batch).rectangular()
    embeds = model.embed(both, "rejected")
    expected = torch.cat([features[1], features[0]])
    assert torch.equal(embeds[0, 2:10], expected) and torch.equal(embeds[0, 11:], features[1])
    assert torch.equal(model.embed(both)[0, 6:10], features[1])


@pytest.mark.parametrize(("training", "learns"), [(True, ""), (False, ""), (True, "llm.model.model.layers")])
def test_checkpointed_layers_run_twice_and_give_the_same_gradients(training, learns):
    """Behind frozen embeddings and features too, where no input of the first layer has a gradient."""
    plain, checked = tiny_vlm().train(training), tiny_vlm().train(training)
    for name, parameter in [*plain.named_parameters(), *checked.named_parameters()]:
        parameter.requires_grad_(name.startswith(learns))
    counts = Counter()
    for name, layers in (("vision", checked.vision.layers), ("llm", checked.llm.layers)):
        for index, layer in enumerate(layers):
            layer.mlp.register_forward_pre_hook(lambda *_, key=(name, index): counts.update([key]))
        checkpoint_layers(layers)
        forward = layers[0].forward
        checkpoint_layers(layers)
        assert layers[0].forward is forward  # asking twice does not wrap twice
    for model in (plain, checked):
        model(branched_batch()).square().sum().backward()
    assert counts == {
        ("vision", 0): 1 if learns else 2,
        ("vision", 1): 1 if learns else 2,
        ("llm", 0): 2,
        ("llm", 1): 2,
    }
    assert all((p.grad is not None) or not learns for name, p in checked.named_parameters() if p.requires_grad)
    for (name, a), b in zip(checked.named_parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None and b.grad.abs().max() > 1e-6:
            assert_close(a.grad, b.grad, name)
    counts.clear()
    with torch.no_grad():
        checked(branched_batch())
    assert set(counts.values()) == {1}
    assert list(checked.state_dict()) == list(plain.state_dict())
