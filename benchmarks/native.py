"""Benchmark of towers of native resolution: `python -m benchmarks.native [key=value ...]`.

Images of mixed sizes in one sequence, as the tower takes them / the same images padded to the largest, by the same
layers. Options: pairs=7; images=12; output=<file>.json.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from benchmarks.measure import Line, Report, paired
from vlm_train.contracts.media import Grid3, MediaInput
from vlm_train.models.vision.qwen import QwenVision, arrange_patches, find_angles, rotate_by

PATCH = 14
SIDES = (4, 40)
"""Least and most patches a side: 56 to 560 pixels, so that areas differ as those of a mixed set do."""


@dataclass
class Settings:
    """What the command line sets, `key=value`."""

    pairs: int = 7
    images: int = 12
    output: str = "data/bench/native.json"


def make_tower() -> QwenVision:
    """A small tower of Qwen2-VL's form."""
    torch.manual_seed(0)
    mean = (0.5, 0.5, 0.5)
    return QwenVision(
        dim=320, depth=4, heads=4, mlp_dim=1280, patch_size=PATCH, frames_per_patch=1, image_mean=mean, image_std=mean
    ).eval()


def make_media(images: int) -> MediaInput:
    """Images of random sides and noise."""
    generator = torch.Generator().manual_seed(0)
    low, high = SIDES
    sides = torch.randint(low, high + 1, (images, 2), generator=generator).tolist()
    grids = tuple(Grid3(1, height, width) for height, width in sides)
    patches = sum(grid.size for grid in grids)
    values = torch.randint(0, 256, (patches, 3 * PATCH**2), dtype=torch.uint8, generator=generator)
    return MediaInput(values, grids, (1,) * images)


def encode_padded(tower: QwenVision, media: MediaInput) -> Tensor:
    """The features of `tower.encode`, by rows of the largest image's length `[N, P, D]`, whose padding is masked."""
    lengths = [grid.size for grid in media.grids]
    pixels = (media.values.unflatten(1, (3, -1)) / 255 - 0.5) / 0.5
    rows = nn.utils.rnn.pad_sequence(list(pixels.flatten(1).split(lengths)), batch_first=True)
    places = arrange_patches(media.grids, None).places
    padded = nn.utils.rnn.pad_sequence(list(places.split(lengths)), batch_first=True).flatten(0, 1)
    cosines, sines = rotate_by(find_angles(padded, tower.channels))
    real = torch.arange(rows.shape[1]) < torch.tensor(lengths)[:, None]
    hidden = tower.patch_embed(rows)
    for layer in tower.layers:
        states = layer.qkv(layer.norm1(hidden)).unflatten(-1, (3, layer.heads, -1))
        query, key, value = states.flatten(0, 1).unbind(1)
        query, key = (_rotate(one, cosines, sines) for one in (query, key))
        sides = (one.unflatten(0, rows.shape[:2]).transpose(1, 2) for one in (query, key, value))
        attended = nn.functional.scaled_dot_product_attention(*sides, attn_mask=real[:, None, None])
        hidden = hidden + layer.proj(attended.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.norm2(hidden))
    return hidden[real]


def _rotate(states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * cosines + torch.cat([-second, first], dim=-1) * sines


@torch.no_grad()
def tokens_per_second(encode: Any, media: MediaInput) -> float:
    """Real patches a second."""
    start = time.perf_counter()
    encode(media)
    return len(media.values) / (time.perf_counter() - start)


def main(argv: list[str]) -> int:
    """The command line."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    chosen: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Settings), OmegaConf.from_dotlist(argv)))
    tower, media = make_tower(), make_media(chosen.images)
    packed, padded = tower.encode, partial(encode_padded, tower)
    with torch.no_grad():
        ours, theirs = packed(media).values, padded(media)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max(), "features differ"
    sides = [partial(tokens_per_second, one, media) for one in (packed, padded)]
    about: dict[str, Any] = {"must": 1.5, "aim": 2.0, "unit": "patches/s"}

    def lines() -> Iterator[Line]:
        yield paired("native tower, packed / padded", *sides, pairs=chosen.pairs, **about)

    Report({"images": chosen.images, "patches a side": list(SIDES)}).run([lines()], chosen.output)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
