"""`auto`: a part says of itself what its own files say; a setting that contradicts them is refused."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.support.hub_folders import (
    change_config,
    make_llm,
    make_vision,
    write_preprocessor,
)
from vlm_train import cli
from vlm_train.build import build_model, instantiate_part
from vlm_train.check.assets import missing_assets
from vlm_train.check.check import check_config
from vlm_train.config.architecture import build_config
from vlm_train.config.compose import compose_config
from vlm_train.config.run_identity import training_hash
from vlm_train.errors import AssetError, ConfigError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llm` and `vision`, folders of odd sizes."""
    root = tmp_path_factory.mktemp("hub")
    make_llm(root / "llm")
    make_vision(root / "vision")
    return root


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    """A copy of the folders that a test may change."""
    return shutil.copytree(made, tmp_path / "own")


def chosen(root: Path, *more: str) -> list[str]:
    words = ["recipe=llava15_stage1", "vision=auto", f"vision.weights={root}/vision"]
    return [*words, "llm=auto", f"llm.weights={root}/llm", *more]


def test_everything_comes_from_the_files(made: Path) -> None:
    cfg = compose_config(chosen(made))
    numbers = {key: cfg.llm.config[key] for key in ("model_type", "hidden_size", "num_key_value_heads", "vocab_size")}
    assert numbers == {"model_type": "qwen2", "hidden_size": 40, "num_key_value_heads": 1, "vocab_size": 259}
    assert cfg.llm.config.rope_parameters.rope_theta == 12345.0 and cfg.llm.config.tie_word_embeddings
    assert (cfg.vision.config.image_size, cfg.vision.config.patch_size) == (42, 7)
    assert (cfg.vision.image_mean, cfg.vision.image_std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert cfg.tokenizer.name == f"{made}/llm"
    assert "architectures" not in cfg.llm.config and "use_cache" not in cfg.llm.config
    check_config(cfg, need_assets=False)
    assert [line for line in missing_assets(cfg) if not line.startswith("data.")] == []


def test_a_changed_folder_is_another_run(own: Path) -> None:
    before = training_hash(compose_config(chosen(own)))
    assert training_hash(compose_config(chosen(own))) == before
    change_config(own / "llm", rms_norm_eps=1e-5)
    changed = training_hash(compose_config(chosen(own)))
    write_preprocessor(own / "vision", image_mean=[0.5, 0.5, 0.5])
    assert len({before, changed, training_hash(compose_config(chosen(own)))}) == 3


def test_a_preset_with_a_folder_that_contradicts_it_is_refused_in_a_dry_run_too(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = f"{made}/llm"
    assert cli.main(["recipe=llava15_stage1", f"llm.weights={folder}", "dry_run=true"]) == 2
    said = capsys.readouterr().err
    assert f"llm.weights: {folder!r} has hidden_size = 40, the config says 4096" in said
    assert f"llm.weights: {folder!r} has model_type = 'qwen2', the config says 'llama'" in said


def test_a_preset_with_a_tower_that_contradicts_it_is_refused(made: Path) -> None:
    cfg = compose_config(["recipe=llava15_stage1", f"vision.weights={made}/vision"])
    with pytest.raises(ConfigError) as caught:
        check_config(cfg, need_assets=False)
    text = str(caught.value)
    assert "has patch_size = 7, the config says 14" in text
    assert "has image_mean = [0.1, 0.2, 0.3], the config says [0.48145466, 0.4578275, 0.40821073]" in text


def test_a_preset_with_the_folder_it_describes_is_taken(made: Path) -> None:
    numbers = OmegaConf.to_container(compose_config(chosen(made)).llm.config)
    cfg = compose_config(["recipe=llava15_stage1", f"llm.weights={made}/llm", "llm.config=null"])
    cfg.llm.config = numbers
    check_config(cfg, need_assets=False)


def test_auto_takes_the_place_of_a_preset_s_numbers(made: Path) -> None:
    words = ["recipe=llava15_stage1", "llm=vicuna_7b_v15", "llm.config=auto", f"llm.weights={made}/llm"]
    assert compose_config(words).llm.config.hidden_size == 40


def test_without_weights_auto_asks_for_them(capsys: pytest.CaptureFixture[str]) -> None:
    for more in (["dry_run=true"], []):
        assert cli.main(["recipe=llava15_stage1", "llm=auto", "vision=auto", *more]) == 2
        said = capsys.readouterr().err
        for part in ("llm", "vision"):
            assert f"{part}.weights is missing: {part}=auto reads its architecture from there" in said
        assert "Mapping" not in said


def test_tiny_is_a_small_copy_of_the_same_architecture_without_its_weights(made: Path) -> None:
    cfg = compose_config(chosen(made, "size=tiny"))
    assert (cfg.llm.config.model_type, cfg.llm.config.hidden_size, cfg.llm.config.num_hidden_layers) == ("qwen2", 64, 2)
    assert len(cfg.llm.config.layer_types) == 2 and "ffn_dim" not in cfg.llm.config
    assert (cfg.vision.config.model_type, cfg.vision.config.image_size) == ("siglip_vision_model", 32)
    assert cfg.llm.weights is None and cfg.vision.weights is None and cfg.vision.image_mean == [0.1, 0.2, 0.3]
    build_model(cfg, list(range(300)))
    cfg = compose_config(["recipe=llava15_stage1", "llm=auto", "vision=auto", "size=tiny"])
    assert (cfg.llm.config.model_type, cfg.vision.config.model_type) == ("llama", "clip_vision_model")
    build_model(cfg, list(range(300)))


def test_old_and_whole_config_files_are_read(own: Path) -> None:
    old = {"rope_parameters": None, "layer_types": None, "rope_theta": 5e5, "torch_dtype": "bfloat16"}
    change_config(own / "llm", **old)
    cfg = compose_config(chosen(own))
    assert build_config("llm.config", cfg.llm.config).rope_parameters["rope_theta"] == 5e5
    llm, vision = (json.loads((own / name / "config.json").read_text()) for name in ("llm", "vision"))
    whole = {"model_type": "llava", "text_config": llm, "vision_config": vision}
    for name in ("llm", "vision"):
        (own / name / "config.json").write_text(json.dumps(whole))
    nested = compose_config(chosen(own))
    assert (nested.llm.config, nested.vision.config) == (cfg.llm.config, cfg.vision.config)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "brand_new"}, "names the model_type 'brand_new', which transformers"),
        ({"model_type": "brand_new", "auto_map": {"AutoModel": "x.y"}}, "Its own code (auto_map) is never executed"),
        ({"model_type": None}, "names the model_type None"),
        ({"quantization_config": {"bits": 4}}, "its weights are quantized"),
    ],
)
def test_what_cannot_be_used_is_refused_in_words(own: Path, changes: dict, said: str) -> None:
    change_config(own / "llm", **changes)
    with pytest.raises(AssetError) as caught:
        compose_config(chosen(own))
    assert said in str(caught.value) and "llm.weights" in str(caught.value)


def test_wrong_folders_are_named(own: Path, tmp_path: Path) -> None:
    def error(*words: str) -> str:
        with pytest.raises(ConfigError) as caught:
            compose_config(chosen(own, *words))
        return str(caught.value)

    assert f"llm.weights: {tmp_path}/none does not exist." in error(f"llm.weights={tmp_path}/none")
    (tmp_path / "empty").mkdir()
    assert f"llm.weights: {tmp_path}/empty has no config.json" in error(f"llm.weights={tmp_path}/empty")
    (tmp_path / "empty" / "config.json").write_text("{")
    assert "cannot be read as JSON" in error(f"llm.weights={tmp_path}/empty")
    (tmp_path / "empty" / "config.json").write_text("[]")
    assert "holds a list; allowed: a JSON object" in error(f"llm.weights={tmp_path}/empty")
    assert "describes 'qwen2', which has no image_size and patch_size" in error(f"vision.weights={own}/llm")
    assert "describes 'siglip_vision_model', which has no vocabulary" in error(f"llm.weights={own}/vision")


def test_pickled_weights_and_missing_tokenizers_are_told_before_the_run(own: Path) -> None:
    for file in (own / "llm").glob("*.safetensors"):
        file.unlink()
    (own / "llm" / "pytorch_model.bin").write_bytes(b"x")
    (own / "llm" / "tokenizer.json").unlink()
    lines = missing_assets(compose_config(chosen(own)))
    assert any(line.startswith(f"llm.weights: {own}/llm holds pickled weights only") for line in lines)
    assert any(line.startswith(f"tokenizer.name: {own}/llm holds no tokenizer: no tokenizer.json") for line in lines)
    (own / "llm" / "pytorch_model.bin").unlink()
    assert any("llm holds no weights: no *.safetensors" in line for line in missing_assets(compose_config(chosen(own))))


def test_an_unreachable_hub_is_one_error_at_once(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    calls = []

    def refuse(self, name: str, timeout: float) -> None:
        calls.append((name, timeout))
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    start = time.monotonic()
    with pytest.raises(AssetError, match=r"llm.weights: nobody/nothing is not a local path.*\(ConnectionError\)"):
        compose_config(chosen(made, "llm.weights=nobody/nothing"))
    assert calls == [("nobody/nothing", 5.0)] and time.monotonic() - start < 20


def test_sizes_of_images_follow_the_preprocessor(own: Path) -> None:
    write_preprocessor(own / "vision", size={"height": 56, "width": 56})
    with pytest.raises(AssetError, match="makes images of 56 x 56 pixels, its config.json says image_size = 42 x 42"):
        compose_config(chosen(own))
    for size in (56, 42):
        cfg = compose_config(chosen(own, f"vision.image_size={size}"))
        model = build_model(cfg, list(range(300)), meta=True)
        assert (model.vision.image_size, model.vision.grid.size) == ((size, size), (size // 7) ** 2)
    cut = {"height": 42, "width": 42}
    write_preprocessor(own / "vision", size={"shortest_edge": 50}, crop_size=cut, do_center_crop=True)
    assert compose_config(chosen(own)).vision.config.image_size == 42
    (own / "vision" / "preprocessor_config.json").unlink()
    with pytest.raises(AssetError, match=r"does not say it: .* vision.image_mean=\[0.5,0.5,0.5\]"):
        compose_config(chosen(own))
    nested = {"image_processor": {"image_mean": [0.2] * 3, "image_std": [0.5] * 3, "size": {"height": 42, "width": 42}}}
    (own / "vision" / "processor_config.json").write_text(json.dumps(nested))
    assert compose_config(chosen(own)).vision.image_mean == [0.2, 0.2, 0.2]


def test_pixels_that_are_scaled_otherwise_give_the_same_values(own: Path) -> None:
    write_preprocessor(own / "vision", rescale_factor=1 / 127.5)
    vision = compose_config(chosen(own)).vision
    published = ((0.1, 0.4), (0.2, 0.5), (0.3, 0.6))
    for mean, std, (theirs, spread) in zip(vision.image_mean, vision.image_std, published, strict=True):
        assert (200 / 255 - mean) / std == pytest.approx((200 / 127.5 - theirs) / spread)
    write_preprocessor(own / "vision", do_normalize=False)
    assert compose_config(chosen(own)).vision.image_std == [1.0, 1.0, 1.0]


def test_other_architectures_have_their_own_names(tmp_path: Path) -> None:
    from transformers import GPT2Config, OPTConfig

    opt = {"ffn_dim": 48, "word_embed_proj_dim": 40, "num_hidden_layers": 3, "num_attention_heads": 5}
    make_llm(tmp_path / "opt", OPTConfig(vocab_size=270, hidden_size=40, max_position_embeddings=64, **opt))
    make_llm(tmp_path / "gpt2", GPT2Config(vocab_size=270, n_embd=40, n_layer=3, n_head=5, n_positions=64))
    for name in ("opt", "gpt2"):
        words = ["recipe=llava15_stage1", "llm=auto", f"llm.weights={tmp_path}/{name}"]
        cfg = compose_config([*words, "size=tiny"])
        assert build_model(cfg, list(range(300))).llm.dim == 64
        assert compose_config(words).llm.config.model_type == name


def test_a_text_tower_and_an_encoder_decoder_come_from_their_files(tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5ForConditionalGeneration

    sizes = {"hidden_size": 40, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 5}
    CLIPTextModel(CLIPTextConfig(vocab_size=300, eos_token_id=2, **sizes)).save_pretrained(tmp_path / "text")
    words = ["recipe=clip_vitb32", "llm=auto_text", f"llm.weights={tmp_path}/text"]
    cfg = compose_config(words)
    assert cfg.llm.config.hidden_size == 40 and "eos_token_id" not in cfg.llm.config  # its 2 stood for the last token
    assert build_model(compose_config([*words, "size=tiny"]), list(range(300))).llm.dim == 64
    t5 = T5Config(vocab_size=300, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=1, num_heads=3)
    T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    words = ["recipe=blip2_stage2_flant5", "llm=auto_seq2seq", f"llm.weights={tmp_path}/t5"]
    llm = compose_config(words).llm
    assert (llm.config.num_decoder_layers, llm.config.dense_act_fn) == (1, "gelu")  # the recipe's own, as in BLIP-2
    assert compose_config([*words, "size=tiny"]).llm.config.dense_act_fn == "gelu"
    assert build_model(compose_config([*words, "size=tiny"]), list(range(300))).llm.dim == 64
    cfg = compose_config(["recipe=llava15_stage1", "llm=auto", f"llm.weights={tmp_path}/t5"])
    with pytest.raises(ConfigError, match="'t5' is not of the kind AutoModelForCausalLM; .* llm=auto_seq2seq"):
        build_model(cfg, list(range(300)), meta=True)


def test_a_folder_s_numbers_cannot_be_changed_silently(made: Path) -> None:
    cfg = compose_config(chosen(made))
    cfg.llm.config.rope_parameters.rope_theta = 10000.0
    with pytest.raises(ConfigError, match="rope_theta"):
        check_config(cfg, need_assets=False)


def test_numbers_beside_auto_stand_on_top_and_are_told_where_they_contradict(made: Path) -> None:
    cfg = compose_config(chosen(made, "+llm.config.attention_dropout=0.25", "+llm.config.rms_norm_eps=0.5"))
    assert (cfg.llm.config.hidden_size, cfg.llm.config.attention_dropout) == (40, 0.25)
    with pytest.raises(ConfigError, match="has rms_norm_eps = 1e-06, the config says 0.5"):
        check_config(cfg, need_assets=False)


def test_a_t5_runs_with_the_activation_of_its_recipe_and_its_own_head(tmp_path: Path) -> None:
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 300, "d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3}
    torch.manual_seed(0)
    theirs = T5ForConditionalGeneration(T5Config(**sizes, feed_forward_proj="gated-gelu", tie_word_embeddings=False))
    theirs.lm_head.weight = torch.nn.Parameter(torch.randn(300, 24))
    theirs.save_pretrained(tmp_path)
    words = ["recipe=blip2_stage2_flant5", "llm=auto_seq2seq", f"llm.weights={tmp_path}"]
    cfg = compose_config(words)
    assert cfg.llm.config.tie_word_embeddings is False  # the file says true, and that outputs are not scaled
    check_config(cfg, need_assets=False)
    llm = instantiate_part("llm", cfg.llm, vocab_size=300)
    llm.load_weights()
    hidden = torch.randn(1, 2, 24)
    assert torch.equal(llm.head(hidden), hidden @ theirs.lm_head.weight.T)
