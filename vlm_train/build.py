"""Configuration -> objects. The only place that threads widths, tokenizer and image layout between parts."""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig
from torch import nn
from transformers.utils.logging import disable_progress_bar

from vlm_train.data.image import ImageTransform
from vlm_train.data.layout import GridLayout, MediaLayout, NoMedia
from vlm_train.data.streams import CAUSAL, Alignment
from vlm_train.launch import rank
from vlm_train.peft import hits
from vlm_train.randomness import derive_seed

PARTS = ("vision", "connector", "llm")


@dataclass
class Built:
    """The objects of a run. `instruction` writes the stream "qformer", where the model reads one."""

    cfg: DictConfig
    model: nn.Module
    tokenizer: Any
    template: Any
    layout: MediaLayout
    image: ImageTransform | None
    instruction: Any = None

    @property
    def streams(self) -> Mapping[str, Alignment]:
        """The token streams that the model reads, and their alignment: the family's attribute `streams`."""
        return cast(Mapping[str, Alignment], getattr(self.model, "streams", CAUSAL))

    @property
    def rendering(self) -> dict[str, Any]:
        """What `vlm_train.data.render` has to know of the model, besides its media layout."""
        if self.streams == CAUSAL:
            return {}
        return {"streams": dict(self.streams), "instruction": self.instruction}

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of one view; a small dummy where the family has no images."""
        return self.image.size if self.image is not None else (8, 8)


def make(node: DictConfig, **threaded: Any) -> Any:
    """Call a node's `_target_` with its options and what the other parts give."""
    return instantiate(node, _partial_=True, _convert_="all")(**threaded)


def quiet() -> None:
    """Keep packages that others import along from talking about what this machine lacks."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def build(cfg: DictConfig, *, meta: bool = False) -> Built:
    """Build everything a run needs but its data; with `meta` the model has shapes, but no weights."""
    quiet()
    if not sys.stderr.isatty():
        disable_progress_bar()  # of transformers, which writes bars into log files
    tokenizer = make(cfg.tokenizer)
    template = make(cfg.template)
    template.check(tokenizer)
    model = build_model(cfg, tokenizer, meta=meta)
    if rank() == 0:
        for line in hits(model):
            print(line, flush=True)
    image = build_image(cfg, model)
    instruction = None if cfg.instruction is None else make(cfg.instruction)
    return Built(cfg, model, tokenizer, template, build_layout(model, image), image, instruction)


def halve(model: nn.Module) -> None:
    """Parameters in bf16 (`trainer.precision=bf16-true`), but quantised ones. Buffers stay: rotary ones lose positions
    in 16 bits."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16)


def build_model(cfg: DictConfig, tokenizer: Any = None, *, meta: bool = False) -> nn.Module:
    """The model of a configuration: parts, their weights, the family's wiring, adapters.

    Args:
        tokenizer: gives the vocabulary size where `llm.config` leaves it open.
        meta: on the meta device, without weights.
    """
    family = get_class(cfg.model._target_)
    wanted = [name for name in PARTS if name in inspect.signature(family).parameters]
    parts: dict[str, Any] = {}
    with torch.device("meta" if meta else "cpu"):
        for name in (n for n in ("vision", "llm", "connector") if n in wanted):
            torch.manual_seed(derive_seed(cfg.seed, "init", name))
            parts[name] = make(cfg[name], **_threaded(name, parts, cfg, tokenizer))
            if not meta and getattr(parts[name], "weights", None):
                parts[name].load_weights()
        torch.manual_seed(derive_seed(cfg.seed, "init", "model"))
        model = cast(nn.Module, make(cfg.model, **parts))
        if not meta and hasattr(model, "load_weights"):
            cast(Any, model).load_weights()
        if cfg.peft is not None:
            torch.manual_seed(derive_seed(cfg.seed, "init", "peft"))
            make(cfg.peft, model=model)
    return model


def _threaded(name: str, parts: dict[str, Any], cfg: DictConfig, tokenizer: Any) -> dict[str, Any]:
    """What the other parts decide about part `name`."""
    if name == "connector":
        widths = {"in_dim": parts["vision"].out_dim, "out_dim": parts["llm"].dim if "llm" in parts else None}
        reads = "vocab_size" in cfg.connector and cfg.connector.vocab_size is None and tokenizer is not None
        return widths | ({"vocab_size": len(tokenizer)} if reads else {})
    if name == "llm" and tokenizer is not None:
        size = cfg.llm.config.get("vocab_size")
        if size is None:
            return {"vocab_size": len(tokenizer)}
        if "new_tokens" in cfg.llm:
            return {}
        return {"new_tokens": max(0, len(tokenizer) - size)}  # padded tables have room; others get rows of their own
    return {}


def build_image(cfg: DictConfig, model: Any) -> ImageTransform | None:
    """The image transform, with the size and mean of the model's tower; None without a tower."""
    vision = getattr(model, "vision", None)
    if vision is None:
        return None
    return cast(ImageTransform, make(cfg.image, size=tuple(vision.image_size), mean=tuple(vision.image_mean)))


def build_layout(model: Any, image: ImageTransform | None) -> MediaLayout:
    """The media layout: a picklable object without weights. A family whose media stand otherwise brings its own."""
    if hasattr(model, "media_layout"):
        return cast(MediaLayout, model.media_layout(image))
    connector = getattr(model, "connector", None)
    if connector is None or image is None:
        return NoMedia()
    return GridLayout(ViewGrid(image, model.vision.patch_grid), connector.token_grid, views=image.view_count)


@dataclass(frozen=True)
class ViewGrid:
    """Patch grid of the view that the image transform makes of a media item."""

    image: ImageTransform
    patch_grid: Any

    def __call__(self, size: Any) -> Any:
        return self.patch_grid(self.image.view_size(size))
