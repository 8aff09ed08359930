"""Whole models of `transformers` as a family: their own processors' batches, logits, losses and gradients; samples of a
packed row; parameters that nothing reaches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipelines.sample import Annotation
from tests.support.hf_vlm import (
    SHOWN,
    library_batch,
    make_batch,
    make_examples,
    make_processor,
    make_sample,
    reference_model,
)
from tests.support.hf_vlm_folders import MAKERS, make_folder
from tests.support.tiny_models import assert_close
from vlm_train.contracts.objective import StepContext
from vlm_train.data.collate import Example, collate_rows
from vlm_train.data.processor import Processor
from vlm_train.data.text.render import RenderOptions
from vlm_train.errors import BatchError
from vlm_train.models.families.hf_vlm import HFVLM
from vlm_train.models.hf_vlm.inputs import make_inputs
from vlm_train.models.hf_vlm.probe import find_contamination
from vlm_train.objectives.lm import LanguageModeling

ALONE = {"qwen3_5", "gemma3", "paligemma", "mllama"}
"""Kinds whose samples cannot share a row."""
PAIRS: list[list[tuple[int, int]]] = [[(90, 60)], [(61, 97)], [(40, 40)], [(33, 70)]]
"""What processors without a chat template take: one image a text."""


@dataclass
class Made:
    """A tiny model of one kind, and samples for it."""

    kind: str
    folder: Path
    model: HFVLM
    processor: Processor
    shown: list[list[tuple[int, int]]]
    samples: list[Example]


@pytest.fixture(scope="module", params=list(MAKERS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = make_folder(request.param, tmp_path_factory.mktemp(request.param))
    model = HFVLM(name=str(folder), weights=str(folder))
    model.load_weights()
    model.eval()
    processor = make_processor(model)
    shown = SHOWN if processor.tokenizer.chat_template else PAIRS
    return Made(request.param, folder, model, processor, shown, make_examples(processor, shown))


def gradients(model: Any, batches: list[Any]) -> dict[str, torch.Tensor]:
    """Of the summed loss of some batches, and that loss itself."""
    model.zero_grad()
    total = torch.stack([LanguageModeling()(model, batch, StepContext())["lm"].sum for batch in batches]).sum()
    total.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": total.detach()}


def assert_same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    """Equal up to rounding; gradients that are zero but for rounding are compared with the largest of all."""
    assert got.keys() == wanted.keys()
    largest = max(float(one.abs().max()) for name, one in wanted.items() if name != "loss")
    for name, expected in wanted.items():
        if expected.abs().max() < 1e-5 * largest:  # biases of keys shift all scores alike
            assert (got[name] - expected).abs().max() <= 1e-5 * largest, name
        else:
            assert_close(got[name], expected, name, tolerance)


def test_ids_logits_loss_and_gradients_are_the_library_s(made: Made) -> None:
    batch = make_batch(made.processor, [[one] for one in made.samples])
    stream, reference = batch.text["llm"], reference_model(made.folder)
    theirs, seen = library_batch(made.model, batch, made.shown), stream.segment_ids != 0
    ids = stream.ids.masked_fill(stream.ids < 0, made.model.image_id)
    assert torch.equal(ids[seen], theirs["input_ids"][seen])
    logits = reference(**theirs).logits
    assert_close(made.model.logits(made.model(batch))[seen], logits[seen], "logits")

    got = gradients(made.model, [batch])
    reference.zero_grad()
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), stream.labels.flatten(), ignore_index=-100, reduction="sum"
    )
    loss.backward()
    names = {name: made.model.get_submodule(name.split(".")[0]) for name in got if name != "loss"}
    wanted = {
        name: reference.get_parameter(part.name_in_library(name.partition(".")[2])).grad for name, part in names.items()
    }
    assert all(one is not None for one in wanted.values())
    assert_same(got, wanted | {"loss": loss.detach()})


def test_what_nothing_reaches_is_known(made: Made) -> None:
    model = made.model
    batches = {
        "images": make_batch(made.processor, [[one] for one in made.samples]),
        "text": make_batch(made.processor, [[one] for one in make_examples(made.processor, [[], []])]),
        "padding": make_batch(made.processor, []),
    }
    for kind, batch in batches.items():
        model.zero_grad()
        LanguageModeling()(model, batch, StepContext())["lm"].sum.backward()
        idle = {name for name, parameter in model.named_parameters() if parameter.grad is None}
        assert idle == set(model.unused_parameters()), kind


def test_every_parameter_belongs_to_one_part(made: Made) -> None:
    own = dict(made.model.named_parameters())
    reference = reference_model(made.folder)
    theirs = {id(one): name for name, one in reference.named_parameters()}
    assert len(own) == len(theirs) == len({id(one) for one in own.values()})
    counts = {
        part: sum(p.numel() for n, p in own.items() if n.startswith(f"{part}."))
        for part in ("vision", "connector", "llm")
    }
    assert all(counts.values()) and sum(counts.values()) == sum(p.numel() for p in own.values())


def test_packed_is_each_alone_or_not_claimed(made: Made) -> None:
    problem = made.model.find_packing_problem()
    assert (problem is not None) == (made.kind in ALONE), problem
    if problem is not None:
        with pytest.raises(Exception, match="takes one sample a row"):
            made.model(make_batch(made.processor, [made.samples[:2]]))
        return
    packed = gradients(made.model, [make_batch(made.processor, [made.samples[:3], made.samples[3:]])])
    alone = gradients(made.model, [make_batch(made.processor, [[one]]) for one in made.samples])
    assert_same(packed, alone, 2e-5)
    texts = make_examples(made.processor, [[], [], []])  # beside them a blank image, in a row of its own
    packed = gradients(made.model, [make_batch(made.processor, [texts[:2], texts[2:]])])
    alone = gradients(made.model, [make_batch(made.processor, [[one]]) for one in texts])
    assert_same(packed, alone, 2e-5)


def test_contamination_is_found(made: Made) -> None:
    if made.kind in ALONE:
        pytest.skip("claims no packing")
    decoder = made.model.whole.get_decoder()
    assert find_contamination(made.model) is None
    decoder.set_attn_implementation("sdpa")  # sees all of a row
    try:
        assert find_contamination(made.model) is not None
    finally:
        decoder.set_attn_implementation(made.model.attention)


def test_images_in_another_order_are_refused(made: Made) -> None:
    if not made.processor.tokenizer.chat_template:
        pytest.skip("takes one image a text")
    sample, blobs = make_sample(0, [(61, 97), (32, 40)])
    ask, answer = sample.annotations[0].turns
    turned = replace(ask, parts=(ask.parts[1], ask.parts[0], *ask.parts[2:]))
    sample = replace(sample, annotations=(Annotation(turns=(turned, answer)),))
    example = Example(made.processor.render(sample), made.processor.make_views(blobs, media=sample.media))
    with pytest.raises(BatchError, match="s0 stand in their text in another order"):
        made.model(make_batch(made.processor, [[example]]))


def test_generates_what_the_library_does(made: Made) -> None:
    prompts = []
    for number, sizes in enumerate(made.shown):
        sample, blobs = make_sample(number, sizes)
        rendered = made.processor.render(sample, RenderOptions(generation=True))
        prompts.append(Example(rendered, made.processor.make_views(blobs, media=sample.media)))
    batch = collate_rows([[one] for one in prompts], made.processor.images, left=True)
    together = made.model.generate(batch, max_new_tokens=5, eos_ids=made.processor.end_ids)
    reference = reference_model(made.folder)
    for number, one in enumerate(prompts):
        if made.kind == "mllama" and not made.shown[number]:
            continue  # the library's rows without images see its fill-in image beside other rows, and none alone
        alone = collate_rows([[one]], made.processor.images, left=True)
        ids = greedy(made, alone, reference)
        assert together[number, : len(ids)].tolist() == ids, number


def greedy(made: Made, batch: Any, reference: Any) -> list[int]:
    """The most likely tokens, one after the other, without a cache."""
    needs = made.kind == "blip2"
    inputs = make_inputs(batch, batch.text["llm"], made.model.wants, blank=needs)
    inputs.pop("position_ids", None)
    found = list[int]()
    with torch.no_grad():
        while len(found) < 5:
            token = int(reference(**inputs).logits[0, -1].argmax())
            found.append(token)
            if token in made.processor.end_ids:
                break
            new = torch.tensor([[token]])
            for name, value in (("input_ids", new), ("attention_mask", torch.ones_like(new))):
                inputs[name] = torch.cat([inputs[name], value], dim=1)
            for name in ("mm_token_type_ids", "token_type_ids"):
                if name in inputs:
                    inputs[name] = torch.cat(
                        [inputs[name], torch.ones_like(new) if made.kind == "paligemma" else torch.zeros_like(new)],
                        dim=1,
                    )
            if "cross_attention_mask" in inputs:
                mask = inputs["cross_attention_mask"]
                inputs["cross_attention_mask"] = torch.cat([mask, mask[:, -1:]], dim=1)
    return found
