"""SigLIP 2 NaFlex: pixels, features and gradients of `transformers`, without its padding; weights in its layout."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import Siglip2VisionConfig, Siglip2VisionModel
from transformers.models.siglip2.image_processing_pil_siglip2 import (
    Siglip2ImageProcessorPil,
    get_image_size_for_max_num_patches,
)

from tests.models.test_counts import build, count
from tests.support.parity import encode, noise
from tests.support.tiny_models import assert_close
from vlm_train.build import build_assembly
from vlm_train.config.compose import compose_tiny
from vlm_train.contracts.layout import MediaSize
from vlm_train.contracts.media import Grid3, MediaInput
from vlm_train.data.images.naflex import NaflexResolution
from vlm_train.data.images.native import NativeResolution
from vlm_train.data.media_layout import make_layout
from vlm_train.errors import AssetError, ConfigError
from vlm_train.models.connectors.mlp import MLP
from vlm_train.models.connectors.pixel_shuffle import PixelShuffleMLP
from vlm_train.models.families.prefix_vlm import PrefixVLM
from vlm_train.models.vision.naflex import NaflexVision, name_theirs
from vlm_train.models.vision.qwen import count_patches

PATCH, DIM = 4, 32
GRIDS = (Grid3(1, 4, 6), Grid3(1, 2, 7), Grid3(1, 4, 4), Grid3(1, 1, 12), Grid3(1, 4, 6), Grid3(1, 9, 3))
HALF = [0.5, 0.5, 0.5]


def ours(**options: Any) -> NaflexVision:
    torch.manual_seed(0)
    given: dict[str, Any] = {"dim": DIM, "depth": 3, "heads": 2, "mlp_dim": 64, "patch_size": PATCH, "num_patches": 16}
    encoder = NaflexVision(**given | options, image_mean=HALF, image_std=HALF)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return encoder


def theirs(encoder: NaflexVision) -> Any:
    """The library's model with the same weights: every one has a place, and every place one."""
    config = Siglip2VisionConfig(
        hidden_size=DIM, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, patch_size=PATCH,
        num_patches=16, vision_use_head=False,
    )  # fmt: skip
    model: Any = Siglip2VisionModel(config)
    inner = getattr(model, "vision_model", model)  # some releases nest it once
    inner.load_state_dict({name_theirs(name): value for name, value in encoder.state_dict().items()})
    return model


def media(grids: tuple[Grid3, ...] = GRIDS) -> MediaInput:
    generator = torch.Generator().manual_seed(1)
    shape = (sum(grid.size for grid in grids), 3 * PATCH**2)
    return MediaInput(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator), grids, (1,) * len(grids))


def run_theirs(model: Any, shown: MediaInput) -> torch.Tensor:
    """The library's features of flat patches, which it pads to rows of one length."""
    most, sizes = max(grid.size for grid in shown.grids), [grid.size for grid in shown.grids]
    pixels = (shown.values.unflatten(1, (3, -1)).transpose(1, 2).flatten(1) / 255 - 0.5) / 0.5
    rows = torch.stack([torch.nn.functional.pad(one, (0, 0, 0, most - len(one))) for one in pixels.split(sizes)])
    mask = torch.arange(most)[None] < torch.tensor(sizes)[:, None]
    shapes = torch.tensor([[grid.h, grid.w] for grid in shown.grids])
    found = model(pixel_values=rows, pixel_attention_mask=mask.int(), spatial_shapes=shapes)
    return found.last_hidden_state[mask]


def test_features_and_gradients_equal_transformers() -> None:
    encoder, shown = ours(), media()
    model = theirs(encoder)
    got, expected = encoder.encode(shown).values, run_theirs(model, shown)
    assert_close(got, expected, "features")
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(2))
    (got * weight).sum().backward()
    (expected * weight).sum().backward()
    wanted = {name.removeprefix("vision_model."): one.grad for name, one in model.named_parameters()}
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None
        if name.endswith("k_proj.bias"):  # zero in exact arithmetic
            assert parameter.grad.abs().max() < 1e-4 * wanted[name_theirs(name).replace("k_", "q_")].abs().max()
        else:
            assert_close(parameter.grad, wanted[name_theirs(name)], name)


def test_views_together_are_those_alone() -> None:
    encoder, shown, first = ours(), media((*GRIDS[:2], Grid3(2, 3, 5))), 0
    together = encoder.encode(shown)
    assert together.grids == shown.grids
    for grid in shown.grids:
        for _ in range(grid.t):  # a frame sees no other one
            values = shown.values[first : first + grid.h * grid.w]
            alone = encoder.encode(MediaInput(values, (Grid3(1, grid.h, grid.w),))).values
            assert_close(together.values[first : first + len(values)], alone)
            first += len(values)


@pytest.mark.parametrize("prefix", ["", "vision_model.", "model.vision_tower.vision_model."])
def test_weights_are_read_from_a_checkpoint(prefix: str, tmp_path: Path) -> None:
    encoder = ours()
    state = {prefix + name_theirs(name): value.clone() for name, value in encoder.state_dict().items()}
    beside = {f"{prefix}head.probe": torch.ones(2), "text_model.encoder.layers.0.mlp.fc1.bias": torch.ones(3)}
    save_file(state | beside, tmp_path / "model.safetensors")
    other = ours(weights=str(tmp_path))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_weights()
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), encoder.parameters(), strict=True))
    with pytest.raises(AssetError, match=r"vision\.weights: .* does not fit the encoder"):
        ours(depth=2, weights=str(tmp_path)).load_weights()


def plan(most: int = 256, patch: int = 16, **options: Any) -> NaflexResolution:
    grid = partial(count_patches, patch_size=patch, frames_per_patch=1)
    return NaflexResolution(patch_size=patch, patch_grid=grid, max_num_patches=most, **options)


@pytest.mark.parametrize("size", [(640, 480), (17, 33), (100, 12), (333, 777), (64, 64)])
def test_pixels_are_those_of_the_processor(size: tuple[int, int]) -> None:
    pixels = noise(*size)
    (views,) = (plan(64)(encode(pixels)),)
    processor = Siglip2ImageProcessorPil(max_num_patches=64, do_rescale=False, do_normalize=False)
    expected = processor(pixels, return_tensors="np")
    (grid,) = views.grids
    assert (grid.h, grid.w) == tuple(expected["spatial_shapes"][0])
    patches = expected["pixel_values"][0][: grid.size].reshape(grid.size, 256, 3).swapaxes(1, 2).reshape(grid.size, -1)
    assert np.array_equal(views.values, patches)


def test_sizes_are_those_of_the_processor() -> None:
    generator = np.random.default_rng(0)
    for width, height in generator.integers(1, 3000, (60, 2)).tolist():
        for patch, most in ((16, 256), (14, 1024)):
            found = plan(most, patch).view_size(MediaSize(width, height))
            assert (found.height, found.width) == get_image_size_for_max_num_patches(height, width, patch, most)


def test_connectors_whose_grids_do_not_fit_are_refused() -> None:
    def lay_out(connector: Any, **options: Any) -> Any:
        model = PrefixVLM(vision=ours(), connector=connector, llm=torch.nn.Linear(1, 1))
        return make_layout(model, {"vision": plan(**options)})

    assert lay_out(MLP(in_dim=DIM, out_dim=8))([MediaSize(640, 480)])[0][0].count == 14 * 18
    shuffle = PixelShuffleMLP(in_dim=DIM, out_dim=8)
    with pytest.raises(ConfigError, match=r"PixelShuffleMLP does not take every view of NaflexResolution.*mlp2x_gelu"):
        lay_out(shuffle)
    assert lay_out(shuffle, merge=2)([MediaSize(640, 480)])[0][0].count == 7 * 9
    with pytest.raises(ConfigError, match=r"image\.max_num_patches: got 3; allowed: at least 2 x 2"):
        plan(3, merge=2)


@pytest.mark.parametrize(("merge", "factor"), [(1, 2), (2, 4), (3, 2)])
def test_native_plans_and_connectors_have_to_fit(merge: int, factor: int) -> None:
    """Before a picture of an odd size comes."""
    native = NativeResolution(
        patch_size=16, patch_grid=ours().patch_grid, merge=merge, min_pixels=64**2, max_pixels=512**2
    )
    model = PrefixVLM(
        vision=ours(), connector=PixelShuffleMLP(in_dim=DIM, out_dim=8, factor=factor), llm=torch.nn.Linear(1, 1)
    )
    with pytest.raises(ConfigError, match=rf"connector.factor: {factor} does not divide.* larger image.merge"):
        make_layout(model, {"vision": native})


def test_a_family_with_a_layout_of_its_own_is_checked_too() -> None:
    with pytest.raises(ConfigError, match="AttentionPool does not take every view of NaflexResolution"):
        overrides = ["vision=siglip2_so400m_naflex", "image=naflex"]
        build_assembly(compose_tiny("recipe=molmo2_4b_pretrain", *overrides), meta=True)


@pytest.mark.parametrize(("options", "message"), [({"heads": 3}, "the 3 heads"), ({"num_patches": 15}, "a square")])
def test_wrong_sizes_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ours(**options)


def test_counts() -> None:
    """27 layers, embedding, positions, last norm: as the library has them."""
    layers = 27 * (4 * (1152**2 + 1152) + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152)
    found = build("vision", "siglip2_so400m_naflex")
    assert count(found) == layers + 768 * 1152 + 1152 + 256 * 1152 + 2 * 1152
    with torch.device("meta"):
        config = Siglip2VisionConfig(
            hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
            vision_use_head=False,
        )  # fmt: skip
        assert count(Siglip2VisionModel(config)) == count(found)
    shown = MediaInput(torch.empty(6, 768, dtype=torch.uint8, device="meta"), (Grid3(1, 2, 3),))
    features = found.encode(shown)
    assert features.values.is_meta and features.values.shape == (6, 1152)
