"""What a run would lack is listed by its dry run, which needs none of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.small_run import make_data
from vlm_train.config.compose import compose_config
from vlm_train.dryrun.report import dry_run, without_assets


def notes(*overrides: str) -> str:
    fixed = ["recipe=llava15_stage2", "size=tiny", "init_from=[]", "dry_run=true"]
    return "\n".join(without_assets(compose_config([*fixed, *overrides]))[1])


def test_missing_shards_weights_and_runs_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: pytest.fail("a dry run asks no hub"))
    data = f"paths.data={make_data(tmp_path)}"
    assert notes(data) == ""
    lost = sorted((tmp_path / "tiny" / "train").glob("*.tar"))[1]
    lost.unlink()
    assert f"{tmp_path}/tiny/train lacks {lost.name}, which its manifest.json names" in notes(data)
    said = notes("data.train=[{shards: /nowhere}]", data, "vision.weights=/nowhere/clip", "llm.weights=some/model")
    assert "data.train.0.shards: /nowhere does not exist" in said
    assert "vision.weights: /nowhere/clip does not exist" in said and "some/model" not in said
    assert "init_from.0.run: /nowhere/run does not exist" in notes(data, "init_from=[{run: /nowhere/run}]")


def test_an_image_that_leaves_no_room_for_text_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    def said(*overrides: str) -> str:
        dry_run(compose_config(["recipe=small_text_native", "dry_run=true", *overrides]))
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Tokens"))

    advice = "data.max_length, or target.image_width and target.image_height"
    assert "16 visual tokens an image of 128 x 128 pixels; 256 tokens a row, 240 of them text" in said()
    assert said("data.max_length=16").endswith(f"16 tokens a row: too few for such an image ({advice})")
