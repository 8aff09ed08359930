"""What one does with a trained run: evaluate, export, import, look at samples; sweeps and debugging runs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from tests.support.small_run import command, make_data, train
from vlm_train import cli, loggers
from vlm_train.config.compose import compose_config, compose_tiny
from vlm_train.config.run_file import save_config
from vlm_train.errors import ConfigError
from vlm_train.evaluation.run import labels_of, require_own_weights
from vlm_train.runs.single import from_run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny/{train,val}`, which also serves as the easy-VQA folders that `eval=easyvqa` names."""
    root = make_data(tmp_path_factory.mktemp("data"))
    (root / "easy_vqa").mkdir()
    for split, own in (("train", "train"), ("val", "val"), ("test", "val")):
        shutil.copytree(root / "tiny" / own, root / "easy_vqa" / split)
    return root


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(command(data, tmp_path_factory.mktemp("runs"), "params=all"))


def copy_of(run: Path, folder: Path) -> Path:
    return Path(shutil.copytree(run, folder / run.name))


def record(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


def last_loss(run: Path) -> float:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["split"] == "train"][-1]


def test_eval_adds_results_to_the_run(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = copy_of(trained, tmp_path)
    assert cli.main(["mode=eval", f"run={run}", "eval=easyvqa"]) == 0
    rows = record(run)["results"]
    assert [row["name"] for row in rows][:2] == ["this run", "images shuffled"]
    assert rows[0]["n"] == 4 and 0 <= rows[0]["value"] <= 1
    folder = run / "eval" / rows[0]["eval"]
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == 4
    assert rows[0]["value"] == sum(p["correct"] for p in predictions) / 4
    assert "images shuffled" in capsys.readouterr().out
    assert (run / "report.html").is_file()


def test_every_number_has_one_place(trained: Path, tmp_path: Path) -> None:
    """Another way of evaluating stands beside the run's own results; the same way again replaces what it found."""
    run = copy_of(trained, tmp_path)
    cfg = OmegaConf.load(run / "config.yaml")
    cfg.eval = compose_config(["recipe=easyvqa_stage2", "eval=easyvqa"]).eval
    OmegaConf.save(cfg, run / "config.yaml")  # as if it had been trained with eval=easyvqa
    old = [{"name": "this run", "value": 0.5, "n": 4, "note": "from training", "eval": "answers"}]
    before = record(run)
    (run / "run.json").write_text(
        json.dumps(before | {"results": old, "metrics": {"answers/exact_match": 0.5, "loss": 1}})
    )

    few = ["mode=eval", f"run={run}", "eval.answers.limit=2"]
    assert cli.main(few) == cli.main(few) == 0
    found = record(run)
    labels = [row.get("eval") for row in found["results"]]
    assert found["results"][0] == old[0] and found["metrics"]["answers/exact_match"] == 0.5
    (label,) = set(labels[1:])
    assert re.fullmatch("answers-[0-9a-f]{8}", label) and labels.count(label) == 4
    assert found["metrics"][f"{label}/exact_match"] == found["results"][1]["value"]
    assert [path.name for path in (run / "eval").iterdir()] == [label]

    assert cli.main(["mode=eval", f"run={run}"]) == 0
    found = record(run)
    assert [row["eval"] for row in found["results"]] == ["answers"] * 4 + [label] * 4
    assert found["metrics"]["answers/exact_match"] == found["results"][0]["value"]
    assert found["metrics"]["loss"] == 1 and found["status"] == "done"
    assert cli.main(["mode=eval", f"run={run}", "template=vicuna_v1"]) == 0, "another prompt is another evaluation"
    assert len({row["eval"] for row in record(run)["results"]}) == 3


@pytest.mark.parametrize("mode", ["eval", "export"])
@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("init_from=[{run: RUN}]", "init_from"),
        ("seed=7", "seed"),
        ("vision.layer=-2", "vision.layer"),
        ("connector=linear", "connector._target_"),
        ("llm.config.hidden_size=32", "llm.config.hidden_size"),
    ],
)
def test_nothing_exchanges_the_weights_of_a_run(
    trained: Path, mode: str, override: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    override = override.replace("RUN", str(trained))
    assert cli.main([f"mode={mode}", f"run={trained}", "eval=easyvqa", override]) == 2
    assert f"{named}: decides the weights of this run; leave it out" in capsys.readouterr().err


def test_weights_and_folders_may_have_moved(tmp_path: Path) -> None:
    own = compose_tiny("recipe=llava15_stage2", "run_name=own", f"paths.runs={tmp_path}")
    own.vision.weights = "here"
    save_config(own, tmp_path / "own" / "config.yaml")
    now = own.copy()
    now.vision.weights, now.llm.attention, now.paths.data = "there", "eager", "there"
    require_own_weights(now, tmp_path / "own")
    now.vision.weights = None
    with pytest.raises(ConfigError, match=r"vision\.weights"):
        require_own_weights(now, tmp_path / "own")


def test_another_tokenizer_is_another_evaluation(tmp_path: Path) -> None:
    own = compose_tiny("recipe=easyvqa_stage2", "run_name=own", "eval=easyvqa", f"paths.runs={tmp_path}")
    save_config(own, tmp_path / "own" / "config.yaml")
    folder = tmp_path / "own"
    copy = {"_target_": "vlm_train.data.text.tokenizer.pretrained", "name": str(folder / "tokenizer")}

    def label(tokenizer: dict) -> str:
        now = own.copy()
        now.tokenizer = tokenizer
        return labels_of(now, folder)["answers"]

    assert labels_of(own, folder)["answers"] == label(copy) == "answers"
    added = {"_target_": "vlm_train.data.text.tokenizer.byte_level", "add": ["zzz"]}
    assert len({label(added), label(copy | {"add": ["zzz"]}), "answers"}) == 3


def test_a_metric_is_added_to_an_evaluation(tmp_path: Path) -> None:
    own = compose_tiny("recipe=easyvqa_stage2", "run_name=own", "eval=none", f"paths.runs={tmp_path}")
    save_config(own, tmp_path / "own" / "config.yaml")
    cfg, _ = from_run([f"run={tmp_path / 'own'}", "eval=easyvqa", "+metric@eval.answers.metrics.cer=cer"], [])
    assert list(cfg.eval.answers.metrics) == ["exact_match", "cer"]
    assert cfg.eval.answers.metrics.cer._target_.endswith("CharacterErrorRate") and "metric" not in cfg


def test_eval_needs_an_evaluator(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["mode=eval", f"run={trained}", "eval=none"]) == 2
    assert "eval=easyvqa" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["eval", "export"])
def test_no_such_run(mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([f"mode={mode}", f"run={tmp_path / 'nowhere'}"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_export_and_import_give_the_weights_back(trained: Path, data: Path, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path)
    assert cli.main(["mode=export", f"run={run}"]) == 0
    assert json.loads((run / "export" / "config.json").read_text())["architectures"] == [
        "LlavaForConditionalGeneration"
    ]
    again = command(data, tmp_path, "mode=import", f"init_from=[{{run: {run / 'export'}}}]", name="imported")
    assert cli.main(again) == 0
    imported = tmp_path / "imported"
    learned = load_file(run / "checkpoints/step-00000006/weights.safetensors")
    read = load_file(imported / "checkpoints/step-00000000/weights.safetensors")
    assert learned.keys() <= read.keys()
    assert all(torch.equal(learned[name], read[name]) for name in learned)

    still = ["trainer.max_steps=1", "optim.lr=0", "optim.weight_decay=0", "params=all"]
    assert cli.main(command(data, tmp_path, *still, f"init_from=[{{run: {imported}}}]", name="started")) == 0
    kept = load_file(tmp_path / "started/checkpoints/step-00000001/weights.safetensors")
    assert all(torch.equal(kept[name], read[name]) for name in kept)


def test_an_imported_run_is_evaluated_and_exported(trained: Path, data: Path, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path)
    assert cli.main(["mode=export", f"run={run}"]) == 0
    overrides = command(data, tmp_path, "mode=import", f"init_from=[{{run: {run / 'export'}}}]")
    assert cli.main([o for o in overrides if not o.startswith("run_name=")]) == 0
    (imported,) = tmp_path.glob("easyvqa_stage2-*-imported")
    assert record(imported)["status"] == "imported"
    assert cli.main(["mode=eval", f"run={imported}", "eval=easyvqa", "eval.answers.controls=[]"]) == 0
    assert cli.main(["mode=export", f"run={imported}"]) == 0
    for name in ("model.safetensors", "config.json"):
        assert (imported / "export" / name).read_bytes() == (run / "export" / name).read_bytes()


@pytest.mark.parametrize(
    ("init_from", "said"),
    [("[]", "takes one folder"), ("[{run: RUN, parts: [llm]}]", "a whole model"), ("[{run: RUN}]", "config.json")],
)
def test_import_refuses(
    init_from: str, said: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init_from = init_from.replace("RUN", str(data))
    assert cli.main(command(data, tmp_path, "mode=import", f"init_from={init_from}")) == 2
    assert said in capsys.readouterr().err


def test_show_saves_what_the_model_sees(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = copy_of(trained, tmp_path)
    assert cli.main(["mode=show", f"run={run}"]) == 0
    said = capsys.readouterr().out
    assert "Which number is" in said
    (named,) = set(re.findall(r"\S+\.png", said)) or {""}
    assert Path(named).is_file(), said


@pytest.mark.timeout(280)
def test_sweep_starts_one_process_for_each_job(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    overrides = [o for o in command(data, tmp_path, "trainer.max_steps=2") if not o.startswith("run_name=")]
    assert cli.main(["-m", *overrides, "optim.lr=1e-3,3e-3"]) == 0
    runs = sorted(tmp_path.glob("easyvqa_stage2-*"))
    assert [record(run)["status"] for run in runs] == ["done", "done"]
    assert {OmegaConf.load(run / "config.yaml").optim.lr for run in runs} == {1e-3, 3e-3}
    ends = [load_file(run / "checkpoints/step-00000002/weights.safetensors") for run in runs]
    assert any(not torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_overfit_batch_learns_one_batch(data: Path, tmp_path: Path) -> None:
    run = train([*command(data, tmp_path)[:5], f"paths.data={data}", f"paths.runs={tmp_path}", "run_name=over",
                 "trainer.threads=1", "debug=overfit_batch", "params=all", "optim.lr=3e-3"])  # fmt: skip
    assert record(run)["step"] == 200
    assert last_loss(run) < 0.05


def test_profile_leaves_a_trace(data: Path, tmp_path: Path) -> None:
    run = train([*command(data, tmp_path)[:5], f"paths.data={data}", f"paths.runs={tmp_path}", "run_name=profiled",
                 "trainer.threads=1", "debug=profile"])  # fmt: skip
    assert json.loads((run / "trace.json").read_text())["traceEvents"]
    assert "Self CPU" in (run / "profile.txt").read_text()


def test_tensorboard_holds_the_loss(data: Path, tmp_path: Path) -> None:
    run = train(command(data, tmp_path, "logger=tensorboard", "trainer.max_steps=2"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    assert events.Scalars("train/loss")[-1].value == pytest.approx(last_loss(run), rel=1e-5)


def test_wandb_offline(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run = train(command(data, tmp_path, "logger=wandb", "logger.wandb.mode=offline", "trainer.max_steps=2"))
    assert list(run.glob("wandb/offline-run-*-run/run-run.wandb"))


def test_wandb_without_a_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")

    def refuse(**_: object) -> None:
        raise wandb.errors.UsageError("No API key configured.\nMore")

    monkeypatch.setattr(wandb, "init", refuse)
    monkeypatch.setattr(wandb, "run", None)  # of another test
    with pytest.raises(ConfigError, match=r"logger\.wandb: No API key configured\. .*wandb login.*mode=offline"):
        loggers.wandb(folder=tmp_path)


def readme_block(start: str) -> str:
    """The README's code block that starts so."""
    text = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    return next(block for block in re.findall(r"```\w+\n(.*?)```", text, re.DOTALL) if block.startswith(start))


def test_the_readmes_import_works(data: Path, tmp_path: Path) -> None:
    """On the export of a tiny run of the same recipe, instead of a 7B folder."""
    small = command(data, tmp_path, "trainer.max_steps=1", "trainer.export=true")
    run = train([override.replace("easyvqa_stage2", "llava15_stage2") for override in small])
    words = shlex.split(readme_block("python -m vlm_train mode=import"))
    words = [word.replace("models/llava-1.5-7b-hf", str(run / "export")) for word in words[3:]]
    assert cli.main([*words, "size=tiny", f"paths.data={tmp_path / 'none'}", f"paths.runs={tmp_path}"]) == 0
    assert cli.main(["mode=export", f"run={tmp_path / 'llava'}"]) == 0
    before, after = (load_file(one / "export" / "model.safetensors") for one in (run, tmp_path / "llava"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name][: len(after[name])], after[name]) for name in before)  # but for padded rows


def test_the_readmes_recipe_is_a_recipe(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "mine" / "recipe" / "my_recipe.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text(readme_block("# @package _global_"))
    small = ["size=tiny", f"data.train=[{{shards: {data / 'tiny/train'}}}]", "trainer.max_steps=1"]
    folders = [f"paths.data={data}", f"paths.runs={tmp_path}", "run_name=mine"]
    assert cli.main(["--config-dir", str(tmp_path / "mine"), "recipe=my_recipe", *small, *folders]) == 0
    assert record(tmp_path / "mine")["recipe"] == "my_recipe"
    assert "connector" in capsys.readouterr().out
