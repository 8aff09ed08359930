"""QLoRA: the asked layers in 4 or 8 bits, which never change; adapters that merge into the base as it was."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from tests.models.adapters import test_lora
from tests.models.adapters.test_lora import EXPECTED, learn, logits
from tests.support.small_run import command, make_data, train
from tests.support.tiny_models import assert_close
from tests.training.test_fit import assert_same_weights, metrics, stop_after
from vlm_train.build import build_assembly, build_model
from vlm_train.check import assets
from vlm_train.check.check import check_config
from vlm_train.check.strategies import check_own_strategy
from vlm_train.checkpoint.weights import load_init_from, load_run_weights, save_weights
from vlm_train.config.compose import compose_config
from vlm_train.config.run_file import load_config
from vlm_train.config.schema import Rule
from vlm_train.errors import CheckpointError, ConfigError
from vlm_train.export.merged import merged_state, unquantize_model
from vlm_train.models.adapters.lora import base_names, describe_adapters, lora, qlora
from vlm_train.models.adapters.quantize import (
    assign_values,
    dequantize_weight,
    full_shape,
    quantized_layers,
    quantized_weights,
)
from vlm_train.models.precision import cast_to_bf16
from vlm_train.runs.folder import RunFolder
from vlm_train.training.params import apply_policy, freeze_eval

pytest.importorskip("bitsandbytes")

BITS = pytest.mark.parametrize("bits", [4, 8])
RULES = OmegaConf.create([Rule(match=r".*\.lora_.*", lr=1e-2), Rule(match=".*")])
for rule in RULES:
    rule.update({"weight_decay": None, "layer_decay": None})


def model() -> Any:
    return test_lora.model(64)  # NF4 packs blocks of 64


def adapted(bits: int | None = 4, **options: Any) -> Any:
    built = model()
    torch.manual_seed(1)
    qlora(model=built, bits=bits, rank=4, alpha=8, **options)
    return built


def stored(built: Any) -> dict[str, torch.Tensor]:
    """Everything that the quantized layers hold, scales included."""
    return {
        f"{name}.{key}": value.clone()
        for name, _ in quantized_layers(built)
        for key, value in built.get_submodule(name).state_dict().items()
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@BITS
def test_only_the_asked_layers_are_quantized(bits: int) -> None:
    built = adapted(bits)
    assert sorted(name for name, _ in quantized_layers(built)) == sorted(f"{name}.base_layer" for name in EXPECTED)
    packed = {name for name, p in built.named_parameters() if not p.is_floating_point()}
    assert packed == set(quantized_weights(built)) == {f"{name}.base_layer.weight" for name in EXPECTED}
    assert describe_adapters(built)[1].startswith(
        f"peft: 14 linear layers in {bits} bits: llm.model.model.layers.{{0-1}}."
    )
    some = adapted(bits, quantize_match=r"llm\..*\.mlp\..*", match=r"llm\..*\.q_proj")
    assert {name.rsplit(".", 1)[1] for name, _ in quantized_layers(some)} == {"gate_proj", "up_proj", "down_proj"}
    with pytest.raises(ConfigError, match=r"peft.quantize_match: '.\*' also matches .* outside llm"):
        adapted(bits, quantize_match=".*")


@BITS
def test_quantizing_is_a_function_of_the_weights(bits: int) -> None:
    one, two = adapted(bits), adapted(bits)
    assert same(stored(one), stored(two)) and stored(one)
    plain = adapted(None)
    for name, parameter in plain.named_parameters():
        if ".lora_" in name:  # the draws of LoRA's initial values do not depend on it
            assert torch.equal(parameter, one.get_parameter(name)), name


@BITS
@pytest.mark.parametrize("double_quant", [True, False])
def test_the_stored_numbers_are_near_the_weights_and_their_bytes_are_known(bits: int, double_quant: bool) -> None:
    built, plain = adapted(bits, double_quant=double_quant), model()
    layer = built.llm.layers[0].mlp.up_proj.base_layer
    exact = plain.llm.layers[0].mlp.up_proj.weight
    error = (dequantize_weight(layer) - exact).abs().max() / exact.abs().max()
    assert (
        0 < error < (0.16 if bits == 4 else 0.004)
    )  # half of NF4's widest gap is 0.152 of a block's largest; int8: 1 / 254
    mark = layer.quantized
    state = layer.weight.quant_state if bits == 4 else None
    held = layer.weight.data.nbytes + (layer.weight.SCB.nbytes if state is None else scale_bytes(state))
    assert (mark.bits, mark.weights, mark.stored) == (bits, exact.numel(), held)


def scale_bytes(state: Any) -> int:
    return state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)


@BITS
def test_the_base_is_untouched_after_training(bits: int) -> None:
    built = adapted(bits)
    policy = apply_policy(built, RULES, weight_decay=0.1)
    freeze_eval(built)  # as training does: bases evaluate while their adapters learn
    before, start = stored(built), {n: p.detach().clone() for n, p in built.named_parameters()}
    optimizer = torch.optim.AdamW([group.as_dict() for group in policy.groups])
    embeds, positions = torch.randn(2, 5, 64), torch.arange(5).expand(1, 2, 5)
    for _ in range(3):
        built.llm.head(built.llm.decode(embeds, positions, None)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, p in built.named_parameters() if not torch.equal(p, start[name])}
    assert same(before, stored(built))
    assert changed == {name for name in start if ".lora_" in name}


@pytest.mark.parametrize("before", ["weight", "state"])
def test_int8_numbers_follow_a_weight_that_moved(before: str) -> None:
    """As after `model.to("cuda")`, before or after a first forward, which takes the numbers off the weight."""
    built = adapted(8)
    expected = logits(adapted(8))
    if before == "state":
        logits(built)
    layers = [module for module in built.modules() if hasattr(getattr(module, "state", None), "CB")]
    for layer in layers:
        held = layer.weight if before == "weight" else layer.state
        held.CB = held.CB.to("meta")  # another device
    assert layers and torch.equal(logits(built), expected)


@BITS
def test_other_base_weights_are_quantized_like_the_first(bits: int) -> None:
    """Weights that a run takes over from an earlier one arrive after the layers were quantized."""
    built, expected = adapted(bits), model()
    logits(built)  # int8 layers move their scales when they first run
    with torch.no_grad():
        for parameter in expected.llm.parameters():
            parameter.mul_(1.5)
    weights = {name: p.detach().clone() for name, p in expected.named_parameters()}
    torch.manual_seed(1)
    qlora(model=expected, bits=bits, rank=4, alpha=8)
    now = base_names(built)
    assert set(now.values()) == set(quantized_weights(built)) and set(now) < set(weights)
    for name, weight in weights.items():
        assert full_shape(built, now.get(name, name)) == weight.shape
        assign_values(built, now.get(name, name), weight)
    assert torch.equal(logits(built), logits(expected))
    assert same(stored(built), stored(expected))


@BITS
def test_a_run_without_adapters_hands_its_weights_to_one_with(bits: int, tmp_path: Path) -> None:
    earlier, built = model(), adapted(bits)
    learned = {name: p.detach() * 1.5 for name, p in earlier.named_parameters() if not name.startswith("vision")}
    save_weights(tmp_path / "checkpoints", learned, run_id="earlier")
    init_from = [SimpleNamespace(run=tmp_path, which="last", parts=["connector", "llm"])]
    load_init_from(built, init_from)
    exact = learned["llm.model.model.layers.0.mlp.up_proj.weight"]
    assert (
        dequantize_weight(built.llm.layers[0].mlp.up_proj.base_layer) - exact
    ).abs().max() < 0.16 * exact.abs().max()
    assert torch.equal(built.connector.layers[0].weight, learned["connector.layers.0.weight"])
    save_weights(tmp_path / "checkpoints", {n: p for n, p in built.named_parameters() if "lora" in n}, run_id="adapted")
    with pytest.raises(CheckpointError, match="lora_A.default.weight: not in the model"):
        load_init_from(earlier, [SimpleNamespace(run=tmp_path, which="last", parts=["llm"])])


@pytest.mark.parametrize("meta", [False, True], ids=["tiny", "meta"])
@BITS
def test_counts_are_those_of_the_unquantized_model(bits: int, meta: bool) -> None:
    with torch.device("meta" if meta else "cpu"):
        quantized, plain = adapted(bits), adapted(None)
    counts = [apply_policy(one, RULES, weight_decay=0.0) for one in (quantized, plain)]
    assert (counts[0].total, counts[0].trainable) == (counts[1].total, counts[1].trainable)
    greedy = OmegaConf.create([{**RULES[0], "match": r"llm\..*"}, RULES[1]])
    with pytest.raises(
        ConfigError, match=r"params.rules: 'llm\\..\*' lets 14 quantized weights learn, for example llm"
    ):
        apply_policy(quantized, greedy, weight_decay=0.0)


def test_16_bit_weights_leave_quantized_ones_alone() -> None:
    built = adapted()
    before = stored(built)
    cast_to_bf16(built)
    assert same(before, stored(built))
    assert built.llm.model.get_input_embeddings().weight.dtype == torch.bfloat16


@pytest.mark.parametrize(("bits", "dora"), [(4, False), (4, True), (8, False)])
def test_adapters_merge_into_the_base_as_it_was(bits: int, dora: bool) -> None:
    """The same adapters over the exact base merge exactly; the quantized model differs by its rounding only."""
    built, fresh, plain = adapted(bits, dora=dora), adapted(None, dora=dora), model()
    start = logits(built)
    learn(built)
    for name, parameter in built.named_parameters():
        if ".lora_" in name:
            fresh.get_parameter(name).data.copy_(parameter)
    plain.load_state_dict(merged_state(fresh))
    assert_close(logits(plain), logits(fresh), tolerance=1e-5)
    learned = (logits(built) - start).abs().max()
    rounding = (logits(plain) - logits(built.eval())).abs().max()
    assert rounding < (0.05 if bits == 4 else 0.01) * learned, f"{rounding:.2e} of {learned:.2e}"


@pytest.mark.parametrize(
    ("strategy", "named"),
    [("zero3", "ZeRO with stage=3"), ("fsdp2", "FSDP2"), ("zero2", None), ("ddp", None), ("auto", None)],
)
def test_sharding_of_quantized_weights_is_refused(strategy: str, named: str | None) -> None:
    problems = list(check_own_strategy(compose_config(["recipe=llava15_qlora", f"strategy={strategy}"])))
    assert len(problems) == (0 if named is None else 1)
    assert all(one.startswith(f"strategy: {named} cuts every weight into slices") for one in problems)
    assert list(check_own_strategy(compose_config(["recipe=llava15_lora", f"strategy={strategy}"]))) == []


def test_unknown_widths_and_a_missing_package_are_said_before_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"peft.bits: got 3. Allowed: 4, 8, or null"):
        check_config(compose_config(["recipe=llava15_qlora", "peft.bits=3", "dry_run=true"]), need_assets=False)
    with pytest.raises(ConfigError, match="peft.compute: expected"):
        check_config(compose_config(["recipe=llava15_qlora", "peft.compute=int8", "dry_run=true"]), need_assets=False)
    with pytest.raises(ConfigError, match="peft.dora: peft 0.21 loses the scales of 8-bit weights"):
        check_config(
            compose_config(["recipe=llava15_qlora", "peft.bits=8", "peft.dora=true", "dry_run=true"]), need_assets=False
        )
    with pytest.raises(ConfigError, match="q_proj has 16 inputs, and NF4 needs a multiple of 64"):
        qlora(model=test_lora.model(16))
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    missing = assets.missing_assets(compose_config(["recipe=easyvqa_lm", "peft=qlora"]))
    assert "peft.bits: 4-bit weights need bitsandbytes: pip install 'vlm-train[qlora]'." in missing


def test_a_7b_is_predicted_at_half_a_byte_a_weight() -> None:
    cfg = compose_config(["recipe=llava15_qlora"])
    marks = dict(quantized_layers(build_model(cfg, meta=True)))
    assert len(marks) == 32 * 7
    weights, bytes_ = sum(m.weights for m in marks.values()), sum(m.stored for m in marks.values())
    assert weights == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert bytes_ / weights == pytest.approx(0.5 + 1 / 64 + 4 / (64 * 256), rel=1e-6)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


ADAPTERS = ["peft=qlora", r"params.rules=[{match: '(llm.*\.lora_|connector).*', lr: 1e-2}, {match: '.*', lr: null}]"]


@pytest.mark.slow
def test_runs_resume_exactly_and_save_no_quantized_weight(data: Path, tmp_path: Path) -> None:
    one, two = (command(data, tmp_path / name, *ADAPTERS) for name in ("one", "two"))
    whole = train(one)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="stopped"):
        stop_after(patch, 3)
        train(two)
    resumed = train(two)
    assert metrics(whole) == metrics(resumed)
    assert_same_weights(whole, resumed)
    folder = whole / "checkpoints" / "step-00000006"
    assert all(".lora_" in n or n.startswith("connector.") for n in load_file(folder / "weights.safetensors"))
    assert "llm.model.model.layers.0.mlp.up_proj.base_layer.weight" in json.loads(
        (folder / "manifest.json").read_text()
    ).get("frozen", [])


def test_export_merges_into_a_fresh_base(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(command(data, tmp_path, *ADAPTERS, "trainer.max_steps=2", "trainer.export=true"))
    said = capsys.readouterr().out
    assert "peft: 14 linear layers adapted: llm" in said and "peft: 14 linear layers in 4 bits: llm" in said
    assert "adapters are merged into a fresh copy of the base" in said and "what it computes equals the run's" in said
    cfg = load_config(RunFolder(run).config)
    built = build_assembly(cfg)
    load_run_weights(built.model, cfg.init_from, run)
    layer = built.model.get_submodule("llm.model.model.layers.0.mlp.up_proj")
    plain = build_assembly(compose_config(command(data, tmp_path))).model  # as the run's base began, without adapters
    base = plain.get_parameter("llm.model.model.layers.0.mlp.up_proj.weight")
    exported: dict[str, torch.Tensor] = {}
    for file in (run / "export").glob("*.safetensors"):
        exported |= load_file(file)
    (name,) = [name for name in exported if name.endswith("layers.0.mlp.up_proj.weight")]
    assert torch.equal(exported[name], base + layer.get_delta_weight("default"))
    assert not torch.equal(dequantize_weight(layer.base_layer), base)


def test_unquantized_keeps_what_was_learned() -> None:
    built = build_assembly(compose_config(["recipe=llava15_qlora", "size=tiny", "init_from=[]", "peft.rank=2"]))
    learn(built.model)
    fresh = unquantize_model(built).model
    assert not list(quantized_layers(fresh))
    for name, parameter in built.model.named_parameters():
        if name not in quantized_weights(built.model):
            assert torch.equal(parameter, fresh.get_parameter(name)), name


def test_lora_alone_needs_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    lora(model=model(), rank=2)
    with pytest.raises(Exception, match=r"pip install 'vlm-train\[qlora\]'"):
        adapted()
