"""`python -m vlm_train.contract` says what is wrong with a component, and where."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from vlm_train.config.folders import config_dir
from vlm_train.contract.command import check_component, find_problems, main

BROKEN = [  # group, shipped option that it is like ("": of its own), class, what is said
    ("connector", "linear", "Missing", "tests.contract.broken has no 'Missing'"),
    ("connector", "linear", "Silent", "has a docstring: tests.contract.broken.Silent has none: say in a sentence"),
    ("connector", "linear", "WrongWidth", "tokens are [F, out_dim]: got [32, 48], wanted [32, 32]"),
    ("connector", "linear", "WrongGrid", "tokens have the grid that token_grid says"),
    ("connector", "linear", "MixesViews", "a view gives what it gives alone, whatever else is in the batch: differs"),
    ("connector", "linear", "Idle", "idle.weight gets none and is not declared as unused"),
    ("connector", "linear", "NotIdle", "proj.weight is declared unused, but gets a gradient"),
    ("connector", "linear", "Hides", "a copy that loads its state_dict computes the same: differs"),
    ("connector", "linear", "Heavy", "token_grid can be sent to data workers: pickles to"),
    ("connector", "linear", "Local", "token_grid can be sent to data workers: does not pickle"),
    ("connector", "linear", "NeedsValues", "builds on the meta device"),
    ("connector", "linear", "NoGrid", "NoGrid has no token_grid"),
    ("connector", "linear", "PlainFeatures", "forward returns Features: got Tensor"),
    ("connector", "linear", "Raises", "runs: ArithmeticError: too hard"),
    ("vision", "vit_small", "MeanOfBatch", "a view gives what it gives alone, whatever else is in the batch: differs"),
    ("vision", "vit_small", "Transposed", "features of a view have the grid that patch_grid says"),
    ("llm", "llama_small", "SeesAhead", "a token sees none that follow it: differs"),
    ("llm", "llama_small", "IgnoresMask", "a sample of a packed row does not see the one before it: differs"),
    ("llm", "llama_small", "LosesBlocks", "inserted blocks run once before every layer: got [0, 0], wanted [1, 1]"),
    ("llm", "flant5_xl", "ShortLogits", "logits are [B, T, vocab_size]: got [2, 7, 49], wanted [2, 7, 50]"),
    ("llm", "clip_text_b32", "ReadsPadding", "a caption gives what it gives alone, without padding: differs"),
    ("model", "prefix", "NoFamily", "NoFamily does not inherit from"),
    ("model", "prefix", "SkipsBlankViews", "a batch of padding reaches the same parameters: connector."),
    ("model", "prefix", "MixesRows", "a sample gives what it gives alone, without padding: differs"),
    ("objective", "lm", "MeanLoss", "lm: the sum does not depend on how a step is cut: differs"),
    ("objective", "lm", "PlainTensor", "lm: returns losses by name: got"),
    ("objective", "lm", "NoLoss", "lm: returns losses by name: got None"),
    ("objective", "", "WrongStream", "reads the stream 'lmm'. Did you mean llm?"),
    ("metric", "exact_match", "WrongDirection", "exact_match: lower is better, as declared: 1.0 for right texts"),
    ("metric", "exact_match", "OtherName", "returns the values that higher_is_better declares: got"),
    ("metric", "exact_match", "PlainValue", "returns values by name: got 1.0"),
    ("eval", "", "UndeclaredFinding", "runs: ConfigError: eval.broken: declares {'good': True}"),
    ("exporter", "", "ForgetfulExporter", "writes files, and says in words what they have: returned 'everything'"),
    ("importer", "", "GreedyImporter", "says why it cannot read an empty folder: got []"),
    ("image", "resize", "RandomPixels", "without a generator nothing is random: got False, wanted True"),
    ("template", "generic", "LearnsQuestions", "the question is not: learned is"),
]


def write_option(folder: Path, group: str, like: str, target: str) -> Path:
    """A folder of YAML with the option `broken`: a shipped one with another class."""
    if not like:
        content = OmegaConf.create({"broken": {"_target_": target}})
    else:
        content = OmegaConf.load(config_dir() / group / f"{like}.yaml")
        OmegaConf.update(content, "_target_" if "_target_" in content else f"{like}._target_", target)
    (folder / group).mkdir(parents=True)
    OmegaConf.save(content, folder / group / "broken.yaml")
    return folder


@pytest.mark.parametrize(("group", "like", "name", "said"), BROKEN, ids=[name for _, _, name, _ in BROKEN])
def test_what_is_wrong_is_said(group: str, like: str, name: str, said: str, tmp_path: Path) -> None:
    folder = write_option(tmp_path, group, like, f"tests.contract.broken.{name}")
    problems = find_problems(group, "broken", ["allow_targets=[tests.]"], [folder])
    assert [one for one in problems if said in one], problems


def test_a_component_without_small_values(tmp_path: Path) -> None:
    folder = write_option(tmp_path, "connector", "linear", "tests.contract.broken.Raises")
    file = folder / "connector" / "broken.yaml"
    file.write_text(file.read_text().replace("tiny: {}\n", ""))
    (problem,) = find_problems("connector", "broken", ["allow_targets=[tests.]"], [folder])
    assert "has a `tiny:` block for size=tiny: its YAML has none. Add the values that make it small" in problem


def test_a_missing_docstring_ends_no_other_checks(tmp_path: Path) -> None:
    folder = write_option(tmp_path, "connector", "linear", "tests.contract.broken.Silent")
    findings = list(check_component("connector", "broken", ["allow_targets=[tests.]"], [folder]))
    assert [one.checked for one in findings if one.problem] == ["has a docstring"]
    assert findings[-1].checked == "a copy that loads its state_dict computes the same"


def test_the_command_prints_a_line_a_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_option(tmp_path, "connector", "linear", "tests.contract.broken.Idle")
    ours = ["--config-dir", str(folder), "allow_targets=[tests.]"]
    assert main(["connector=linear", *ours]) == 0, "flags may stand behind overrides"
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "connector=linear" and said[-2] == "connector=linear: keeps its contract"
    assert len(said) > 10 and all(line.startswith("  ok    ") for line in said[1:-2])
    assert main([*ours, "connector=linear", "metric=cer", "connector=broken"]) == 1
    out = capsys.readouterr().out
    assert "metric=cer: keeps its contract" in out and "connector=broken: 3 of its checks failed" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["connector=mlpp"], "connector=mlpp"),
        (["recipe=easyvqa_clip"], "contract: nothing to check. Allowed: <group>=<name> of vision, connector, llm"),
        (["connector=linear", "vission=a"], "vission"),
        (["--config-dir", "/nowhere", "connector=linear"], "--config-dir: /nowhere is not a folder"),
    ],
)
def test_a_wrong_command_gets_a_sentence(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert said in shown and "Traceback" not in shown, shown


def test_code_that_is_not_trusted_is_not_imported(tmp_path: Path) -> None:
    folder = write_option(tmp_path, "connector", "linear", "somewhere.else.Connector")
    (problem,) = find_problems("connector", "broken", [], [folder])
    assert "'somewhere.else.Connector' is not trusted" in problem
