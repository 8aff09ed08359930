"""What the first step says of itself, and what of it is implausible; targets that the tokenizer does not know."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tests.support.small_run import command, make_data, train
from vlm_train import cli
from vlm_train.data.text.tokenizer import byte_level, find_unknown_id, word_tokenizer
from vlm_train.errors import ConfigError, TrainingError
from vlm_train.training.first_step import FirstSteps, TargetCheck, find_implausible

V = 1000
CHANCE = math.log(V)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def implausible(
    loss: float, *, pretrained: bool | None = False, targets: float = 200, vocabulary: int | None = V
) -> str:
    held: dict[str, Any] = {"tokens": 1000.0, "targets": targets, "unknown": 0.0, "vocabulary": vocabulary}
    return "\n".join(find_implausible(**held, losses={"lm": loss}, pretrained=pretrained))


@pytest.mark.parametrize(
    ("loss", "pretrained"),
    [
        (CHANCE, False),
        (CHANCE + 1.5, False),
        (0.9 * CHANCE, False),
        (5 * CHANCE, False),
        (1.2, True),
        (0.05, True),
        (0.9 * CHANCE, True),
        (1.0, None),
        (8.0, None),
    ],
)
def test_what_healthy_models_begin_with_is_not_said(loss: float, pretrained: bool | None) -> None:
    assert implausible(loss, pretrained=pretrained) == ""


@pytest.mark.parametrize(
    ("loss", "pretrained", "said"),
    [
        (float("nan"), True, "lm nan, is no number"),
        (0.0, True, "next to nothing"),
        (0.0, False, "next to nothing"),
        (25.0, True, "far above that of guessing, ln 1,000 = 6.91"),
        (CHANCE + 0.5, True, "a trained language model begins"),
        (0.5 * CHANCE, False, "far below that of guessing"),
    ],
)
def test_what_is_implausible_is_said(loss: float, pretrained: bool, said: str) -> None:
    found = implausible(loss, pretrained=pretrained)
    assert said in found and "\n" not in found


def test_without_a_vocabulary_only_numbers_are_judged() -> None:
    assert implausible(25.0, vocabulary=None) == "" and "no number" in implausible(math.inf, vocabulary=None)


def test_a_small_supervised_share_is_said() -> None:
    assert "0.50% of the tokens of the first step are learned" in implausible(CHANCE, targets=5)
    assert implausible(CHANCE, targets=10) == ""


def test_a_run_says_what_its_first_step_learns(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(command(data, tmp_path, "trainer.max_steps=2", "trainer.export=false"))
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if line.startswith("first step: ")]
    assert "tokens are learned (" in line and "0.0% of them unknown" in line and "loss lm 5." in line
    assert "the loss of the first step" not in said
    off = ["trainer.guard.first_step=false", "trainer.max_steps=1", "trainer.export=false"]
    train(command(data, tmp_path, *off, name="off"))
    assert "first step: " not in capsys.readouterr().out


def test_the_text_side_of_a_q_former_is_compared_with_guessing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm_train.models.families.blip2_qformer import Blip2QFormerModel

    more = ["recipe=easyvqa_blip2_stage1", "batch.micro=4", "trainer.max_steps=1", "trainer.export=false"]
    train([*command(data, tmp_path)[1:], *more])
    said = capsys.readouterr().out
    assert "loss itg 5." in said and "of guessing ln 2" in said and "warning: the loss" not in said
    inner = Blip2QFormerModel.logits
    monkeypatch.setattr(Blip2QFormerModel, "logits", lambda self, hidden: 1000 * inner(self, hidden))
    train([*command(data, tmp_path, name="wide")[1:], *more])
    assert "far above that of guessing, ln 2" in capsys.readouterr().out


def test_a_run_whose_targets_can_be_read_off_is_warned(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits that know the answer, as when labels are not shifted."""
    from vlm_train.objectives import lm

    inner = lm.F.cross_entropy
    monkeypatch.setattr(
        lm,
        "F",
        SimpleNamespace(
            cross_entropy=lambda logits, labels, **how: inner(
                logits + 30.0 * torch.nn.functional.one_hot(labels.clamp(min=0), logits.shape[-1]), labels, **how
            )
        ),
    )
    train(command(data, tmp_path, "trainer.max_steps=1", "trainer.export=false"))
    assert "warning: the loss of the first step, lm" in capsys.readouterr().out


WORDS = ["tokenizer._target_=tests.training.test_first_step.few_words"]


def few_words(*, add: list[str]) -> Any:
    """A closed vocabulary that knows the questions, and no word of the answers."""
    return word_tokenizer(["Which number is ?"], add=add)


@pytest.mark.parametrize("pack", [False, True])
def test_unknown_targets_are_refused(pack: bool, data: Path, tmp_path: Path) -> None:
    """In the first batches, or where lengths are measured."""
    own = ["allow_targets=[tests.]", "trainer.export=false", *WORDS, *(["data.pack=64"] if pack else [])]
    with pytest.raises(ConfigError if pack else TrainingError, match=r"% of .* unknown to the tokenizer, more than tr"):
        train(command(data, tmp_path, *own, "batch.samples=12"))
    borne = ["trainer.guard.max_unknown=null", "trainer.max_steps=1"]
    train(command(data, tmp_path, *own, *borne, name="borne"))


def test_lengths_say_unknown_targets(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = command(data, tmp_path, "allow_targets=[tests.]", *WORDS, "mode=lengths")
    assert cli.main(overrides) == 2
    assert "train: " in (told := capsys.readouterr()).out and "trainer.guard.max_unknown=0.2" in told.err
    assert cli.main([*overrides, "trainer.guard.max_unknown=0.9999"]) == 0
    assert "learned tokens looked at are unknown to the tokenizer; mode=show" in capsys.readouterr().out
    assert cli.main(command(data, tmp_path, "mode=lengths")) == 0
    assert "unknown" not in capsys.readouterr().out


def test_a_few_unknown_targets_are_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    check = TargetCheck(0.2)
    for _ in range(3):
        check.count_targets(5, 99)
    assert capsys.readouterr().out.count("warning: data: 5.1% of 198 learned tokens are unknown") == 1
    for _ in range(1000):
        check.count_targets(0, 99)
    TargetCheck(0.2).count_targets(0, 1000)
    TargetCheck(None).count_targets(1000, 1000)
    assert capsys.readouterr().out == ""
    with pytest.raises(TrainingError, match="21.0% of 100 learned tokens"):
        TargetCheck(0.2).count_targets(21, 100)


def test_tokenizers_that_spell_everything_have_no_unknown_token() -> None:
    whole = byte_level()
    assert find_unknown_id(whole) not in whole.encode("any text, ÿ 🎈", add_special_tokens=False)
    ends = SimpleNamespace(unk_token_id=7, eos_token_id=7, bos_token_id=7)
    assert find_unknown_id(ends) is None  # GPT-2
    assert find_unknown_id(SimpleNamespace(unk_token_id=0, eos_token_id=2, bos_token_id=1)) == 0  # Llama


def test_a_step_that_was_left_out_proves_nothing() -> None:
    looked: list[Any] = []
    steps = FirstSteps(first_step=False)
    steps.watch = cast(Any, SimpleNamespace(look_after_update=lambda *args: looked.append(args), done=False))
    groups = [{"name": "connector", "lr": 1e-4}, {"name": "connector", "lr": 1e-3}]
    trainer = SimpleNamespace(optimizers=[SimpleNamespace(param_groups=groups)])
    norms = {"grad_norm": torch.tensor(3.0), "grad_norm/connector": torch.tensor(2.0)}
    module = SimpleNamespace(left_out="overflow", trainer=trainer, grad_norms=norms)
    steps.look(module)
    assert not looked
    module.left_out = None
    steps.look(module)
    assert looked[0][0] == {"connector": 1e-3} and looked[0][1]["connector"] == 2.0
