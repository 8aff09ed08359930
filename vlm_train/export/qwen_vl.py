"""To Qwen2-VL and Qwen2.5-VL of `transformers`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm_train.contracts.layout import MediaSize
from vlm_train.contracts.media import Grid3, MediaInput
from vlm_train.data.images.native import NativeResolution
from vlm_train.data.media_layout import make_layout
from vlm_train.data.processor import Processor
from vlm_train.data.text.streams import PlacedSlot
from vlm_train.errors import ConfigError
from vlm_train.export.chat import ServedImages, add_chat_template, describe_chat_template
from vlm_train.export.merged import find_quantized, merged_state
from vlm_train.export.shared import (
    language_state,
    load_served,
    load_without_videos,
    require_same_logits,
    save_model,
    write_json_files,
)
from vlm_train.export.vocabulary import rows_with
from vlm_train.models.connectors.pixel_shuffle import PixelShuffleMLP
from vlm_train.models.families.prefix_vlm import PrefixVLM
from vlm_train.models.llms.hf import HFCausalLM
from vlm_train.models.vision.qwen import QwenVision, name_theirs

IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
START, END = "<|vision_start|>", "<|vision_end|>"
NORMS: dict[str, Any] = {"qwen2_vl_text": torch.nn.LayerNorm, "qwen2_5_vl_text": torch.nn.RMSNorm}
"""`model_type` of the language model -> the norm of tower and merger."""


class QwenVLExporter:
    """Writes Qwen2-VL or Qwen2.5-VL, as its language model says.

    The processor needs torchvision where it is used. No test runs its video processor."""

    def problems(self, model: Any) -> list[str]:
        return find_problems(model)

    def write(self, model: Any, processor: Processor, folder: Path) -> str:
        plan, tokenizer = require_plan(processor, model), add_media_tokens(processor.tokenizer)
        tokens = {
            f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
            for name, token in (("image", IMAGE), ("video", VIDEO), ("vision_start", START), ("vision_end", END))
        }
        text = copy.deepcopy(model.llm.model.config)
        text.vocab_size = rows_with(max(tokens.values()), model.llm.vocab_size)
        text.dtype = next(model.llm.parameters()).dtype
        kind, config_kind = choose_classes(text.model_type)
        config = config_kind(
            text_config=text.to_dict(),
            vision_config=describe_tower(model),
            tie_word_embeddings=text.tie_word_embeddings,
            dtype=text.dtype,
            **tokens,
        )
        state = tower_state(model.vision) | language_state(model.llm, text.vocab_size)
        for ours, theirs in (("patch_norm", "ln_q"), ("layers", "mlp")):
            for name, value in merged_state(model.connector.get_submodule(ours)).items():
                state[f"model.visual.merger.{theirs}.{name}"] = value
        save_model(kind, config, state, tokenizer, processor.end_ids, folder)
        write_processor(folder, model, plan, tokenizer)
        size = MediaSize(width=plan.side * 3, height=plan.side * 2)
        return describe_chat_template(
            add_chat_template(folder, processor, size, ServedImages(IMAGE, load=load_images_only))
        )

    @torch.no_grad()
    def verify(self, model: Any, folder: Path) -> float:
        served = load_served(choose_classes(model.llm.model.config.model_type)[0], model, folder)
        generator, grid = torch.Generator().manual_seed(0), Grid3(1, 4, 6)
        patch = 3 * model.vision.frames_per_patch * model.vision.patch_size**2
        values = torch.randint(0, 256, (grid.size, patch), dtype=torch.uint8, generator=generator)
        parameter = next(model.llm.parameters())
        media = MediaInput(values.to(parameter.device), (grid,), (1,))
        image = model.connector(model.vision.encode(media)).values
        most = min(model.llm.vocab_size, served.config.image_token_id, served.config.vision_start_token_id)
        text = torch.randint(0, most, (1, 8), generator=generator).to(parameter.device)
        slots = torch.full((1, len(image)), served.config.image_token_id, device=parameter.device)
        ids = torch.cat([text[:, :4], slots, text[:, 4:]], dim=1)
        theirs = served(
            input_ids=ids,
            mm_token_type_ids=(ids == served.config.image_token_id).int(),
            pixel_values=in_squares(normalize(model.vision, values), grid, model.connector.factor).to(image),
            image_grid_thw=torch.tensor([grid], device=parameter.device),
        ).logits
        layout: Any = make_layout(model, {"vision": _OneGrid(grid)})
        ((slot,),) = layout([MediaSize(width=1, height=1)])
        positions = torch.from_numpy(layout.positions(ids.shape[1], [PlacedSlot(4, slot)]))[:, None]
        embeds = model.llm.embed(torch.where(ids == served.config.image_token_id, 0, ids))
        embeds = torch.cat([embeds[:, :4], image[None].to(embeds.dtype), embeds[:, 4 + len(image) :]], dim=1)
        ours = model.llm.head(model.llm.decode(embeds, positions.to(parameter.device), None))
        return require_same_logits(ours, theirs, folder)


class _OneGrid:
    """An image plan that gives every image the same patches."""

    def __init__(self, grid: Grid3) -> None:
        self.grid = grid

    def grids(self, size: MediaSize) -> tuple[Grid3, ...]:
        """The grid."""
        return (self.grid,)


def choose_classes(model_type: str) -> tuple[Any, Any]:
    """The class of a whole model, and of its configuration, for the `model_type` of its language model."""
    import transformers

    if model_type == "qwen2_vl_text":
        return transformers.Qwen2VLForConditionalGeneration, transformers.Qwen2VLConfig
    return transformers.Qwen2_5_VLForConditionalGeneration, transformers.Qwen2_5_VLConfig


def find_problems(model: Any) -> list[str]:
    """Every reason why neither Qwen2-VL nor Qwen2.5-VL can express `model`. Reads no weight: it may be on meta."""
    if type(model) is not PrefixVLM:
        return [f"model: {type(model).__name__} has no Qwen-VL equivalent; only PrefixVLM does"]
    vision, llm, problems = model.vision, model.llm, list[str]()
    connector: Any = model.connector
    kind = llm.model.config.model_type if isinstance(llm, HFCausalLM) else type(llm).__name__
    if kind not in NORMS:
        return [f"llm: {kind}; Qwen-VL has qwen2_vl_text and qwen2_5_vl_text (llm=qwen25_vl_3b)"]
    older, norm = kind == "qwen2_vl_text", NORMS[kind]
    if not isinstance(vision, QwenVision):
        problems.append(f"vision: {type(vision).__name__}; Qwen-VL has a tower of its own (vision=qwen25_vit)")
    else:
        layer: Any = vision.layers[0]
        windows = vision.window is not None
        if not isinstance(layer.norm1, norm) or hasattr(layer.mlp, "gate_proj") == older or (older and windows):
            problems.append(f"vision: norm, gated and window are not those of {kind}")
        elif older and layer.mlp.fc1.out_features % vision.out_dim:
            problems.append("vision.mlp_dim: Qwen2-VL's is a multiple of vision.dim")
    if (
        not isinstance(connector, PixelShuffleMLP)
        or not isinstance(connector.patch_norm, norm)
        or len(connector.layers) != 3
        or connector.layers[0].bias is None
        or connector.layers[0].in_features != connector.layers[0].out_features
        or connector.patch_norm.eps != 1e-6
    ):
        problems.append(
            f"connector: {type(connector).__name__}; {kind} goes with connector=qwen{'2' if older else '25'}_merger"
        )
    if model.stitcher is not None:
        problems.append(f"parts.stitcher: {type(model.stitcher).__name__}; Qwen-VL joins no tiles")
    if older and llm.tokens_per_second is not None:
        problems.append("llm.tokens_per_second: Qwen2-VL knows no time; use null")
    if layer_name := find_quantized(model):
        problems.append(f"{layer_name}: is quantized; its adapter can only be merged into an unquantized base model")
    return problems


def require_plan(processor: Processor, model: Any) -> NativeResolution:
    """The image plan of the processor. Raises `ConfigError` if it makes other patches than Qwen-VL's."""
    plan = processor.images["vision"]
    if not isinstance(plan, NativeResolution):
        raise ConfigError(f"image: {type(plan).__name__}; Qwen-VL's images have their own size (image=qwen2)")
    if plan.side != model.vision.patch_size * model.connector.factor:
        raise ConfigError(f"image.merge: the connector joins {model.connector.factor} patches a side; use the same")
    return plan


def add_media_tokens(tokenizer: Any) -> Any:
    """A copy of a tokenizer that knows Qwen-VL's media tokens, without a chat template.

    Raises:
        ConfigError: it has no tokens around an image.
    """
    if missing := [token for token in (START, END) if token not in tokenizer.get_vocab()]:
        raise ConfigError(f"tokenizer: has no token {', '.join(missing)}; Qwen-VL's prompts do")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = None
    if new := [token for token in (IMAGE, VIDEO) if token not in tokenizer.get_vocab()]:
        tokenizer.add_special_tokens({"additional_special_tokens": new}, replace_extra_special_tokens=False)
    return tokenizer


def describe_tower(model: PrefixVLM) -> dict[str, Any]:
    """The `vision_config` of a tower and its merger."""
    vision, factor = model.vision, model.connector.factor
    layer: Any = vision.layers[0]
    common = {
        "depth": len(vision.layers),
        "num_heads": layer.heads,
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.frames_per_patch,
        "spatial_merge_size": factor,
    }
    if not hasattr(layer.mlp, "gate_proj"):
        ratio = layer.mlp.fc1.out_features // vision.out_dim
        return common | {"embed_dim": vision.out_dim, "hidden_size": model.llm.dim, "mlp_ratio": ratio}
    windows = {} if vision.window is None else {"window_size": vision.window * vision.patch_size}
    return (
        common
        | windows
        | {
            "hidden_size": vision.out_dim,
            "out_hidden_size": model.llm.dim,
            "intermediate_size": layer.mlp.gate_proj.out_features,
            "fullatt_block_indexes": sorted(vision.full_layers),
            "tokens_per_second": model.llm.tokens_per_second,
        }
    )


def tower_state(vision: QwenVision) -> dict[str, Tensor]:
    """The tower's weights under the names of the whole model, its patch embedding as a convolution again."""
    state = {f"model.visual.{name_theirs(key)}": value for key, value in merged_state(vision).items()}
    kernel = state["model.visual.patch_embed.proj.weight"]
    shape = (3, vision.frames_per_patch, vision.patch_size, vision.patch_size)
    state["model.visual.patch_embed.proj.weight"] = kernel.unflatten(1, shape)
    return state


def normalize(vision: QwenVision, values: Tensor) -> Tensor:
    """Patches `[F, 3 * T * p * p]` of uint8 as the library's processor gives them."""
    mean, std = (torch.tensor(one).view(3, 1) for one in (vision.image_mean, vision.image_std))
    return ((values.unflatten(1, (3, -1)) / 255 - mean) / std).flatten(1)


def in_squares(patches: Tensor, grid: Grid3, side: int) -> Tensor:
    """Patches `[F, ...]` of one view, row by row -> square by square of `side` x `side`, as the library has them."""
    squares = patches.unflatten(0, (grid.t, grid.h // side, side, grid.w // side, side))
    return squares.transpose(2, 3).flatten(0, 4)


def write_processor(folder: Path, model: Any, plan: NativeResolution, tokenizer: Any) -> None:
    """Write the files of a Qwen-VL processor. The class itself cannot be made without torchvision."""
    from transformers import Qwen2VLImageProcessorPil

    vision = model.vision
    common: dict[str, Any] = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.frames_per_patch,
        "merge_size": model.connector.factor,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
    }
    least, most = plan.image_pixels
    Qwen2VLImageProcessorPil(size={"shortest_edge": least, "longest_edge": most}, **common).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    least, most = plan.frame_pixels
    videos = {
        "video_processor_type": "Qwen2VLVideoProcessor",
        "size": {"shortest_edge": least, "longest_edge": most},
        "fps": plan.fps,
        "min_frames": plan.min_frames,
        "max_frames": plan.frames,
        **common,
    }
    older = model.llm.model.config.model_type == "qwen2_vl_text"
    processor = {"processor_class": "Qwen2VLProcessor" if older else "Qwen2_5_VLProcessor"}
    write_json_files(folder, video_preprocessor_config=videos, processor_config=processor)


def load_images_only(folder: Path) -> Any:
    """The processor of a folder without its videos."""
    from transformers import Qwen2VLImageProcessorPil, Qwen2VLProcessor

    return load_without_videos(Qwen2VLProcessor, folder, Qwen2VLImageProcessorPil.from_pretrained(folder))
