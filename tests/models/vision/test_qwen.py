"""QwenVision against the encoders of Qwen2-VL and Qwen2.5-VL in `transformers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from tests.support.tiny_models import MEAN, STD, assert_close
from vlm_train.config.folders import config_dir
from vlm_train.contracts.media import Features, Grid3, MediaInput
from vlm_train.errors import AssetError, ConfigError
from vlm_train.models.connectors.pixel_shuffle import PixelShuffleMLP
from vlm_train.models.llms.hf import HFCausalLM
from vlm_train.models.vision.qwen import QwenVision, arrange_patches, name_ours, name_theirs

PATCH = 4
GRIDS = (Grid3(1, 4, 6), Grid3(1, 2, 2), Grid3(3, 10, 4), Grid3(1, 6, 14))
"""Images of several sizes, and a video of three pairs of frames."""


def make_llm(name: str) -> HFCausalLM:
    node = OmegaConf.load(config_dir() / "llm" / f"{name}.yaml")
    return HFCausalLM(config=OmegaConf.to_container(node.config))  # type: ignore[arg-type]


def ours(kind: str, **options: Any) -> QwenVision:
    torch.manual_seed(0)
    newer = {"norm": "rms", "gated": True, "window": 4 * PATCH, "full_layers": [1]} if kind == "qwen2.5" else {}
    given: dict[str, Any] = {"image_mean": MEAN, "image_std": STD} | newer | options
    encoder = QwenVision(dim=32, depth=3, heads=2, mlp_dim=64, patch_size=PATCH, **given)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return encoder


def theirs(kind: str, encoder: QwenVision) -> Any:
    if kind == "qwen2.5":
        model: Any = Qwen2_5_VisionTransformerPretrainedModel(
            Qwen2_5_VLVisionConfig(
                depth=3, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=PATCH, window_size=4 * PATCH,
                fullatt_block_indexes=[1], out_hidden_size=8,
            )
        )  # fmt: skip
    else:
        model = Qwen2VisionTransformerPretrainedModel(
            Qwen2VLVisionConfig(depth=3, embed_dim=32, hidden_size=8, mlp_ratio=2, num_heads=2, patch_size=PATCH)
        )
    state = {name_theirs(key): value for key, value in encoder.state_dict().items()}
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].view(32, 3, 2, PATCH, PATCH)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(key.startswith("merger.") for key in missing)
    return model


def media(grids: tuple[Grid3, ...] = GRIDS) -> MediaInput:
    patches = sum(grid.size for grid in grids)
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(0, 256, (patches, 3 * 2 * PATCH**2), dtype=torch.uint8, generator=generator)
    return MediaInput(values, grids, (1,) * len(grids))


def in_blocks(values: torch.Tensor, grids: tuple[Grid3, ...]) -> torch.Tensor:
    """Rows of patches in the order of Qwen, squares of four one after the other."""
    parts = []
    for one, grid in zip(values.split([grid.size for grid in grids]), grids, strict=True):
        squares = one.unflatten(0, (grid.t, grid.h // 2, 2, grid.w // 2, 2)).transpose(2, 3)
        parts.append(squares.flatten(0, 4))
    return torch.cat(parts)


@pytest.mark.parametrize("kind", ["qwen2", "qwen2.5"])
def test_features_and_gradients_equal_transformers(kind: str) -> None:
    encoder = ours(kind)
    reference, shown = theirs(kind, encoder), media()
    features = encoder.encode(shown)
    pixels = (shown.values.unflatten(1, (3, -1)) / 255 - torch.tensor(MEAN)[:, None]) / torch.tensor(STD)[:, None]
    captured: list[torch.Tensor] = []
    reference.merger.register_forward_pre_hook(lambda _, args: captured.append(args[0]))
    reference(in_blocks(pixels.flatten(1), GRIDS), grid_thw=torch.tensor(GRIDS))
    (expected,) = captured
    got = in_blocks(features.values, GRIDS)
    if kind == "qwen2.5":  # window by window there
        from transformers.vision_utils import get_vision_window_index

        index, _ = get_vision_window_index(torch.tensor(GRIDS), 2, 4 * PATCH, PATCH)
        got = got.unflatten(0, (-1, 4))[index].flatten(0, 1)
    assert_close(got, expected, "features")
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(2))
    (got * weight).sum().backward()
    (expected * weight).sum().backward()
    for key, parameter in reference.named_parameters():
        if not key.startswith("merger."):
            mine = encoder.get_parameter(name_ours(key)).grad
            assert mine is not None and parameter.grad is not None, key
            if key.endswith("qkv.bias"):  # a key's bias shifts all scores of a query alike, up to its rotation
                assert_close(mine[:32], parameter.grad[:32], key, 3e-5)
                assert_close(mine[64:], parameter.grad[64:], key)
            else:
                assert_close(mine, parameter.grad.flatten(1) if parameter.ndim == 5 else parameter.grad, key, 2e-5)


@pytest.mark.parametrize("kind", ["qwen2", "qwen2.5"])
def test_views_together_are_those_alone(kind: str) -> None:
    encoder, shown = ours(kind), media()
    together = encoder.encode(shown).values.split([grid.size for grid in GRIDS])
    first = 0
    for grid, values in zip(GRIDS, together, strict=True):
        alone = encoder.encode(MediaInput(shown.values[first : first + grid.size], (grid,)))
        assert_close(values, alone.values)
        first += grid.size


@pytest.mark.parametrize("kind", ["qwen2", "qwen2.5"])
def test_it_is_traced_without_memory(kind: str) -> None:
    """A dry run counts its work so."""
    with torch.device("meta"):
        encoder, shown = ours(kind), MediaInput(torch.empty(media().values.shape, dtype=torch.uint8), GRIDS)
        features = encoder.encode(shown)
    assert features.values.is_meta and features.values.shape == (len(shown.values), 32)


def test_windows_keep_frames_together() -> None:
    order = arrange_patches((Grid3(2, 3, 5),), 2)
    assert order.frames == [15, 15] and order.windows == [4, 4, 2, 2, 2, 1] * 2
    assert order.permutation is not None and order.permutation[:6].tolist() == [0, 1, 5, 6, 2, 3]
    assert sorted(order.permutation.tolist()) == list(range(30)) and order.permutation[15:].min() == 15


def test_weights_are_read_from_a_whole_model(tmp_path: Path) -> None:
    encoder = ours("qwen2.5")
    state = {f"visual.{name_theirs(key)}": value.clone() for key, value in encoder.state_dict().items()}
    state["visual.patch_embed.proj.weight"] = state["visual.patch_embed.proj.weight"].view(32, 3, 2, PATCH, PATCH)
    save_file(
        state | {"visual.merger.mlp.0.weight": torch.ones(2), "lm_head.weight": torch.ones(3)},
        tmp_path / "model.safetensors",
    )
    other = ours("qwen2.5", weights=str(tmp_path))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_weights()
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), encoder.parameters(), strict=True))
    with pytest.raises(AssetError, match=r"vision\.weights: .* does not fit the encoder"):
        ours("qwen2", weights=str(tmp_path)).load_weights()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 6}, "vision.window"),
        ({"window": 8, "full_layers": [3]}, "vision.full_layers"),
        ({"heads": 3}, "vision.dim"),
    ],
)
def test_wrong_numbers_are_refused(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"dim": 32, "depth": 3, "heads": 2, "patch_size": PATCH} | options
    with pytest.raises(ConfigError, match=message):
        QwenVision(**given, image_mean=MEAN, image_std=STD)


def test_features_keep_their_grids() -> None:
    features = ours("qwen2").encode(media())
    assert isinstance(features, Features) and features.grids == GRIDS and features.lengths == [24, 4, 120, 84]


def test_counts_are_the_published_ones() -> None:
    """Qwen2-VL-2B and 7B, encoder and merger, and the whole (transformers 5.23 on the meta device)."""
    with torch.device("meta"):
        encoder = QwenVision(image_mean=MEAN, image_std=STD)
        mergers = {dim: PixelShuffleMLP(in_dim=1280, out_dim=dim, norm="patch", wide=True) for dim in (1536, 3584)}
        small, large = (make_llm(name) for name in ("qwen2_vl_2b", "qwen2_vl_7b"))

    def count(*parts: torch.nn.Module) -> int:
        return sum(parameter.numel() for part in parts for parameter in part.parameters())

    assert count(encoder, mergers[1536]) == 665_271_296
    assert count(encoder, mergers[3584]) == 675_759_104
    assert count(encoder, mergers[1536], small) == 2_208_985_600
    assert count(encoder, mergers[3584], large) == 8_291_375_616
