"""LanguageModeling: chunks, weights, empty batches, memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.support.tiny_models import IMAGE, assert_close, batch_of, text_stream, tiny_vlm
from vlm_train.contracts.batch import IGNORE
from vlm_train.contracts.objective import StepContext
from vlm_train.errors import ConfigError
from vlm_train.objectives.lm import LanguageModeling

ROWS = [[5, *IMAGE, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15]]


def weighted_batch():
    stream = text_stream(ROWS, learn_from=1)
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(stream.weights.shape, generator=generator) * (stream.labels != IGNORE)
    return batch_of(replace(stream, weights=weights), [0])


def full_loss(model, batch):
    stream = batch.text["llm"]
    logits = model.logits(model(batch)).float().flatten(0, 1)
    losses = nn.functional.cross_entropy(logits, stream.labels.flatten(), reduction="none", ignore_index=IGNORE)
    return (losses * stream.weights.flatten()).sum()


@pytest.mark.parametrize("settings", [{"chunk": 1}, {"chunk": 3}, {"chunk": 1000}])
def test_chunked_loss_equals_the_full_loss(settings):
    batch = weighted_batch()
    model, reference = tiny_vlm(), tiny_vlm()
    loss = LanguageModeling(**settings)(model, batch, StepContext())["lm"]
    expected = full_loss(reference, batch)
    assert_close(loss.sum, expected, tolerance=1e-6)
    assert_close(loss.count, batch.text["llm"].weights.sum())
    loss.sum.backward()
    expected.backward()
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        if b.grad is None or name.endswith("k_proj.bias"):
            continue
        assert_close(a.grad, b.grad, name)


@pytest.mark.parametrize("chunk", [2, 1000])
def test_z_loss_is_added_to_every_token(chunk):
    """z times the square of the log-sum-exp, weighted as the token (olmo/train of github.com/allenai/molmo2)."""
    batch, model, reference = weighted_batch(), tiny_vlm(), tiny_vlm()
    loss = LanguageModeling(chunk=chunk, z_loss=0.01)(model, batch, StepContext())["lm"]
    stream = batch.text["llm"]
    squares = reference.logits(reference(batch)).float().flatten(0, 1).logsumexp(-1).square()
    expected = full_loss(reference, batch) + 0.01 * (squares * stream.weights.flatten()).sum()
    assert_close(loss.sum, expected, tolerance=1e-6)
    assert_close(loss.metrics["z"], squares[stream.supervised].mean(), tolerance=1e-6)
    loss.sum.backward()
    expected.backward()
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        if b.grad is not None and not name.endswith("k_proj.bias"):
            assert_close(a.grad, b.grad, name)
    assert "z" not in LanguageModeling()(model, batch, StepContext())["lm"].metrics
    with pytest.raises(ConfigError, match=r"z_loss: got -1"):
        LanguageModeling(z_loss=-1)


def test_logits_never_exceed_a_chunk():
    model, sizes = tiny_vlm(), []
    model.llm.model.lm_head.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[0]))
    loss = LanguageModeling(chunk=3)(model, weighted_batch(), StepContext())["lm"]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        LanguageModeling(chunk=3)(model, weighted_batch(), StepContext())
    loss.sum.backward()
    assert max(sizes) <= 3
    assert not [shape for shape in kept if len(shape) == 2 and shape[1] == 97 and shape[0] != 48 and shape != (97, 48)]


def test_as_many_head_calls_as_the_rank_with_the_most_positions():
    context = StepContext(most_of_ranks=lambda count: max(count, 9))
    model, calls = tiny_vlm(), []
    model.llm.model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    for stream in (text_stream(ROWS), text_stream([[5, 6]]), text_stream(ROWS, learn_from=99)):
        calls.clear()
        batch = batch_of(stream, [0] if IMAGE[0] in stream.ids else [])
        with torch.no_grad():
            LanguageModeling(chunk=3)(model, batch, context)
        assert len(calls) == 3


@pytest.mark.parametrize("settings", [{}, {"chunk": 2}])
def test_no_supervised_token_gives_zero_attached_to_the_graph(settings):
    model = tiny_vlm()
    batch = batch_of(text_stream(ROWS, learn_from=99), [0])
    loss = LanguageModeling(**settings)(model, batch, StepContext())["lm"]
    assert loss.sum.item() == 0.0 and loss.count.item() == 0.0
    assert torch.isfinite(loss.metrics["accuracy"])
    loss.sum.backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.connector.parameters())


def test_the_index_of_the_stream_says_what_is_learned():
    batch = weighted_batch()
    stream = batch.text["llm"]
    fewer = replace(batch, text={"llm": replace(stream, supervised=stream.supervised[:2])})
    losses = [LanguageModeling()(tiny_vlm(), b, StepContext())["lm"] for b in (batch, fewer)]
    assert losses[1].count == stream.weights.flatten()[stream.supervised[:2]].sum() < losses[0].count


def test_accuracy_counts_correct_targets():
    model = tiny_vlm()
    batch = batch_of(text_stream(ROWS, learn_from=1), [0])
    stream = batch.text["llm"]
    keep = stream.labels != IGNORE
    expected = (model.logits(model(batch)).argmax(-1) == stream.labels)[keep].float().mean()
    assert_close(LanguageModeling(chunk=2)(model, batch, StepContext())["lm"].metrics["accuracy"], expected)


def test_bad_chunks_are_refused():
    with pytest.raises(ConfigError, match="chunk"):
        LanguageModeling(chunk=0)


def test_label_smoothing_is_torch_s():
    model, batch = tiny_vlm(), weighted_batch()
    stream = batch.text["llm"]
    said = model.logits(model(batch)).argmax(dim=-1)  # labels that the model is sure of, so that smoothing costs much
    stream = replace(stream, labels=torch.where(stream.labels == IGNORE, IGNORE, said))
    batch = replace(batch, text={"llm": stream})
    loss = LanguageModeling(chunk=3, label_smoothing=0.1)(model, batch, StepContext())["lm"]
    logits = model.logits(model(batch)).float().flatten(0, 1)
    expected = nn.functional.cross_entropy(
        logits, stream.labels.flatten(), reduction="none", ignore_index=IGNORE, label_smoothing=0.1
    )
    assert_close(loss.sum, (expected * stream.weights.flatten()).sum(), tolerance=1e-6)
    plain = LanguageModeling(chunk=3)(model, batch, StepContext())["lm"]
    assert (plain.sum - loss.sum).abs() > 1e-2 * plain.sum.abs()
    assert loss.metrics["accuracy"] == 1 == plain.metrics["accuracy"] and loss.count == plain.count
