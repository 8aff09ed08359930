"""Tiny parts, batches and tolerances shared by the tests of models, objectives and export."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vlm_train.contracts.batch import IGNORE, Batch, MediaBatch, Slots, TokenStream
from vlm_train.contracts.layout import PLACEHOLDER_ID
from vlm_train.contracts.media import MediaInput
from vlm_train.models.connectors.mlp import MLP
from vlm_train.models.families.prefix_vlm import PrefixVLM
from vlm_train.models.llms.hf import HFCausalLM
from vlm_train.models.vision.hf import HFVision

IMAGE = [PLACEHOLDER_ID] * 4  # a 32 x 32 image in patches of 16
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


def clip_config(**changes) -> dict:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 16,
    } | changes


def siglip_config(**changes) -> dict:
    return clip_config(model_type="siglip_vision_model", **changes)


def llama_config(**changes) -> dict:
    return {
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    } | changes


def tiny_vision(config: dict | None = None, **arguments) -> HFVision:
    return HFVision(config=config or clip_config(), image_mean=MEAN, image_std=STD, **arguments)


def tiny_llm(config: dict | None = None, **arguments) -> HFCausalLM:
    """From Llama's numbers, which OPT calls otherwise or has not."""
    config = dict(config or llama_config())
    if config.get("model_type") == "opt":
        config.pop("num_key_value_heads")
        config["ffn_dim"] = config.pop("intermediate_size")
    return HFCausalLM(config=config, **arguments)


def tiny_vlm(seed: int = 0, spread: float = 3.0) -> PrefixVLM:
    """A random LLaVA whose weights are large enough for images to matter."""
    torch.manual_seed(seed)
    vision, llm = tiny_vision(), tiny_llm()
    model = PrefixVLM(vision=vision, connector=MLP(in_dim=vision.out_dim, out_dim=llm.dim), llm=llm)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(spread)
    return model


def text_stream(
    rows: list[list[int]], *, learn_from: int = 0, groups=None, segments=None, positions=None, left=False
) -> TokenStream:
    """Rows of ids as a padded stream; every text token from index `learn_from` on predicts its successor."""
    length = max(map(len, rows))

    def pad(values: list[int], fill: int) -> list[int]:
        missing = [fill] * (length - len(values))
        return missing + values if left else values + missing

    labels = []
    for row in rows:
        following = [*row[1:], IGNORE]
        labels.append([t if i >= learn_from and t >= 0 else IGNORE for i, t in enumerate(following)])
    label = torch.tensor([pad(r, IGNORE) for r in labels])
    segments = segments or [[1] * len(r) for r in rows]
    groups = groups or [[0] * len(r) for r in rows]
    positions = positions or [list(range(len(r))) for r in rows]
    ids = torch.tensor([pad(r, 0) for r in rows])
    index = (ids.flatten() == PLACEHOLDER_ID).nonzero().squeeze(1)
    return TokenStream(
        ids=ids,
        labels=label,
        weights=(label != IGNORE).float(),
        positions=torch.tensor([pad(p, 0) for p in positions])[None],
        segment_ids=torch.tensor([pad(s, 0) for s in segments], dtype=torch.int32),
        attention_group=torch.tensor([pad(g, 0) for g in groups], dtype=torch.int32),
        slots=Slots(index=index, placeholders=len(index)),
        supervised=(label.flatten() != IGNORE).nonzero().squeeze(1),
    )


def batch_of(stream: TokenStream, items: list[int], *, tokens: int = 4, size: int = 32, seed: int = 1) -> Batch:
    """A batch around `stream` with one random image for each row number in `items`, or the blank view."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (len(items), 3, size, size), dtype=torch.uint8, generator=generator)
    if not items:
        pixels = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    media = MediaBatch(
        inputs={"vision": MediaInput(pixels, view_counts=(1,) * len(items))},
        slot_counts=(tokens,) * len(items),
        row=torch.tensor(items, dtype=torch.long),
        keys=tuple(f"sample{i}" for i in range(len(items))),
    )
    return Batch(text={"llm": stream}, media=media)


def with_views(batch: Batch, values: Tensor) -> Batch:
    """The batch with other views of the same media items."""
    shown = replace(batch.media.inputs["vision"], values=values)
    return replace(batch, media=replace(batch.media, inputs={"vision": shown}))


def assert_close(got: Tensor, expected: Tensor, name: str = "", tolerance: float = 1e-5) -> None:
    """max|a - b| <= tolerance * max|b|, the project's rule for fp32."""
    difference, scale = (got - expected).abs().max().item(), expected.abs().max().item()
    assert difference <= tolerance * scale + 1e-12, f"{name}: differs by {difference:.3e} of {scale:.3e}"
