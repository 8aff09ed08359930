"""What the first step of a run says of its data and its model: how much is learned, and how well it is guessed."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from vlm_train.contracts.batch import Window
from vlm_train.distributed import say_once
from vlm_train.errors import TrainingError
from vlm_train.objectives.lm import LanguageModeling
from vlm_train.training.filled import is_filled
from vlm_train.training.weights_watch import WeightsWatch

COUNTED = ("tokens", "targets", "unknown")
"""What is counted of a step: its tokens, those that are learned, and those of them that the tokenizer does not know."""

ENOUGH = 100
"""Targets that tell the share of unknown ones."""

WORTH_SAYING = 0.01
"""Share of unknown targets that is said; also the share of learned tokens below which that is."""


class TargetCheck:
    """Counts the targets of a run that its tokenizer does not know, over all ranks.

    A target that is the unknown token teaches a model to say that it does not know. Byte-level tokenizers have none.

    Args:
        most: share of unknown targets that is borne; None: any. Above 1 % it is said once.
    """

    def __init__(self, most: float | None) -> None:
        self.most, self.said = most, False
        self.unknown = self.targets = 0.0

    def count_targets(self, unknown: float, targets: float) -> None:
        """Count those of a step. Raises TrainingError, on every rank, when too many are unknown."""
        self.unknown, self.targets = self.unknown + unknown, self.targets + targets
        if self.targets < ENOUGH or self.most is None:
            return
        share = self.unknown / self.targets
        if share > self.most:
            raise TrainingError(
                describe_unknown(share, self.targets) + f", more than trainer.guard.max_unknown={self.most:g}. "
                "Choose a tokenizer that knows the words of the answers (tokenizer=..., or tokenizer.shards of this "
                "data); mode=show shows them."
            )
        if share > WORTH_SAYING and not self.said:
            self.said = True
            say_once(f"warning: {describe_unknown(share, self.targets)}; mode=show shows them.")


def describe_unknown(share: float, targets: float) -> str:
    """The beginning of a message about unknown targets."""
    return f"data: {share:.1%} of {targets:,.0f} learned tokens are unknown to the tokenizer"


def describe_first_step(
    *, tokens: float, targets: float, unknown: float, losses: Mapping[str, float], vocabulary: int | None
) -> str:
    """The line about the first step: what is learned of it, and the losses of predicted tokens beside that of guessing.

    Args:
        losses: of the objectives that predict tokens.
        vocabulary: what a guess chooses from; None: unknown.
    """
    said = f"first step: {targets:,.0f} of {tokens:,.0f} tokens are learned ({targets / max(tokens, 1):.1%})"
    if targets:
        said += f", {unknown / targets:.1%} of them unknown to the tokenizer"
    if losses:
        said += "; loss " + ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
        said += f", of guessing ln {vocabulary:,} = {math.log(vocabulary):.2f}" if vocabulary else ""
    return said


def find_implausible(
    *,
    tokens: float,
    targets: float,
    unknown: float,
    losses: Mapping[str, float],
    vocabulary: int | None,
    pretrained: bool | None,
) -> Iterable[str]:
    """What is implausible in the first step of a run, in words.

    Args:
        losses: of the objectives that predict tokens, in nats a token.
        pretrained: whether the weights of the language model come from files: it predicts better than a guess. A random
            one predicts nothing, and may be as far off as its weights are wide (T5). None: neither is expected, as of
            BERT in the place of a decoder.
    """
    if tokens and targets / tokens < WORTH_SAYING:
        yield (
            f"data: {targets / tokens:.2%} of the tokens of the first step are learned. Is the template's answer what "
            "the data holds? mode=show marks what is learned."
        )
    for name, loss in losses.items():
        begin = f"the loss of the first step, {name} {loss:.4g}, is"
        chance = math.log(vocabulary) if vocabulary else None
        if not math.isfinite(loss):
            yield f"{begin} no number. Look at the weights, trainer.precision, and the pixels (mode=show)."
        elif loss <= 0.01:
            yield f"{begin} next to nothing: either nothing is learned, or the targets can be read off the input."
        elif chance is None:
            continue
        elif pretrained is not False and loss > 1.25 * chance + 1.0:
            yield (
                f"{begin} far above that of guessing, ln {vocabulary:,} = {chance:.2f}. Do the weights belong to this "
                "architecture and tokenizer?"
            )
        elif pretrained and loss > chance:
            yield (
                f"{begin} above that of guessing, ln {vocabulary:,} = {chance:.2f}; a trained language model begins "
                "well below it. Did its weights arrive, and is the tokenizer its own?"
            )
        elif pretrained is False and loss < 0.7 * chance:
            yield (
                f"{begin} far below that of guessing, ln {vocabulary:,} = {chance:.2f}, though the language model is "
                "untrained. Can the targets be read off the input (labels that are not shifted, or twice)?"
            )


def count_targets(window: Window) -> tuple[int, ...]:
    """What a step holds on this rank, in the order of `COUNTED`."""
    return window.tokens, window.supervised, window.unknown


class FirstSteps:
    """What is looked at in the first steps of a process, because it would go wrong without an error.

    Args:
        weights: compare weights with what they were, see `WeightsWatch`.
        first_step: say what the first step of the run learned, and what of it is implausible.
        max_unknown: see `TargetCheck`.
        vocabulary: tokens that the language model chooses from; None: unknown.
        pretrained: see `find_implausible`.
    """

    def __init__(
        self,
        *,
        weights: bool = True,
        first_step: bool = True,
        max_unknown: float | None = 0.2,
        vocabulary: int | None = None,
        pretrained: bool | None = None,
    ) -> None:
        self.weights, self.first_step, self.is_first = weights, first_step, False
        self.vocabulary, self.pretrained = vocabulary, pretrained
        self.targets = TargetCheck(max_unknown)
        self.watch: WeightsWatch | None = None
        self.counts = dict.fromkeys(COUNTED, 0.0)

    def begin(self, module: Any) -> None:
        """The weights are in place, and no update has been made."""
        self.is_first = self.first_step and module.global_step == 0
        if not self.weights:
            return
        strategy = module.trainer.strategy
        strategy.reshard(module.model)
        copy = strategy.keeps_fp32_copy
        self.watch = WeightsWatch(module.model, module.policy, module.over_ranks, exact_copy=copy)

    def take_counts(self, sums: list[float]) -> list[float]:
        """Take what `count_targets` gave, summed over all ranks, off the end of a step's sums. Returns the others.

        Raises:
            TrainingError: too many targets are unknown.
        """
        own = len(COUNTED)
        self.counts = dict(zip(COUNTED, sums[-own:], strict=True))
        self.targets.count_targets(self.counts["unknown"], self.counts["targets"])
        return sums[:-own]

    def look(self, module: Any) -> None:
        """Look at the step that was just made, or left out. Raises TrainingError, on every rank."""
        if self.is_first:
            self.is_first = False
            self._say_first(module)
        if self.watch is None or module.left_out is not None:
            return
        groups = module.trainer.optimizers[0].param_groups
        rates = {g["name"]: max(one["lr"] for one in groups if one["name"] == g["name"]) for g in groups}
        norms = {name.partition("/")[2]: float(norm) for name, norm in module.grad_norms.items()}
        self.watch.look_after_update(rates, norms)
        if self.watch.done:
            self.watch = None

    def _say_first(self, module: Any) -> None:
        """Print the line, and a warning for whatever is implausible; on rank 0."""
        sums = module.over_ranks(module.meter.train.read_sums())
        names = [one.name for one in module.objectives.values() if isinstance(one, LanguageModeling)]
        losses = {name: sums[f"{name}/sum"] / max(sums[f"{name}/count"], 1e-8) for name in names}
        held: dict[str, Any] = self.counts | {"losses": losses, "vocabulary": self.vocabulary}
        say_once(describe_first_step(**held))
        for problem in find_implausible(**held, pretrained=self.pretrained):
            say_once(f"warning: {problem}")


def make_first_steps(settings: Any, model: Any, filled: Collection[str]) -> FirstSteps:
    """What a run looks at, by `trainer.guard`. `filled`: parameters that came from files, see `is_filled`."""
    llm = getattr(model, "llm", None)
    # BLIP's, and the text side of a Q-Former, begin as a BERT, which has never predicted a next word.
    unlike = llm is None or hasattr(llm, "encoder_start")
    return FirstSteps(
        weights=settings.weights,
        first_step=settings.first_step,
        max_unknown=settings.max_unknown,
        vocabulary=getattr(model if llm is None else llm, "vocab_size", None),
        pretrained=None if unlike else is_filled(model, "llm", filled),
    )
