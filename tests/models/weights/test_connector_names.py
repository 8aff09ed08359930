"""A connector is read out of the checkpoint of a whole model, under the names of every release that is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vlm_train.errors import AssetError
from vlm_train.models.connectors.mlp import MLP
from vlm_train.models.connectors.pixel_shuffle import PixelShuffleMLP
from vlm_train.models.connectors.pool import PooledMLP

LINEAR = {"layers.0": "multi_modal_projector.linear_1", "layers.2": "multi_modal_projector.linear_2"}
INTERNVL = {"norm": "multi_modal_projector.layer_norm", **LINEAR}
QWEN = {"patch_norm": "visual.merger.ln_q", "layers.0": "visual.merger.mlp.0", "layers.2": "visual.merger.mlp.2"}
RELEASES: dict[str, tuple[type[nn.Module], dict[str, Any], dict[str, str]]] = {
    "llava": (MLP, {}, LINEAR),
    "llava_newer": (MLP, {}, {name: f"model.{theirs}" for name, theirs in LINEAR.items()}),
    "perceptionlm": (
        PooledMLP,
        {"project_first": True},
        {name: f"model.{theirs}" for name, theirs in LINEAR.items()},
    ),
    "llava_own": (MLP, {}, {"layers.0": "model.mm_projector.0", "layers.2": "model.mm_projector.2"}),
    "internvl": (PixelShuffleMLP, {}, {name: f"model.{theirs}" for name, theirs in INTERNVL.items()}),
    "internvl_own": (PixelShuffleMLP, {}, {"norm": "mlp1.0", "layers.0": "mlp1.1", "layers.2": "mlp1.3"}),
    "qwen2_vl": (PixelShuffleMLP, {"norm": "patch", "wide": True}, QWEN),
    "qwen25_vl": (
        PixelShuffleMLP,
        {"norm": "patch_rms", "wide": True},
        {name: f"model.{theirs}" for name, theirs in QWEN.items()},
    ),
    "onevision15": (
        PixelShuffleMLP,
        {"norm": "patch", "wide": True, "eps": 1e-5},
        {name: f"model.{theirs}" for name, theirs in QWEN.items()},
    ),
}


def release(folder: Path, kind: str) -> nn.Module:
    """Write a checkpoint of a release with other tensors beside; returns the connector in it."""
    target, options, names = RELEASES[kind]
    torch.manual_seed(1)
    one = target(in_dim=8, out_dim=6, **options)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.normal_()
    state = {
        f"{names[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": value for name, value in one.state_dict().items()
    }
    save_file(state | {"model.embed_tokens.weight": torch.ones(3, 2)}, folder / "model.safetensors")
    return one


def ours(kind: str, folder: Path, **options: Any) -> Any:
    target, given, _ = RELEASES[kind]
    torch.manual_seed(2)
    return target(**{"in_dim": 8, "out_dim": 6, "weights": str(folder)} | given | options)


@pytest.mark.parametrize("kind", sorted(RELEASES))
def test_every_release(kind: str, tmp_path: Path) -> None:
    there, here = release(tmp_path, kind), ours(kind, tmp_path)
    assert any(not torch.equal(a, b) for a, b in zip(there.parameters(), here.parameters(), strict=True))
    here.load_weights()
    for name, value in there.state_dict().items():
        assert torch.equal(here.state_dict()[name], value), name


def test_another_width_is_refused_with_both_shapes(tmp_path: Path) -> None:
    release(tmp_path, "internvl")
    with pytest.raises(
        AssetError, match=r"connector\.weights: .*linear_1\.weight is \[6, 32\], the connector's layers\.0"
    ):
        ours("internvl", tmp_path, out_dim=5).load_weights()


@pytest.mark.parametrize(
    ("kind", "options"), [("llava", {"depth": 3}), ("internvl", {"norm": None}), ("qwen25_vl", {"norm": "patch"})]
)
def test_other_modules_are_refused(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    release(tmp_path, kind)
    with pytest.raises(AssetError, match="holds no .* of these modules; looked for .*multi_modal_projector"):
        ours(kind, tmp_path, **options).load_weights()


def test_a_bias_that_nothing_takes_is_refused(tmp_path: Path) -> None:
    release(tmp_path, "internvl")
    with pytest.raises(AssetError, match=r"unexpected model\.multi_modal_projector\.linear_1\.bias"):
        ours("internvl", tmp_path, bias=False).load_weights()


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"connector\.weights: .*no safetensors could be read"):
        ours("llava", tmp_path).load_weights()
