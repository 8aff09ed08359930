"""DirectPreference: losses, rewards and gradients are TRL's, and the same however a step is cut, packed or chunked.

`golden/preference.*` holds what `DPOTrainer` of TRL 1.16.0 computed of a tiny Llama; `make_preference.py` made it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from tests.support.tiny_models import assert_close, batch_of, text_stream
from vlm_train.build import build_objectives
from vlm_train.config.compose import compose_config
from vlm_train.contracts.batch import IGNORE, Batch, TokenStream
from vlm_train.contracts.objective import Loss, StepContext
from vlm_train.errors import ConfigError
from vlm_train.models.families.text_only import TextOnly
from vlm_train.models.llms.hf import HFCausalLM
from vlm_train.objectives.answers import ANSWERS, score_answers
from vlm_train.objectives.dpo import DirectPreference
from vlm_train.training.reference import frozen

GOLDEN = Path(__file__).parent / "golden"
TENSORS, FACTS = load_file(GOLDEN / "preference.safetensors"), json.loads((GOLDEN / "preference.json").read_text())
PAIRS, CASES = FACTS["pairs"], FACTS["cases"]
LOGGED = {f"rewards_{name}": f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
LOGGED |= {f"logps_{name}": f"logps/{name}" for name in ("chosen", "rejected")}


def make_model(weights: str = "weights") -> TextOnly:
    model = TextOnly(llm=HFCausalLM(config=FACTS["config"]))
    named = {n.removeprefix(f"{weights}."): t for n, t in TENSORS.items() if n.startswith(f"{weights}.")}
    model.llm.model.load_state_dict(named, strict=True)
    return model.eval()


def stream_of(rows: Sequence[Sequence[dict[str, Any]]], answer: str) -> TokenStream:
    """Rows of one or several pairs with one of their answers, of which every token is learned."""
    ids = [[token for pair in row for token in pair["prompt_ids"] + pair[answer]] for row in rows]
    lengths = [[len(pair["prompt_ids"]) + len(pair[answer]) for pair in row] for row in rows]
    segments = [[n for n, length in enumerate(row, start=1) for _ in range(length)] for row in lengths]
    positions = [[p for length in row for p in range(length)] for row in lengths]
    stream = text_stream(ids, segments=segments, positions=positions)
    labels = stream.labels.clone()
    for row, pairs in enumerate(rows):
        start = 0
        for pair in pairs:
            end = start + len(pair["prompt_ids"]) + len(pair[answer])
            labels[row, start : start + len(pair["prompt_ids"]) - 1] = IGNORE
            labels[row, end - 1] = IGNORE  # its last token predicts nothing of the next sample
            start = end
    learned = (labels != IGNORE).float()
    return replace(stream, labels=labels, weights=learned, supervised=learned.flatten().nonzero().squeeze(1))


def pairs_batch(rows: Sequence[Sequence[dict[str, Any]]], sources: Sequence[Sequence[str]] = ()) -> Batch:
    chosen, rejected = (stream_of(rows, answer) for answer in ("chosen_ids", "rejected_ids"))
    keys = tuple(tuple(str(PAIRS.index(pair)) for pair in row) for row in rows)
    named = tuple(map(tuple, sources)) or tuple(("made",) * len(row) for row in rows)
    return replace(batch_of(chosen, []), text={"llm": chosen, "rejected": rejected}, keys=keys, sources=named)


def compute(objectives: Sequence[Any], model: Any, batch: Batch, reference: Any = None) -> dict[str, Loss]:
    context = StepContext(reference=partial(frozen, reference or make_model("reference")))
    return {name: loss for one in objectives for name, loss in one(model, batch, context).items()}


def make_objectives(case: str, **settings: Any) -> list[Any]:
    """The objectives of a case: those of two losses on pairs and next-token loss from conf/."""
    how, rest = CASES[case], {"beta": FACTS["beta"], **settings}
    if "sft" in how["loss_type"]:
        name = "mpo" if case == "mpo" else "dpo_sft"
        made = [f"objective={name}", *(f"objective.dpo.{key}={value}" for key, value in rest.items())]
        return [*build_objectives(compose_config(["recipe=easyvqa_lm", "model=text_only", *made])).values()]
    loss_type = [{"aot": "sigmoid"}.get(name, name) for name in how["loss_type"]]
    smoothing = {"label_smoothing": how["label_smoothing"]}
    return [DirectPreference(loss_type=loss_type, reference_free=not how["reference"], **smoothing, **rest)]


def total(losses: dict[str, Loss]) -> Tensor:
    return torch.stack([loss.sum / loss.count * loss.weight for loss in losses.values()]).sum()


@pytest.mark.parametrize("settings", [{}, {"chunk": 2}], ids=["whole", "chunk"])
@pytest.mark.parametrize("case", CASES)
def test_loss_rewards_and_gradients_are_those_of_trl(case: str, settings: dict[str, int]) -> None:
    model = make_model()
    losses = compute(make_objectives(case, **settings), model, pairs_batch([[pair] for pair in PAIRS]))
    found = total(losses)
    expected = CASES[case]["found"]
    assert found.item() == pytest.approx(expected["loss"], rel=1e-5)
    metrics = next(iter(losses.values())).metrics
    assert metrics.keys() == LOGGED.keys()
    for ours, theirs in LOGGED.items():
        assert metrics[ours].item() == pytest.approx(expected[theirs], rel=1e-5), ours
    found.backward()
    for name, parameter in model.llm.model.named_parameters():
        assert parameter.grad is not None
        assert_close(parameter.grad, TENSORS[f"gradients.{case}.{name}"], name)


CUTS = {
    "micro-batches": [[[PAIRS[0]], [PAIRS[1]]], [[PAIRS[2]]], [[PAIRS[3]]]],
    "packed": [[[PAIRS[3], PAIRS[0]], [PAIRS[1], PAIRS[2]]]],
    "packed in micro-batches": [[[PAIRS[3], PAIRS[0], PAIRS[1]]], [[PAIRS[2]]]],
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_step_is_the_same_however_it_is_cut(cut: str) -> None:
    model, objectives = make_model(), make_objectives("mpo")
    parts = [compute(objectives, model, pairs_batch(rows)) for rows in CUTS[cut]]
    counts = {name: sum(part[name].count for part in parts) for name in parts[0]}
    found = torch.stack([loss.sum / counts[name] * loss.weight for part in parts for name, loss in part.items()]).sum()
    assert found.item() == pytest.approx(CASES["mpo"]["found"]["loss"], rel=1e-5)
    found.backward()
    for name, parameter in model.llm.model.named_parameters():
        assert_close(parameter.grad, TENSORS[f"gradients.mpo.{name}"], name)


def test_the_three_losses_of_mpo_share_one_pass_of_each_answer() -> None:
    model, reference, seen = make_model(), make_model("reference"), []
    for name, one in (("model", model), ("reference", reference)):
        one.register_forward_hook(lambda *_, name=name: seen.append(name))
    compute(make_objectives("mpo"), model, pairs_batch([[pair] for pair in PAIRS]), reference)
    assert sorted(seen) == ["model", "model", "reference", "reference"]
    assert all(parameter.grad is None for parameter in reference.parameters())


def weigh(batch: Batch, stream: str, numbers: Sequence[int], weight: float) -> Batch:
    """`batch` with other weights of the supervised tokens of these numbers."""
    text = batch.text[stream]
    weights = text.weights.clone().flatten()
    weights[text.supervised[list(numbers)]] = weight
    return replace(batch, text={**batch.text, stream: replace(text, weights=weights.view_as(text.weights))}, shared={})


@torch.no_grad()
@pytest.mark.parametrize("norm", [False, True], ids=["sum", "mean"])
@pytest.mark.parametrize(("gamma", "weight"), [(None, 5.0), (1.1, 1.1), (1.0, 1.0)])
def test_segments_weigh_in_both_answers_and_in_both_models(gamma: float | None, weight: float, norm: bool) -> None:
    """RLHF-V, equation 4: gamma in front of the log-likelihoods of changed tokens; with the mean, 1/N = 1/sum of w."""
    batch = pairs_batch([[PAIRS[0]]])
    batch = weigh(weigh(batch, "llm", [1, 2], 5.0), "rejected", [0], 5.0)
    model, reference, scores = make_model(), make_model("reference"), []
    for answer, weights in (("chosen_ids", [1, weight, weight, 1]), ("rejected_ids", [weight, 1])):
        row = PAIRS[0]["prompt_ids"] + PAIRS[0][answer]
        ratio = 0.0
        for one, sign in ((model, 1), (reference, -1)):
            logits = one.llm.model(torch.tensor([row])).logits[0].log_softmax(-1)
            of_tokens = [logits[len(row) - len(weights) - 1 + n, row[n - len(weights)]] for n in range(len(weights))]
            ratio += sign * sum(w * p for w, p in zip(weights, of_tokens, strict=True))
        scores.append(ratio / sum(weights) if norm else ratio)
    loss_type = "sigmoid_norm" if norm else "sigmoid"
    losses = compute([DirectPreference(beta=0.5, gamma=gamma, loss_type=[loss_type])], model, batch, reference)
    assert losses[loss_type].sum.item() == pytest.approx(-F.logsigmoid(0.5 * (scores[0] - scores[1])).item(), rel=1e-5)


@torch.no_grad()
def test_columns_stand_for_the_reference() -> None:
    batch, reference = pairs_batch([[PAIRS[3], PAIRS[0]], [PAIRS[1]]]), make_model("reference")
    said = {f"{name}_logp": score_answers(reference, batch, name, StepContext())[0] for name in ANSWERS}
    live = compute([DirectPreference()], make_model(), batch, reference)["sigmoid"]
    objective = DirectPreference(reference_columns=[*said])
    assert objective.columns == ("llm_logp", "rejected_logp") and not objective.needs_reference
    read = objective(make_model(), replace(batch, columns=said, shared={}), StepContext())["sigmoid"]
    assert read.sum.item() == pytest.approx(live.sum.item(), rel=1e-6)
    other = {**said, "llm_logp": said["llm_logp"] + 1}
    moved = objective(make_model(), replace(batch, columns=other, shared={}), StepContext())["sigmoid"]
    assert moved.sum.item() != pytest.approx(live.sum.item(), rel=1e-3)


@torch.no_grad()
def test_every_source_has_its_part() -> None:
    rows = [[PAIRS[0], PAIRS[1]], [PAIRS[2]]]
    loss = compute([DirectPreference()], make_model(), pairs_batch(rows, [["a", "b"], ["a"]]))["sigmoid"]
    alone = [compute([DirectPreference()], make_model(), pairs_batch([[p]]))["sigmoid"].sum for p in PAIRS[:3]]
    assert_close(loss.sources["a"], torch.stack([alone[0] + alone[2], torch.tensor(2.0)]))
    assert_close(loss.sources["b"], torch.stack([alone[1], torch.tensor(1.0)]))


def test_padding_alone_gives_zero_attached_to_the_graph() -> None:
    model = make_model()
    batch = replace(pairs_batch([[PAIRS[0]]]), keys=((),), sources=((),))
    empty = {name: text_stream([[0, 0]], learn_from=9, segments=[[0, 0]]) for name in ANSWERS}
    losses = compute(make_objectives("mpo"), model, replace(batch, text=empty))
    assert [(loss.sum.item(), loss.count.item()) for loss in losses.values()] == [(0.0, 0.0)] * 3
    torch.stack([loss.sum for loss in losses.values()]).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_head_calls_are_bounded() -> None:
    model, sizes = make_model(), []
    model.llm.model.lm_head.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    objective = DirectPreference(reference_free=True, chunk=2)
    with torch.no_grad():
        objective(model, pairs_batch([[pair] for pair in PAIRS]), StepContext())
    assert len(sizes) == 16 and max(sizes) == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"beta": 0}, "objective.dpo.beta: got 0; allowed: above 0"),
        ({"beta": float("nan")}, "objective.dpo.beta: got nan"),
        ({"label_smoothing": 0.5}, "label_smoothing: got 0.5; allowed: from 0 to below 0.5"),
        ({"loss_type": ["bco_pair"], "label_smoothing": 0.1}, "which bco_pair does not read; allowed: 0, or"),
        ({"loss_type": ["sigmod"]}, r"loss_type: got \['sigmod'\]; allowed: a list of sigmoid, sigmoid_norm"),
        ({"loss_type": "sigmoid"}, "loss_type: got sigmoid; allowed: a list"),
        ({"loss_type": []}, r"loss_type: got \[\]"),
        ({"loss_type": ["sigmoid", "sigmoid"]}, "allowed: every loss once"),
        ({"loss_weights": [1.0, 2.0]}, r"loss_weights: got \[1.0, 2.0\]; allowed: 1 numbers from 0 on"),
        ({"loss_weights": [-1.0]}, "loss_weights: got"),
        ({"gamma": 0}, "gamma: got 0; allowed: above 0, or null"),
        ({"chunk": 0}, "objective.dpo.chunk: got 0; allowed: from 1"),
        ({"reference_columns": ["chosen_logp"]}, r"reference_columns: got \['chosen_logp'\]; allowed: none, or"),
        ({"reference_free": True, "reference_columns": ["a", "b"]}, "reference_free: got true with reference_columns"),
    ],
)
def test_a_value_out_of_range_is_one_clear_error(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        DirectPreference(**settings)
