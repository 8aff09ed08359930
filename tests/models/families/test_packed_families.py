"""Samples of a packed row, of every family with images of any size: as each alone, and none sees another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from data_pipelines.media.limits import media_item
from data_pipelines.sample import Annotation, Media, Sample, Text, Turn
from tests.support.parity import encode, noise
from tests.support.tiny_models import assert_close
from tests.support.videos import video
from vlm_train.build import Assembly, build_assembly
from vlm_train.config.compose import compose_tiny
from vlm_train.contracts.batch import Batch
from vlm_train.contracts.objective import StepContext
from vlm_train.data.collate import Example, collate_rows
from vlm_train.objectives.lm import LanguageModeling

FAMILIES = {
    "llava_next": ["recipe=llava_next_vicuna7b"],
    "llava_onevision": ["recipe=llava_onevision_7b"],
    "internvl": ["recipe=internvl25_8b"],
    "qwen2_vl": ["recipe=qwen25_vl_3b", "vision=qwen2_vit", "connector=qwen2_merger", "llm=qwen2_vl_2b"],
    "qwen25_vl": ["recipe=qwen25_vl_3b"],
    "nanovlm": ["recipe=nanovlm"],
    "molmo2": ["recipe=molmo2_4b_pretrain"],
    "perceptionlm": ["recipe=perceptionlm_1b_stage3"],
}
SHOWN: list[list[tuple[int, int] | str]] = [[(90, 60)], [], [(61, 97), (32, 32)], ["video"], [(300, 5)]]
"""Images and videos of each sample: one, none, several, a video, a line."""


@pytest.fixture(scope="module", params=list(FAMILIES))
def assembly(request: pytest.FixtureRequest) -> Assembly:
    keys = compose_tiny(*FAMILIES[request.param])
    found = build_assembly(compose_tiny(*FAMILIES[request.param], *(["init_from=[]"] if keys.init_from else [])))
    found.model.eval()  # drop path and dropout draw otherwise
    with torch.no_grad():
        for name, parameter in found.model.named_parameters():
            if parameter.ndim > 1 and not name.startswith("llm."):
                parameter.mul_(2.0)  # images matter
    return found


def example(assembly: Assembly, number: int) -> Example:
    blobs = [video(4, (64, 48)) if isinstance(one, str) else encode(noise(*one)) for one in SHOWN[number]]
    media = tuple(media_item(place, blob) for place, blob in enumerate(blobs))
    ask = Turn(role="user", parts=(*(Media(item=place) for place in range(len(blobs))), Text(text="What?")))
    answer = Turn(role="assistant", parts=(Text(text=f"It is number {number}."),))
    sample = Sample(key=f"s{number}", media=media, annotations=(Annotation(turns=(ask, answer)),))
    views = assembly.processor.make_views(blobs, media=media)
    return Example(assembly.processor.render(sample), views)


def loss_and_gradients(model: Any, batches: list[Batch]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    losses = [LanguageModeling()(model, batch, StepContext())["lm"].sum for batch in batches]
    torch.stack(losses).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": torch.stack(losses).sum().detach()}


def test_packed_is_each_alone(assembly: Assembly) -> None:
    samples, plans = [example(assembly, number) for number in range(len(SHOWN))], assembly.processor.images
    packed = loss_and_gradients(assembly.model, [collate_rows([samples[:3], samples[3:]], plans)])
    alone = loss_and_gradients(assembly.model, [collate_rows([[one]], plans) for one in samples])
    assert packed.keys() == alone.keys() and len(alone) > 20
    largest = max(float(one.abs().max()) for name, one in alone.items() if name.startswith("vision."))
    for name, expected in alone.items():
        key_bias = name.endswith(("k_proj.bias", "qkv.bias")) and name.startswith("vision.")
        if key_bias or name == "connector.key.bias":  # it has no gradient
            assert (packed[name] - expected).abs().max() <= 1e-5 * largest, name
        else:
            assert_close(packed[name], expected, name, 2e-5)


@pytest.mark.parametrize("changed", [0, 3])
def test_no_sample_of_a_row_sees_another(assembly: Assembly, changed: int) -> None:
    samples, plans = [example(assembly, number) for number in range(len(SHOWN))], assembly.processor.images
    views = {
        name: [one and replace(one, values=255 - one.values) for one in all_]
        for name, all_ in samples[changed].views.items()
    }
    stream = samples[changed].rendered.llm
    ids = stream.ids.copy()
    ids[-3] = ids[-3] + 1 if ids[-3] < 250 else ids[-3] - 1
    rendered = replace(samples[changed].rendered, streams={"llm": replace(stream, ids=ids)})
    others = [*samples]
    others[changed] = Example(rendered, views)
    ends = [0]
    for one in samples:
        ends.append(ends[-1] + len(one.rendered.llm))
    with torch.no_grad():
        before, after = (
            assembly.model.logits(assembly.model(collate_rows([row], plans)))[0] for row in (samples, others)
        )
    for number in range(len(samples)):
        same = torch.equal(before[ends[number] : ends[number + 1]], after[ends[number] : ends[number + 1]])
        assert same == (number != changed), number
