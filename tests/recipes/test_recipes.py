"""Every recipe and schedule: how it is written, that it composes and checks, and that it says what was published."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from data_pipelines.sample import Annotation, Media, MediaItem, Sample, Text, Turn
from vlm_train.build import build_assembly, build_images, build_lr_schedule, build_model, build_objectives
from vlm_train.check.check import check_config
from vlm_train.config.compose import compose_config, compose_tiny
from vlm_train.config.folders import config_dir, recipes_dir
from vlm_train.contracts.layout import PLACEHOLDER_ID, MediaSize
from vlm_train.data.text.streams import IGNORE
from vlm_train.dryrun.length import predict_length

PARTS = ("vision", "connector", "llm")
RECIPES = sorted(path.stem for path in (recipes_dir() / "recipe").glob("*.yaml"))
SCHEDULES = sorted(path.stem for path in (recipes_dir() / "schedule").glob("*.yaml"))
FILES = sorted(recipes_dir().glob("*/*.yaml"))

# Source of every row: its name, then the numbers of the paper or script named in the recipe's first lines.
# LLaVA-1.0: README.md v1.0.1; LLaVA-1.5: scripts/v1_5/{pretrain,finetune,finetune_lora}.sh.
PUBLISHED = {
    # recipe: (learning rate, samples a step, epochs, warm-up ratio, weight decay, max length, template, image)
    "llava1_stage1": (2e-3, 128, 1, 0.03, 0.0, 2048, "v0", "crop"),
    "llava1_stage2": (2e-5, 32, 3, 0.03, 0.0, 2048, "v0", "crop"),
    "llava15_stage1": (1e-3, 256, 1, 0.03, 0.0, 2048, "plain", "crop"),
    "llava15_stage2": (2e-5, 128, 1, 0.03, 0.0, 2048, "vicuna_v1", "pad"),
    "llava15_13b_stage1": (1e-3, 256, 1, 0.03, 0.0, 2048, "plain", "crop"),
    "llava15_13b_stage2": (2e-5, 128, 1, 0.03, 0.0, 2048, "vicuna_v1", "pad"),
    "llava15_lora": (2e-4, 128, 1, 0.03, 0.0, 2048, "vicuna_v1", "pad"),
    "llava15_qlora": (2e-4, 128, 1, 0.03, 0.0, 2048, "vicuna_v1", "pad"),  # none of its own: those of llava15_lora
}

# CLIP: arXiv 2103.00020, appendix F. SigLIP: arXiv 2303.15343; what it leaves out is marked as unknown in the recipe.
TWO_TOWERS = {
    # recipe: (learning rate, betas, eps, weight decay, warm-up steps, epochs, E, temperature, bound of the scale, bias)
    "clip_vitb32": (5e-4, (0.9, 0.98), 1e-6, 0.2, 2000, 32, 512, 0.07, 100.0, None),
    "clip_vitl14": (4e-4, (0.9, 0.98), 1e-6, 0.2, 2000, 32, 768, 0.07, 100.0, None),
    "siglip_so400m": (1e-3, (0.9, 0.95), 1e-8, 1e-4, 20000, 100, None, 0.1, None, -10.0),
}

# Source of every row: BLIP-2's paper section 3.4; notes on InstructBLIP's section 2.6; MiniGPT-4's paper and
# train_configs/. Steps, not epochs, are given.
QFORMER_LINE = {
    # recipe: (learning rate, least rate, samples a step, steps, warm-up steps, second beta, template)
    "blip2_stage1": (1e-4, 1e-5, 1680, 250_000, 2000, 0.98, "caption_bert"),
    "blip2_stage2_opt": (1e-4, 5e-5, 1920, 80_000, 2000, 0.98, "caption_opt"),
    "blip2_stage2_flant5": (1e-4, 5e-5, 1520, 80_000, 2000, 0.98, "seq2seq"),
    "instructblip_vicuna7b": (1e-5, 0.0, 128, 60_000, 1000, 0.999, "instructblip"),
    "instructblip_flant5xl": (1e-5, 0.0, 192, 60_000, 1000, 0.999, "seq2seq"),
    "dynamic_qformer": (1e-4, 5e-5, 1920, 80_000, 2000, 0.98, "caption_opt"),
    "hierarchical_qformer": (1e-4, 5e-5, 1920, 80_000, 2000, 0.98, "caption_opt"),
    "minigpt4_stage1": (1e-4, 8e-5, 256, 20_000, 5000, 0.999, "plain"),
    "minigpt4_stage2": (3e-5, 1e-5, 12, 400, 200, 0.999, "minigpt4"),
    "minigpt4_llama2": (1e-4, 8e-5, 256, 20_000, 5000, 0.999, "plain"),
    "minigpt5_gate": (1e-4, 8e-5, 256, 20_000, 5000, 0.999, "plain"),
}


# arXiv 2201.12086, appendix; configs/*.yaml and models/ of github.com/salesforce/BLIP.
BLIP = {
    # recipe: (learning rate, samples a step, epochs, tokens of a text, least share of an image, LM's label smoothing)
    "blip_base": (3e-4, 2880, 20, 30, 0.2, 0.1),
    "blip_captioner": (1e-5, 256, 5, 40, 0.5, 0.1),
    "blip_filter": (1e-5, 256, 6, 35, 0.5, None),
}


# LLaVA-NeXT: scripts/train/direct_finetune_clip.sh, and Open-LLaVA-NeXT where nothing official is known.
# LLaVA-OneVision: arXiv 2408.03326, Table 1; scripts/train/finetune_{si,ov}.sh.
TILED = {
    # recipe: (learning rate, that of the tower, samples a step, max length, template, grids, most tiles, frames)
    "llava_next_vicuna7b": (2e-5, 2e-6, 128, 4096, "vicuna_v1", 5, None, 8),
    "llava_next_mistral7b": (2e-5, 2e-6, 128, 4096, "mistral", 5, None, 8),
    "llava_next_llama3_8b": (1e-5, 2e-6, 128, 8192, "llama3", 5, None, 8),
    "llava_onevision_7b_stage15": (1e-5, 2e-6, 256, 32768, "chatml", 5, None, 8),
    "llava_onevision_7b_single": (1e-5, 2e-6, 256, 32768, "chatml", 6, 9, 8),
    "llava_onevision_7b": (1e-5, 2e-6, 256, 32768, "chatml", 6, 9, 32),
    "llava_onevision_0_5b_stage15": (1e-5, 2e-6, 512, 32768, "chatml", 5, None, 8),
    "llava_onevision_0_5b_single": (1e-5, 2e-6, 512, 32768, "chatml", 6, 9, 8),
    "llava_onevision_0_5b": (1e-5, 2e-6, 512, 32768, "chatml", 6, 9, 32),
}

# arXiv 2412.05271, Table 3 (InternVL 2.5); internvl_chat/shell/internvl{1.5,2.5} of github.com/OpenGVLab/InternVL.
INTERNVL = {
    # recipe: (frozen, rate, weight decay, samples or packs a step, steps, warm-up, drop path, max length, template)
    "internvl25_8b_stage1": (["vision", "llm"], 2e-4, 0.05, 512, 100_000, 100, 0.0, 16384, "internvl25"),
    "internvl25_8b_stage15": (["llm"], 1e-5, 0.05, 1024, 100_000, 100, 0.1, 16384, "internvl25"),
    "internvl25_8b": ([], 4e-5, 0.05, 512, 5500, 0.03, 0.1, 16384, "internvl25"),
    "internvl25_2b_stage1": (["vision", "llm"], 2e-4, 0.01, 512, 100_000, 100, 0.0, 16384, "internvl25"),
    "internvl25_2b": ([], 4e-5, 0.01, 512, 22_000, 0.03, 0.1, 16384, "internvl25"),
    "internvl15_2b_stage1": (["llm"], 2e-5, 0.01, 2048, None, 100, 0.1, 4096, "internlm2_chat"),
    "internvl15_2b": ([], 4e-5, 0.01, 1024, None, 0.03, 0.1, 8192, "internlm2_chat"),
    "internvl35_2b": ([], 8e-5, 0.05, 512, 8000, 0.03, 0.0, 32768, "internvl25"),
    "internvl35_8b": ([], 8e-5, 0.05, 512, 8000, 0.03, 0.1, 32768, "internvl25"),
}

QWEN_VL = ["qwen25_vl_3b", "qwen25_vl_7b"]

# arXiv 2409.12191, section 2.2: who learns, and tokens of a stage. Every other number is unknown, and ours.
QWEN2_VL = {
    # recipe: (frozen, tokens)
    "qwen2vl_2b_stage1": (["llm"], 600e9),
    "qwen2vl_2b_stage2": ([], 800e9),
    "qwen2vl_2b": (["vision", "connector"], None),
    "qwen2vl_7b_stage1": (["llm"], 600e9),
    "qwen2vl_7b_stage2": ([], 800e9),
    "qwen2vl_7b": (["vision", "connector"], None),
}

# examples/llava_ov_1_5/quick_start/*.sh of github.com/EvolvingLMMs-Lab/LLaVA-OneVision-1.5.
ONEVISION_15 = {
    # recipe: (frozen, rate, weight decay, second beta, packs or samples a step, steps, most pixels)
    "llava_onevision15_4b_stage1": (["vision", "llm"], 1e-4, 0.0, 0.99, 8, 2500, 1600**2),
    "llava_onevision15_4b_stage15": ([], 1e-5, 0.01, 0.95, 16, 20_000, 1600**2),
    "llava_onevision15_4b_stage2": ([], 1e-5, 0.0, 0.99, 224, 3500, 1000**2),
}

# internvl_chat/shell/internvl2.0/2nd_finetune/*_full.sh of github.com/OpenGVLab/InternVL.
INTERNVL2 = {"internvl2_2b": 0.01, "internvl2_8b": 0.05}  # weight decay

# launch_scripts/{pretrain,sft}.py of github.com/allenai/molmo2.
MOLMO2 = {
    # recipe: (rates and warm-ups of connector, new rows, tower, language model; steps, length, views a pack, weighting)
    "molmo2_4b_pretrain": ([2e-4, 2e-4, 6e-6, 2e-5], [200, 200, 2000, 2000], 31_000, 2536, 16, "token"),
    "molmo2_4b": ([5e-6, 5e-6, 5e-6, 1e-5], [None] * 4, 300_000, 16384, 128, "sqrt_length"),
}

# apps/plm/configs/stage_{1,2,3}/plm_{1b,8b}.yaml of github.com/facebookresearch/perception_models.
PERCEPTIONLM = {
    # recipe: (rate, weight decay, warm-up, samples a step, of a GPU, steps, length, most tiles, frames, pool, layers)
    "perceptionlm_1b_stage1": (1e-4, 0.01, 20, 512, 16, 8000, 1280, None, 8, 1, 23),
    "perceptionlm_1b_stage2": (4e-5, 0.01, 120, 2048, 8, 35_000, 6144, 16, 16, 2, 23),
    "perceptionlm_1b_stage3": (4e-5, 0.01, 120, 1024, 4, 21_000, 11520, 36, 32, 2, 23),
    "perceptionlm_8b_stage1": (1e-4, 0.05, 20, 512, 16, 8000, 1280, None, 8, 1, 47),
    "perceptionlm_8b_stage2": (4e-5, 0.05, 120, 2048, 4, 35_000, 6144, 16, 16, 2, 47),
    "perceptionlm_8b_stage3": (1e-5, 0.05, 120, 1024, 2, 21_000, 11520, 36, 32, 2, 47),
}

# script/train/llava15_train.sh of github.com/RLHF-V/RLAIF-V; scripts/train/dpo_ov7b.sh of LLaVA-VL/LLaVA-NeXT there;
# internvl_chat/shell/internvl2.0_mpo/preference_optimization/*.sh, and internvl_chat_gpt_oss/shell/internvl3_5_qwen3/
# internvl3_5_2b_mpo.sh with internvl_chat_gpt_oss/internvl/train/internvl_chat_mpo.py of github.com/OpenGVLab/InternVL.
PREFERENCE = {
    # recipe: (rate, weight decay, warm-up, samples a step, epochs, steps of a run, length, frozen, drop path, losses,
    # strategy). A pass over MMPR: 3 million pairs.
    "llava15_dpo": (5e-7, 0.01, 0.05, 8, None, 2672, 2048, ["vision"], 0.0, {"sigmoid": 1.0}, "zero2"),
    "llava_onevision_dpo": (5e-7, 0.0, 0.1, 64, 1, None, 32768, [], 0.0, {"sigmoid": 1.0, "sft": 1.0}, "zero3"),
    "internvl2_mpo": (
        5e-6, 0.05, 0.03, 256, 1, None, 6144, [], 0.1, {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}, "zero1",
    ),
    "internvl35_mpo": (
        2e-7, 0.05, 0.03, 256, 1, None, 16384, [], 0.0, {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}, "zero3",
    ),
}  # fmt: skip


def test_there_are_recipes() -> None:
    newer = {*INTERNVL2, *QWEN2_VL, *ONEVISION_15, *MOLMO2, *PERCEPTIONLM, *PREFERENCE}
    assert {*PUBLISHED, *TILED, *INTERNVL, *QWEN_VL, *TWO_TOWERS, *QFORMER_LINE, *BLIP} | newer < set(RECIPES)
    assert {"llava1", "llava15", "llava15_13b", "easyvqa"} <= set(SCHEDULES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_is_a_short_list_of_deltas(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert lines[0] == "# @package _global_", "Hydra would put it under its group's name otherwise"
    assert lines[1].startswith("# "), "says what it is"
    assert len(lines) <= 45
    assert "_target_" not in text, "components live in conf/"
    assert "recipe_name" not in text, "it is the file's name"
    assert "hydra" not in text


@pytest.mark.parametrize(
    "name",
    sorted(
        [*PUBLISHED, *TILED, *INTERNVL, *QWEN_VL, "nanovlm", "tiled_gpt4v_style", *TWO_TOWERS, *QFORMER_LINE]
        + [*INTERNVL2, *QWEN2_VL, *ONEVISION_15, *MOLMO2, *PERCEPTIONLM, *PREFERENCE]
    ),
)
def test_every_number_names_its_source(name: str) -> None:
    path = recipes_dir() / "recipe" / f"{name}.yaml"
    for line in path.read_text(encoding="utf-8").splitlines():
        value, _, comment = line.partition(" #")
        if re.search(r":.*[^\w.]\d", value) and not line.startswith("#"):
            assert comment.strip(), f"{name}: {line}"


@pytest.mark.parametrize("name", RECIPES)
def test_composes_and_checks(name: str) -> None:
    cfg = compose_config([f"recipe={name}", "dry_run=true"])
    assert cfg.recipe_name == name
    check_config(cfg, need_assets=False)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_says_what_was_published(name: str) -> None:
    cfg = compose_config([f"recipe={name}"])
    lr, samples, epochs, warmup, decay, length, template, image = PUBLISHED[name]
    assert (cfg.optim.lr, cfg.batch.samples, cfg.trainer.epochs) == (lr, samples, epochs)
    assert cfg.optim._target_ == "vlm_train.training.optim.adamw"
    assert (list(cfg.optim.betas), cfg.optim.eps, cfg.optim.weight_decay) == ([0.9, 0.999], 1e-8, decay)
    assert cfg.lr_schedule._target_ == "vlm_train.training.optim.cosine"
    assert (cfg.lr_schedule.warmup_ratio, cfg.lr_schedule.min_ratio) == (warmup, 0.0)
    assert cfg.trainer.max_grad_norm is None, "LLaVA's DeepSpeed JSON names no clipping, so none happened"
    assert cfg.trainer.precision == "bf16-mixed"
    assert cfg.data.max_length == length
    assert (cfg.data.pack, cfg.batch.micro) == (4096, 1), "not published, and changes no loss"
    for group, option in (("template", template), ("image", image)):
        assert cfg[group] == OmegaConf.load(config_dir() / group / f"{option}.yaml")


@pytest.mark.parametrize("name", sorted(TILED))
def test_tiled_ones_say_what_was_published(name: str) -> None:
    cfg = compose_config([f"recipe={name}"])
    lr, tower, samples, length, template, grids, most, frames = TILED[name]
    assert (cfg.optim.lr, cfg.batch.samples, cfg.trainer.epochs) == (lr, samples, 1)
    assert [(rule.match, rule.lr) for rule in cfg.params.rules] == [(r"vision\..*", tower), (".*", lr)]
    assert (cfg.lr_schedule.warmup_ratio, cfg.optim.weight_decay, cfg.trainer.max_grad_norm) == (0.03, 0.0, 1.0)
    assert cfg.data.max_length == length
    assert (grids if isinstance(cfg.image.grids, int) else len(cfg.image.grids)) == grids
    assert (cfg.parts.stitcher.max_tiles, cfg.image.frames) == (most, frames)
    assert cfg.image.tile_several == (most is None)
    named = OmegaConf.load(config_dir() / "template" / f"{template}.yaml")
    assert cfg.template.user_prefix == named.user_prefix


@pytest.mark.parametrize("name", ["llava_onevision_7b_stage1", "llava_onevision_0_5b_stage1"])
def test_onevision_aligns_as_published(name: str) -> None:
    cfg = compose_config([f"recipe={name}"])
    assert (cfg.optim.lr, cfg.batch.samples, cfg.trainer.epochs) == (1e-3, 512, 1)
    assert cfg.image.mode == "resize" and cfg.vision.layer == -2


def list_rates(cfg: DictConfig) -> dict[str, float | None]:
    """The rate of every part's weights."""
    return {part: next(r.lr for r in cfg.params.rules if re.fullmatch(r.match, f"{part}.w")) for part in PARTS}


@pytest.mark.parametrize("name", sorted(ONEVISION_15))
def test_onevision15_says_what_was_published(name: str) -> None:
    cfg = compose_config([f"recipe={name}"])
    frozen, lr, decay, beta, count, steps, pixels = ONEVISION_15[name]
    assert list_rates(cfg) == {part: None if part in frozen else lr for part in PARTS}
    assert (cfg.optim.weight_decay, list(cfg.optim.betas), cfg.optim.eps) == (decay, [0.9, beta], 1e-5)
    assert (cfg.lr_schedule.warmup_ratio, cfg.lr_schedule.min_ratio * lr) == (0.002, pytest.approx(1e-6))
    packed = name != "llava_onevision15_4b_stage2"  # OFFLINE_PACKED_DATA
    assert (cfg.batch.tokens / 32768 if packed else cfg.batch.samples) == count
    assert cfg.batch.normalize == ("token" if packed else "sample")
    assert (cfg.trainer.max_steps, cfg.trainer.epochs, cfg.trainer.max_grad_norm) == (steps, None, 1.0)
    assert (cfg.data.max_length, cfg.data.pack, cfg.trainer.precision) == (32768, 32768, "bf16-mixed")
    assert (cfg.image.min_pixels, cfg.image.max_pixels) == (4 * 28 * 28, pixels)
    assert (cfg.template.system, cfg.template.media_prefix) == ("You are a helpful assistant.", "<|vision_start|>")
    classes = next(rule for rule in cfg.params.rules if re.fullmatch(rule.match, "vision.class_pos_emb"))
    assert classes.lr is None, "buffers in aiak_training_llm/models/llavaov_1_5/rice_vision_model.py"


@pytest.mark.parametrize("name", sorted(PERCEPTIONLM))
def test_perceptionlm_says_what_was_published(name: str) -> None:
    cfg = compose_config([f"recipe={name}"])
    lr, decay, warmup, samples, micro, steps, length, tiles, frames, pool, layers = PERCEPTIONLM[name]
    first = name.endswith("stage1")
    assert list_rates(cfg) == {"vision": None if first else lr, "connector": lr, "llm": None if first else lr}
    assert (cfg.optim.weight_decay, cfg.params.decay_norms_and_biases) == (decay, True)
    assert (list(cfg.optim.betas), cfg.optim.eps, cfg.seed) == ([0.9, 0.95], 1e-8, 777)
    assert (cfg.lr_schedule.warmup_steps, cfg.lr_schedule.warmup_ratio, cfg.lr_schedule.min_ratio) == (warmup, 0, 0.01)
    assert (cfg.batch.samples, cfg.batch.micro, cfg.batch.normalize) == (samples, micro, "token")
    assert samples % (micro * cfg.target.gpus) == 0, "no accumulation on as many GPUs as published"
    assert (cfg.trainer.max_steps, cfg.trainer.max_grad_norm) == (steps, 1.0)
    assert (cfg.data.max_length, cfg.data.pack) == (length, None)
    assert (cfg.image.get("max_tiles"), cfg.image.frames, cfg.image.get("mode")) == (
        tiles, frames, "resize" if first else None,
    )  # fmt: skip
    assert (cfg.connector.pool, cfg.connector.project_first, cfg.get("vision").depth) == (pool, True, layers)
    scale = (None, 0.0) if first else (0.1, 0.1)
    assert (cfg.get("vision").layer_scale, cfg.get("vision").drop_path) == scale
    assert (cfg.template.system is None, cfg.template.bos) == (first, not first)
    longest = ((tiles or 0) + (not first)) * 1024 // pool**2
    assert longest < length, "the largest image fits"


@pytest.mark.parametrize("name", sorted(INTERNVL2))
def test_internvl2_says_what_was_published(name: str) -> None:
    cfg = compose_config([f"recipe={name}"])
    assert list_rates(cfg) == {"vision": None, "connector": 4e-5, "llm": 4e-5}
    assert (cfg.params.rules[0].frozen_mode, cfg.get("vision").drop_path) == ("train", 0.1)
    assert (cfg.optim.weight_decay, cfg.params.decay_norms_and_biases) == (INTERNVL2[name], True)
    assert (cfg.batch.samples, cfg.batch.micro, cfg.target.gpus, cfg.trainer.epochs) == (128, 4, 8, 1)
    assert (cfg.lr_schedule.warmup_ratio, cfg.lr_schedule.warmup_steps) == (0.03, None)
    assert (cfg.data.max_length, cfg.data.group_by, cfg.trainer.max_grad_norm) == (4096, "length", 1.0)
    assert (cfg.image.max_tiles, cfg.image.thumbnail, cfg.batch.normalize) == (6, True, "token")
    assert cfg.template == OmegaConf.load(config_dir() / "template" / "internlm2_chat.yaml")
    assert {cfg.get("vision").weights, cfg.connector.weights} == {cfg.llm.weights} and cfg.init_from == []


@pytest.mark.parametrize("name", sorted(PREFERENCE))
def test_preference_tuning_says_what_was_published(name: str) -> None:
    cfg = compose_config([f"recipe={name}"])
    lr, decay, warmup, samples, epochs, steps, length, frozen, drop_path, losses, strategy = PREFERENCE[name]
    assert list_rates(cfg) == {part: None if part in frozen else lr for part in PARTS}
    assert (cfg.optim.lr, cfg.optim.weight_decay, cfg.lr_schedule.warmup_ratio) == (lr, decay, warmup)
    assert (cfg.batch.samples, cfg.batch.tokens, cfg.batch.normalize) == (samples, None, "token")
    assert (cfg.trainer.epochs, cfg.trainer.max_steps) == (epochs, steps)
    assert (cfg.data.max_length, cfg.data.pack, cfg.data.rejected, len(cfg.data.train)) == (length, None, True, 1)
    of_pairs = {"rlaif_v", "preference_pairs"} if steps or name.startswith("llava") else {"mmpr"}
    assert Path(cfg.data.train[0].shards).parent.name in of_pairs
    assert (cfg.get("vision").get("drop_path", 0.0), cfg.reference.model) == (drop_path, "start")
    assert cfg.params.get("decay_norms_and_biases", False) == name.startswith("internvl")
    objectives = build_objectives(cfg)
    found = dict(objectives["dpo"].weights) | ({"sft": objectives["sft"].weight} if "sft" in objectives else {})
    assert found == losses and (objectives["dpo"].beta, objectives["dpo"].label_smoothing) == (0.1, 0.0)
    assert cfg.strategy == compose_config([f"recipe={name}", f"strategy={strategy}"]).strategy


@pytest.mark.parametrize("name", sorted(QWEN2_VL))
def test_qwen2_vl_says_what_was_published(name: str) -> None:
    cfg = compose_config([f"recipe={name}"])
    frozen, tokens = QWEN2_VL[name]
    assert [part for part, rate in list_rates(cfg).items() if rate is None] == frozen
    if tokens is not None:
        assert cfg.trainer.max_steps * cfg.batch.tokens == pytest.approx(tokens, rel=0.005)
    assert (cfg.image.fps, cfg.image.video_max_pixels, cfg.image.max_pixels) == (2.0, 16384 * 28 * 28, 16384 * 28 * 28)
    assert cfg.llm.weights.removeprefix("Qwen/") in ("Qwen2-1.5B-Instruct", "Qwen2-7B-Instruct")
    path = recipes_dir() / "recipe" / f"{name.replace('7b', '2b')}.yaml"
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(("optim:", "lr_schedule:", "batch:")):
            assert "# unknown; our own" in line, line


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llava_onevision15_4b_stage2", 4_352_654_368),
        ("qwen2vl_2b", 2_208_985_600),
        ("qwen2vl_7b", 8_291_375_616),
        ("internvl2_2b", 2_205_754_368),
        ("internvl2_8b", 8_075_365_376),
        ("perceptionlm_1b_stage1", 1_533_477_888),
        ("perceptionlm_1b_stage3", 1_533_524_992),
        ("perceptionlm_8b_stage3", 9_794_260_736),
    ],
)
def test_whole_models_have_their_size(name: str, expected: int) -> None:
    model = build_model(compose_config([f"recipe={name}", "tokenizer=byte_level"]), meta=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


@pytest.mark.parametrize("name", sorted(INTERNVL))
def test_internvl_says_what_was_published(name: str) -> None:
    cfg = compose_config([f"recipe={name}"])
    frozen, lr, decay, samples, steps, warmup, drop_path, length, template = INTERNVL[name]
    assert list_rates(cfg) == {part: None if part in frozen else lr for part in PARTS}
    assert (cfg.optim.lr, cfg.optim.weight_decay, cfg.params.decay_norms_and_biases) == (lr, decay, True)
    packed = cfg.data.pack is not None
    assert (cfg.batch.tokens / length if packed else cfg.batch.samples) == samples
    assert (cfg.trainer.max_steps, cfg.trainer.epochs) == (steps, None if steps else 1)
    assert warmup in (cfg.lr_schedule.warmup_steps, cfg.lr_schedule.warmup_ratio)
    assert (cfg.lr_schedule.warmup_steps is None) == (warmup < 1)
    assert (cfg.get("vision").get("drop_path", 0.0), cfg.data.max_length) == (drop_path, length)
    assert cfg.batch.normalize == ("sqrt_length" if packed else "token")
    assert (cfg.data.pack, cfg.data.pack_patches) == ((length, 3 * length) if packed else (None, None)), (
        "48 or 96 tiles"
    )
    assert (cfg.image.max_tiles, cfg.image.share_tiles, cfg.image.thumbnail) == (12, True, True)
    assert (cfg.trainer.max_grad_norm, cfg.trainer.precision) == (1.0, "bf16-mixed")
    named = OmegaConf.load(config_dir() / "template" / f"{template}.yaml")
    assert (cfg.template.system, cfg.template.user_suffix) == (named.system, named.user_suffix)


@pytest.mark.parametrize("name", QWEN_VL)
def test_qwen_vl_says_what_was_published(name: str) -> None:
    """qwen-vl-finetune/scripts/sft.sh, sft_7b.sh and qwenvl/train/argument.py of github.com/QwenLM/Qwen3-VL."""
    cfg = compose_config([f"recipe={name}"])
    assert [(rule.match, rule.lr) for rule in cfg.params.rules] == [(r"vision\..*", None), (".*", 2e-7)]
    assert (cfg.optim.weight_decay, cfg.lr_schedule.warmup_ratio) == (0.0, 0.03)
    assert cfg.trainer.max_grad_norm is None, "zero3.json names no clipping, so none happened"
    assert (cfg.batch.samples, cfg.batch.micro, cfg.trainer.epochs, cfg.data.max_length) == (4 * 4 * 8, 4, 0.5, 8192)
    assert (cfg.image.min_pixels, cfg.image.max_pixels) == (784, 50176)
    assert (cfg.image.frames, cfg.image.min_frames, cfg.image.fps) == (8, 4, 2.0)
    assert (cfg.image.frame_min_pixels, cfg.image.frame_max_pixels) == (256 * 28 * 28, 1024 * 28 * 28)
    assert {cfg.vision.weights, cfg.connector.weights, cfg.llm.weights, cfg.tokenizer.name} == {cfg.llm.weights}


@pytest.mark.parametrize("name", sorted(MOLMO2))
def test_molmo2_says_what_was_published(name: str) -> None:
    cfg = compose_config([f"recipe={name}"])
    rates, warmups, steps, length, views, weighting = MOLMO2[name]
    assert [rule.lr for rule in cfg.params.rules] == rates
    assert [rule.get("warmup_steps") for rule in cfg.params.rules] == warmups
    assert cfg.lr_schedule.warmup_steps == (warmups[-1] or 200) and cfg.lr_schedule.min_ratio == 0.1
    assert (list(cfg.optim.betas), cfg.optim.eps, cfg.optim.weight_decay) == ([0.9, 0.95], 1e-6, 0.0)
    assert (cfg.batch.tokens, cfg.data.pack, cfg.data.max_length) == (128 * length, length, length)
    assert (cfg.data.pack_patches, cfg.batch.normalize, cfg.trainer.max_steps) == (views * 27 * 27, weighting, steps)
    assert (cfg.objective.lm.z_loss, cfg.trainer.max_grad_norm) == (1e-4, 1.0)
    total = sum(source.weight for source in cfg.data.train)
    assert total == pytest.approx(1.0 if name == "molmo2_4b_pretrain" else 1.1) and cfg.data.mixture == "weights"
    assert list(cfg.vision.layer) == [-3, -9] and list(cfg.image.margins) == [4, 4] and cfg.image.max_tiles == 8
    tokens = cfg.tokenizer.add  # ids of Molmo2Config in transformers
    assert (cfg.tokenizer.first, tokens.index("<im_patch>"), tokens.index("<frame_end>")) == (151936, 2, 8)


def test_molmo2_counts_its_tokens() -> None:
    """14 x 14 of all of an image, and those of what its tiles make up; four marks and one a row."""
    cfg = compose_config(["recipe=molmo2_4b_pretrain", "tokenizer=byte_level"])
    model = build_model(cfg, meta=True)
    plan = build_images(cfg, model)["vision"]
    layout = model.media_layout({"vision": plan})
    assert layout is not None
    for size, (rows, columns) in (((378, 378), (14, 14)), ((640, 480), (23, 23)), ((4000, 2000), (23, 42))):
        (pieces,) = layout([MediaSize(*size)])
        slots = [one for one in pieces if not isinstance(one, str)]
        assert sum(slot.count for slot in slots) == 196 + rows * columns, size
        assert len(pieces) - len(slots) == 4 + rows and len(slots) == 1 + rows


def test_molmo2_writes_what_its_preprocessor_writes() -> None:
    """The end token first and, between turns, twice; images in front of the question, each of several with a number."""
    assembly = build_assembly(compose_tiny("recipe=molmo2_4b_pretrain"), meta=True)
    items = tuple(MediaItem(name=f"{number}.png", width=40, height=40) for number in range(2))
    ask = Turn(role="user", parts=(Text(text="Why?"), Media(item=0), Media(item=1)))
    answer, again = Turn(role="assistant", parts=(Text(text="So."),)), Turn(role="user", parts=(Text(text="And?"),))
    sample = Sample(key="one", media=items, annotations=(Annotation(turns=(ask, answer, again, answer)),))
    stream, tokenizer = assembly.processor.render(sample).llm, assembly.processor.tokenizer
    rows = ("@" * 5 + "<im_col>") * 5
    image = f"<low_res_im_start>{'@' * 25}<im_end><im_start>{rows}<im_end>"
    asked = "<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>"
    expected = (
        f"<|im_end|>Image 1{image}Image 2{image}<|im_start|>user\nWhy?{asked}<|im_end|>\n<|im_start|>user\nAnd?{asked}"
    )
    assert "".join("@" if one == PLACEHOLDER_ID else tokenizer.decode([one]) for one in stream.ids.tolist()) == expected
    marks = [
        tokenizer.convert_tokens_to_ids(one) for one in ("<low_res_im_start>", "<im_start>", "<im_end>", "<im_col>")
    ]
    assert ((stream.attention_group == -1) == np.isin(stream.ids, [*marks, PLACEHOLDER_ID])).all()
    assert not stream.attention_group[stream.attention_group != -1].any()
    learned = stream.labels[stream.labels != IGNORE]
    assert tokenizer.decode(learned.tolist()) == "So.<|im_end|>" * 2


def test_nanovlm_says_what_was_published() -> None:
    """models/config.py, train.py and slurm/nanoVLM.slurm of github.com/huggingface/nanoVLM."""
    cfg = compose_config(["recipe=nanovlm"])
    assert [(rule.match, rule.lr) for rule in cfg.params.rules] == [(r"connector\..*", 0.00512), (".*", 5e-5)]
    assert (cfg.optim.weight_decay, list(cfg.optim.betas), cfg.params.decay_norms_and_biases) == (
        0.01,
        [0.9, 0.999],
        True,
    )
    assert (cfg.lr_schedule.warmup_ratio, cfg.lr_schedule.min_ratio, cfg.trainer.max_steps) == (0.03, 0.1, 40_000)
    assert (cfg.batch.tokens, cfg.batch.micro, cfg.target.gpus) == (2 * 8 * 32 * 4096, 2, 32)
    assert (cfg.data.pack, cfg.data.max_length, cfg.trainer.max_grad_norm) == (4096, 4096, 1.0)
    assert (cfg.image.longest_side, cfg.image.enlarge, cfg.connector.factor) == (2048, True, 4)
    assert len(cfg.tokenizer.add) == 66 and cfg.tokenizer.add[-1] == "<row_8_col_8>"
    assert (cfg.vision.image_mean, cfg.vision.image_std, cfg.vision.final_norm) == ([0.0] * 3, [1.0] * 3, True)


def test_nanovlm_counts_its_tokens() -> None:
    """64 a tile, at most 4 x 4 of them and one view of all (mp_image_token_length of models/config.py)."""
    cfg = compose_config(["recipe=nanovlm", "vision.weights=null", "llm.weights=null", "tokenizer=byte_level"])
    model = build_model(cfg, meta=True)
    plan = build_images(cfg, model)["vision"]
    for size, views in (((2048, 2048), 17), ((512, 512), 17), ((640, 480), 13), ((4000, 100), 5)):
        grids = plan.grids(MediaSize(*size))
        assert (len(grids), sum(model.connector.token_grid(grid).size for grid in grids)) == (views, 64 * views), size
    assert sum(p.numel() for p in model.connector.parameters()) == 16 * 768 * 960


def test_qwen_vl_learns_the_line_end_behind_an_answer() -> None:
    """qwenvl/data/data_processor.py: labels go to the token behind <|im_end|>."""
    assembly = build_assembly(compose_tiny("recipe=qwen25_vl_3b"), meta=True)
    turns = [Turn(role=role, parts=(Text(text=text),)) for role, text in (("user", "Why?"), ("assistant", "So."))]
    stream = assembly.processor.render(Sample(key="one", annotations=(Annotation(turns=(*turns, *turns)),))).llm
    learned = stream.labels[stream.labels != IGNORE]
    assert assembly.processor.tokenizer.decode(learned.tolist()) == "So.<|im_end|>\n" * 2


@pytest.mark.parametrize("name", sorted(TWO_TOWERS))
def test_two_towers_say_what_was_published(name: str) -> None:
    cfg = compose_config([f"recipe={name}"])
    lr, betas, eps, decay, warmup, epochs, width, temperature, bound, bias = TWO_TOWERS[name]
    assert (cfg.optim.lr, tuple(cfg.optim.betas), cfg.optim.eps, cfg.optim.weight_decay) == (lr, betas, eps, decay)
    assert (cfg.lr_schedule.warmup_steps, cfg.lr_schedule.min_ratio) == (warmup, 0.0)
    assert (cfg.batch.samples, cfg.trainer.epochs) == (32768, epochs)
    model = (cfg.model.embed_dim, cfg.model.init_temperature, cfg.model.max_scale, cfg.model.init_bias)
    assert model == (width, temperature, bound, bias)
    assert not cfg.params.decay_norms_and_biases
    assert cfg.model.cache_chunk == cfg.batch.samples // cfg.target.gpus, "no chunks on as many GPUs as published"


@pytest.mark.parametrize("gpus", [1, 8, 128])
def test_a_large_batch_needs_no_number_of_gpus(gpus: int) -> None:
    check_config(compose_config(["recipe=clip_vitb32", "launch=torchrun", f"launch.devices={gpus}"]), need_assets=False)


@pytest.mark.parametrize("name", sorted(QFORMER_LINE))
def test_the_qformer_line_says_what_was_published(name: str) -> None:
    cfg = compose_config([f"recipe={name}"])
    lr, least, samples, steps, warmup, beta, template = QFORMER_LINE[name]
    assert (cfg.optim.lr, cfg.batch.samples, cfg.trainer.max_steps, cfg.trainer.epochs) == (lr, samples, steps, None)
    assert (list(cfg.optim.betas), cfg.optim.weight_decay) == ([0.9, beta], 0.05)
    assert cfg.lr_schedule._target_ == "vlm_train.training.optim.cosine"
    assert (cfg.lr_schedule.warmup_steps, cfg.lr_schedule.warmup_ratio) == (warmup, 0.0)
    assert cfg.lr_schedule.min_ratio * lr == pytest.approx(least)
    assert (
        cfg.trainer.precision == ("bf16-mixed" if "flant5" in name else "16-mixed")
        and cfg.trainer.max_grad_norm is None
    )
    own = {name: value for name, value in cfg.template.items() if name != "caption_words"}
    assert own == OmegaConf.load(config_dir() / "template" / f"{template}.yaml")
    cleaned = None if name == "minigpt4_stage2" or name.startswith("instructblip") else 50
    assert cfg.template.get("caption_words") == cleaned, "blip_processors.py; CCSBUAlignDataset leaves captions alone"
    crop = None if name.startswith("minigpt") else [0.5, 1.0]
    assert cfg.image.random_resized_crop == crop, "MiniGPT-4's blip2_image_train only resizes"


# The first warm-up rate, and rates at some steps, by lavis/common/optims.py and minigpt4/common/optims.py.
RATES = {
    "minigpt4_stage1": {0: 1e-6, 2500: 5.05e-5, 5000: 9.7071e-5, 10_000: 9e-5, 20_000: 8e-5},
    "minigpt4_llama2": {0: 1e-6, 5000: 9.7071e-5, 20_000: 8e-5},
    "minigpt4_stage2": {0: 1e-6, 200: 2e-5, 400: 1e-5},
    "blip2_stage1": {0: 1e-6, 1000: 5.05e-5, 125_000: 5.5e-5, 250_000: 1e-5},
    "blip2_stage2_opt": {0: 1e-6, 40_000: 7.5e-5, 80_000: 5e-5},
    "instructblip_vicuna7b": {0: 1e-8, 30_000: 5e-6, 60_000: 0.0},
}


@pytest.mark.parametrize("name", sorted(RATES))
def test_rates_are_those_of_the_published_schedule(name: str) -> None:
    cfg = compose_config([f"recipe={name}"])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.optim.lr)
    schedule = build_lr_schedule(cfg, optimizer, total_steps=cfg.trainer.max_steps)
    for step, rate in RATES[name].items():
        assert schedule.lr_lambdas[0](step) * cfg.optim.lr == pytest.approx(rate, rel=1e-5, abs=1e-12), step


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("blip2_stage2_opt", "train"),
        ("blip2_stage2_flant5", "train"),
        ("dynamic_qformer", "train"),
        ("hierarchical_qformer", "train"),
        ("instructblip_flant5xl", "train"),
        ("minigpt4_stage1", None),  # Vicuna has no dropout
    ],
)
def test_a_frozen_language_model_keeps_its_dropout_where_lavis_trains_it_so(name: str, mode: str | None) -> None:
    rules = compose_config([f"recipe={name}"]).params.rules
    first = next(rule for rule in rules if re.fullmatch(rule.match, "llm.model.lm_head.weight"))
    tower = next(rule for rule in rules if re.fullmatch(rule.match, "vision.model.encoder.layers.0.fc1.weight"))
    assert (first.lr, first.frozen_mode, tower.lr, tower.frozen_mode) == (None, mode, None, None)


def test_flant5_runs_with_gelu_as_in_lavis() -> None:
    for name in ("blip2_stage2_flant5", "instructblip_flant5xl"):
        assert compose_config([f"recipe={name}"]).llm.config.dense_act_fn == "gelu"


def test_only_blip2_s_temperature_decays_beside_matrices() -> None:
    rules = {rule.match: rule for rule in compose_config(["recipe=blip2_stage1"]).params.rules}
    assert rules["temperature"].decay_norms_and_biases and rules["temperature"].lr == 1e-4
    others = [rule.decay_norms_and_biases for match, rule in rules.items() if match != "temperature"]
    assert others == [None] * 3


def test_siglip_decays_kernels_alone() -> None:
    """big_vision: neither embeddings of tokens and positions nor the probe of the pooling."""
    rules = compose_config(["recipe=siglip_so400m"]).params.rules
    for name, decay in {
        "llm.model.embeddings.token_embedding.weight": 0.0,
        "llm.model.embeddings.position_embedding.weight": 0.0,
        "vision.model.embeddings.position_embedding.weight": 0.0,
        "vision.model.head.probe": 0.0,
        "vision.model.embeddings.patch_embedding.weight": None,
        "llm.model.head.weight": None,
    }.items():
        assert next(rule for rule in rules if re.fullmatch(rule.match, name)).weight_decay == decay, name


def test_blip_draws_negatives_as_published() -> None:
    objective = {name: compose_config([f"recipe={name}"]).objective.itm for name in ("blip_base", "blip_filter")}
    assert (objective["blip_base"].floor, objective["blip_base"].local) == (1e-4, True)
    assert (objective["blip_filter"].get("floor", 0.0), objective["blip_filter"].local) == (0.0, False)


@pytest.mark.parametrize(("name", "steps"), [("blip_captioner", 11_065), ("blip_filter", 13_278)])
def test_capfilt_goes_through_every_caption(name: str, steps: int) -> None:
    """566,747 captions of 113,287 images, in whole batches of 256: 2,213 a pass."""
    cfg = compose_config([f"recipe={name}"])
    entry = cfg.data.train[0]
    assert round(entry.samples * entry.repeat) == 566_747
    assert predict_length(cfg, 40.0).steps == steps == cfg.trainer.epochs * (566_747 // 256)


def test_the_filter_goes_on_with_the_temperature() -> None:
    assert "temperature" in compose_config(["recipe=blip_filter"]).init_from[0].parts


def test_clip_crops_at_random() -> None:
    cfg = compose_config(["recipe=clip_vitl14"])
    assert (cfg.image.mode, cfg.image.random_resized_crop) == ("crop", [0.9, 1.0])


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("llava15_stage2", "zero3"),
        ("llava15_13b_stage2", "zero3"),
        ("llava15_lora", "zero3"),
        ("llava15_qlora", "auto"),
        ("llava1_stage2", "zero2"),
        ("instructblip_vicuna7b", "zero1"),
    ],
)
def test_a_recipe_names_the_strategy_that_it_needs(name: str, strategy: str) -> None:
    cfg = compose_config([f"recipe={name}"])
    assert cfg.strategy == compose_config([f"recipe={name}", f"strategy={strategy}"]).strategy


@pytest.mark.parametrize("name", sorted(BLIP))
def test_blip_says_what_was_published(name: str) -> None:
    cfg = compose_config([f"recipe={name}"])
    lr, samples, epochs, length, least, smoothing = BLIP[name]
    assert (cfg.optim.lr, cfg.batch.samples, cfg.trainer.epochs, cfg.data.max_length) == (lr, samples, epochs, length)
    assert (list(cfg.optim.betas), cfg.optim.weight_decay, cfg.params.decay_norms_and_biases) == (
        [0.9, 0.999],
        0.05,
        True,
    )
    assert (list(cfg.image.random_resized_crop), cfg.image.flip) == ([least, 1.0], True)
    assert (cfg.template.caption_words, cfg.template.keep_end) == (30, True)
    assert cfg.trainer.precision == "32-true" and cfg.trainer.max_grad_norm is None
    assert (cfg.objective.lm.label_smoothing if "lm" in cfg.objective else None) == smoothing


@pytest.mark.parametrize("name", ["instructblip_vicuna7b", "instructblip_flant5xl"])
def test_instructblip_s_text_branch_is_that_of_stage_1(name: str) -> None:
    """LAVIS issue 344: no stage 2 has one."""
    stage = compose_config([f"schedule={name}"]).schedule.stages[-1]
    assert {source.run: list(source.parts) for source in stage.init_from}["blip2_stage1"] == ["connector.text"]
    assert compose_config([f"recipe={name}"]).connector.weights is None


def test_instructblip_draws_by_the_square_root_of_sizes() -> None:
    cfg = compose_config(["recipe=instructblip_vicuna7b"])
    assert cfg.data.mixture == "sqrt" and len(cfg.data.train) == 13
    assert cfg.instruction.max_length == 128 and cfg.connector.vocab_size == 30523


@pytest.mark.parametrize("name", ["llava15_lora", "llava15_qlora"])
def test_lora_learns_adapters_and_the_projector_at_their_own_rates(name: str) -> None:
    cfg = compose_config([f"recipe={name}"])
    assert (cfg.peft.rank, cfg.peft.alpha, cfg.peft.dropout) == (128, 256, 0.05)
    assert {rule.match: rule.lr for rule in cfg.params.rules} == {
        r"llm\..*\.lora_.*": 2e-4,
        r"connector\..*": 2e-5,
        ".*": None,
    }


@pytest.mark.parametrize(
    "name", ["llava1_stage2", "llava15_stage2", "llava15_13b_stage2", "llava15_lora", "llava15_qlora"]
)
def test_a_second_stage_says_what_it_waits_for(name: str) -> None:
    cfg = compose_config([f"recipe={name}"])
    assert OmegaConf.is_missing(cfg.init_from[0], "run")
    assert list(cfg.init_from[0].parts) == ["connector"]


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_hands_over_what_its_recipes_wait_for(name: str) -> None:
    cfg = compose_config([f"schedule={name}"])
    assert cfg.schedule.name == name
    earlier: list[str] = []
    for stage in cfg.schedule.stages:
        assert stage.recipe in RECIPES
        recipe = compose_config([f"recipe={stage.recipe}"])
        assert all(source.run in earlier for source in stage.init_from)
        assert [s.parts for s in stage.init_from] == [s.parts for s in recipe.init_from]
        earlier.append(stage.recipe)
    assert len(earlier) > 1


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_schedule_fixes_a_learning_rate(name: str) -> None:
    """Else optim.lr on the command line would do nothing to that stage."""
    for stage in compose_config([f"schedule={name}"]).schedule.stages:
        assert not re.search(r"\blr:\s*\d", " ".join(stage.overrides)), stage.overrides


def test_replay_changes_the_mixture_only() -> None:
    """docs/hallucination.md compares the two: the same steps of as many samples, a tenth of them dialogues."""
    without, replay = (compose_config([f"recipe={name}"]) for name in ("small_no_replay", "small_replay"))
    texts = replay.data.train[1]
    assert texts.share == 0.1 and texts.shards == without.eval.text.shards.replace("/val", "/train")
    assert [*replay.data.train[:1]] == [*without.data.train]
    for cfg in (without, replay):
        cfg.data.train, cfg.recipe_name = [], ""
    assert without == replay
