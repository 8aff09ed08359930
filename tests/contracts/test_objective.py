"""A per-sample objective with a reference model, out of a package of somebody's own: cut, packed, or whole."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch

from data_pipelines.sample import Annotation, Sample
from tests.contracts.preference import Balance, Preference, Routed
from tests.data.text.rendering import assistant, sample, user
from tests.models.layers.test_packed import PLANS, QA, TOKENIZER, tiny_model
from tests.support.render import render_sample
from tests.support.tiny_models import assert_close, llama_config, tiny_llm
from vlm_train.contracts.batch import Batch
from vlm_train.contracts.layout import GridLayout, NoMedia
from vlm_train.contracts.media import Grid3
from vlm_train.contracts.objective import Objective, StepContext
from vlm_train.data.collate import Example, collate_rows
from vlm_train.data.images.plan import Views
from vlm_train.models.layers.activation_checkpointing import checkpoint_layers
from vlm_train.models.layers.passes import outputs_of
from vlm_train.objectives.lm import LanguageModeling
from vlm_train.objectives.per_sample import sum_by_segment
from vlm_train.training.reference import frozen

PACKED = (((0, 1, 2), (3,)),)
WHOLE = (((0,), (1,), (2,), (3,)),)
CUT = (((0,),), ((1,), (2,)), ((3,),))


def preferred(number: int, media: int) -> Sample:
    turns = (user(f"Which {number}?", *range(media)), assistant("yes " * (1 + number)))
    return sample(Annotation(turns=turns, rejected=assistant("no " * (3 - number) + "never")), media=media)


def items_of(model: Any) -> list[Example]:
    layout = (
        NoMedia() if not hasattr(model, "vision") else GridLayout(PLANS["vision"].grids, model.connector.token_grid)
    )
    generator = torch.Generator().manual_seed(1)
    items = []
    for number, media in enumerate((1, 0, 2, 1)):
        media = media if hasattr(model, "vision") else 0
        rendered = render_sample(preferred(number, media), QA, TOKENIZER, layout, rejected=True)
        views = [torch.randint(0, 256, (1, 3, 32, 32), generator=generator).byte().numpy() for _ in range(media)]
        given = {"vision": [Views(view, (Grid3(1, 2, 2),)) for view in views]}
        items.append(Example(rendered, given, source="ab"[number % 2]))
    return items


def batches_of(items: list[Example], cut: Any) -> list[Batch]:
    return [collate_rows([[items[index] for index in row] for row in rows], PLANS) for rows in cut]


def step(
    model: Any, objectives: list[Objective], context: StepContext, batches: list[Batch]
) -> dict[str, torch.Tensor]:
    """Losses and gradients of one optimizer step."""
    model.zero_grad()
    found: dict[str, torch.Tensor] = {}
    for batch in batches:
        losses = {name: one for objective in objectives for name, one in objective(model, batch, context).items()}
        sum(one.weight * one.sum for one in losses.values()).backward()
        for name, one in losses.items():
            found[name] = found.get(name, 0.0) + one.sum.detach()
            found[f"{name}/count"] = found.get(f"{name}/count", 0.0) + one.count.detach()
    return found | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def pair() -> tuple[Any, StepContext]:
    """A model, and as its reference the model that it was before it moved a little."""
    model = tiny_model("llama", "packed")
    context = StepContext(reference=partial(frozen, copy.deepcopy(model).eval().requires_grad_(False)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return model, context


@pytest.mark.parametrize("cut", [CUT, PACKED])
def test_a_preference_step_does_not_depend_on_how_it_is_cut(pair: tuple[Any, StepContext], cut: Any) -> None:
    model, context = pair
    items = items_of(model)
    expected = step(model, [Preference()], context, batches_of(items, WHOLE))
    found = step(model, [Preference()], context, batches_of(items, cut))
    assert found["preference/count"] == 4 and found["preference"] != pytest.approx(4 * 0.6931, rel=1e-3)
    assert found.keys() == expected.keys() and len(found) > 30
    for name, one in expected.items():
        if name.startswith("vision") and name.endswith("k_proj.bias"):  # zero in exact arithmetic
            assert found[name].abs().max() <= 1e-5 * expected[name.replace("k_proj", "q_proj")].abs().max(), name
        else:
            assert_close(found[name], one, name)


def test_a_batch_of_padding_has_no_samples_and_all_gradients(pair: tuple[Any, StepContext]) -> None:
    model, context = pair
    whole = step(model, [Preference()], context, batches_of(items_of(model), WHOLE))
    empty = step(model, [Preference()], context, [collate_rows([], PLANS, streams=("llm", "rejected"))])
    assert empty["preference"] == 0 and empty["preference/count"] == 0 and empty.keys() == whole.keys()


def test_sums_by_segment(pair: tuple[Any, StepContext]) -> None:
    (batch,) = batches_of(items_of(pair[0]), PACKED)
    stream = batch.text["llm"]
    index = torch.arange(stream.ids.numel())[(stream.segment_ids != 0).flatten()]
    sums = sum_by_segment(batch, stream, index, torch.ones(len(index)))
    assert sums.tolist() == [float((stream.segment_ids[row] == n).sum()) for row, n in ((0, 1), (0, 2), (0, 3), (1, 1))]


@pytest.mark.parametrize("recompute", [False, True])
def test_auxiliary_outputs_are_made_once_and_learned_from(recompute: bool) -> None:
    torch.manual_seed(0)
    model = Routed(llm=tiny_llm(llama_config(vocab_size=len(TOKENIZER)))).train()
    runs: list[Any] = []
    model.router.register_forward_hook(lambda *_: runs.append(None))
    if recompute:
        checkpoint_layers(list(model.llm.layers), selective=False)
    items = items_of(model)
    objectives = [LanguageModeling(), Balance(weight=0.5)]
    whole = step(model, objectives, StepContext(), batches_of(items, WHOLE))
    assert len(runs) == 1  # both losses read one pass
    assert whole["balance"] / whole["balance/count"] > 0.5 and whole["router.weight"].abs().max() > 0
    cut = step(model, objectives, StepContext(), batches_of(items, CUT))
    for name, one in whole.items():
        assert_close(cut[name], one, name)
    alone = step(model, [LanguageModeling()], StepContext(), batches_of(items, WHOLE))
    assert not torch.allclose(alone["router.weight"], whole["router.weight"])


def test_bare_hidden_states_are_outputs_without_auxiliary_values(pair: tuple[Any, StepContext]) -> None:
    model, _ = pair
    (batch,) = batches_of(items_of(model), WHOLE)
    found = outputs_of(model, batch, "rejected")
    assert found.aux == {} and torch.equal(found.hidden, model(batch, stream="rejected"))
