"""Several encoders: their names have to agree, and every component among them has to be one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.small_run import make_data
from vlm_train.check.check import check_config
from vlm_train.config.compose import compose_config
from vlm_train.config.run_identity import training_hash
from vlm_train.errors import AssetError, ConfigError

RECIPE = """# @package _global_
defaults:
  - llava15_stage1
  - /vision@vision.clip: clip_vit_l14
  - /vision@vision.dino: siglip_so400m_384
  - /image@image.clip: crop
  - /image@image.dino: resize
  - override /vision: null
  - override /image: null
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "two.yaml").write_text(RECIPE)
    return tmp_path


def problems(folder: Path, *overrides: str, need_assets: bool = False) -> list[str]:
    cfg = compose_config(["recipe=two", "eval=none", *overrides], [folder])
    try:
        check_config(cfg, need_assets=need_assets)
    except ConfigError as error:
        return list(error.problems)
    return []


def test_two_encoders_of_two_files_are_composed(folder: Path) -> None:
    assert problems(folder) == []
    cfg = compose_config(["recipe=two", "size=tiny", "vision.dino.config.image_size=48"], [folder])
    sizes = {name: (one.config.image_size, one.config.num_hidden_layers) for name, one in cfg.vision.items()}
    assert sizes == {"clip": (32, 3), "dino": (48, 3)}


def test_every_image_plan_is_asked_what_it_decodes_with(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_train.check.parts.find_spec", lambda name: None)
    (said,) = problems(folder, "image.dino.decode=simplejpeg")
    assert said.startswith("image.dino.decode: got simplejpeg, which is not installed")
    plain, asked = (compose_config(["recipe=two", *more], [folder]) for more in ([], ["image.dino.decode=simplejpeg"]))
    assert training_hash(plain) == training_hash(asked), "it changes no pixel, so no run"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["~image.dino", "+image.dinov2=${image.clip}"],
            "image: has components called clip, dinov2. Allowed: clip, dino, as vision names its encoders, or one that "
            "serves all, image=<option>.",
        ),
        (
            ["+vision.dino2={config: {}}"],
            "vision.dino2 has no _target_: vision names several components, and this is none: {'config': {}}.",
        ),
        (
            ["+vision.items=${vision.clip}", "+image.items=${image.clip}"],
            "vision.items: a component cannot be called 'items'. Allowed: letters, digits and _.",
        ),
        (
            ["vision.dino.keep_clss=true"],
            "vision.dino.keep_clss: vlm_train.models.vision.hf.HFVision has no such option. Did you mean "
            "vision.dino.keep_cls?",
        ),
    ],
)
def test_wrong_names_give_one_error(folder: Path, overrides: list[str], expected: str) -> None:
    force = [f"+{one}" if "keep_clss" in one else one for one in overrides]
    found = problems(folder, *force)
    assert len(found) == 1 and found[0].startswith(expected)


def test_weights_of_every_encoder_are_looked_for(folder: Path, tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    more = [f"paths.data={data}", "size=tiny", "vision.clip.weights=/nowhere/clip", "vision.dino.weights=/nowhere/dino"]
    with pytest.raises(AssetError) as caught:
        check_config(compose_config(["recipe=two", "eval=none", *more], [folder]), need_assets=True)
    assert "vision.clip.weights: /nowhere/clip does not exist." in caught.value.problems
    assert "vision.dino.weights: /nowhere/dino does not exist." in caught.value.problems
