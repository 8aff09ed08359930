"""What does not go together is found in the model's shape, before a weight is read, for code of any package."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import pytest
from torch import Tensor, nn

from vlm_train.build import build_model
from vlm_train.check.check import check_config
from vlm_train.check.model import check_model, check_packing, check_parts
from vlm_train.config.compose import compose_config
from vlm_train.contracts.batch import Batch
from vlm_train.contracts.media import Grid3
from vlm_train.contracts.objective import Loss, Objective, StepContext
from vlm_train.dryrun.report import without_assets
from vlm_train.errors import ConfigError
from vlm_train.models.connectors.grids import same_grid
from vlm_train.models.connectors.pool import pooled_grid
from vlm_train.models.families.prefix_seq2seq import PrefixSeq2Seq
from vlm_train.models.families.prefix_vlm import PrefixVLM

PAIR = ["model=prefix_seq2seq", "llm=flant5_xl", "template=seq2seq", "data.pack=null"]
MINE = ["allow_targets=[tests.]", "~objective.lm"]


def problems(*overrides: str, recipe: str = "llava15_stage1") -> list[str]:
    """What is found in the configuration and in its model; empty when all is fine."""
    try:
        cfg = compose_config([f"recipe={recipe}", *overrides])
        check_config(cfg, need_assets=False)
        cfg, _ = without_assets(cfg)
        check_model(cfg, build_model(cfg, meta=True))
    except ConfigError as error:
        return error.problems
    return []


def mine(name: str) -> str:
    return f"+objective.mine._target_={__name__}.{name}"


class AnswersOnItsOwn(PrefixSeq2Seq):
    """A family of a user's own package: its streams are its base's."""


class Deaf(PrefixVLM):
    """A family with streams of its own."""

    streams = {"llm": "causal", "qformer": "none"}


class PerSample(Objective):
    """Normalized by samples, which it does not compare with each other."""

    streams = ("llm",)
    normalized_by = "samples"

    def __call__(self, model: Any, batch: Batch, context: StepContext) -> dict[str, Loss]:
        raise NotImplementedError


class Undeclared:
    streams = ("llm",)

    def __call__(self, model: Any, batch: Batch, context: StepContext) -> dict[str, Loss]:
        raise NotImplementedError


class Nonsense(Undeclared):
    streams = "llm"  # type: ignore[assignment]
    needs = ("Routes",)
    normalized_by = "bananas"
    needs_whole_step = False
    needs_reference = "maybe"


class Aligned(PrefixVLM):
    streams = {"llm": "causall"}  # type: ignore[dict-item]  # noqa: RUF012


class Routes:
    """What no shipped family offers."""

    _is_protocol = True

    def route(self, batch: Batch) -> Tensor: ...


class Needy(PerSample):
    needs = (Routes,)


class Measures:
    """An evaluator of a user's own."""

    at_validation = True
    needs = (Routes,)
    primary = "routed"
    higher_is_better = {"routed": True}

    def run(self, model: Any, processor: Any, folder: Any, *, final: bool) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["objective.lm.stream=lm"], "objective.lm: reads the stream 'lm'. Did you mean llm? Allowed: llm."),
        (["objective=contrastive"], "objective.contrastive: needs a model that EmbedsImagesAndTexts. PrefixVLM lacks"),
        (
            ["model=two_tower", "model.pooling=mean"],
            "objective.lm: needs a model that PredictsTokens. TwoTower lacks logits; it Embeds",
        ),
        ([*MINE, mine("Needy")], "objective.mine: needs a model that Routes. PrefixVLM lacks route; it PredictsTokens"),
        ([*MINE, mine("Undeclared")], "objective.mine: Undeclared does not declare normalized_by, needs_whole_step, "),
        ([*MINE, mine("Nonsense")], "objective.mine: streams is 'llm'; allowed: a tuple of names of streams."),
        ([*MINE, mine("Nonsense")], "objective.mine: needs is ('Routes',); allowed: a tuple of protocols of"),
        ([*MINE, mine("Nonsense")], "objective.mine: normalized_by is 'bananas'; allowed: tokens, samples."),
        ([*MINE, mine("Nonsense")], "objective.mine: needs_reference is 'maybe'; allowed: True or False."),
        (
            ["allow_targets=[tests.]", f"model._target_={__name__}.Aligned"],
            "model: Aligned gives its stream 'llm' the alignment 'causall'; allowed: causal, seq2seq, none.",
        ),
        (
            ["allow_targets=[tests.]", f"+eval.mine._target_={__name__}.Measures"],
            "eval.mine: needs a model that Routes. PrefixVLM lacks route",
        ),
    ],
)
def test_what_a_model_does_not_offer_is_said(overrides: list[str], expected: str) -> None:
    found = problems(*overrides)
    assert any(problem.startswith(expected) for problem in found), found


def test_a_part_that_lacks_what_its_kind_needs_is_said() -> None:
    cfg, _ = without_assets(compose_config(["recipe=llava15_stage1"]))
    model = build_model(cfg, meta=True)
    assert list(check_parts(model)) == []
    del model.connector.token_grid  # type: ignore[attr-defined,union-attr]
    (problem,) = check_parts(model)
    assert problem.startswith("connector: MLP has no token_grid, which a Connector needs.")


def test_a_model_that_is_no_family_is_refused() -> None:
    (found,) = problems("allow_targets=[tests.]", "model._target_=tests.check.test_model.Measures")
    assert "Measures" in found


@pytest.mark.parametrize(
    "overrides",
    [
        ["batch.micro=2"],
        ["data.pack=4096", "batch.micro=2"],
        ["strategy=zero2", "launch.devices=2"],
        ["strategy=fsdp2", "launch.devices=2"],
    ],
)
def test_a_per_sample_objective_may_be_cut_packed_and_sharded(overrides: list[str]) -> None:
    assert problems(*MINE, mine("PerSample"), *overrides) == []


def test_rejected_answers_can_be_learned_where_the_data_has_them() -> None:
    (found,) = problems("objective.lm.stream=rejected")
    assert found == "objective.lm: reads the stream 'rejected'. Allowed: llm."
    assert problems("objective.lm.stream=rejected", "data.rejected=true") == []


def test_families_of_other_packages_bring_their_streams() -> None:
    own = ["allow_targets=[tests.]", f"model._target_={__name__}.AnswersOnItsOwn", "objective.lm.stream=decoder"]
    assert problems(*PAIR[1:], *own, "data.prefix_split=true") == []
    deaf = ["allow_targets=[tests.]", f"model._target_={__name__}.Deaf", "data.pack=null"]
    assert problems(*deaf, "instruction=bert") == []
    (missing,) = problems(*deaf)
    assert missing.startswith("instruction is empty: the model's Q-Former reads one")


def test_streams_that_do_not_go_together_are_refused() -> None:
    learned = "objective.lm.stream=decoder"
    assert problems(*PAIR, learned) == []
    assert problems(*PAIR) == ["objective.lm: reads the stream 'llm'. Allowed: decoder."]
    assert problems(learned) == ["objective.lm: reads the stream 'decoder'. Did you mean llm? Allowed: llm."]
    refused = problems(*PAIR, learned, "data.pack=2048", "data.over_length=split", "instruction=bert")
    named = ("data.pack: the model reads the streams llm and decoder", "data.over_length: ", "instruction: the model")
    assert len(refused) == len(named) and all(a.startswith(b) for a, b in zip(refused, named, strict=True))
    assert problems("llm=flant5_xl") == [
        "llm: HFSeq2Seq is an encoder-decoder. Use model=prefix_seq2seq or instruct_seq2seq, or a causal llm."
    ]
    assert problems(PAIR[0], learned)[0].startswith("llm: the model needs an encoder-decoder such as llm=flant5_xl")
    assert problems("data.prefix_split=true")[0].startswith("data.prefix_split: only an encoder-decoder")
    assert problems(*PAIR, learned, "data.rejected=true")[0].startswith("data.rejected: the model reads the streams")


def test_contrasts_need_a_whole_step() -> None:
    (found,) = problems("batch.micro=8", recipe="easyvqa_clip")
    assert found.startswith("objective.contrastive: ") and "allowed: batch.micro=32" in found
    assert "model.cache_chunk=8" in found
    found = problems("batch.micro=8", recipe="easyvqa_blip2_stage1")[0]
    assert "cannot cut" in found and "cache_chunk" not in found and "or a smaller batch.samples" in found
    assert problems("batch.micro=64", recipe="easyvqa_clip") == []
    assert problems("launch.devices=2", recipe="easyvqa_clip") == []  # micro 32 holds the 16 of a process
    assert problems("launch.devices=2", "batch.micro=16", recipe="easyvqa_clip") == []
    (refused,) = problems("data.pack=64", "data.max_length=64", recipe="easyvqa_clip")
    assert "packed rows do not tell them apart" in refused


@pytest.mark.parametrize(
    ("objective", "recipe"),
    [
        ("contrastive", "easyvqa_clip"),
        ("sigmoid", "siglip_so400m"),
        ("itc", "easyvqa_blip2_stage1"),
        ("itm", "easyvqa_blip2_stage1"),
    ],
)
def test_pairs_are_not_weighed(objective: str, recipe: str) -> None:
    for rule in ("source", "sqrt_length"):
        expected = f"batch.normalize: {rule} has no effect on objective.{objective}, which counts every pair once."
        found = problems(f"batch.normalize={rule}", recipe=recipe)
        assert f"{expected} Allowed: token or sample." in found
        assert not any("objective.lm" in one for one in found)
    heavy = "[{shards: a, loss_weight: 1.0}, {shards: b, loss_weight: 0}]"
    for split in ("train", "val"):
        expected = (
            f"data.{split}.1.loss_weight: 0 has no effect on objective.{objective}, which counts every pair once."
        )
        found = problems(f"data.{split}={heavy}", recipe=recipe)
        assert f"{expected} Allowed: 1, or leave it out." in found and not any(".0.loss_weight" in one for one in found)
    assert problems("batch.normalize=sample", recipe=recipe) == []


def test_an_objective_of_samples_may_read_weights() -> None:
    weighed = ["batch.normalize=sqrt_length", "data.train=[{shards: a, loss_weight: 2}]"]
    assert problems(*MINE, mine("PerSample"), *weighed) == []


@pytest.mark.parametrize("strategy", ["zero1", "fsdp2"])
def test_a_temperature_stays_whole(strategy: str) -> None:
    (found,) = problems(f"strategy={strategy}", recipe="easyvqa_clip")
    assert found.startswith("strategy: model.logit_scale is a single number") and "Use strategy=ddp" in found


def test_mixers_that_no_mask_reaches_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = compose_config(["recipe=llava15_stage1", "size=tiny", "data.pack=256", "data.max_length=128"])
    model = build_model(without_assets(cfg)[0], meta=True)
    assert list(check_packing(cfg, model)) == []
    monkeypatch.setattr(model.llm, "unmasked_mixers", ["MambaMixer"])
    (problem,) = check_packing(cfg, model)
    assert problem.startswith("data.pack: 'llama' has MambaMixer, which no mask reaches")
    cfg.data.pack = None
    assert list(check_packing(cfg, model)) == []


class Tokens(nn.Module):
    """A connector whose tokens are as `token_grid` says."""

    def __init__(self, token_grid: Any) -> None:
        super().__init__()
        self.token_grid = token_grid

    def forward(self, features: Any) -> Any:
        raise NotImplementedError


class Holder(nn.Module):
    """Holds one connector."""

    def __init__(self, token_grid: Any) -> None:
        super().__init__()
        self.connector = Tokens(token_grid)


def two_sides(grid: Grid3) -> Grid3:
    return Grid3(1, 16)  # type: ignore[call-arg]


def plain_tuple(grid: Grid3) -> tuple[int, int]:
    return (1, 16)


def halves(grid: Grid3) -> Grid3:
    return Grid3(1, grid.h / 2, grid.w)  # type: ignore[arg-type]


def refuses(grid: Grid3) -> Grid3:
    raise ConfigError("connector: does not fit")


@pytest.mark.parametrize(
    ("token_grid", "said"),
    [
        (
            lambda grid: grid,
            "cannot be sent to data workers (Can't pickle .*<lambda>.*). Use a function of a module, or",
        ),
        (two_sides, "raised TypeError: .*'w'. It is called with Grid3(t=1, h=12, w=12) and returns a Grid3(t, h, w)"),
        (
            plain_tuple,
            "returned (1, 16) for Grid3(t=1, h=12, w=12); allowed: a Grid3(t, h, w) of whole numbers above 0",
        ),
        (halves, "returned Grid3(t=1, h=6.0, w=12) for "),
    ],
)
def test_a_token_grid_that_workers_or_layouts_cannot_use_is_one_error(token_grid: Any, said: str) -> None:
    (problem,) = check_parts(Holder(token_grid))  # type: ignore[arg-type]
    pattern = re.escape(f"connector: token_grid of Tokens {said}").replace(r"\.\*", ".*")
    assert re.match(pattern, problem), problem


@pytest.mark.parametrize("token_grid", [same_grid, partial(pooled_grid, pool=2), refuses])
def test_token_grids_that_can_be_used_pass(token_grid: Any) -> None:
    assert list(check_parts(Holder(token_grid))) == []  # type: ignore[arg-type]
