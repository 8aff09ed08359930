"""Any `transformers` vision transformer as a vision encoder: embeddings, layers, features of the layers one asks for.

Legend: N views, P patches (plus the class token with `keep_cls`), D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from vlm_train.contracts.layout import MediaSize
from vlm_train.contracts.media import Features, Grid3, MediaInput
from vlm_train.errors import ConfigError
from vlm_train.models.layers.drop_path import add_drop_path
from vlm_train.models.layers.flash import FLASH
from vlm_train.models.weights.clip_init import init_vision
from vlm_train.models.weights.hub import ATTENTION, build_model, load_pretrained
from vlm_train.models.weights.inside import load_inside

# Whole CLIP-type checkpoints also hold a text tower and the projections of the contrastive head.
_NOT_VISION = (
    r"^text_model\.",
    r"^classifier\.",
    r"^logit_(scale|bias)$",
    r"(text|visual)_projection",
    r"position_ids$",
)

PRE_NORM = "pre_layrnorm"
"""Of CLIP, before the first layer; spelled so in transformers."""


def fixed_grid(size: MediaSize, grid: Grid3) -> Grid3:
    """The patch grid of an encoder with one input resolution: the same for every view."""
    del size
    return grid


ATTENTIONS = (FLASH, *ATTENTION)
"""What a tower may attend by."""


class HFVision(nn.Module):
    """A tower with `embeddings` and `encoder.layers` (CLIP, SigLIP, DINOv2, ...) built from `config`.

    Features follow `hidden_states[layer]` of `transformers` and of LLaVA: 0 is the input of the first layer, -1 the
    output of the last one, without the final norm. Only the layers below the deepest chosen one are run.

    Args:
        config: `{model_type, ...}`, the fields of the `transformers` configuration.
        weights: hub name or local folder, read by `load_weights`; a whole BLIP, BLIP-2 or InstructBLIP gives its tower.
            None: random.
        layer: which hidden state, or several, concatenated along the width; between 0 and 1: so much of the depth.
        keep_cls: keep the tokens in front of the patches; the features then have no grid: (1, 1, P).
        final_norm: apply the tower's final LayerNorm (`layer` must be -1), as CLIP's own image embedding does.
        image_mean, image_std: per channel, of pixels in [0, 1].
        image_size: pixels of a view, one number or (height, width); null: those of `config`. For another size the
            tower interpolates its positions.
        attention: `sdpa`, `flash` (the flash-attn package) or `eager`.
        init: random weights as `transformers` has them (`library`), or as CLIP's training started (`clip`).
        drop_path: probability that training leaves out a branch of the last layer, see `add_drop_path`.
    """

    def __init__(
        self,
        *,
        config: Mapping[str, Any],
        weights: str | None = None,
        layer: float | Sequence[float] = -2,
        keep_cls: bool = False,
        final_norm: bool = False,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        image_size: int | Sequence[int] | None = None,
        attention: str = "sdpa",
        init: str = "library",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.numbers, self.weights = dict(config), weights
        self.model = build_model(_auto_model(config.get("model_type")), "vision", config, attention, ATTENTIONS)
        _init_weights(self.model, init)
        tower_config = self.model.config
        self.tower_path = "vision_model" if hasattr(self.model, "vision_model") else ""  # some classes nest it once
        _check_tower(self.tower, tower_config)
        blocks = "layers" if hasattr(self.tower.encoder, "layers") else "layer"
        self.layers_path = f"{self.tower_path}.encoder.{blocks}".lstrip(".")
        self.depth, self.drop_path = len(self.layers), drop_path
        add_drop_path(self.layers, drop_path, setting="vision.drop_path")
        # Some layers take a mask as their second argument, in some releases only.
        takes_mask = "attention_mask" in inspect.signature(type(self.layers[0]).forward).parameters
        self._no_mask = (None,) if takes_mask else ()
        self.layer = _count_layers(layer, self.depth)
        self.chosen = _resolve_layers(self.layer, self.depth)
        self.keep_cls, self.final_norm = keep_cls, final_norm
        if final_norm and self.chosen != (self.depth,):
            raise ConfigError(f"vision.final_norm: needs vision.layer = -1, got {layer!r}")

        own_size, patch = _to_pair(tower_config.image_size), _to_pair(tower_config.patch_size)
        size = own_size if image_size is None else _to_pair(image_size)
        if any(not 0 < one <= whole for one, whole in zip(patch, size, strict=True)):
            raise ConfigError(f"vision.config: image_size={size} holds no patch of patch_size={patch}")
        self._embedding_options = {} if size == own_size else _choose_options(self.tower.embeddings, size, patch)
        self.image_size = size
        self.grid = Grid3(1, size[0] // patch[0], size[1] // patch[1])
        self.prefix_tokens = self._count_prefix_tokens()
        self.kept_grid = Grid3(1, 1, self.grid.size + self.prefix_tokens) if keep_cls else self.grid
        self.patch_grid = partial(fixed_grid, grid=self.kept_grid)
        self.out_dim = tower_config.hidden_size * len(self.chosen)
        self.image_mean, self.image_std = _to_triple("image_mean", image_mean), _to_triple("image_std", image_std)
        if min(self.image_std) <= 0:
            raise ConfigError(f"vision.image_std: got {self.image_std}; allowed: numbers above 0")
        self._register_statistics(torch.empty(0).device)

    @property
    def tower(self) -> Any:
        """The module that holds `embeddings` and `encoder`."""
        return self.model.get_submodule(self.tower_path)

    @property
    def layers(self) -> nn.ModuleList:
        """The encoder blocks, for layer-wise learning rates and activation checkpointing."""
        return self.model.get_submodule(self.layers_path)

    @property
    def pooling_head(self) -> Any:
        """The tower's own attention pooling, normalized features `[N, P, D]` -> `[N, D]` (SigLIP); None without."""
        return getattr(self.tower, "head", None)

    @property
    def interpolates(self) -> bool:
        """Whether its positions are interpolated because its caller asks for it, which other programs may not do."""
        return bool(self._embedding_options)

    def encode(self, media: MediaInput) -> Features:
        """Features `[N * P, D_v]` of uint8 views `[N, 3, H, W]`."""
        tower: Any = self.model.get_submodule(self.tower_path)
        layers: Any = self.model.get_submodule(self.layers_path)
        dtype = next(tower.embeddings.parameters()).dtype
        mean, std = self.get_buffer("mean").to(dtype), self.get_buffer("std").to(dtype)
        pixels = (media.values.to(dtype) / 255 - mean) / std
        hidden = tower.embeddings(pixels, **self._embedding_options)
        if hasattr(tower, PRE_NORM):
            hidden = getattr(tower, PRE_NORM)(hidden)
        states = {0: hidden}
        for index, block in enumerate(layers[: max(self.chosen)], start=1):
            hidden = block(hidden, *self._no_mask)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
            if index in self.chosen:
                states[index] = hidden
        features = [states[index] for index in self.chosen]
        if self.final_norm:
            features = [_final_norm(tower)(features[0])]
        if not self.keep_cls:
            features = [state[:, self.prefix_tokens :] for state in features]
        values = features[0] if len(features) == 1 else torch.cat(features, dim=-1)
        return Features.from_rectangular(values, self.kept_grid)

    def forward(self, media: MediaInput) -> Features:
        """The same as `encode`."""
        return self.encode(media)

    def unused_parameters(self) -> list[str]:
        """Names of parameters that `encode` never reads: later layers, final norm, pooling head. Kept for export."""
        used = [self.tower.embeddings, *self.layers[: max(self.chosen)]]
        used += [getattr(self.tower, PRE_NORM)] if hasattr(self.tower, PRE_NORM) else []
        used += [_final_norm(self.tower)] if self.final_norm else []
        read = {id(p) for module in used for name, p in module.named_parameters() if not name.endswith("mask_token")}
        return [name for name, parameter in self.named_parameters() if id(parameter) not in read]

    def load_weights(self) -> None:
        """Read `weights` into the tower. Raises `AssetError` if they are not those of this architecture."""
        if self.weights is None:
            return
        if load_inside(self.model, self.weights, side="vision", setting="vision.weights", config=self.numbers):
            return
        self.model = load_pretrained(
            self.model, self.weights, setting="vision.weights", declared=_NOT_VISION, config=self.numbers
        )
        add_drop_path(self.layers, self.drop_path, setting="vision.drop_path")  # on the copy that was read
        self._register_statistics(next(self.model.parameters()).device)

    def _register_statistics(self, device: torch.device) -> None:
        for name, values in (("mean", self.image_mean), ("std", self.image_std)):
            self.register_buffer(name, torch.tensor(values, device=device).view(1, 3, 1, 1), persistent=False)

    def _count_prefix_tokens(self) -> int:
        embeddings = self.tower.embeddings
        registers = getattr(self.model.config, "num_register_tokens", 0)
        return int(hasattr(embeddings, "class_embedding") or hasattr(embeddings, "cls_token")) + registers


def _auto_model(model_type: Any) -> Any:
    """`AutoModel`, told of a tower that it does not list, as those of BLIP and BLIP-2."""
    import transformers

    mapping: Any = transformers.CONFIG_MAPPING
    if model_type in mapping:
        config = mapping[model_type]
        tower = getattr(transformers, config.__name__.removesuffix("Config") + "Model", None)
        if tower is not None and config not in transformers.AutoModel._model_mapping:
            transformers.AutoModel.register(config, tower, exist_ok=True)  # else ignored for its own classes
    return transformers.AutoModel


def _init_weights(model: Any, init: str) -> None:
    """Random weights as CLIP's training started, if `init` says so. Raises ConfigError for another word."""
    if init not in ("library", "clip") or (init == "clip" and model.config.model_type != "clip_vision_model"):
        raise ConfigError(f"vision.init: {init!r}; allowed: library; clip for clip_vision_model")
    if init == "clip":
        init_vision(model)


def _check_tower(tower: Any, config: Any) -> None:
    """Raises ConfigError for a model that is no vision transformer of the usual shape."""
    encoder = getattr(tower, "encoder", None)
    shaped = hasattr(tower, "embeddings") and (hasattr(encoder, "layers") or hasattr(encoder, "layer"))
    if not shaped or not hasattr(config, "image_size") or not hasattr(config, "patch_size"):
        raise ConfigError(
            f"vision.config.model_type: {config.model_type!r} ({type(tower).__name__}) is no tower with embeddings, "
            "encoder layers and one input size, as CLIP, SigLIP, DINOv2 or ViT; choose one, or write a part of your own"
        )
    if getattr(config, "num_channels", 3) != 3:
        raise ConfigError(f"vision.config.num_channels: got {config.num_channels}; allowed: 3, pictures have colors")


def _choose_options(embeddings: Any, size: tuple[int, int], patch: tuple[int, int]) -> dict[str, bool]:
    """What embeddings are told, so that they take views of a size they were not made for. Raises ConfigError."""
    if any(whole % one for one, whole in zip(patch, size, strict=True)):
        raise ConfigError(f"vision.image_size: got {size}; allowed: multiples of patch_size={patch}")
    if "interpolate_pos_encoding" in inspect.signature(type(embeddings).forward).parameters:
        return {"interpolate_pos_encoding": True}
    if not hasattr(embeddings, "interpolate_pos_encoding"):
        raise ConfigError(f"vision.image_size: {type(embeddings).__name__} cannot interpolate its positions; use null")
    return {}  # it always does


def _count_layers(layer: float | Sequence[float], depth: int) -> int | list[int]:
    """`layer` with shares of the depth as numbers of layers. What is no whole number otherwise stays, to be refused."""
    if isinstance(layer, Sequence):
        return [_count_layers(one, depth) for one in layer]  # type: ignore[misc]
    return round(layer * depth) if 0 < layer < 1 else layer  # type: ignore[return-value]


def _resolve_layers(layer: int | Sequence[int], depth: int) -> tuple[int, ...]:
    """Indices into hidden_states (0 .. depth) of the chosen layers, in the order given."""
    wanted = list(layer) if isinstance(layer, Sequence) else [layer]
    if not wanted or any(not (isinstance(index, int) and -depth - 1 <= index <= depth) for index in wanted):
        raise ConfigError(
            f"vision.layer: {layer!r} does not exist; the tower has {depth} layers: {-depth - 1} ... {depth}"
        )
    return tuple(index % (depth + 1) for index in wanted)


def _final_norm(tower: Any) -> Any:
    for name in ("post_layernorm", "layernorm"):
        if hasattr(tower, name):
            return getattr(tower, name)
    raise ConfigError(f"vision.final_norm: {type(tower).__name__} has no final norm")


def _to_pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _to_triple(name: str, values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) != 3:
        raise ConfigError(f"vision.{name}: needs three numbers, got {list(values)}")
    return (float(values[0]), float(values[1]), float(values[2]))
