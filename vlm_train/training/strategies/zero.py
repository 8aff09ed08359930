"""DeepSpeed ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054) on GPUs and, for tests, on CPUs.

Lightning's strategy does the work. Every method below corrects one thing, and says which.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, ClassVar, Literal, cast

import torch
from lightning.pytorch.plugins.precision.deepspeed import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, ParallelStrategy
from torch import Tensor, nn

from vlm_train.checkpoint.pieces import WEIGHT, Piece
from vlm_train.errors import ConfigError
from vlm_train.training.strategies.spread import broadcast_weights, keep_buffers, list_units
from vlm_train.training.strategies.state import OwnState, allocate_states


class ZeRO(OwnState, DeepSpeedStrategy):
    """Optimizer states (stage 1), gradients too (2), weights too (3) in equal parts on all devices.

    Args:
        stage: 1 | 2 | 3.
        offload_optimizer: keep fp32 weights and optimizer states in the memory of the CPU. (DeepSpeed can keep them on
            a disk; they could not be saved from there.)
        offload_parameters: keep the 16-bit weights there, or on a disk; stage 3 only.
        nvme_path: a folder on a fast local disk, for `nvme`.
        overlap_comm: reduce gradients while backward still runs.
        reduce_bucket, gather_bucket: numbers that travel together, in millions.
        prefetch_bucket: numbers, in millions, that stage 3 gathers ahead of their use.
        persistent_parameters: stage 3 leaves parameters of fewer numbers whole on every device.
        timeout_minutes: a collective that takes longer ends the run.
    """

    sharded_by: ClassVar[Mapping[str, Any]] = {"stage": 3}
    compiles_shards = False
    keeps_fp32_copy = True
    clips_gradients = True

    def __init__(
        self,
        *,
        stage: Literal[1, 2, 3] = 2,
        offload_optimizer: Literal["cpu"] | None = None,
        offload_parameters: Literal["cpu", "nvme"] | None = None,
        nvme_path: str | None = None,
        overlap_comm: bool = True,
        reduce_bucket: float = 200,
        gather_bucket: float = 200,
        prefetch_bucket: float = 50,
        persistent_parameters: int = 100_000,
        timeout_minutes: float = 30.0,
    ) -> None:
        if offload_parameters == "nvme" and nvme_path is None:
            raise ConfigError("strategy.nvme_path is missing: offloading to nvme needs a folder on a local disk.")
        if offload_parameters and stage != 3:
            raise ConfigError(f"strategy.offload_parameters: only stage 3 can, got stage {stage}.")
        zero: dict[str, Any] = {
            "stage": stage,
            "contiguous_gradients": True,
            "overlap_comm": overlap_comm,
            "reduce_bucket_size": int(reduce_bucket * 1e6),
            "allgather_bucket_size": int(gather_bucket * 1e6),
        }
        if stage == 3:
            zero["stage3_prefetch_bucket_size"] = int(prefetch_bucket * 1e6)
            zero["stage3_param_persistence_threshold"] = persistent_parameters
        for key, device in (("offload_optimizer", offload_optimizer), ("offload_param", offload_parameters)):
            if device:
                zero[key] = {"device": device, "pin_memory": True} | (
                    {"nvme_path": nvme_path} if device == "nvme" else {}
                )
        config = {
            "train_micro_batch_size_per_gpu": 1,  # for DeepSpeed's own throughput line, which is not printed
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": zero,
        }
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
        try:
            super().__init__(config=config, timeout=timedelta(minutes=timeout_minutes))
        except ModuleNotFoundError as error:
            raise ConfigError("strategy: DeepSpeed is not installed: pip install 'vlm-train[deepspeed]'.") from error
        self.stage = stage

    def make_precision(self, precision: str) -> Any:
        """DeepSpeed's precision. It has no bf16-true: the model is in 16 bits anyway."""
        return ZeROPrecision(cast(Any, precision.replace("bf16-true", "bf16-mixed")))

    @property
    def engine(self) -> Any:
        """The engine of DeepSpeed, which wraps the model."""
        return self.model

    # CPUs: Lightning wants CUDA in three places.

    def setup_environment(self) -> None:
        """Skip Lightning's check that the device is CUDA."""
        ParallelStrategy.setup_environment(self)
        self.setup_distributed()

    def setup_distributed(self) -> None:
        """Skip the check of CUDA device numbers on a CPU."""
        if self.root_device.type == "cuda":
            super().setup_distributed()
            return
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _setup_model_and_optimizer(self, model: nn.Module, optimizer: Any, lr_scheduler: Any = None) -> tuple[Any, Any]:
        """Pass no CUDA device number, and keep float buffers: rotary frequencies lose positions in 16 bits."""
        import deepspeed

        assert isinstance(self.config, dict)
        with keep_buffers(model):
            engine, optimizer, *_ = deepspeed.initialize(
                args=argparse.Namespace(device_rank=self.local_rank),
                config=self.config | {"gradient_clipping": cast(Any, model).max_grad_norm or 0.0},
                model=model,
                model_parameters=[p for p in model.parameters() if p.requires_grad],
                optimizer=optimizer,
                lr_scheduler=lr_scheduler,
                dist_init_required=False,
            )
        self._ask_guard(optimizer)
        return engine, optimizer

    def _ask_guard(self, optimizer: Any) -> None:
        """Let the guard see the gradient norm before the update. Its veto is a NaN, an overflow to DeepSpeed."""
        if self.stage == 3:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            norms_of = optimizer._get_norm_groups

            def norm_groups() -> list[Any]:
                norms = norms_of()
                groups = [optimizer.sub_group_to_group_id[number] for number in range(len(norms))]
                objects = self._report_norms(combine_grad_norm_groups(norms), norms, groups)
                return [float("nan")] if objects else norms

            optimizer._get_norm_groups = norm_groups
            return
        norm_of = optimizer.scaled_global_norm
        optimizer.check_grad_overflow = True  # else a norm that is no number is not looked at in bf16
        optimizer.check_overflow = lambda **_: None  # else the norm is not even computed, and tells the same

        norms: list[Any] = []
        of_group = optimizer.get_grad_norm_direct

        def get_grad_norm_direct(*args: Any, **kwargs: Any) -> Any:
            norms.append(of_group(*args, **kwargs))
            return norms[-1]

        def scaled_global_norm(*args: Any, **kwargs: Any) -> Any:
            norms.clear()
            norm = norm_of(*args, **kwargs)
            return float("nan") if self._report_norms(norm, norms, range(len(norms))) else norm

        optimizer.get_grad_norm_direct, optimizer.scaled_global_norm = get_grad_norm_direct, scaled_global_norm

    def _report_norms(self, scaled_norm: Any, norms: Sequence[Any], groups: Iterable[int]) -> bool:
        """Tell the module the norm, and those of its parts from those of the optimizer's groups."""
        optimizer = self.engine.optimizer
        parts: dict[str, list[Tensor]] = {}
        for norm, group in zip(norms, groups, strict=True):
            parts.setdefault(optimizer.param_groups[group]["name"], []).append(
                _unscale_norm(norm, optimizer.loss_scale)
            )
        of_parts = {name: torch.stack(found).norm() for name, found in parts.items()}
        total = _unscale_norm(scaled_norm, optimizer.loss_scale)
        return bool(cast(Any, self.lightning_module).objects_to(total, of_parts))

    def made_update(self) -> bool:
        """Whether the last step made one: DeepSpeed leaves out those whose gradients overflow, silently."""
        return bool(self.engine.was_step_applied())

    @contextmanager
    def gradients_cross_ranks(self, last: bool) -> Iterator[None]:
        """Tell the engine which micro-batch is the last: it completes the gradients, and the engine's step follows."""
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    # Weights.

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Do nothing: `shard_model` shards a model that is already built."""
        yield

    def shard_model(self, model: nn.Module) -> None:
        """Spread the weights of rank 0 over all ranks, block by block. Stage 3 only."""
        if self.stage != 3:
            return
        import deepspeed

        self._init_config_if_needed()
        dtype = self._compute_dtype()

        def split_unit(unit: nn.Module) -> None:
            deepspeed.zero.Init(module=unit, config_dict_or_path=self.config)

        with keep_buffers(model):
            broadcast_weights(model, list_units(model), self.root_device, split_unit, dtype)
        for module in model.modules():
            for parameter in getattr(module, "parameters_read_here", list)():
                deepspeed.zero.register_external_parameter(module, parameter)

    def _compute_dtype(self) -> torch.dtype | None:
        return {"bf16": torch.bfloat16, "16": torch.float16}.get(str(self.precision_plugin.precision).split("-")[0])

    # Checkpoints: ours, not DeepSpeed's pickles.

    def scaler_state(self) -> dict[str, Any]:
        """State of DeepSpeed's loss scaler."""
        return {k: v for k, v in vars(self.engine.optimizer.loss_scaler).items() if isinstance(v, int | float)}

    def load_scaler_state(self, held: Mapping[str, Any]) -> None:
        """Restore what `scaler_state` returned."""
        vars(self.engine.optimizer.loss_scaler).update(held)

    def pieces(self, named: dict[str, nn.Parameter]) -> Iterator[Piece]:
        """Pieces of the optimizer's states and of the fp32 weights, which are more exact than 16-bit ones."""
        parts = self._parts_3(named) if self.stage == 3 else self._parts_12(named)
        states = self.engine.optimizer.optimizer.state
        for name, start, flat, first, size in parts:
            if not size:
                continue
            yield Piece(name, WEIGHT, start, flat.data.narrow(0, first, size), owned=False)
            for kind, state in states.get(flat, {}).items():
                if isinstance(state, Tensor) and state.ndim:
                    yield Piece(name, kind, start, state.narrow(0, first, size), owned=True)
                elif isinstance(state, Tensor):
                    yield Piece(name, kind, 0, state.view(1), owned=start == 0, single=True)

    def _parts_12(self, named: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, int, Tensor, int, int]]:
        """(parameter, start within it, this rank's flat fp32 tensor, start within that, size)."""
        names = {id(parameter): name for name, parameter in named.items()}
        optimizer = self.engine.optimizer
        for group, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
            for parameter in group:
                if (held := parameter._hp_mapping) is not None:
                    within, address = held.lp_fragment_address, held.hp_fragment_address
                    yield names[id(parameter)], within.start, flat, address.start, within.numel

    def _parts_3(self, named: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, int, Tensor, int, int]]:
        names = {id(parameter): name for name, parameter in named.items()}
        optimizer = self.engine.optimizer
        for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
            first = 0
            for parameter in group:
                share = parameter.partition_numel()
                start = share * self.global_rank  # the last ranks' parts are filled up with zeros
                yield names[id(parameter)], start, flat, first, max(0, min(share, parameter.ds_numel - start))
                first += share

    def whole(self, named: dict[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
        """Every parameter as a whole in fp32. A collective."""
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in named.items():
            exact = self.stage < 3 and parameter.dtype == torch.float32
            yield name, (parameter.detach() if exact else safe_get_full_fp32_param(parameter))

    def allocate_state(self, kinds: Mapping[str, bool]) -> None:
        """Make zero optimizer states. Stage 3 takes its parameters out of the groups between two steps."""
        optimizer = self.engine.optimizer
        flats = optimizer.fp32_partitioned_groups_flat if self.stage == 3 else None
        if flats is None:
            allocate_states(optimizer.optimizer, kinds)
            return
        groups = optimizer.optimizer.param_groups
        for number, flat in enumerate(flats):
            groups[optimizer.sub_group_to_group_id[number]]["params"] = [flat]
            allocate_states(optimizer.optimizer, kinds)
            groups[optimizer.sub_group_to_group_id[number]]["params"] = []


def _unscale_norm(norm: Any, scale: float) -> Tensor:
    """A norm without the loss scale; DeepSpeed says -1 where it is no number."""
    norm = torch.as_tensor(norm).float() / scale
    return torch.where(norm < 0, torch.inf, norm)


class ZeROPrecision(DeepSpeedPrecision):
    """DeepSpeed's precision, with the loss and the batch left as they are."""

    def convert_input(self, data: Any) -> Any:
        """Keep the batch as it is: parts cast what they compute with, and the weights of targets stay exact."""
        return data

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Skip DeepSpeed's own division by the number of micro-batches."""
        model.trainer.model.backward(tensor, *args, scale_wrt_gas=False, **kwargs)
