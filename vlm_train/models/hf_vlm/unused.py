"""Parameters of a whole model that nothing reaches: later layers of a tower, its pooling head."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn


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


def _names_read(model: Any) -> set[str] | None:
    """Names of parameters that the features of an image are made with; None where it cannot be told."""
    encode = getattr(model.whole, "get_image_features", None)
    if encode is None:
        return None
    fields, _ = model.processor.prepare(Image.fromarray(np.zeros((32, 32, 3), np.uint8)))
    taken = inspect.signature(encode).parameters
    given = {key: torch.from_numpy(one) for key, one in fields.items() if key in taken}
    for device in ("meta", "cpu"):
        twin = _copy_shapes(model.whole, device)
        try:
            with torch.enable_grad():
                output = twin.get_image_features(**{key: _place(one, device) for key, one in given.items()})
            break
        except Exception:  # code of any model: much of it asks for values, which there are none of on meta
            continue
    else:
        return None
    names = {id(one): name for name, one in _list_library_parameters(model, twin)}
    return {names[id(one)] for one in _find_leaves(_list_tensors(output)) if id(one) in names}


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


def _place(tensor: Tensor, device: str) -> Tensor:
    """Pixels on a device; grids and sizes stay where they can be read."""
    return tensor.to(device) if tensor.is_floating_point() else tensor


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
