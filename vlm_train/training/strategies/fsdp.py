"""FSDP2: weights, gradients and optimizer states in shards of whole rows; no DeepSpeed needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ClassVar

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from vlm_train.checkpoint.pieces import Piece
from vlm_train.training.strategies.spread import broadcast_weights, list_units
from vlm_train.training.strategies.state import OwnState


class FSDP2(OwnState, DDPStrategy):
    """Every layer is a group of shards, gathered when it runs (torch's `fully_shard`).

    Args:
        reshard_after_forward: gather a second time for backward, and hold less in between.
        compute_dtype: bf16 | fp16: gather and compute in 16 bits while shards stay as they are; given by the trainer
            for mixed precision.
        offload: keep shards and optimizer states in the memory of the CPU.
        timeout_minutes: a collective that takes longer ends the run.
    """

    sharded_by: ClassVar[Mapping[str, Any]] = {}
    scales_loss = False

    def __init__(
        self,
        *,
        reshard_after_forward: bool = True,
        compute_dtype: str | None = None,
        offload: bool = False,
        timeout_minutes: float = 30.0,
    ) -> None:
        both = "cpu:gloo,cuda:nccl" if offload and torch.cuda.is_available() else None  # norms of shards on CPUs
        super().__init__(timeout=timedelta(minutes=timeout_minutes), process_group_backend=both)
        self.reshard_after_forward, self.offload = reshard_after_forward, offload
        self.compute_dtype = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}[compute_dtype]

    def shard_model(self, model: nn.Module) -> None:
        """Spread the weights of rank 0 over all ranks, block by block."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import (
            CPUOffloadPolicy,
            MixedPrecisionPolicy,
            OffloadPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        precision = MixedPrecisionPolicy(param_dtype=self.compute_dtype, reduce_dtype=torch.float32)
        offload = CPUOffloadPolicy() if self.offload else OffloadPolicy()

        learns = any(parameter.requires_grad for parameter in model.parameters())

        def split_unit(unit: nn.Module) -> None:
            fully_shard(
                unit,
                mesh=mesh,
                mp_policy=precision,
                offload_policy=offload,
                reshard_after_forward=self.reshard_after_forward and not (unit is model and learns),
            )

        broadcast_weights(model, list_units(model), self.root_device, split_unit)
        for name in ("logits", "generate", "encode_patches"):  # entered without the model's forward
            if hasattr(model, name):
                register_fsdp_forward_method(model, name)

    def reshard(self, model: nn.Module) -> None:
        """Give back the root's weights, which a forward pass leaves whole, in tensors that are thrown away later."""
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def configure_ddp(self) -> None:
        """Do nothing: the model's own hooks gather and reduce."""

    def model_to_device(self) -> None:
        """Do nothing: the shards are already on their devices."""

    @contextmanager
    def gradients_cross_ranks(self, last: bool) -> Iterator[None]:
        """Reduce gradients in every micro-batch, so that no rank holds more than its shard of them."""
        yield

    def pieces(self, named: dict[str, nn.Parameter]) -> Iterator[Piece]:
        """Pieces of the optimizer's states: the rows of this rank's shards."""
        states = self.optimizers[0].state
        for name, parameter in named.items():
            start = self._first_row(parameter)
            for kind, state in states.get(parameter, {}).items():
                if not isinstance(state, Tensor):
                    continue
                if state.ndim == 0:
                    yield Piece(name, kind, 0, _to_local(state).view(1), owned=self.is_global_zero, single=True)
                elif _to_local(state).numel():
                    yield Piece(name, kind, start, _to_local(state).view(-1), owned=True)

    def _first_row(self, parameter: Any) -> int:
        """Offset of this rank's first row in the flat parameter; `torch.chunk` distributes the rows."""
        rows = -(-parameter.shape[0] // self.world_size) * self.global_rank
        return min(rows, parameter.shape[0]) * (parameter.numel() // parameter.shape[0])

    def whole(self, named: dict[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
        """Every parameter gathered from its shards. A collective."""
        return ((name, parameter.detach().full_tensor()) for name, parameter in named.items())  # type: ignore[attr-defined]


def _to_local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
