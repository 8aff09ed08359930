"""Who learns, and at which rate: one ordered list of rules decides; the first match wins.

The policy sets `requires_grad`, makes the optimizer groups and a table to print. A rule that matches no parameter and a
parameter that no rule matches are errors, so no setting can silently do nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from omegaconf import DictConfig
from torch import nn

from vlm_train.contracts.model_parts import find_parts, name_part
from vlm_train.errors import ConfigError
from vlm_train.models.adapters.quantize import quantized_weights

_LAYER = re.compile(r"\.(?:layers?|blocks?|h)\.(\d+)\.")


class RuleLike(Protocol):
    """A rule of `params.rules`, see `vlm_train.config.schema.Rule`."""

    match: str
    lr: float | None
    weight_decay: float | None
    layer_decay: float | None
    warmup_steps: int | None
    decay_norms_and_biases: bool | None
    frozen_mode: str | None


@dataclass
class Group:
    """Parameters that share a learning rate, a weight decay and a warm-up (None: that of the schedule)."""

    name: str
    lr: float
    weight_decay: float
    parameters: list[nn.Parameter] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    warmup_steps: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """The group as `torch.optim` takes it."""
        own = {} if self.warmup_steps is None else {"warmup_steps": self.warmup_steps}
        return {"params": self.parameters, "lr": self.lr, "weight_decay": self.weight_decay, "name": self.name, **own}


@dataclass
class Row:
    """One line of the table: a part under one rule."""

    part: str
    rule: str
    tensors: int
    parameters: int
    lr: float | None
    weight_decay: float | None
    note: str = ""


@dataclass
class Policy:
    """The result of the rules: groups for the optimizer, rows for the table, and the frozen parameters whose modules
    stay in training mode."""

    groups: list[Group]
    rows: list[Row]
    in_train_mode: frozenset[str] = frozenset()

    @property
    def named(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name."""
        return {name: p for group in self.groups for name, p in zip(group.names, group.parameters, strict=True)}

    def rebind_parameters(self, model: nn.Module) -> None:
        """Take the parameters of these names from a model whose parameters were replaced by shards of them."""
        named = dict(model.named_parameters())
        for group in self.groups:
            group.parameters[:] = [named[name] for name in group.names]

    @property
    def trainable(self) -> int:
        """Number of trainable parameters."""
        return sum(row.parameters for row in self.rows if row.lr is not None)

    @property
    def total(self) -> int:
        """Number of all parameters."""
        return sum(row.parameters for row in self.rows)

    def list_parts(self) -> list[dict[str, Any]]:
        """The rows as plain JSON data."""
        return [
            {
                "name": row.part,
                "parameters": row.parameters,
                "trainable": row.lr is not None,
                "lr": row.lr,
                "weight_decay": row.weight_decay,
            }
            for row in self.rows
        ]

    def format_table(self) -> str:
        """The rows as aligned text, printed at the start of every run."""
        lines = [("part", "parameters", "lr", "weight decay", "rule")]
        for row in self.rows:
            lr = "frozen" if row.lr is None else f"{row.lr:g}"
            decay = "-" if row.weight_decay is None else f"{row.weight_decay:g}"
            rule = f"{row.rule}  ({row.note})" if row.note else row.rule
            lines.append((row.part, f"{row.parameters:,}", lr, decay, rule))
        lines.append(("total", f"{self.total:,}", "", "", f"{self.trainable:,} train"))
        widths = [max(len(line[i]) for line in lines) for i in range(4)]
        return "\n".join(
            f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}  {e}" for a, b, c, d, e in lines
        )


def make_policy(cfg: DictConfig, model: Any) -> Policy:
    """`apply_policy` as a configuration says: `params`, `optim.weight_decay`, and what the model never uses."""
    return apply_policy(
        model,
        cfg.params.rules,
        weight_decay=cfg.optim.weight_decay,
        decay_norms_and_biases=cfg.params.decay_norms_and_biases,
        unused=model.unused_parameters(),
    )


def apply_policy(
    model: nn.Module,
    rules: Sequence[RuleLike],
    *,
    weight_decay: float,
    decay_norms_and_biases: bool = False,
    unused: Iterable[str] = (),
) -> Policy:
    """Set `requires_grad` on every parameter of `model` and return the groups.

    Args:
        rules: ordered; the first whose `match` (a regex for the whole name) fits decides. `lr: null` freezes.
        weight_decay: used where a rule gives none.
        decay_norms_and_biases: also decay tensors with fewer than two dimensions, where a rule does not say.
        unused: names of parameters that the chosen layers never use: frozen whatever the rules say, and shown.

    Raises:
        ConfigError: with every rule that matches nothing and every parameter that no rule matches.
    """
    unused = set(unused)
    decided = _decide_rules(model, rules)
    stored = quantized_weights(model)
    _require_frozen(decided, stored)
    parts = find_parts(model)
    depth = _count_layers((name for name in decided if name not in unused), parts)
    trains: set[str] = set()
    groups: dict[tuple[Any, ...], Group] = {}
    rows: dict[tuple[str, str, str], Row] = {}
    for name, (parameter, rule) in decided.items():
        part = name_part(name, parts)
        lr = None if name in unused else rule.lr
        decay = None
        parameter.requires_grad_(lr is not None)
        if lr is not None:
            decay = _find_decay(parameter, rule, weight_decay, decay_norms_and_biases)
            scaled = lr * _layer_factor(name, rule, depth.get(part, 0))
            key = (part, rule.match, scaled, decay)
            new = Group(name=part, lr=scaled, weight_decay=decay, warmup_steps=rule.warmup_steps)
            group = groups.setdefault(key, new)
            group.parameters.append(parameter)
            group.names.append(name)
        note = "not used by the chosen layers" if name in unused else _describe_rule(rule)
        if lr is None and rule.frozen_mode == "train":
            trains.add(name)
        row = rows.setdefault((part, rule.match, note), Row(part, rule.match, 0, 0, lr, decay, note))
        row.tensors += 1
        row.parameters += stored[name].weights if name in stored else parameter.numel()
        if decay is not None:
            row.weight_decay = max(decay, row.weight_decay or 0.0)  # norms and biases have none
    return Policy(groups=list(groups.values()), rows=list(rows.values()), in_train_mode=frozenset(trains))


def _describe_rule(rule: RuleLike) -> str:
    """What else a rule does to what it matches."""
    if rule.lr is None:
        return "in training mode: dropout is on" if rule.frozen_mode == "train" else ""
    return "" if rule.warmup_steps is None else f"warm-up of {rule.warmup_steps} steps"


def _find_decay(parameter: nn.Parameter, rule: RuleLike, weight_decay: float, decay_norms_and_biases: bool) -> float:
    """The weight decay of a parameter that learns; the arguments are used where the rule says nothing."""
    own = rule.decay_norms_and_biases
    if parameter.ndim < 2 and not (decay_norms_and_biases if own is None else own):
        return 0.0
    return weight_decay if rule.weight_decay is None else rule.weight_decay


def _decide_rules(model: nn.Module, rules: Sequence[RuleLike]) -> dict[str, tuple[nn.Parameter, RuleLike]]:
    """The deciding rule of every parameter, or one error that names all that is wrong."""
    named = dict(model.named_parameters())
    parts = ", ".join(dict.fromkeys(name_part(name, find_parts(model)) for name in named))
    problems: list[str] = []
    patterns: list[tuple[re.Pattern[str], RuleLike]] = []
    for index, rule in enumerate(rules):
        try:
            pattern = re.compile(rule.match)
        except re.error as error:
            problems.append(f"params.rules[{index}] '{rule.match}' is not a regular expression: {error}")
            continue
        if not any(pattern.fullmatch(name) for name in named):
            problems.append(f"params.rules[{index}] '{rule.match}' matches no parameter. Parts: {parts}.")
        if rule.frozen_mode not in (None, "eval", "train"):
            problems.append(f"params.rules[{index}].frozen_mode: {rule.frozen_mode!r}; allowed: eval, train, null")
        elif rule.frozen_mode is not None and rule.lr is not None:
            problems.append(f"params.rules[{index}].frozen_mode: '{rule.match}' learns; it is for lr: null only")
        if rule.warmup_steps is not None and rule.lr is None:
            problems.append(f"params.rules[{index}].warmup_steps: '{rule.match}' is frozen; it is for what learns")
        patterns.append((pattern, rule))
    decided: dict[str, tuple[nn.Parameter, RuleLike]] = {}
    missed: list[str] = []
    for name, parameter in named.items():
        first = next((rule for pattern, rule in patterns if pattern.fullmatch(name)), None)
        if first is None:
            missed.append(name)
        else:
            decided[name] = (parameter, first)
    if missed and not problems:
        shown = ", ".join(missed[:3]) + (f" and {len(missed) - 3} more" if len(missed) > 3 else "")
        problems.append(
            f"params.rules: no rule matches {shown}. End the list with {{match: '.*', lr: null}} to freeze the rest."
        )
    if problems:
        raise ConfigError(problems)
    return decided


def _require_frozen(decided: dict[str, tuple[nn.Parameter, RuleLike]], stored: Iterable[str]) -> None:
    """Raises ConfigError for rules that let a quantized weight learn."""
    asked = [name for name in stored if name in decided and decided[name][1].lr is not None]
    if asked:
        raise ConfigError(
            f"params.rules: '{decided[asked[0]][1].match}' lets {len(asked)} quantized weights learn, for example "
            f"{asked[0]}. They cannot: put {{match: '.*\\.base_layer\\..*', lr: null}} before it, or match only the "
            "adapters, '.*\\.lora_.*'."
        )


def _count_layers(names: Iterable[str], parts: Iterable[str]) -> dict[str, int]:
    """Number of numbered layers of each part."""
    depth: dict[str, int] = {}
    for name in names:
        if found := _LAYER.search(name):
            part = name_part(name, parts)
            depth[part] = max(depth.get(part, 0), int(found.group(1)) + 1)
    return depth


def _layer_factor(name: str, rule: RuleLike, depth: int) -> float:
    """Layer-wise decay: 1 after the last layer, `d` for the last, `d^depth` for the first, `d^(depth+1)` before it."""
    if rule.layer_decay is None or depth == 0:
        return 1.0
    if found := _LAYER.search(name):
        return rule.layer_decay ** (depth - int(found.group(1)))
    return rule.layer_decay ** (depth + 1) if "embed" in name else 1.0


def freeze_eval(module: nn.Module, in_train_mode: Iterable[str] = ()) -> None:
    """Put every submodule that has parameters but none that learns into eval mode (dropout off, statistics fixed), but
    for those with parameters of the names `in_train_mode`."""
    kept = set(in_train_mode)
    _freeze_modules(module, {id(p) for name, p in module.named_parameters(remove_duplicate=False) if name in kept})


def _freeze_modules(module: nn.Module, kept: set[int]) -> None:
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad or id(parameter) in kept for parameter in parameters):
        module.eval()
        return
    for child in module.children():
        _freeze_modules(child, kept)
