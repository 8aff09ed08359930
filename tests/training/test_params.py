"""The parameter policy: first match wins, nothing is silently without effect."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from vlm_train.config.schema import Rule
from vlm_train.errors import ConfigError
from vlm_train.training.params import apply_policy, freeze_eval


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)) for _ in range(3)])
        self.norm = nn.LayerNorm(4)


class Sub(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList([nn.Linear(2, 2)])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision = Tower()
        self.connector = nn.Linear(4, 4)
        self.llm = Tower()


def apply(*rules: Rule, model: nn.Module | None = None, **kwargs):
    model = model or Model()
    return model, apply_policy(model, rules, weight_decay=0.1, **kwargs)


def settings(model: nn.Module, policy) -> dict[str, tuple[float, float]]:
    """(lr, weight decay) of every parameter in a group, by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [(names[id(p)], (g.lr, g.weight_decay)) for g in policy.groups for p in g.parameters]
    assert len(found) == len(dict(found))
    return dict(found)


def test_the_first_match_wins():
    model, policy = apply(Rule(r"llm\.norm\..*", lr=3.0), Rule(r"llm\..*", lr=1.0), Rule(".*"))
    found = settings(model, policy)
    assert found["llm.norm.weight"][0] == 3.0 and found["llm.embed.weight"][0] == 1.0
    assert {name.split(".")[0] for name in found} == {"llm"}
    assert all(p.requires_grad == (name in found) for name, p in model.named_parameters())
    assert policy.total == sum(p.numel() for p in model.parameters())
    assert policy.trainable == sum(p.numel() for p in model.llm.parameters())
    assert "frozen" in policy.format_table()


def test_a_rule_matches_the_whole_name():
    with pytest.raises(ConfigError, match="'llm' matches no parameter"):
        apply(Rule("llm", lr=1.0), Rule(".*"))


def test_a_rule_that_matches_nothing_is_an_error():
    with pytest.raises(ConfigError) as caught:
        apply(Rule(r"conector\..*", lr=1.0), Rule(".*"))
    expected = r"params.rules[0] 'conector\..*' matches no parameter. Parts: vision, connector, llm."
    assert str(caught.value) == expected


def test_a_parameter_that_no_rule_matches_is_an_error():
    message = "params.rules: no rule matches vision.embed.weight, vision.layers.0.0.weight, vision.layers.0.0.bias and "
    with pytest.raises(ConfigError, match=re.escape(message)):
        apply(Rule(r"(connector|llm)\..*", lr=1.0))


def test_every_problem_is_named_at_once():
    with pytest.raises(ConfigError) as caught:
        apply(Rule("(", lr=1.0), Rule("nobody"), Rule(".*"))
    first, second = caught.value.problems
    assert first.startswith("params.rules[0] '(' is not a regular expression") and "params.rules[1] 'nobody'" in second


@pytest.mark.parametrize("everything", [False, True])
def test_tensors_with_one_dimension_do_not_decay(everything):
    model, policy = apply(
        Rule(r"llm\..*", lr=1.0, weight_decay=0.3), Rule(".*", lr=1.0), decay_norms_and_biases=everything
    )
    parameters = dict(model.named_parameters())
    for name, (_, decay) in settings(model, policy).items():
        full = 0.3 if name.startswith("llm") else 0.1
        assert decay == (full if everything or parameters[name].ndim >= 2 else 0.0), name


def test_layer_decay_counts_from_the_last_layer():
    model, policy = apply(Rule(r"vision\..*", lr=1.0, layer_decay=0.5), Rule(".*", lr=1.0))
    found = {name: lr for name, (lr, _) in settings(model, policy).items()}
    assert [found[f"vision.layers.{n}.0.weight"] for n in range(3)] == [0.125, 0.25, 0.5]
    assert found["vision.embed.weight"] == 0.0625 and found["vision.norm.weight"] == 1.0
    assert found["llm.layers.0.0.weight"] == found["connector.weight"] == 1.0


@pytest.mark.parametrize("name", ["layers", "blocks", "h", "block", "layer"])  # T5 says block, BERT says layer
def test_layer_decay_knows_the_names_of_layers(name: str):
    tower = nn.ModuleDict({name: nn.ModuleList(Sub() for _ in range(2))})
    model, policy = apply(Rule(".*", lr=1.0, layer_decay=0.5), model=nn.ModuleDict({"llm": tower}))
    found = {one: lr for one, (lr, _) in settings(model, policy).items()}
    assert [found[f"llm.{name}.{n}.layer.0.weight"] for n in range(2)] == [0.25, 0.5]


def test_unused_parameters_are_frozen_and_shown():
    unused = ["vision.layers.2.0.weight", "vision.layers.2.0.bias"]
    model, policy = apply(Rule(".*", lr=1.0), unused=unused)
    parameters = dict(model.named_parameters())
    assert [name for name, p in parameters.items() if not p.requires_grad] == unused
    assert not set(unused) & set(settings(model, policy))
    assert "not used by the chosen layers" in policy.format_table()


def test_groups_are_what_torch_takes():
    model, policy = apply(Rule(r"connector\..*", lr=0.5), Rule(".*"))
    optimizer = torch.optim.AdamW([group.as_dict() for group in policy.groups])
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.5, 0.1), (0.5, 0.0)]


def test_a_policy_can_be_changed():
    model, _ = apply(Rule(".*"))
    apply(Rule(".*", lr=1.0), model=model)
    assert all(p.requires_grad for p in model.parameters())


def test_freeze_eval_keeps_what_is_frozen_in_eval():
    model, _ = apply(Rule(r"llm\.layers\.2\..*", lr=1.0), Rule(r"connector\..*", lr=1.0), Rule(".*"))
    model.train()
    freeze_eval(model)
    assert not any(module.training for module in model.vision.modules())
    assert not model.llm.layers[0][1].training and not model.llm.norm.training
    assert model.training and model.connector.training and model.llm.layers[2][1].training


def test_frozen_parts_stay_in_training_mode_where_a_rule_says_so():
    """LAVIS: the dropout of a frozen OPT and Flan-T5 is on."""
    model, policy = apply(
        Rule(r"llm\..*", frozen_mode="train"), Rule(r"connector\..*", lr=1.0), Rule(r"vision\..*", frozen_mode="eval")
    )
    model.train()
    freeze_eval(model, policy.in_train_mode)
    assert all(module.training for module in model.llm.modules())
    assert not any(module.training for module in model.vision.modules())
    assert not any(p.requires_grad for p in model.llm.parameters())
    assert "dropout is on" in policy.format_table()
    ones = torch.ones(64, 4)
    assert not torch.equal(model.llm.layers[0](ones), model.llm.layers[0](ones)), "and it drops"


def test_a_frozen_mode_that_does_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"rules\[0\]\.frozen_mode: 'evil'; allowed: eval, train, null"):
        apply(Rule(".*", frozen_mode="evil"))
    with pytest.raises(ConfigError, match=r"rules\[0\]\.frozen_mode: '\.\*' learns"):
        apply(Rule(".*", lr=1.0, frozen_mode="train"))


def test_a_rule_may_decay_its_own_vectors_and_scalars():
    model = Model()
    model.temperature = nn.Parameter(torch.tensor(0.07))
    model, policy = apply(Rule("temperature", lr=1.0, decay_norms_and_biases=True), Rule(".*", lr=1.0), model=model)
    found = settings(model, policy)
    assert found["temperature"] == (1.0, 0.1) and found["llm.norm.weight"] == (1.0, 0.0)
    model, policy = apply(
        Rule("connector.*", lr=1.0, decay_norms_and_biases=False), Rule(".*", lr=1.0), decay_norms_and_biases=True
    )
    found = settings(model, policy)
    assert found["connector.bias"] == (1.0, 0.0) and found["llm.norm.weight"] == (1.0, 0.1)


def test_layer_decay_of_a_part_with_one_layer():
    tower = nn.Module()
    tower.layers, tower.embed = nn.ModuleList([Sub()]), nn.Embedding(2, 2)
    model, policy = apply(Rule(".*", lr=1.0, layer_decay=0.5), model=nn.ModuleDict({"llm": tower}))
    found = {one: lr for one, (lr, _) in settings(model, policy).items()}
    assert found["llm.layers.0.layer.0.weight"] == 0.5 and found["llm.embed.weight"] == 0.25


def test_a_rule_has_a_warm_up_of_its_own() -> None:
    _, policy = apply(Rule(r"connector\..*", lr=1.0, warmup_steps=3), Rule(".*", lr=1.0))
    warmups = {group.name: group.as_dict().get("warmup_steps") for group in policy.groups}
    assert warmups == {"connector": 3, "vision": None, "llm": None}
    assert "warm-up of 3 steps" in policy.format_table()
    with pytest.raises(ConfigError, match=r"params\.rules\[0\]\.warmup_steps: 'vision\\..*' is frozen"):
        apply(Rule(r"vision\..*", warmup_steps=3), Rule(".*", lr=1.0))
