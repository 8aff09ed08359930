"""Every shipped component keeps the contract of its group, by the checks of `python -m vlm_train.contract`."""

from __future__ import annotations

import pytest
import yaml

from tests.support.components import options
from vlm_train.config.folders import recipes_dir
from vlm_train.contract.command import CONTRACTS, find_problems

AROUND = {
    "objective=contrastive": "easyvqa_clip",
    "objective=sigmoid": "siglip_so400m",
    "objective=itc_itm": "blip_filter",
    "objective=itc_itm_itg": "blip2_stage1",
    "objective=itc_itm_lm": "blip_base",
    "template=internlm2_chat": "internvl15_2b_stage1",
    "template=internvl25": "internvl25_8b_stage1",
    "template=nanovlm": "nanovlm",
    "template=library": "hf_vlm_sft",
    "image=library": "hf_vlm_sft",
    "eval=easyvqa_alignment": "blip2_stage1",
    "eval=easyvqa_captions": "easyvqa_clip",
    "eval=easyvqa_zero_shot": "easyvqa_clip",
}
"""Component -> a recipe whose model or tokenizer it needs. Families are checked in the first recipe that names each."""


def first_recipes() -> dict[str, str]:
    """Family -> the first recipe that names it. Later ones may train a part of it only."""
    found: dict[str, str] = {}
    for path in sorted((recipes_dir() / "recipe").glob("*.yaml")):
        for entry in yaml.safe_load(path.read_text(encoding="utf-8")).get("defaults", []):
            if "override /model" in entry:
                found.setdefault(entry["override /model"], path.stem)
    return found


@pytest.mark.parametrize(
    "component", [f"{group}={one}" for group in CONTRACTS if group != "model" for one in options(group)]
)
def test_component(component: str) -> None:
    group, name = component.split("=")
    around = [f"recipe={AROUND[component]}"] if component in AROUND else []
    around += ["eval.chair.objects={cat: [kitten], dog: []}"] if component == "metric=chair" else []
    assert find_problems(group, name, around) == []


@pytest.mark.parametrize("family", options("model"))
def test_family(family: str) -> None:
    assert find_problems("model", family, [f"recipe={first_recipes()[family]}"]) == []


@pytest.mark.parametrize("recipe", ["blip_base", "blip2_stage2_opt"])
def test_exporter(recipe: str) -> None:
    """The formats of other models than the default one."""
    assert find_problems("exporter", "default", [f"recipe={recipe}"]) == []
