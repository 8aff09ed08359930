"""A whole model without its weights: which parameters nothing reaches, and what a step computes.

Models of the library ask for values (sizes of images, positions of tokens), which there are none of on the meta device.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vlm_train.models.layers.attention import PACKED, decoding
from vlm_train.models.llms.library_masks import make_library_mask


def find_unused(model: Any) -> list[str]:
    """Full names of a family's parameters that no image and no text reaches.

    A copy without weights encodes a small image, and the graph of its features tells. Where the model's own code cannot
    be run so, all of the tower counts as used.
    """
    unused = [f"audio.{name}" for name, _ in model.audio.named_parameters()] if hasattr(model, "audio") else []
    read = _names_read(model)
    if read is None:
        return unused
    return unused + [f"vision.{name}" for name, _ in model.vision.named_parameters() if f"vision.{name}" not in read]


def trace_shapes(whole: Any, ids: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
    """Hidden states `[B, T, D]` on the meta device: tower and connector, where they can run there, and the decoder. The
    features are added with the factor 0, so that the graph holds them."""
    features = encode_shapes(whole, fields) or []

    def add_features(module: nn.Module, inputs: Any, embeds: Tensor) -> Tensor:
        for one in features:
            embeds = embeds + 0 * one.sum()
        return embeds

    hook = whole.get_input_embeddings().register_forward_hook(add_features)
    decoder = whole.get_decoder()
    while (inner := decoder.get_decoder()) is not decoder:
        decoder = inner  # BLIP-2 holds a language model with its head
    mask = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
    if decoder.config._attn_implementation != PACKED:
        mask = make_library_mask(decoder.config, None, ids[..., None].to(whole.dtype))
    try:
        with decoding(None), _assume_nonzero():
            output = decoder(input_ids=ids.clamp(min=0), attention_mask=mask, use_cache=False)
    finally:
        hook.remove()
    hidden: Tensor = output.last_hidden_state
    return hidden


@contextmanager
def _assume_nonzero() -> Iterator[None]:
    """On the meta device, which has no values, a mask counts as true everywhere."""
    from torch.fx.experimental import _config as config

    before: Any = config.meta_nonzero_assume_all_nonzero
    config.meta_nonzero_assume_all_nonzero = True
    try:
        yield
    finally:
        config.meta_nonzero_assume_all_nonzero = before


def encode_shapes(whole: Any, fields: Mapping[str, Tensor]) -> list[Tensor] | None:
    """What the model reads of images, from `fields` whose pixels are on the device of its weights; None where its own
    code cannot run so."""
    encode = getattr(whole, "get_image_features", None)
    if encode is None:
        return None
    taken = inspect.signature(encode).parameters
    try:
        with _assume_nonzero():
            return _list_tensors(encode(**{key: one for key, one in fields.items() if key in taken}))
    except Exception:  # code of any model
        return None


def _names_read(model: Any) -> set[str] | None:
    """Names of parameters that the features of an image are made with; None where it cannot be told."""
    fields, _ = model.processor.prepare(Image.fromarray(np.zeros((32, 32, 3), np.uint8)))
    for device in ("meta", "cpu"):
        twin = _copy_shapes(model.whole, device)
        with torch.enable_grad():
            output = encode_shapes(twin, place_fields(fields, device))
        if output is not None:
            break
    else:
        return None
    names = {id(one): name for name, one in _list_library_parameters(model, twin)}
    return {names[id(one)] for one in _find_leaves(output) if id(one) in names}


def _copy_shapes(whole: nn.Module, device: str) -> Any:
    """A copy of a model whose parameters take no memory: on the meta device, or one zero repeated."""
    memo: dict[int, Any] = {}
    for one in whole.parameters():
        shape = torch.zeros((), dtype=torch.float32, device=device).expand(one.shape)
        memo[id(one)] = nn.Parameter(shape)
    for buffer in whole.buffers():
        if buffer.is_meta or device == "meta":
            memo[id(buffer)] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)
    return copy.deepcopy(whole, memo)


def place_fields(fields: Mapping[str, np.ndarray], device: str) -> dict[str, Tensor]:
    """Pixels on a device; grids and sizes stay where they can be read."""
    tensors = {name: torch.from_numpy(one) for name, one in fields.items()}
    return {name: one.to(device) if one.is_floating_point() else one for name, one in tensors.items()}


def _list_library_parameters(model: Any, twin: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Full names here, with the parameters of a copy of the library's model."""
    found = []
    for part, child in model.named_children():
        for name, _ in child.named_parameters():
            holder: Any = twin
            for step in child.name_in_library(name).split("."):
                holder = getattr(holder, step)
            found.append((f"{part}.{name}", holder))
    return found


def _list_tensors(output: Any) -> list[Tensor]:
    """What the model reads of encoded images: the features behind the connector."""
    features = getattr(output, "pooler_output", None)
    deep = getattr(output, "deepstack_features", None)
    if features is None:
        features = output
    flat, rest = list[Tensor](), [features, deep]
    while rest:
        one = rest.pop()
        if isinstance(one, Tensor):
            flat.append(one)
        elif isinstance(one, list | tuple):
            rest += one
    return flat


def _find_leaves(tensors: list[Tensor]) -> list[Tensor]:
    """The parameters that the graphs of `tensors` begin with."""
    nodes, seen, leaves = [one.grad_fn for one in tensors if one.grad_fn is not None], set[Any](), list[Tensor]()
    while nodes:
        node: Any = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        nodes += [following for following, _ in node.next_functions if following is not None]
    return leaves
