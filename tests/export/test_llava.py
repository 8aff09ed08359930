"""Export to LLaVA and back: same logits, a processor that agrees, refusals that say why."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoProcessor, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from tests.support.tiny_models import (
    IMAGE,
    assert_close,
    batch_of,
    llama_config,
    siglip_config,
    text_stream,
    tiny_llm,
    tiny_vision,
    tiny_vlm,
)
from vlm_train.contracts.layout import PLACEHOLDER_ID
from vlm_train.errors import AssetError
from vlm_train.export.llava import find_problems, verify_llava, write_llava
from vlm_train.export.llava_import import import_llava
from vlm_train.models.adapters.lora import lora
from vlm_train.models.adapters.quantize import quantize_layers
from vlm_train.models.connectors.mlp import MLP
from vlm_train.models.connectors.pool import PooledMLP
from vlm_train.models.families.prefix_vlm import PrefixVLM


def tokenizer_of(size: int) -> PreTrainedTokenizerFast:
    words = {"</s>": 0, "<unk>": 1} | {f"w{i}": i for i in range(2, size)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>", pad_token="</s>")


def export_llava(model, tokenizer, folder, **options) -> None:
    """Write and verify."""
    write_llava(model, tokenizer, folder, **options)
    assert verify_llava(model, folder) < 1e-5


def compose(vision, llm) -> PrefixVLM:
    return PrefixVLM(vision=vision, connector=MLP(in_dim=vision.out_dim, out_dim=llm.dim), llm=llm).eval()


COMPOSITIONS = {
    "llava 1.5": lambda: tiny_vlm().eval(),
    "siglip, last layer": lambda: compose(tiny_vision(siglip_config(), layer=-1), tiny_llm()),
    "class token, several layers": lambda: compose(tiny_vision(layer=[-2, -1], keep_cls=True), tiny_llm()),
    "tied": lambda: compose(tiny_vision(), tiny_llm(llama_config(tie_word_embeddings=True))),
    "new tokens": lambda: compose(tiny_vision(), tiny_llm(new_tokens=2)),
    "tied with new tokens": lambda: compose(
        tiny_vision(), tiny_llm(llama_config(tie_word_embeddings=True), new_tokens=2)
    ),
    "qwen2": lambda: compose(tiny_vision(), tiny_llm(llama_config(model_type="qwen2"))),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_export_reload_and_import_back(tmp_path, name):
    torch.manual_seed(0)
    model = COMPOSITIONS[name]()
    size = model.llm.vocab_size
    export_llava(model, tokenizer_of(size), tmp_path)
    other = COMPOSITIONS[name]()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    import_llava(other, tmp_path)
    for (key, a), b in zip(other.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b), key
    served = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    is_one = served.get_output_embeddings().weight is served.get_input_embeddings().weight
    assert is_one == name.startswith("tied"), "a tied head stays one with the embedding"


def test_a_served_prompt_gives_our_logits(tmp_path):
    """The whole path of a user: processor and model from the folder, an image file, a text."""
    model = tiny_vlm().eval()
    export_llava(model, tokenizer_of(97), tmp_path, eos_ids=[7])
    processor = AutoProcessor.from_pretrained(tmp_path)
    served = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert served.generation_config.eos_token_id in (7, [7])
    assert served.config.text_config.vocab_size == 128 and served.config.image_token_index == 97

    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    inputs = processor(images=image, text="w5 <image> w6 w7", return_tensors="pt")
    with torch.no_grad():
        logits = served(**inputs).logits
        batch = batch_of(text_stream([[5, *IMAGE, 6, 7]]), [0], seed=1)
        ours = model.logits(model(batch))
    expected_ids = torch.where(batch.text["llm"].ids == PLACEHOLDER_ID, 97, batch.text["llm"].ids)
    assert torch.equal(inputs["input_ids"], expected_ids)
    assert_close(logits[..., :97], ours)


def test_adapters_are_merged_into_the_copy_only(tmp_path):
    model = tiny_vlm().eval()
    lora(model=model, match=r"llm\..*(q_proj|down_proj)", rank=4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    names = list(model.state_dict())
    export_llava(model, tokenizer_of(97), tmp_path)  # compares logits with the adapted model
    assert list(model.state_dict()) == names
    plain = tiny_vlm().eval()
    import_llava(plain, tmp_path)
    layer = model.llm.layers[0].self_attn.q_proj
    merged = plain.llm.layers[0].self_attn.q_proj.weight
    assert_close(merged, layer.base_layer.weight + layer.get_delta_weight("default"))


def test_a_folder_with_other_weights_is_not_accepted(tmp_path):
    model = tiny_vlm().eval()
    export_llava(model, tokenizer_of(97), tmp_path / "good")
    with torch.no_grad():
        model.connector.layers[0].weight.add_(0.1)
    with pytest.raises(AssetError, match="logits of .* differ by"):
        verify_llava(model, tmp_path / "good")


def test_the_callers_tokenizer_is_left_alone(tmp_path):
    tokenizer = tokenizer_of(97)
    export_llava(tiny_vlm().eval(), tokenizer, tmp_path)
    assert len(tokenizer) == 97


def test_compositions_without_an_equivalent_have_problems():
    scaled = compose(tiny_vision(), tiny_llm(llama_config(model_type="granite", logits_scaling=2.0)))
    assert find_problems(scaled) == ["llm.config.logits_scaling: LLaVA does not scale its logits"]
    assert find_problems(torch.nn.Linear(1, 1)) == ["model: Linear has no LLaVA equivalent; only PrefixVLM does"]


def test_what_cannot_be_exported_is_known_before_any_weight():
    with torch.device("meta"):
        vision, llm = tiny_vision(), tiny_llm()
        assert find_problems(compose(vision, llm)) == []
        pooled = PrefixVLM(vision=vision, connector=PooledMLP(in_dim=vision.out_dim, out_dim=llm.dim), llm=llm)
    assert find_problems(pooled) == ["connector: PooledMLP; LLaVA has only the two-layer MLP (mlp2x_gelu)"]
    with torch.device("meta"):
        model = compose(tiny_vision(), tiny_llm())
        lora(model=model, match=r"llm\..*q_proj", rank=4)
    assert find_problems(model) == []
    quantize_layers(model, ["llm.model.model.layers.0.mlp.up_proj"], bits=8)
    (problem,) = find_problems(model)
    assert "up_proj: is quantized" in problem


def test_imports_that_do_not_fit_are_refused(tmp_path):
    export_llava(tiny_vlm().eval(), tokenizer_of(97), tmp_path / "good")
    with pytest.raises(AssetError, match="the model needs 200"):
        import_llava(compose(tiny_vision(), tiny_llm(llama_config(vocab_size=200))), tmp_path / "good")
    with pytest.raises(AssetError, match="does not fit the model"):
        import_llava(compose(tiny_vision(), tiny_llm(llama_config(hidden_size=32))), tmp_path / "good")
    with pytest.raises(AssetError, match="cannot be read as LlavaForConditionalGeneration"):
        import_llava(tiny_vlm(), tmp_path / "nowhere")
