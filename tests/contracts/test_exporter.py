"""Exporters and importers: the first one without problems is taken, also one of a user's own package."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.contracts.exchange import FILE
from vlm_train import cli
from vlm_train.build import Assembly, build_assembly, build_exporters, build_importers
from vlm_train.config.compose import compose_config
from vlm_train.config.folders import config_dir
from vlm_train.contracts.exporter import Exporter, Importer
from vlm_train.errors import AssetError, ConfigError
from vlm_train.export.run import choose_exporter, write_export

OWN = ["allow_targets=[tests.]", "+exporter.plain._target_=tests.contracts.exchange.PlainExporter"]
OWN += ["+importer.plain._target_=tests.contracts.exchange.PlainImporter"]
SMALL = ["recipe=easyvqa_stage2", "size=tiny", "init_from=[]"]


def tiny(*more: str) -> Assembly:
    return build_assembly(compose_config([*SMALL, *more]))


def test_the_first_without_problems_is_taken() -> None:
    linear, mlp = tiny("connector=linear", *OWN), tiny(*OWN)
    exporters = build_exporters(mlp.cfg)
    assert list(exporters) == [
        "blip",
        "blip2",
        "hf_vlm",
        "internvl",
        "llava",
        "llava_next",
        "llava_onevision",
        "qwen_vl",
        "plain",
    ]
    assert choose_exporter(linear.model, exporters) == "plain" and choose_exporter(mlp.model, exporters) == "llava"
    everything = {"plain": exporters["plain"], **exporters}
    assert choose_exporter(mlp.model, everything) == "llava", "an earlier one has a problem"


def test_problems_of_all_are_listed_where_none_fits() -> None:
    linear = tiny("connector=linear")
    with pytest.raises(ConfigError) as caught:
        choose_exporter(linear.model, build_exporters(linear.cfg))
    assert caught.value.problems == [
        "exporter.blip: model: PrefixVLM has no BLIP equivalent; only Blip with BlipTextModel does",
        "exporter.blip2: connector: Linear; BLIP-2 has a Q-Former",
        "exporter.hf_vlm: model: PrefixVLM is no whole model of transformers",
        "exporter.internvl: connector: Linear; InternVL has only the pixel shuffle with its norm and two layers",
        "exporter.llava: connector: Linear; LLaVA has only the two-layer MLP (mlp2x_gelu)",
        "exporter.llava_next: parts.stitcher: null; tiles are joined by UnpadNewline (parts=unpad_newline)",
        "exporter.llava_onevision: parts.stitcher: null; tiles are joined by UnpadNewline (parts=unpad_newline)",
        "exporter.qwen_vl: llm: llama; Qwen-VL has qwen2_vl_text and qwen2_5_vl_text (llm=qwen25_vl_3b)",
    ]
    with pytest.raises(ConfigError, match="exporter is empty.*exporter=default"):
        choose_exporter(linear.model, {})


def test_a_format_of_ones_own_is_written_verified_and_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = tiny("connector=linear", *OWN)
    out = write_export(linear, tmp_path, build_exporters(linear.cfg))
    assert [path.name for path in out.iterdir()] == [FILE]
    said = f"Exported to {out} (plain); what it computes equals the run's; it has "
    assert f"{said}{len(linear.processor.tokenizer)} tokens." in capsys.readouterr().out

    more = [f"init_from=[{{run: {out}}}]", f"paths.runs={tmp_path}", "run_name=again", "connector=linear"]
    assert cli.main(["mode=import", *SMALL[:2], *OWN, *more]) == 0
    read = load_file(tmp_path / "again/checkpoints/step-00000000/weights.safetensors")
    assert all(torch.equal(read[name], one) for name, one in linear.model.named_parameters())

    modes = {path.stat().st_mode & 0o777 for path in out.iterdir()}
    assert modes == {out.stat().st_mode & 0o666}, "others who may read the folder may read its files"

    exporters = build_exporters(linear.cfg)
    with (
        monkeypatch.context() as patch,
        pytest.raises(AssetError, match="plain wrote a folder that computes no numbers"),
    ):
        patch.setattr(exporters["plain"], "verify", lambda *_: float("nan"), raising=False)
        write_export(linear, tmp_path, exporters)
    with torch.no_grad():
        linear.model.connector.proj.weight.add_(1.0)  # type: ignore[union-attr,operator]
    with pytest.raises(AssetError, match="holds other weights"):
        exporters["plain"].verify(linear.model, out)


def test_a_folder_that_nobody_reads_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert cli.main(["mode=import", *SMALL[:2], *OWN, f"init_from=[{{run: {tmp_path}}}]"]) == 2
    said = capsys.readouterr().err
    assert f"importer.llava: {tmp_path}/config.json: model_type is 'gpt2'; allowed: llava" in said
    assert f"importer.plain: {tmp_path} has no {FILE}" in said


def test_options_are_what_they_are_called() -> None:
    for path in (config_dir() / "exporter").glob("*.yaml"):
        assert all(
            isinstance(one, Exporter) for one in build_exporters(compose_config([f"exporter={path.stem}"])).values()
        )
    for path in (config_dir() / "importer").glob("*.yaml"):
        assert all(
            isinstance(one, Importer) for one in build_importers(compose_config([f"importer={path.stem}"])).values()
        )
    wrong = compose_config(["+exporter.mine._target_=tests.contracts.exchange.PlainImporter", "allow_targets=[tests.]"])
    with pytest.raises(ConfigError, match=r"exporter\.mine: PlainImporter is no Exporter: no write, verify\."):
        build_exporters(wrong)
