"""Every problem is found before a weight is read, named by its setting, and all are raised together."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pytest
import yaml
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from data_pipelines.build import main as build_shards
from vlm_train.check.assets import missing_assets
from vlm_train.check.bounds import POSITIVE, RANGES
from vlm_train.check.check import check_config
from vlm_train.check.hydra_errors import unknown_key
from vlm_train.check.settings import check_numbers
from vlm_train.config.compose import compose_config, compose_tiny
from vlm_train.config.folders import config_dir
from vlm_train.config.origins import flatten_leaves
from vlm_train.config.schema import Root
from vlm_train.config.signatures import UnknownTarget, fits_annotation, import_signature, read_signature
from vlm_train.config.trust import iterate_nodes, reason_not_trusted
from vlm_train.errors import AssetError, ConfigError


def problems(*overrides: str, recipe: str = "llava15_stage1") -> list[str]:
    """What `check` says about a command line; empty when it is fine."""
    try:
        check_config(compose_config([f"recipe={recipe}", *overrides]), need_assets=False)
    except ConfigError as error:
        return error.problems
    return []


def test_recipe_passes() -> None:
    assert problems() == []


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lr=abc", "optim.lr: expected float, got 'abc' (str)."),
        ("optim.fused=banana", "optim.fused: expected bool | Literal['auto'] | None, got 'banana' (str)."),
        ("image.resize=cv2", "image.resize: expected Literal['pillow', 'torch'], got 'cv2' (str)."),
        ("image.decode=cv2", "image.decode: expected Literal['pillow', 'simplejpeg'], got 'cv2' (str)."),
        ("+connector.dept=3", "connector.dept: vlm_train.models.connectors.mlp.MLP has no such option. Did you mean"),
        ("connector._target_=vlm_train.models.connectors.mlp.MPL", "Did you mean vlm_train.models.connectors.mlp.MLP?"),
        ("connector._target_=os.system", "connector._target_: 'os.system' is not trusted."),
        ("connector._target_=torchvision.ops.MLP", "is not trusted."),
        ("batch.tokens=9", "batch: give exactly one of batch.samples and batch.tokens, got both."),
        ("batch.samples=null", "got neither."),
        ("batch.micro=0", "batch.micro: expected a positive number or null, got 0."),
        ("batch.normalize=tokens", "batch.normalize: got 'tokens'. Did you mean token?"),
        ("trainer.precision=bf16", "trainer.precision: got 'bf16'."),
        ("mode=fitt", "mode: got 'fitt'. Did you mean fit?"),
        ("trainer.epochs=null", "trainer: give trainer.epochs or trainer.max_steps, got neither."),
        ("launch.nodes=2", "launch.nodes: launch=local starts one node, got 2."),
        ("+eval.mine._target_=torch.nn.functional.torch.load", "torch.nn.functional.torch is not a module of its own"),
        (
            "+eval.mine._target_=transformers.utils.hub.os.system",
            "transformers.utils.hub.os is not a module of its own",
        ),
        ("+eval.mine._target_=transformers.dynamic_module_utils.get_class_from_dynamic_module", "only classes are"),
        ("+eval.mine._target_=torch.nn.modules.module.OrderedDict", "it is really from collections"),
        ("+eval.mine._target_=lightning.pytorch.cli.LightningCLI", "is not trusted"),
        ("+eval.mine._target_=vlm_train.runs.process.main", "is not trusted"),
        ("+eval.mine._target_=vlm_train.data.text.tokenizer._load", "is private"),
        ("++llm.config.trust_remote_code=true", "llm.config.trust_remote_code: got True. Allowed: False"),
        ("++data.train.0.weights_only=false", "data.train.0.weights_only: got False. Allowed: True"),
        ("init_from=[{run: x, which: bst}]", "init_from.0.which: got 'bst'. Did you mean best? Allowed: last, best."),
        ("optim.lr=-1", "optim.lr: expected a number >= 0 and <= 1000, got -1"),
        ("optim.lr=inf", "optim.lr: expected a number >= 0 and <= 1000, got inf"),
        ("+trainer.foo=1", "trainer.foo: no such setting. Settings: epochs, max_steps,"),
        ("+trainer.guard.spik=2", "trainer.guard.spik: no such setting. Did you mean spike?"),
        ("+trainer.clip_norm=1", "trainer.clip_norm: it is trainer.max_grad_norm now."),
        ("optim.betas=[0.9,1.0]", "optim.betas.1: expected a number >= 0 and < 1, got 1.0."),
        ("params.rules=[{match: '.*', lr: -1}]", "params.rules.0.lr: expected a number >= 0"),
        ("target.gpus_per_node=0", "target.gpus_per_node: expected a number >= 1, got 0."),
        ("target.cpu_gib=nan", "target.cpu_gib: expected a number > 0 and <= 1e6, got nan."),
        ("trainer.peak_tflops=0", "trainer.peak_tflops: expected a number > 0 and <= 1e6, got 0"),
        ("trainer.epochs=1e20", "trainer.epochs: expected a number > 0 and <= 1e6, got 1e+20."),
        ("launch.timeout_minutes=1e20", "launch.timeout_minutes: expected a number > 0"),
        ("columns.repetition_penalty=1e20", "columns.repetition_penalty: expected a number > 0 and <= 10, got 1e+20."),
        ("columns.parts=0", "columns.parts: expected a number >= 1, got 0."),
        ("optim.lr=1e20", "optim.lr: expected a number >= 0 and <= 1000, got 1e+20."),
        ("seed=-1", "seed: expected a number >= 0, got -1."),
        ("vision.image_mean=[0.5,nan,0.5]", "vision.image_mean.1: expected a finite number, got nan."),
        ("llm.config.num_hidden_layers=0", "llm.config.num_hidden_layers: expected a number >= 1, got 0."),
        ("llm.config.rms_norm_eps=1e30", "llm.config.rms_norm_eps: expected a number > 0 and < 1, got 1e+30."),
        ("llm.config.rope_parameters.rope_theta=-1", "rope_theta: expected a number > 0 and <= 1e12, got -1."),
        ("vision.config.intermediate_size=0", "vision.config.intermediate_size: expected a number >= 1, got 0."),
        ("data.cache=''", "data.cache: expected a name or null, got ''."),
        ("data.train=[{shards: ''}]", "data.train.0.shards: expected a name or null, got ''."),
        ("data.workers=-1", "data.workers: expected a number >= 0, got -1."),
        ("data.limit=0", "data.limit: expected a number >= 1, got 0."),
        ("lr_schedule.warmup_ratio=1.5", "lr_schedule.warmup_ratio: expected a number >= 0 and <= 1, got 1.5."),
        ("trainer.keep_last=0", "trainer.keep_last: expected a number >= 1, got 0."),
        ("lr_schedule.warmup_steps=3", "lr_schedule: give warmup_steps or warmup_ratio, got both (3 and 0.03)."),
        ("data.train=[]", "data.train: expected at least one entry"),
        ("data.train=[{shard: x}]", "data.train.0.shard: unknown key. Did you mean data.train.0.shards?"),
        ("data.val=[{samples: 3}]", "data.val.0.shards is missing"),
        ("data.train=[{shards: x, epochs: 2}]", "data.train.0.epochs: unknown key."),
        ("data.train=[x]", "data.train.0: expected an entry such as {shards: <folder>}, got 'x'."),
        ("launch.devices=3", "batch.samples=256 cannot be shared evenly by 3 ranks; allowed: multiples of 3"),
        ("~lr_schedule", "lr_schedule has no _target_: it needs one component"),
        ("~tokenizer", "tokenizer is empty: choose an option"),
        ("~template", "template is empty: choose an option"),
        ("~image", "image is empty: choose an option"),
        ("~objective", "objective is empty: there is no loss."),
        ("objective.lm=null", "objective is empty: there is no loss."),
        ("mode=eval", "run is missing: mode=eval needs run=<run folder>."),
        ("run_name=a/b", "run_name: expected a folder name"),
        ("image.mode=???", "image.mode is missing"),
        ("llm.weights=${oc.env:NO_SUCH_VARIABLE}", "llm.weights: "),
        ("++eval.mine.name=3", "eval.mine has no _target_"),
        ("+eval.mine._target_=torch.nn.Lineer", "Did you mean torch.nn.Linear?"),
        ("+eval.mine._target_=torch.nn.Linear", "eval.mine.in_features is missing: torch.nn.Linear requires it."),
    ],
)
def test_problem_names_its_setting(override: str, expected: str) -> None:
    found = problems(override)
    assert any(expected in problem for problem in found), found


def numeric_settings(section: type, path: str = "") -> list[str]:
    """Dotted keys of all numbers of the typed root; `*` for the entries of lists."""
    found: list[str] = []
    for name, kind in get_type_hints(section).items():
        kinds = [kind, *get_args(kind)]
        inner = next((one for one in kinds if is_dataclass(one)), None)
        listed = any(get_origin(one) is list for one in kinds)
        nested = [one for one in get_args(next((k for k in kinds if get_origin(k) is list), None)) if is_dataclass(one)]
        if inner is not None and not listed:
            found += numeric_settings(inner, f"{path}{name}.")
        elif nested:
            found += numeric_settings(nested[0], f"{path}{name}.*.")
        elif int in kinds or float in kinds:
            found.append(f"{path}{name}")
    return found


def test_every_number_of_the_schema_has_bounds() -> None:
    found = numeric_settings(Root)
    assert len(found) > 40 and {"trainer.guard.spike", "params.rules.*.lr", "target.cpu_gib"} <= set(found)
    assert [key for key in found if key not in POSITIVE and key not in RANGES] == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("recipe", ["llava15_stage2", "blip2_stage1"])
def test_no_number_is_nan_or_infinite(recipe: str, value: float) -> None:
    """All numbers of a recipe at once, those of components too: each is named."""
    cfg = compose_config([f"recipe={recipe}", "columns.shards=x"])
    numbers = {key: found for key, found in flatten_leaves(cfg).items() if type(found) in (int, float)}
    cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))  # untyped: an int takes a float
    for key in numbers:
        OmegaConf.update(cfg, key, value)
    named = {problem.partition(":")[0] for problem in check_numbers(cfg)}
    assert len(numbers) > 50 and numbers.keys() - named == set()


@pytest.mark.parametrize("value", ["-1", "0", "1e20", "''", "[3]", "{a: 1}"])
def test_nonsense_in_settings_is_refused_in_words(value: str) -> None:
    """What is neither a number of the right kind nor within bounds; a sample of the settings, all at once."""
    keys = ["trainer.epochs", "trainer.peak_tflops", "target.memory_gib", "target.cpu_gib", "launch.timeout_minutes"]
    cfg = compose_config(["recipe=llava15_stage2"])
    refused = []
    for key in keys:
        try:
            OmegaConf.update(cfg, key, yaml.safe_load(value) if value != "1e20" else 1e20, merge=False)
        except OmegaConfBaseException:
            refused.append(key)
    named = {problem.partition(":")[0] for problem in check_numbers(cfg)}
    assert {*refused, *named} == set(keys)


def test_a_setting_that_repeats_a_wrong_one_is_not_told() -> None:
    found = problems("optim.lr=fast", recipe="llava15_stage2")
    assert len(found) == 1 and found[0].startswith("optim.lr: "), found


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("optim.learning_rate", "optim.lr"),
        ("learning_rate", "optim.lr"),
        ("batch_size", "batch.samples"),
        ("batch.batch_size", "batch.samples"),
        ("num_workers", "data.workers"),
        ("trainer.gradient_clip_val", "trainer.max_grad_norm"),
        ("data.max_seq_length", "data.max_length"),
        ("output_dir", "paths.runs"),
        ("projector", "connector"),
    ],
)
def test_names_of_other_programs_are_understood(key: str, meant: str) -> None:
    assert f"Did you mean {meant}?" in unknown_key(key, [f"{key}=1", "recipe=llava15_stage2"], [])


def test_all_problems_are_raised_together() -> None:
    found = problems("optim.lr=abc", "batch.micro=0", "mode=fitt", "+connector.dept=3")
    for key in ("optim.lr", "batch.micro", "mode", "connector.dept"):
        assert any(problem.startswith(key) for problem in found), (key, found)


@pytest.mark.parametrize("more", ["data.pack=512", "data.group_by=length", "data.over_length=split"])
def test_what_needs_one_length_of_a_sample_takes_no_drawn_annotation(more: str) -> None:
    assert any(found.startswith("data.annotations: drawn") for found in problems("data.annotations=drawn", more))


def test_parts_that_the_model_needs_are_there() -> None:
    cfg = compose_config(["recipe=llava15_stage1"])
    cfg.vision = None
    with pytest.raises(ConfigError, match="vision is empty: choose an option"):
        check_config(cfg, need_assets=False)
    assert problems(recipe="easyvqa_lm") == []  # a text model needs none


def test_batches_that_cannot_be_trained_are_refused_before_weights_are_read() -> None:
    (found,) = problems("batch.samples=null", "batch.tokens=4096", "data.pack=null", "dry_run=true")
    assert found.startswith("batch.tokens: ") and "data.pack" in found


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["strategy=single", "launch.devices=2"], "strategy: Single trains on one device, but 2 processes"),
        (["strategy=zero2", "+strategy.offload_parameters=cpu"], "only stage 3 can, got stage 2"),
        (["strategy=zero3", "strategy.offload_parameters=nvme"], "strategy.nvme_path is missing"),
        (["strategy=zero3", "trainer.compile=true"], "trainer.compile: ZeRO with stage=3 gathers weights in between"),
        (["strategy=fsdp2", "trainer.precision=16-mixed"], "trainer.precision: FSDP2 has no loss scale"),
    ],
)
def test_a_strategy_that_cannot_be(overrides: list[str], words: str) -> None:
    (found,) = problems(*overrides)
    assert words in found


def test_best_follows_what_is_measured() -> None:
    (found,) = problems("trainer.best=answers/exact_mach", recipe="easyvqa_stage2")
    assert "did you mean" in found.lower() and "Allowed: loss, answers/exact_match" in found
    assert problems("trainer.best=answers/exact_match", recipe="easyvqa_stage2") == []


@pytest.mark.parametrize("name", [path.stem for path in sorted((config_dir() / "strategy").glob("*.yaml"))])
def test_every_strategy_composes(name: str) -> None:
    path = ["strategy.nvme_path=/local"] if name.endswith("nvme") else []
    assert problems(f"strategy={name}", *path) == []


def test_exchanged_group_says_how_to_drop_what_the_recipe_set() -> None:
    (found,) = problems("optim=sgd", recipe="easyvqa_lm")
    assert (
        found.startswith("optim.betas: vlm_train.training.optim.sgd has no such option.")
        and "add ~optim.betas" in found
    )
    assert problems("optim=sgd", "~optim.betas", recipe="easyvqa_lm") == []


def test_what_nobody_gives_must_be_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needy.py").write_text("class Needy:\n    def __init__(self, *, in_dim, out_dim, grid): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    choice = ["connector=linear", "connector._target_=needy.Needy", "allow_targets=[needy.]"]
    assert problems(*choice) == ["connector.grid is missing: needy.Needy requires it."]


def test_every_option_of_conf_is_trusted() -> None:
    for path in config_dir().glob("*/*.yaml"):
        for _, node in iterate_nodes(OmegaConf.create({"file": OmegaConf.load(path)})):
            assert "_target_" not in node or reason_not_trusted(node["_target_"], []) is None, path


def test_trust_can_be_extended() -> None:
    override = "+eval.mine._target_=fractions.Fraction"
    assert any("not trusted" in problem for problem in problems(override))
    assert problems(override, "allow_targets=[fractions.]") == []
    override = "+eval.mine._target_=fractions.re.compile"  # what a trusted module imports is not trusted with it
    assert any("not a module of its own" in problem for problem in problems(override, "allow_targets=[fractions.]"))


def test_nested_components_are_checked() -> None:
    cfg = compose_config(["recipe=llava15_stage1"])
    with open_dict(cfg):
        cfg.data.train = [{"shards": {"_target_": "subprocess.run"}}]
    with pytest.raises(ConfigError, match=r"data\.train\.0\.shards\._target_: 'subprocess.run' is not trusted"):
        check_config(cfg, need_assets=False)


def test_missing_assets_are_listed_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    cfg = compose_config(["recipe=llava15_stage2", f"paths.data={tmp_path}"])
    with pytest.raises(AssetError) as caught:
        check_config(cfg, need_assets=True)
    text = str(caught.value)
    for key in ("vision.weights: ", "llm.weights: ", "tokenizer.name: ", "data.train.0.shards: ", "init_from.0.run "):
        assert key in text, text


def test_missing_pictures_of_size_tiny_come_with_their_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train, val = sorted(missing_assets(compose_tiny("recipe=llava15_stage1")))
    build = "python -m data_pipelines.build source=tiny split="
    assert train.startswith("data.train.0.shards: ") and train.endswith(f"{build}train output=data/tiny/train")
    assert val.endswith(f"{build}val output=data/tiny/val")
    for line in (train, val):
        assert build_shards(line.partition("data_pipelines.build ")[2].split()) == 0
    assert missing_assets(compose_tiny("recipe=llava15_stage1")) == []
    full = missing_assets(compose_config(["recipe=easyvqa_clip"]))
    assert all("source=tiny" not in line for line in full)


def test_assets_that_are_there_are_not_missing(tmp_path: Path) -> None:
    (tmp_path / "llava_558k" / "train").mkdir(parents=True)
    (tmp_path / "weights").mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / "weights" / name).write_text("{}")
    here = [f"{key}={tmp_path}/weights" for key in ("vision.weights", "llm.weights")]
    cfg = compose_config(["recipe=llava15_stage1", f"paths.data={tmp_path}", *here])
    assert [line for line in missing_assets(cfg) if "manifest.json" not in line] == []
    (tmp_path / "llava_558k" / "train" / "manifest.json").write_text("{}")
    assert missing_assets(cfg) == []


def test_runs_that_an_earlier_stage_fills_are_expected(tmp_path: Path) -> None:
    cfg = OmegaConf.merge(compose_config([]), {"init_from": [{"run": str(tmp_path / "later")}]})
    assert any("init_from.0.run" in line for line in missing_assets(cfg))
    assert not any("init_from" in line for line in missing_assets(cfg, [tmp_path / "later"]))


def test_inherited_constructors_and_moved_names_are_followed() -> None:
    assert list(read_signature("vlm_train.errors.AssetError").parameters) == ["problems"]
    assert read_signature("vlm_train.check.check.AssetError") == read_signature("vlm_train.errors.AssetError")


def test_check_does_not_import_torch() -> None:
    code = (
        "import sys; from vlm_train.config import compose; from vlm_train.check import check; "
        "check.check_config(compose.compose_config(['recipe=llava15_stage1']), need_assets=False); "
        "print([m for m in ('torch', 'transformers', 'lightning') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (1, "float", True), (1.5, "int", False), (True, "int", False), (1, "bool", False), ("1", "int", False),
        (None, "int | None", True), (None, "Optional[int]", True), ("x", "Union[int, str]", True),
        ([0.9, 0.99], "tuple[float, float]", True), ([0.9], "tuple[float, float]", False),
        ([1, 2, 3], "tuple[int, ...]", True), ([1, "a"], "list[int]", False), ("ab", "Sequence[str]", False),
        ({"a": 1}, "dict[str, int]", True), ({"a": "b"}, "Mapping[str, int]", False),
        ("pad", "Literal['pad', 'crop']", True), ("fit", "Literal['pad', 'crop']", False),
        ("anything", "nn.Module", True), ("x", "Callable[[int], int]", True), (3, "'int | None'", True),
        ({"_target_": "torch.nn.ReLU"}, "int", True),
    ],
)  # fmt: skip
def test_fits(value: object, annotation: str, expected: bool) -> None:
    assert fits_annotation(value, annotation) is expected


def test_signatures_of_ours_and_of_others() -> None:
    trainer = read_signature("vlm_train.config.schema.Trainer")
    assert trainer.parameters["epochs"].annotation == "float | None" and not trainer.parameters["epochs"].required
    with pytest.raises(UnknownTarget, match=r"Did you mean vlm_train\.config\.schema\.Trainer\?"):
        read_signature("vlm_train.config.schema.Trainr")
    assert import_signature("fractions.Fraction").parameters["numerator"].required is False
    with pytest.raises(UnknownTarget, match="cannot be imported"):
        import_signature("no_such_package.Thing")


def test_a_module_that_needs_a_missing_package_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lacking").mkdir()
    (tmp_path / "lacking/__init__.py").touch()
    (tmp_path / "lacking/part.py").write_text("import no_such_package\nclass Thing:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        UnknownTarget, match="^lacking.part.Thing cannot be imported: No module named 'no_such_package'$"
    ):
        import_signature("lacking.part.Thing")
    with pytest.raises(UnknownTarget, match="lacking.other"):
        import_signature("lacking.other.Thing")


def test_shards_of_evaluators_are_looked_for_where_they_will_be_read(tmp_path: Path) -> None:
    def lines(*more: str) -> list[str]:
        cfg = compose_config(["recipe=easyvqa_stage2", "size=tiny", "eval=easyvqa", f"paths.data={tmp_path}", *more])
        return [line for line in missing_assets(cfg) if line.startswith("eval.answers")]

    found = lines("trainer.val_every=10")
    for name in ("shards", "validation_shards", "majority_shards"):
        assert any(line.startswith(f"eval.answers.{name}: {tmp_path}/easy_vqa/") for line in found), found
    for unread in (["trainer.val_every=null"], ["trainer.val_every=10", "+eval.answers.at_validation=false"]):
        assert not any("validation_shards" in line for line in lines(*unread))


def test_without_a_recipe_that_is_what_is_said() -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(compose_config([]), need_assets=False)
    assert any(one.startswith("recipe: none is chosen. Type for example python") for one in caught.value.problems)
    assert not any(problem.startswith("batch: give exactly") for problem in caught.value.problems)


def test_a_decoder_that_is_not_installed_is_named_in_a_dry_run_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["image.decode=simplejpeg", "dry_run=true"]
    monkeypatch.setattr("vlm_train.check.parts.find_spec", lambda name: object())
    assert problems(*asked) == []
    monkeypatch.setattr("vlm_train.check.parts.find_spec", lambda name: None)
    assert problems() == []
    assert problems(*asked) == [
        "image.decode: got simplejpeg, which is not installed: pip install 'vlm-train[jpeg]'. "
        "Allowed without it: pillow."
    ]


def test_recipe_may_leave_assets_to_its_user(tmp_path: Path) -> None:
    cfg = compose_config(["recipe=llava15_stage1", "llm.weights='???'", "data.train=[{shards: '???'}]"])
    check_config(cfg, need_assets=False)  # a plan needs no assets
    lines = missing_assets(cfg)
    for key in ("llm.weights is missing", "tokenizer.name is missing", "data.train.0.shards is missing"):
        assert any(line.startswith(key) for line in lines), lines


def test_settings_of_the_order_that_would_be_ignored_are_refused() -> None:
    def found(*overrides: str) -> str:
        (one,) = problems(*overrides)
        return one

    weighted = "data.train=[{shards: a, weight: 2.0}]"
    assert found(weighted).startswith("data.train: a weight counts only with data.mixture=weights")
    assert "it is data.pack_patches now" in unknown_key("data.pack_views", [], [])
    assert found("data.pack_patches=4", "data.pack=null").startswith(
        "data.pack_patches: bounds packed rows, but data.pack is null"
    )
    assert found("data.pack=1024").startswith(
        "data.pack: rows of 1024 tokens must hold samples of data.max_length=2048"
    )
    assert found("data.pack=4096", "data.group_by=length").startswith("data.group_by: packed rows are evened out")
    both = found("data.mixture=weights", "data.train=[{shards: a, share: 0.5, weight: 2.0}, {shards: b}]")
    assert both.startswith("data.train: an entry has a share of all draws or a weight")
    assert found("data.rejected=true", "data.over_length=split").startswith("data.over_length: pairs of answers")
    budget = ["batch.samples=null", "batch.tokens=65536", "data.pack=4096", "data.group_by=null"]
    assert problems(*budget, "batch.micro=1") == []
    assert found(*budget[:3], "data.group_by=modality", "batch.micro=1").startswith(
        "data.group_by: groups steps of batch.samples"
    )
    assert "multiples of 65536" in found(*budget[:1], "batch.tokens=8192", *budget[2:], "batch.micro=16")
    assert found("data.train=[{shards: a, shards2: b}]").startswith("data.train.0.shards2: unknown key")
    assert found("data.mixture=sqr").startswith("data.mixture: expected Literal['concat', 'weights', 'sqrt'")
