"""HFVision against the towers of `transformers`, and what it refuses."""

from __future__ import annotations

import pickle

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from tests.support.tiny_models import MEAN, STD, assert_close, clip_config, siglip_config, tiny_vision
from vlm_train.contracts.layout import MediaSize
from vlm_train.contracts.media import MediaInput
from vlm_train.errors import AssetError, ConfigError

DINO = {
    "model_type": "dinov2",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 16,
}
TOWERS = {"clip": clip_config(), "siglip": siglip_config(), "dinov2": DINO}


def pixels(count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def normalized(images: torch.Tensor) -> torch.Tensor:
    return (images.float() / 255 - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("layer", [0, 1, -2, -1])
@pytest.mark.parametrize("keep_cls", [False, True])
def test_features_are_the_reference_hidden_states(tower, layer, keep_cls):
    torch.manual_seed(0)
    vision = tiny_vision(TOWERS[tower], layer=layer, keep_cls=keep_cls).eval()
    reference = vision.model(normalized(pixels()), output_hidden_states=True).hidden_states[layer]
    dropped = 0 if keep_cls or tower == "siglip" else 1
    features = vision.encode(MediaInput(pixels())).rectangular()
    assert_close(features, reference[:, dropped:])
    _, rows, columns = vision.patch_grid(MediaSize(32, 32))
    assert features.shape == (2, rows * columns, vision.out_dim)


def test_several_layers_are_concatenated_in_the_order_given():
    vision = tiny_vision(layer=[-1, 1])
    states = vision.model(normalized(pixels()), output_hidden_states=True).hidden_states
    assert_close(
        vision.encode(MediaInput(pixels())).rectangular(), torch.cat([states[-1][:, 1:], states[1][:, 1:]], dim=-1)
    )
    assert vision.out_dim == 64


def test_final_norm_gives_the_towers_own_embedding():
    vision = tiny_vision(layer=-1, keep_cls=True, final_norm=True)
    assert_close(
        vision.encode(MediaInput(pixels())).rectangular()[:, 0], vision.model(normalized(pixels())).pooler_output
    )
    with pytest.raises(ConfigError, match="vision.final_norm"):
        tiny_vision(layer=-2, final_norm=True)


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("layer", [0, -2, -1, [0, 2]])
def test_unused_parameters_are_exactly_those_without_gradient(tower, layer):
    vision = tiny_vision(TOWERS[tower], layer=layer)
    vision.encode(MediaInput(pixels())).values.sum().backward()
    without = {name for name, parameter in vision.named_parameters() if parameter.grad is None}
    unused = set(vision.unused_parameters())
    assert unused == without | {name for name in unused if name.endswith("mask_token")}


def test_later_layers_are_not_run():
    vision = tiny_vision(layer=-2)
    vision.layers[2].forward = None  # calling it would fail
    vision.encode(MediaInput(pixels()))


def test_meta_construction_and_small_layout():
    with torch.device("meta"):
        vision = tiny_vision()
    assert vision.encode(MediaInput(pixels().to("meta"))).rectangular().shape == (2, 4, 32)
    assert len(pickle.dumps(vision.patch_grid)) < 300


def test_statistics_are_not_saved():
    assert not {"mean", "std"} & set(tiny_vision().state_dict())


@pytest.mark.parametrize("layer", [4, -5, []])
def test_layer_that_does_not_exist_is_refused(layer):
    with pytest.raises(ConfigError, match="vision.layer"):
        tiny_vision(layer=layer)


def test_unknown_keys_are_refused_together_with_a_suggestion():
    with pytest.raises(ConfigError) as caught:
        tiny_vision(clip_config(hiden_size=3, foo=1))
    assert len(caught.value.problems) == 2
    assert "did you mean 'hidden_size'" in str(caught.value)
    with pytest.raises(ConfigError, match="did you mean 'clip_vision_model'"):
        tiny_vision(clip_config(model_type="clip_vison_model"))


@pytest.mark.parametrize("config", [clip_config(), siglip_config()])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_weights_of_a_tower_folder(tmp_path, config, device):
    saved = tiny_vision(config)
    saved.model.save_pretrained(tmp_path)
    with torch.device(device):
        vision = tiny_vision(config, weights=str(tmp_path))
    vision.load_weights()
    assert torch.equal(vision.encode(MediaInput(pixels())).values, saved.encode(MediaInput(pixels())).values)


def test_weights_of_a_whole_clip_checkpoint(tmp_path):
    numbers = {key: value for key, value in clip_config().items() if key != "model_type"}
    text = CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
    )
    whole = CLIPModel(CLIPConfig(vision_config=CLIPVisionConfig(**numbers).to_dict(), text_config=text.to_dict()))
    whole.save_pretrained(tmp_path)
    vision = tiny_vision(weights=str(tmp_path), layer=-1)
    vision.load_weights()
    expected = whole.vision_model(normalized(pixels())).last_hidden_state[:, 1:]
    assert_close(vision.encode(MediaInput(pixels())).rectangular(), expected)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    saved = tiny_vision()
    saved.model.save_pretrained(tmp_path / "good")
    state = {key: value for key, value in saved.model.state_dict().items() if "layers.1.mlp.fc1" not in key}
    saved.model.save_pretrained(tmp_path / "missing", state_dict=state)
    with pytest.raises(AssetError, match=r"missing 2 \(.*layers\.1\.mlp\.fc1"):
        tiny_vision(weights=str(tmp_path / "missing")).load_weights()
    more = saved.model.state_dict() | {"encoder.layers.9.mlp.fc1.weight": torch.zeros(2)}
    saved.model.save_pretrained(tmp_path / "more", state_dict=more)
    with pytest.raises(AssetError, match=r"missing none, unexpected 1 \(.*layers\.9\.mlp\.fc1"):
        tiny_vision(weights=str(tmp_path / "more")).load_weights()
    with pytest.raises(AssetError, match="num_attention_heads = 4, the config says 2"):
        tiny_vision(clip_config(num_attention_heads=2), weights=str(tmp_path / "good")).load_weights()
    with pytest.raises(AssetError, match="vision.weights"):
        tiny_vision(weights=str(tmp_path / "nowhere")).load_weights()


def test_a_layer_may_be_a_share_of_the_depth():
    vision = tiny_vision(layer=[0.3333, 0.6667, -1])
    assert vision.layer == [1, 2, -1] and vision.chosen == (1, 2, 3)
    with pytest.raises(ConfigError, match=r"vision\.layer: 1\.5 does not exist"):
        tiny_vision(layer=1.5)
