"""Metrics of texts by hand."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from vlm_train.build import instantiate_part
from vlm_train.config.folders import config_dir
from vlm_train.contracts.evaluator import TextMetric
from vlm_train.errors import ConfigError
from vlm_train.evaluation.metrics.anls import ANLS
from vlm_train.evaluation.metrics.bleu import BLEU
from vlm_train.evaluation.metrics.chair import CHAIR
from vlm_train.evaluation.metrics.character_error_rate import CharacterErrorRate
from vlm_train.evaluation.metrics.contains import contains
from vlm_train.evaluation.metrics.exact_match import ExactMatch
from vlm_train.evaluation.metrics.texts import count_edits
from vlm_train.evaluation.metrics.token_f1 import TokenF1, token_f1
from vlm_train.evaluation.metrics.vqa_accuracy import measure_agreement
from vlm_train.evaluation.metrics.yes_no import YesNo

REFERENCES = {  # where a text of one word, or what one of two people says, is not all of it
    "bleu": [["a cat sat there", "one cat sat on it"], ["Stop and look at it"]],
    "vqa_accuracy": [["one cat"] * 4, ["Stop"]],
    "yes_no": [["yes, a cat"], ["no"]],
}
GIVEN = {"chair": {"objects": {"cat": [], "bus stop": ["stop"], "dog": []}}}
"""What an option leaves to the user."""
UNBOUND = ("yes_share",)
"""Values whose best one is neither 0 nor 1."""
OPTIONS = sorted(path.stem for path in (config_dir() / "metric").glob("*.yaml"))


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_is_a_metric(option: str) -> None:
    """It returns the values that it declares, the best ones for the references themselves, and worse ones else."""
    node = OmegaConf.load(config_dir() / "metric" / f"{option}.yaml")
    metric = instantiate_part("metric", OmegaConf.merge(node, GIVEN.get(option, {})))
    assert isinstance(metric, TextMetric)
    references = REFERENCES.get(option, [["a cat", "one cat"], ["Stop"]])
    right, wrong = metric([texts[-1] for texts in references], references), metric(["no dogs", ""], references)
    assert list(right) == list(wrong) == list(metric.higher_is_better)
    for name, higher in metric.higher_is_better.items():
        if name in UNBOUND:
            continue
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


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("It is a red car.", "Red car", True),
        ("It is red, the car", "red car", True),
        ("a redder car", "red", False),
        ("yes", "yes, sir", False),
        ("anything", "", False),
        ("", "the", False),
        ("?", "?", True),
    ],
)
def test_contains_looks_for_whole_words(prediction: str, reference: str, expected: bool) -> None:
    assert contains(prediction, reference) is expected


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("Two.", ["2"] * 3 + ["3"] * 7, 0.9),  # leaving out one of the three gives 2/3, thrice; else 1
        ("the dog", ["dog"] * 4 + ["cat"] * 6, 1.0),
        ("dog", ["dog"] + ["cat"] * 9, 0.3),
        ("don't", ["dont"], 1.0),
        ("1,000", ["1000"], 1.0),
        ("2.5", ["25"], 0.0),
        ("dog", ["dog", "cat"], 0.5),
    ],
)
def test_vqa_accuracy_counts_people(prediction: str, answers: list[str], expected: float) -> None:
    assert measure_agreement(prediction, answers) == pytest.approx(expected)


def test_bleu_is_that_of_the_corpus() -> None:
    """One text by hand: all words, and three of five pairs of words, are in a reference."""
    predictions, references = ["The cat sat on a mat."], [["the cat sat on the mat", "a dog"]]
    assert BLEU(n_gram=1)(predictions, references) == pytest.approx({"bleu_1": 6 / 6})
    assert BLEU(n_gram=2)(predictions, references) == pytest.approx({"bleu_2": (6 / 6 * 3 / 5) ** 0.5})
    with pytest.raises(ConfigError, match="n_gram: got 0"):
        BLEU(n_gram=0)


def test_yes_no_counts_as_pope_does() -> None:
    said = ["Yes, there is.", "No.", "There is not a dog. Yes", "yes", "Yes.", "A cat"]
    true = [["yes"], ["yes"], ["no"], ["no"], ["no"], ["yes"]]
    found = YesNo()(said, true)  # yes, no, no, yes, yes, yes against yes, yes, no, no, no, yes
    assert found == pytest.approx({"accuracy": 0.5, "f1": 4 / 7, "precision": 0.5, "recall": 2 / 3, "yes_share": 2 / 3})
    assert YesNo()(["no"], [["no"]]) == {"accuracy": 1.0, "f1": 0.0, "precision": 0.0, "recall": 0.0, "yes_share": 0.0}


def test_chair_counts_every_mention() -> None:
    metric = CHAIR(objects={"dog": ["puppy"], "hot dog": [], "cat": [], "bus": []})
    said = ["A puppy and two dogs beside a bus.", "Hot dogs on a table", "Nothing at all"]
    there = [["A dog sleeps", "a cat"], ["one hot dog"], ["two buses"]]
    found = metric(said, there)  # 4 mentions, the bus is not there; 3 objects of 4 pictures are not named
    assert found == pytest.approx({"chair_i": 1 / 4 + 0, "chair_s": 1 / 3, "object_recall": 2 / 4})
    assert metric(["nothing"], [["a cat"]]) == {"chair_i": 0.0, "chair_s": 0.0, "object_recall": 0.0}
    with pytest.raises(ConfigError, match="'puppy' names both 'dog' and 'puppy'"):
        CHAIR(objects={"dog": ["puppy"], "puppy": []})
