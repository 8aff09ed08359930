"""Spreading rank 0's weights over ranks that have built none, one block at a time: no rank holds a second full copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from vlm_train.contracts.model_parts import find_layers


def list_units(model: nn.Module) -> list[nn.Module]:
    """What is gathered at once: every numbered layer of every part, every inserted block, then the model for all the
    rest."""
    return [*find_layers(model).values(), model]


def broadcast_weights(
    model: nn.Module,
    groups: Sequence[nn.Module],
    device: torch.device,
    split: Callable[[nn.Module], None],
    dtype: torch.dtype | None = None,
) -> None:
    """Give every rank the parameters of one group after the other, and let `split` cut them.

    Args:
        model: whole on rank 0, on the meta device on the others.
        groups: modules, inner ones first; `split` leaves what it has cut as parameters of another kind.
        device: where parameters are whole for a moment.
        dtype: they are cast to it; None: as they are.
    """
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, _from_rank_0(buffer, device), name not in module._non_persistent_buffers_set)
    done: set[int] = set()
    for group in groups:
        for parameter in group.parameters():
            if id(parameter) in done or getattr(parameter, "ds_id", None) is not None:
                continue
            whole = _from_rank_0(parameter.detach().to(dtype or parameter.dtype), device)
            # In place: a tied parameter stays one, and rules hold it by identity.
            torch.utils.swap_tensors(parameter, nn.Parameter(whole, requires_grad=parameter.requires_grad))
        split(group)
        done |= {id(parameter) for parameter in group.parameters()}


def _from_rank_0(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    held = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device).contiguous()
    if dist.is_initialized():
        dist.broadcast(held, 0)
    return held


@contextmanager
def keep_buffers(model: nn.Module) -> Iterator[None]:
    """Undo what happens to the float type of buffers: frequencies of rotary positions do not survive 16 bits."""
    kept = {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    yield
    for name, buffer in model.named_buffers():
        if name in kept and buffer.dtype != kept[name].dtype:
            module, _, own = name.rpartition(".")
            owner = model.get_submodule(module)
            owner.register_buffer(own, kept[name].to(buffer.device), own not in owner._non_persistent_buffers_set)
