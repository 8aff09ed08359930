"""A part is read out of the checkpoint of a whole model, under the names of older and newer releases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.hub_folders import change_config, make_llm, qwen2_config, siglip_config
from vlm_train.config.architecture import read_architecture
from vlm_train.errors import AssetError
from vlm_train.models.llms.hf import HFCausalLM
from vlm_train.models.vision.hf import HFVision

MEAN = STD = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, object]:
    """A LLaVA that `transformers` saved, and the model itself."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    text = qwen2_config(tie_word_embeddings=request.param).to_dict()
    numbers = {"text_config": text, "vision_config": siglip_config().to_dict(), "image_token_index": 2}
    model = LlavaForConditionalGeneration(LlavaConfig(**numbers, tie_word_embeddings=request.param))
    folder = tmp_path_factory.mktemp("whole")
    model.save_pretrained(folder)
    return folder, model


def read_parts(folder: Path) -> tuple[HFVision, HFCausalLM]:
    tower = HFVision(
        config=read_architecture(str(folder), "vision", "vision.weights"),
        weights=str(folder),
        image_mean=MEAN,
        image_std=STD,
    )
    llm = HFCausalLM(config=read_architecture(str(folder), "text", "llm.weights"), weights=str(folder), new_tokens=2)
    tower.load_weights()
    llm.load_weights()
    return tower, llm


def assert_same(tower: HFVision, llm: HFCausalLM, model) -> None:
    for name, tensor in model.model.vision_tower.state_dict().items():
        assert torch.equal(tower.model.state_dict()[name], tensor), name
    table = model.get_input_embeddings().weight
    assert torch.equal(llm.model.get_input_embeddings().weight, table)
    assert torch.equal(llm.model.get_output_embeddings().weight, model.lm_head.weight)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        theirs = model.eval()(input_ids=ids + 3).logits[0]
        positions = torch.arange(6)[None, None]
        ours = llm.eval().head(llm.decode(llm.embed(ids + 3), positions, None))[0, :, : theirs.shape[-1]]
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_parts_of_a_whole_model(whole: tuple[Path, object]) -> None:
    folder, model = whole
    assert_same(*read_parts(folder), model)


def test_the_names_of_another_release(whole: tuple[Path, object], tmp_path: Path) -> None:
    folder, model = whole
    names = load_file(folder / "model.safetensors")
    pairs = [("model.language_model.", "language_model.model."), ("model.vision_tower.", "vision_tower.")]
    pairs += [("lm_head.", "language_model.lm_head.")]
    newer = any(name.startswith("model.language_model.") for name in names)

    def rename(name: str) -> str:
        for one, other in pairs:
            if name.startswith(before := one if newer else other):
                return (other if newer else one) + name.removeprefix(before)
        return name

    renamed = {rename(name): tensor for name, tensor in names.items()}
    assert renamed.keys() != names.keys()
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert_same(*read_parts(tmp_path), model)


def test_a_whole_model_of_other_numbers_is_refused(whole: tuple[Path, object]) -> None:
    folder, _ = whole
    numbers = read_architecture(str(folder), "text", "llm.weights")
    numbers |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    llm = HFCausalLM(config=numbers, weights=str(folder))
    with pytest.raises(AssetError, match="rope_parameters = .*12345.0.*the config says .*10000.0"):
        llm.load_weights()


def test_a_language_model_alone_is_read_as_before(tmp_path: Path) -> None:
    make_llm(tmp_path, qwen2_config(tie_word_embeddings=False), tokenizer=False)
    numbers = read_architecture(str(tmp_path), "text", "llm.weights")
    llm = HFCausalLM(config=numbers, weights=str(tmp_path), new_tokens=1)
    llm.load_weights()
    assert llm.vocab_size == numbers["vocab_size"] + 1
    change_config(tmp_path, hidden_size=48)
    with pytest.raises(AssetError, match="has hidden_size = 48, the config says 40"):
        llm.load_weights()
