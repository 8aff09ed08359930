"""Text towers of CLIP and SigLIP: with the image towers, the embeddings and logits of `transformers`."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
)

from tests.support.tiny_models import assert_close, batch_of, clip_config, siglip_config, text_stream, tiny_vision
from vlm_train.errors import AssetError, ConfigError
from vlm_train.models.families.two_tower import TwoTower
from vlm_train.models.llms.text_tower import HFTextTower

LENGTH, EOS = 7, 90
ROWS = [[5, 6, 7, EOS], [9, EOS, 11, EOS], [12, 13, 14, 15, 16, 17, EOS]]


def text_config(model_type: str = "clip_text_model", **changes) -> dict:
    numbers = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    numbers |= {"vocab_size": 97, "max_position_embeddings": LENGTH, "eos_token_id": EOS}
    return {"model_type": model_type, **numbers, **changes}


def spread_out(module: torch.nn.Module) -> None:
    """Weights large enough for every token to matter."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim:
                parameter.normal_(std=0.3)


def without_type(config: dict) -> dict:
    return {key: value for key, value in config.items() if key != "model_type"}


def clip() -> tuple[TwoTower, CLIPModel]:
    """A random model of ours, and the library's with the same weights."""
    vision = tiny_vision(layer=-1, keep_cls=True, final_norm=True)
    model = TwoTower(vision=vision, llm=HFTextTower(config=text_config()), embed_dim=12)
    config = CLIPConfig(
        vision_config=CLIPVisionConfig(**without_type(clip_config())).to_dict(),
        text_config=CLIPTextConfig(**without_type(text_config())).to_dict(),
        projection_dim=12,
    )
    reference = CLIPModel(config).eval()
    spread_out(model)
    reference.vision_model.load_state_dict(model.vision.model.state_dict())
    reference.text_model.load_state_dict(model.llm.model.state_dict())
    reference.visual_projection.load_state_dict(model.image_projection.state_dict())
    reference.text_projection.load_state_dict(model.text_projection.state_dict())
    reference.logit_scale.data.fill_(model.logit_scale.item())
    return model.eval(), reference


def siglip() -> tuple[TwoTower, SiglipModel]:
    text = text_config("siglip_text_model", projection_size=32)
    vision = tiny_vision(siglip_config(), layer=-1, keep_cls=True, final_norm=True)
    options = {"embed_dim": None, "pooling": "head", "init_temperature": 0.1, "init_bias": -10.0, "max_scale": None}
    model = TwoTower(vision=vision, llm=HFTextTower(config=text), **options)
    config = SiglipConfig(
        vision_config=SiglipVisionConfig(**without_type(siglip_config())).to_dict(),
        text_config=SiglipTextConfig(**without_type(text)).to_dict(),
    )
    reference = SiglipModel(config).eval()
    spread_out(model)
    reference.vision_model.load_state_dict(model.vision.model.state_dict())
    reference.text_model.load_state_dict(model.llm.model.state_dict())
    reference.logit_scale.data.fill_(model.logit_scale.item())
    reference.logit_bias.data.fill_(-10.0)
    return model.eval(), reference


def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
    return torch.tensor([row + [fill] * (LENGTH - len(row)) for row in rows])


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("rows", [ROWS, ROWS[:2]])  # the longest takes all positions
@pytest.mark.parametrize("kind", [clip, siglip])
@torch.no_grad()
def test_embeddings_and_logits_are_those_of_transformers(kind, rows, left):
    model, reference = kind()
    stream = text_stream(rows, left=left)
    batch = batch_of(stream, list(range(len(rows))))
    normalized = (batch.media.inputs["vision"].values / 255 - model.vision.mean) / model.vision.std
    expected = reference(input_ids=padded(rows, 1), pixel_values=normalized)
    image, text = model.encode_image(batch.media), model.encode_text(stream)
    assert_close(image, expected.image_embeds, "image embeddings")
    assert_close(text, expected.text_embeds, "text embeddings")
    logits = model.logit_scale.exp() * image @ text.T + (0 if model.logit_bias is None else model.logit_bias)
    assert_close(logits, expected.logits_per_image, "logits")


@pytest.mark.parametrize("model_type", ["clip_text_model", "siglip_text_model"])
@torch.no_grad()
def test_long_captions_keep_their_end(model_type):
    """As the published tokenizers cut: the first L - 1 tokens and the end of the text."""
    tower = HFTextTower(config=text_config(model_type))
    row = [5, 6, 7, 8, 9, 10, 11, 12, 13, EOS]
    assert_close(tower.pooled(text_stream([row, [5]])), tower.pooled(text_stream([[*row[: LENGTH - 1], EOS], [5]])))


@torch.no_grad()
def test_a_row_without_end_is_read_at_its_last_token():
    tower = HFTextTower(config=text_config())
    spread_out(tower)
    cut, whole = tower.pooled(text_stream([[5, 6, 7], [8]])), tower.pooled(text_stream([[5, 6, 7, EOS], [8, EOS]]))
    hidden = tower.model(input_ids=torch.tensor([[5, 6, 7]])).last_hidden_state
    assert_close(cut[0], hidden[0, 2])
    assert (cut - whole).abs().max() > 0.1


@pytest.mark.parametrize("kind", [clip, siglip])
def test_weights_of_a_whole_checkpoint(kind, tmp_path):
    model, reference = kind()
    reference.save_pretrained(tmp_path)
    tower = HFTextTower(config=model.llm.numbers, weights=str(tmp_path))
    tower.load_weights()
    stream = text_stream(ROWS)
    assert_close(tower.pooled(stream), model.llm.pooled(stream))
    with pytest.raises(AssetError, match="llm.weights.*num_attention_heads = 4, the config says 2"):
        HFTextTower(config=model.llm.numbers | {"num_attention_heads": 2}, weights=str(tmp_path)).load_weights()


def test_wrong_settings_are_refused():
    with pytest.raises(ConfigError, match="'llama'; allowed: clip_text_model, siglip_text_model"):
        HFTextTower(config={"model_type": "llama", "vocab_size": 9})
    with pytest.raises(ConfigError, match="the tokenizer has 3 tokens more"):
        HFTextTower(config=text_config(), new_tokens=3)
    vision = tiny_vision(siglip_config(), layer=-1, final_norm=True)
    with pytest.raises(ConfigError, match=r"null needs towers of one width, got 32 \(vision\) and 24 \(llm\)"):
        TwoTower(
            vision=vision, llm=HFTextTower(config=text_config("siglip_text_model")), embed_dim=None, pooling="head"
        )
    with pytest.raises(ConfigError, match="final_norm=true"):
        TwoTower(vision=tiny_vision(siglip_config()), llm=HFTextTower(config=text_config()), pooling="head")
    with pytest.raises(ConfigError, match="no head; allowed: cls, mean"):
        TwoTower(vision=tiny_vision(), llm=HFTextTower(config=text_config()), pooling="head")


@pytest.mark.parametrize("kind", [clip, siglip])
def test_unused_parameters_are_exactly_those_without_gradient(kind):
    model, _ = kind()
    batch = batch_of(text_stream(ROWS), [0, 1, 2])
    logits = model.logit_scale.exp() * model.encode_image(batch.media) @ model.encode_text(batch.text["llm"]).T
    (logits.diagonal().sum() + (0 if model.logit_bias is None else model.logit_bias)).backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert set(model.unused_parameters()) == without
