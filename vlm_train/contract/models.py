"""Families keep the contract of `vlm_train.contracts.family`, objectives that of `vlm_train.contracts.objective`.

Legend: B rows, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig, open_dict
from torch import Tensor

from vlm_train.build import Assembly, build_assembly, build_model, build_objectives, build_tokenizer
from vlm_train.check.model import REJECTED, check_model, check_objective
from vlm_train.contract.component import Component
from vlm_train.contract.finding import (
    Finding,
    check_gradients,
    check_on_meta,
    check_pickle,
    check_state,
    compare_tensors,
    compare_values,
)
from vlm_train.contract.samples import COUNT, make_batch, make_items, make_prompts
from vlm_train.contracts.batch import Batch
from vlm_train.contracts.family import Family, Generates, PredictsTokens, missing_members
from vlm_train.contracts.objective import Loss, Objective, StepContext
from vlm_train.errors import ConfigError
from vlm_train.models.layers.passes import outputs_of
from vlm_train.training.reference import frozen

NEW_TOKENS = 3


def check_family(component: Component) -> Iterator[Finding]:
    """A family, with the parts, data and losses of its configuration: `Family`, and what it offers."""
    cfg = component.small
    with torch.random.fork_rng(devices=[]):
        skeleton = build_model(cfg, build_tokenizer(cfg), meta=True)
    yield check_on_meta(skeleton)
    problems = _find_problems(cfg, skeleton)
    yield Finding("goes with the parts, the data and the losses of its configuration", "; ".join(problems))
    if problems:
        return

    built = build_assembly(cfg)
    model, processor = built.model, built.processor
    yield check_pickle("its media layout can be sent to data workers", processor.layout)
    objectives = build_objectives(cfg)
    batch = _make_batches(built, objectives)[0]
    if not missing_members(model, PredictsTokens):
        yield from _check_tokens(model.eval(), built, batch)
    model.train()
    yield check_gradients(model, _sum_losses(model, objectives, batch), model.unused_parameters())
    yield from _check_reach(built, objectives, batch)
    if not missing_members(model, Generates):
        answers = model.eval().generate(  # type: ignore[operator]
            make_prompts(processor), max_new_tokens=NEW_TOKENS, eos_ids=processor.end_ids
        )
        right = answers.ndim == 2 and len(answers) == COUNT and answers.shape[1] <= NEW_TOKENS
        problem = "" if right else f"got {list(answers.shape)}, wanted [{COUNT}, up to {NEW_TOKENS}]"
        yield Finding("answers are [B, up to max_new_tokens]", problem)
    model.clamp_()
    other = build_assembly(cfg).model
    yield check_state(model, other, lambda one: _sum_losses(one, objectives, batch).detach())


@torch.no_grad()
def _check_tokens(model: Any, built: Assembly, batch: Batch) -> Iterator[Finding]:
    """Hidden states and logits of a stream that is learned, and samples by themselves."""
    name = next(stream for stream, alignment in model.streams.items() if alignment != "none")
    stream, hidden = batch.text[name], outputs_of(model, batch, name).hidden
    shape = list(stream.ids.shape)
    yield compare_values(f"hidden states of {name!r} are [B, T, D]", list(hidden.shape[:2]), shape)
    yield compare_values("logits are [..., V]", list(model.logits(hidden).shape[:2]), shape)
    items = make_items(built.processor)
    alone = make_batch(built.processor, items[-1:], [*batch.text])
    length = alone.text[name].ids.shape[1]
    expected = outputs_of(model, alone, name).hidden[0]
    yield compare_tensors("a sample gives what it gives alone, without padding", hidden[-1, :length], expected)


def _check_reach(built: Assembly, objectives: Mapping[str, Objective], batch: Batch) -> Iterator[Finding]:
    """Every rank makes the same collective calls: whatever its batch holds, the same parameters get a gradient."""
    model, processor = built.model, built.processor
    idle = _list_idle(model)
    others = {"of padding": make_batch(processor, [], [*batch.text])}
    if processor.images and not any(one.needs_whole_step for one in objectives.values()):  # no pairs of image and text
        rejected = any(REJECTED in one.streams for one in objectives.values())
        texts = make_items(processor, media=False, rejected=rejected)
        others["without images"] = make_batch(processor, texts, [*batch.text])
    for kind, other in others.items():
        model.zero_grad()
        _sum_losses(model, objectives, other).backward()
        differing = sorted(idle ^ _list_idle(model))[:3]
        problem = f"{', '.join(differing)} have a gradient in one of them only" if differing else ""
        yield Finding(f"a batch {kind} reaches the same parameters", problem)


def check_objective_group(component: Component) -> Iterator[Finding]:
    """Every loss of an option, with the family of its configuration: `Objective`."""
    cfg = component.small
    objectives = build_objectives(cfg)
    for name, objective in objectives.items():
        _grant_wishes(cfg, objective)
        with torch.random.fork_rng(devices=[]):
            skeleton = build_model(cfg, build_tokenizer(cfg), meta=True)
        problems = [*check_objective(f"objective.{name}", cfg, skeleton, objective)]
        yield Finding(f"{name}: declares itself, and goes with the model", "; ".join(problems))
        if not problems:
            built = build_assembly(cfg)
            built.model.eval()  # no dropout: sums are compared
            yield from _check_losses(name, objective, built)


def _check_losses(name: str, objective: Objective, built: Assembly) -> Iterator[Finding]:
    """What an objective returns for a batch, for its parts, and for padding."""
    context = StepContext(reference=partial(frozen, copy.deepcopy(built.model).requires_grad_(False)))
    whole, halves, empty = _make_batches(built, {name: objective})
    losses: Any = objective(built.model, whole, context)
    if not isinstance(losses, dict):
        yield Finding(f"{name}: returns losses by name", f"got {losses!r}")
        return
    wrong = {key: value for key, value in losses.items() if not isinstance(value, Loss)}
    yield compare_values(f"{name}: returns losses by name", (wrong, bool(losses)), ({}, True))
    for key, loss in losses.items():
        good = loss.sum.ndim == 0 and bool(torch.isfinite(loss.sum)) and loss.sum.requires_grad
        yield Finding(f"{key}: the sum is a finite number to learn from", "" if good else f"got {loss.sum}")
        yield Finding(f"{key}: the count is above 0", "" if float(loss.count) > 0 else f"got {loss.count}")
        attached = [metric for metric, value in loss.metrics.items() if value.requires_grad]
        yield compare_values(f"{key}: metrics are detached", attached, [])
    nothing = objective(built.model, empty, context)
    for key, loss in nothing.items():
        found = (float(loss.sum.detach()), float(loss.count))
        yield compare_values(f"{key}: a batch of padding adds nothing to sum and count", found, (0.0, 0.0))
    if not objective.needs_whole_step:
        parts = [objective(built.model, half, context) for half in halves]
        for key, loss in losses.items():
            for what, of in (("sum", loss.sum), ("count", loss.count)):
                added = torch.stack([getattr(part[key], what).detach().reshape(()) for part in parts]).sum()
                wanted = of.detach().reshape(())
                yield compare_tensors(f"{key}: the {what} does not depend on how a step is cut", added, wanted)


def _grant_wishes(cfg: DictConfig, objective: Any) -> None:
    """Switch on what an objective asks of the run: a reference model, rejected answers."""
    if getattr(objective, "needs_reference", False):
        cfg.reference.model = "start"
    if REJECTED in getattr(objective, "streams", ()):
        cfg.data.rejected = True
    if getattr(objective, "columns", ()):
        for entry in (*cfg.data.train, *(cfg.data.val or ())):
            with open_dict(entry):
                entry.columns = "granted"  # no folder of that name is looked for


def _find_problems(cfg: DictConfig, model: Family) -> list[str]:
    try:
        check_model(cfg, model)
    except ConfigError as error:
        return error.problems
    return []


def _make_batches(built: Assembly, objectives: Mapping[str, Objective]) -> tuple[Batch, tuple[Batch, Batch], Batch]:
    """Four samples, two halves of them, and no samples."""
    rejected = any(REJECTED in objective.streams for objective in objectives.values())
    items = make_items(built.processor, rejected=rejected)
    streams = [*items[0].rendered.streams]
    columns = [name for objective in objectives.values() for name in getattr(objective, "columns", ())]
    whole, empty = (make_batch(built.processor, some, streams, columns) for some in (items, []))
    halves = [make_batch(built.processor, some, streams, columns) for some in (items[:2], items[2:])]
    for half, numbers in zip(halves, ([0, 1], [2, 3]), strict=True):
        for name in columns:
            half.columns[name].copy_(whole.columns[name][numbers])  # a sample keeps its numbers
    return whole, (halves[0], halves[1]), empty


def _sum_losses(model: Any, objectives: Mapping[str, Objective], batch: Batch) -> Tensor:
    """The sum of all losses, `[]`, each by its weight."""
    batch.shared.clear()  # where passes are kept: another model, or mode, reads the same batch
    context = StepContext(reference=partial(frozen, model))
    losses = [loss for one in objectives.values() for loss in one(model, batch, context).values()]
    return torch.stack([loss.sum * loss.weight for loss in losses]).sum()


def _list_idle(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.grad is None}
