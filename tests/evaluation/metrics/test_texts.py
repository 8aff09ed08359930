"""Metrics of texts by hand."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from vlm_train.build import instantiate_part
from vlm_train.config.folders import config_dir
from vlm_train.contracts.evaluator import TextMetric
from vlm_train.errors import ConfigError
from vlm_train.evaluation.metrics.anls import ANLS
from vlm_train.evaluation.metrics.character_error_rate import CharacterErrorRate
from vlm_train.evaluation.metrics.exact_match import ExactMatch
from vlm_train.evaluation.metrics.texts import count_edits
from vlm_train.evaluation.metrics.token_f1 import TokenF1, token_f1

OPTIONS = sorted(path.stem for path in (config_dir() / "metric").glob("*.yaml"))


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_is_a_metric(option: str) -> None:
    """It returns the values that it declares, the best ones for the references themselves, and worse ones else."""
    metric = instantiate_part("metric", OmegaConf.load(config_dir() / "metric" / f"{option}.yaml"))
    assert isinstance(metric, TextMetric)
    references = [["a cat", "one cat"], ["Stop"]]
    right, wrong = metric(["one cat", "Stop"], references), metric(["dogs", ""], references)
    assert list(right) == list(wrong) == list(metric.higher_is_better)
    for name, higher in metric.higher_is_better.items():
        assert isinstance(right[name], float) and right[name] == float(higher)
        assert (wrong[name] < right[name]) is higher


def test_exact_match_ignores_case_and_outer_blanks() -> None:
    found = ExactMatch()([" Yes ", "no.", "b"], [["yes"], ["no"], ["a", "B"]])
    assert found == {"exact_match": 2 / 3}


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("the red, Red cat!", "red cat", 2 * 2 / 5),
        ("a dog", "the cat", 0.0),
        ("The", "an", 1.0),  # both are empty
        ("the", "cat", 0.0),
        ("cat cat", "cat", 2 / 3),
    ],
)
def test_token_f1(prediction: str, reference: str, expected: float) -> None:
    assert token_f1(prediction, reference) == pytest.approx(expected)
    assert TokenF1()([prediction, "x"], [["q", reference], ["x"]]) == {"token_f1": pytest.approx((expected + 1) / 2)}


def test_anls_counts_what_is_near_enough() -> None:
    assert ANLS()(["Kittens"], [["sitting", "kitten"]]) == {"anls": pytest.approx(6 / 7)}
    assert ANLS()(["ab"], [["ac"]]) == {"anls": 0.0}, "half of it is wrong"
    assert ANLS(threshold=0.6)(["ab"], [["ac"]]) == {"anls": 0.5}
    assert ANLS()([" "], [[""]]) == {"anls": 1.0}
    with pytest.raises(ConfigError, match="threshold: got 0; allowed: above 0, up to 1"):
        ANLS(threshold=0)


def test_character_error_rate_is_over_all_characters() -> None:
    assert CharacterErrorRate()(["abcd", " Ab "], [["abxx"], ["ab"]]) == {"cer": 3 / 6}
    assert CharacterErrorRate()(["aaaaaa"], [["b"]]) == {"cer": 6.0}
    assert CharacterErrorRate()(["ab"], [["xyz", "abc"]]) == {"cer": 1 / 3}
    assert CharacterErrorRate()([""], [[""]]) == {"cer": 0.0}


@pytest.mark.parametrize(
    ("one", "other", "edits"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("ab", "ba", 2), ("x", "x", 0)],
)
def test_edits(one: str, other: str, edits: int) -> None:
    assert count_edits(one, other) == count_edits(other, one) == edits
