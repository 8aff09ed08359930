"""Both sides of a comparison: our loader as `fit` drives it, and raw webdataset with Pillow, doing the same work.

Theirs makes pixels only. Ours makes what training needs: it checks checksums and headers, shuffles over all samples,
renders the conversation to tokens and labels, and collates all of it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import webdataset
import yaml
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.corpus import tars
from data_pipelines.media.pictures import Decoder
from vlm_train.config.schema import BatchSize
from vlm_train.contracts.batch import Batch
from vlm_train.contracts.layout import GridLayout, MediaSize
from vlm_train.contracts.media import Grid3
from vlm_train.data.datamodule import VLMData
from vlm_train.data.images.transform import ImageTransform, Mode, Resizer
from vlm_train.data.order.cost import Cost
from vlm_train.data.processor import Processor
from vlm_train.data.text.template import ChatTemplate
from vlm_train.data.text.tokenizer import byte_level
from vlm_train.models.connectors.grids import same_grid

SIDE = 336
MEAN = (0.48145466, 0.4578275, 0.40821073)
BATCH = 8
PREFETCH = 4
CONF = Path(__file__).resolve().parents[1] / "conf"


def our_data(
    folder: Path,
    steps: int,
    *,
    first: int = 0,
    workers: int = 0,
    mode: Mode = "crop",
    draft: bool = False,
    decode: Decoder = "pillow",
    resize: Resizer = "pillow",
    shuffle: bool = True,
) -> VLMData:
    """The data module of a LLaVA-1.5 run (576 image tokens, one token a byte of text), `steps` before its end."""
    data = VLMData(
        train=[{"shards": str(folder)}],
        val=[],
        processor=our_processor(mode, draft, decode, resize),
        batch=BatchSize(samples=BATCH, micro=BATCH),
        shuffle="full" if shuffle else "none",
        workers=workers,
        prefetch=PREFETCH,
    )
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer: Any = SimpleNamespace(global_step=first, global_rank=0, world_size=1, strategy=strategy)
    data.trainer = trainer
    data.plan = data.make_plan(batch=BATCH, tokens=None, epochs=None, most=first + steps, world=1, cost=Cost())
    return data


def our_processor(
    mode: Mode = "crop", draft: bool = False, decode: Decoder = "pillow", resize: Resizer = "pillow"
) -> Processor:
    """That of the run."""
    options = yaml.safe_load((CONF / "template" / "vicuna_v1.yaml").read_text(encoding="utf-8"))
    about: dict[str, Any] = {"patch_grid": patch_grid, "jpeg_draft": draft, "decode": decode, "resize": resize}
    plan = ImageTransform(mode=mode, size=(SIDE, SIDE), mean=MEAN, **about)
    return Processor(
        template=ChatTemplate(**{name: value for name, value in options.items() if name != "_target_"}),
        tokenizer=byte_level(),
        layout=GridLayout(plan.grids, same_grid),
        images={"vision": plan},
    )


def our_loader(folder: Path, steps: int, **options: Any) -> Iterator[Batch]:
    """The batches of `steps` optimizer steps; options as in `our_data`."""
    yield from our_data(folder, steps, **options).train_dataloader()


def webdataset_loader(folder: Path, *, mode: Mode = "crop", workers: int = 0) -> DataLoader[Any]:
    """All samples in file order, as batches of pixels."""
    stages = webdataset.WebDataset(tars(folder), shardshuffle=False).to_tuple("0.jpg")
    pixels = stages.map(partial(first_view, mode=mode)).batched(BATCH, collation_fn=stack)
    return DataLoader(pixels, batch_size=None, num_workers=workers, prefetch_factor=PREFETCH if workers else None)


def first_view(parts: tuple[bytes], mode: Mode) -> np.ndarray:
    """Pixels `[3, H, W]` of a sample's first file."""
    return their_transform(parts[0], mode)


def stack(views: list[np.ndarray]) -> torch.Tensor:
    """A batch `[N, 3, H, W]`."""
    return torch.from_numpy(np.stack(views))


def patch_grid(size: MediaSize) -> Grid3:
    """Patches of 14 pixels, as of a ViT-L/14."""
    del size
    return Grid3(1, SIDE // 14, SIDE // 14)


def their_transform(data: bytes, mode: Mode) -> np.ndarray:
    """The view `[3, H, W]` as one writes it with Pillow."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = image.size
    if mode == "crop":
        new = (SIDE, int(SIDE * height / width)) if width <= height else (int(SIDE * width / height), SIDE)
        image = image.resize(new, Image.Resampling.BICUBIC)
        left, top = (new[0] - SIDE) // 2, (new[1] - SIDE) // 2
        image = image.crop((left, top, left + SIDE, top + SIDE))
    else:
        if mode == "pad" and width != height:
            side = max(width, height)
            square = Image.new("RGB", (side, side), tuple(int(channel * 255) for channel in MEAN))
            square.paste(image, ((side - width) // 2, (side - height) // 2))
            image = square
        image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
