"""The parameters of models with code of their own, under the names and in the pieces that `transformers` has them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from vlm_train.config.own_code_models import INTERN_VIT, INTERNLM2


@dataclass(frozen=True)
class CheckpointNames:
    """How a checkpoint names and joins the parameters of a model of `transformers`.

    Attributes:
        renames: (pattern of a name in `transformers`, what stands there in the checkpoint), in this order.
        cut: what a parameter named so in `transformers` is of the tensor in the checkpoint.
    """

    renames: tuple[tuple[str, str], ...]
    cut: Callable[[str, Tensor, int, int], Tensor]

    def name_in_checkpoint(self, name: str) -> str:
        """The checkpoint's name of a parameter."""
        for pattern, theirs in self.renames:
            name = re.sub(pattern, theirs, name)
        return name


def _cut_by_groups(name: str, joined: Tensor, heads: int, key_heads: int) -> Tensor:
    """InternLM2's `wqkv` `[(G + 2) * S * d, ...]`: for each of S heads its G queries, key and value."""
    if not (kind := re.search(r"self_attn\.([qkv])_proj", name)):
        return joined
    groups = joined.unflatten(0, (key_heads, heads // key_heads + 2, -1))
    part = {"q": groups[:, :-2], "k": groups[:, -2:-1], "v": groups[:, -1:]}[kind[1]]
    return part.flatten(0, 2)


def _cut_in_three(name: str, joined: Tensor, heads: int, key_heads: int) -> Tensor:
    """InternViT's `qkv` `[3 * D, ...]`: queries, keys, values."""
    del heads, key_heads
    if not (kind := re.search(r"attention\.([qkv])_proj", name)):
        return joined
    return joined.chunk(3)["qkv".index(kind[1])]


CHECKPOINT_NAMES = {
    INTERNLM2: CheckpointNames(
        renames=(
            (r"embed_tokens", "tok_embeddings"),
            (r"self_attn\.[qkv]_proj", "attention.wqkv"),
            (r"self_attn\.o_proj", "attention.wo"),
            (r"mlp\.gate_proj", "feed_forward.w1"),
            (r"mlp\.up_proj", "feed_forward.w3"),
            (r"mlp\.down_proj", "feed_forward.w2"),
            (r"input_layernorm", "attention_norm"),
            (r"post_attention_layernorm", "ffn_norm"),
            (r"^lm_head", "output"),
        ),
        cut=_cut_by_groups,
    ),
    INTERN_VIT: CheckpointNames(
        renames=(
            (r"cls_token", "class_embedding"),
            (r"patch_embeddings\.projection", "patch_embedding"),
            (r"position_embeddings", "position_embedding"),
            (r"encoder\.layer\.", "encoder.layers."),
            (r"attention\.[qkv]_proj", "attn.qkv"),
            (r"attention\.projection_layer", "attn.proj"),
            (r"attention\.([qk])_norm", r"attn.\1_norm"),
            (r"layernorm_before", "norm1"),
            (r"layernorm_after", "norm2"),
            (r"lambda_([12])", r"ls\1"),
        ),
        cut=_cut_in_three,
    ),
}
"""`model_type` of a checkpoint's config.json -> its names."""
