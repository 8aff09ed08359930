"""Peak memory for every way of spreading a model, from counts and the traced activations.

Weights, gradients and optimizer states follow the ZeRO paper (Rajbhandari et al. 2020, section 3), what else DeepSpeed
and FSDP2 hold follows their code (DeepSpeed 0.19, torch 2.13). Frozen parameters have neither gradient nor state. A
prediction, not a measurement: fragmentation is left out, and the CUDA context and library workspaces are one constant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

GIB = 1024**3
RUNTIME = 1.5 * GIB
"""CUDA context, cuBLAS and NCCL workspaces."""

RUNTIME_CPU = 0.5 * GIB
"""Python, torch, Lightning and transformers in one process, measured on a tiny run."""

REDUCE_BUCKET = ALLGATHER_BUCKET = 200_000_000
"""Elements that ZeRO reduces or gathers at once; two reduce buckets overlap with backward under ZeRO-1 and 2."""

LIVE_PARAMETERS = 1_000_000_000
"""Gathered parameters that ZeRO-3 keeps, because they are used again soon (`stage3_max_live_parameters`)."""

SWAP_BUFFERS = 5 * 100_000_000 * 2
"""Bytes a process of the buffers between GPU and NVMe for parameters."""

HOST_SLACK = 1.5
"""What offload takes over its tensors' bytes: page-locked memory is dealt in powers of two. DeepSpeed's own factor."""

NF4 = 0.5 + 0.127 / 8
"""Bytes a parameter in 4-bit NormalFloat with doubly quantized constants (Dettmers et al. 2023, section 3)."""

Place = Literal["gpu", "cpu", "nvme"]


@dataclass(frozen=True)
class ShardingSpec:
    """What a strategy shards.

    Attributes:
        engine: `replicated`: nothing; `zero`: DeepSpeed; `fsdp`: FSDP2.
        stage: ZeRO: from 1 on optimizer states are shared out, from 2 on gradients, at 3 weights.
        weights, optimizer: where they are kept. Gradients follow the optimizer.
    """

    engine: Literal["replicated", "zero", "fsdp"]
    stage: int = 0
    weights: Place = "gpu"
    optimizer: Place = "gpu"

    @property
    def offloads(self) -> bool:
        return self.optimizer != "gpu"


STRATEGIES: Mapping[str, ShardingSpec] = {
    "single": ShardingSpec("replicated"),
    "ddp": ShardingSpec("replicated"),
    "zero1": ShardingSpec("zero", 1),
    "zero2": ShardingSpec("zero", 2),
    "zero3": ShardingSpec("zero", 3),
    "fsdp2": ShardingSpec("fsdp", 3),
    "zero1_offload": ShardingSpec("zero", 1, optimizer="cpu"),
    "zero2_offload": ShardingSpec("zero", 2, optimizer="cpu"),
    "zero3_offload": ShardingSpec("zero", 3, weights="cpu", optimizer="cpu"),
    "fsdp2_offload": ShardingSpec("fsdp", 3, weights="cpu", optimizer="cpu"),
    "zero3_nvme": ShardingSpec("zero", 3, weights="nvme", optimizer="cpu"),
}
"""By name, from the least to the most communication: the first that fits is the cheapest."""


@dataclass(frozen=True)
class MemoryNeeds:
    """The memory that a training needs.

    Attributes:
        parameters, trainable: counts.
        largest_layer: parameters of the largest block, or module outside blocks, that is gathered at once.
        outside: parameters outside blocks, which FSDP2 gathers for the whole pass.
        states: optimizer numbers per trainable parameter (AdamW: 2).
        precision: as `trainer.precision`.
        activations: bytes kept for backward by one micro-batch.
        logits: bytes of the loss head at its peak.
        quantized, quantized_bytes: how many of the frozen parameters are stored quantized, and their bytes in all.
        accumulates: whether an optimizer step has several micro-batches.
        fused: whether the optimizer updates in one kernel, without temporaries.
        halved: frozen parameters that are kept in 16 bits where others are in fp32, without a strategy that does.
    """

    parameters: int
    trainable: int
    largest_layer: int
    states: int
    precision: str
    activations: int
    logits: int
    outside: int = 0
    quantized: int = 0
    quantized_bytes: float = 0.0
    accumulates: bool = False
    fused: bool = False
    halved: int = 0

    @property
    def size(self) -> int:
        """Bytes of a weight as FSDP and a plain trainer store it: mixed precision keeps fp32."""
        return 2 if self.precision.endswith("-true") and not self.full else 4

    @property
    def compute(self) -> int:
        """Bytes of a weight as it is multiplied with."""
        return 4 if self.full else 2

    @property
    def full(self) -> bool:
        return self.precision.startswith("32")

    def stored_bytes(self, size: int) -> float:
        """Bytes of all weights, those that are not quantized at `size` each."""
        return size * (self.parameters - self.quantized) + self.quantized_bytes


@dataclass(frozen=True)
class Hardware:
    """What there is: GPUs in nodes of `gpus_per_node`, bytes of one GPU, of one node's CPU memory, and what the
    libraries take of a GPU themselves."""

    gpus: int
    memory: float
    gpus_per_node: int = 8
    cpu: float = math.inf
    runtime: float = RUNTIME

    @property
    def processes(self) -> int:
        """GPUs that share a node."""
        return min(self.gpus, self.gpus_per_node)


@dataclass(frozen=True)
class Peak:
    """Bytes per GPU (or process, on a CPU); `cpu` and `nvme`: what is offloaded, bytes per node.

    `buffers`: gathered weights and communication buckets, or the temporaries of the update where these take more than
    the activations leave free.
    """

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float
    logits: float
    runtime: float
    cpu: float = 0.0
    nvme: float = 0.0

    @property
    def states(self) -> float:
        """Weights, gradients and optimizer states: what the ZeRO paper calls model states."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        """Bytes of one GPU at the peak."""
        return self.states + self.buffers + self.activations + self.logits + self.runtime

    def fits_hardware(self, hardware: Hardware) -> bool:
        """Whether GPU and CPU have room."""
        return self.total <= hardware.memory and self.cpu <= hardware.cpu


@dataclass(frozen=True)
class _Share:
    """Bytes of one process wherever they lie: what it keeps, what backward needs besides, and what the update does."""

    weights: float
    gradients: float
    optimizer: float
    backward: float
    update: float
    host: float = 0.0
    """Further bytes on the CPU, if the optimizer is there."""


def predict_peak(strategy: str, needs: MemoryNeeds, hardware: Hardware) -> Peak:
    """Peak bytes under one of `STRATEGIES`."""
    spec = STRATEGIES[strategy]
    share = {"replicated": _share_replicated, "zero": _share_zero, "fsdp": _share_fsdp}[spec.engine](
        spec, needs, 1 if strategy == "single" else hardware.gpus
    )
    at: dict[Place, float] = {"gpu": 0.0, "cpu": 0.0, "nvme": 0.0}
    at[spec.weights] += share.weights
    at[spec.optimizer] += share.optimizer
    if spec.offloads:
        at["cpu"] += share.host
    return Peak(
        weights=share.weights if spec.weights == "gpu" else 0.0,
        gradients=share.gradients,
        optimizer=0.0 if spec.offloads else share.optimizer,
        buffers=max(share.backward, share.update - needs.activations - needs.logits),
        activations=needs.activations,
        logits=needs.logits,
        runtime=hardware.runtime,
        cpu=HOST_SLACK * at["cpu"] * hardware.processes,
        nvme=at["nvme"] * hardware.processes,
    )


def _share_replicated(spec: ShardingSpec, needs: MemoryNeeds, gpus: int) -> _Share:
    """Everything on every GPU. Mixed precision keeps fp32 weights, and autocast a 16-bit copy of those that learn."""
    size, learned = needs.size, needs.size * needs.trainable
    copies = 2 * (needs.trainable + needs.largest_layer) if needs.precision.endswith("-mixed") else 0
    return _Share(
        weights=needs.stored_bytes(size) - 2 * needs.halved,
        gradients=learned,
        optimizer=needs.states * learned,
        backward=copies + (learned if gpus > 1 else 0),  # DDP all-reduces copies of the gradients
        update=_update_temporaries(learned, needs),
    )


def _share_zero(spec: ShardingSpec, needs: MemoryNeeds, gpus: int) -> _Share:
    """DeepSpeed: 16-bit weights and gradients (fp32 ones with 32-true), and an fp32 master copy of what learns."""
    size, shard = needs.compute, needs.trainable / gpus
    weights, backward = needs.stored_bytes(size), 2 * size * REDUCE_BUCKET
    gradients: float = size * (shard if spec.stage > 1 else needs.trainable)
    if spec.stage == 3:
        weights /= gpus
        backward = size * (REDUCE_BUCKET + min(max(LIVE_PARAMETERS, needs.largest_layer), needs.parameters))
    optimizer = (4 + 4 * needs.states) * shard  # fp32 weights have a master copy, too
    if not spec.offloads:
        update = 4 * shard + _update_temporaries(4 * shard, needs) + size * ALLGATHER_BUCKET  # gradients, in fp32
        return _Share(weights, gradients, optimizer, backward, update)
    if spec.stage == 1:
        return _Share(weights, gradients, optimizer + 4 * shard, backward, 0)
    # The shard of the gradients leaves the GPU as it is made; ZeRO-2 accumulates whole ones on the CPU.
    kept = size * (shard if spec.stage == 3 else needs.trainable) if needs.accumulates else 0.0
    if spec.weights == "nvme":
        kept += SWAP_BUFFERS
    return _Share(weights, 0, optimizer + 4 * shard, backward, 0, kept)


def _share_fsdp(spec: ShardingSpec, needs: MemoryNeeds, gpus: int) -> _Share:
    """FSDP2: fp32 shards of everything (16-bit ones with bf16-true), gathered layer by layer as they are computed."""
    shard = needs.size * needs.trainable / gpus
    gathered = needs.compute * (2 * needs.largest_layer + needs.outside)  # the running layer and the prefetched one
    return _Share(
        weights=needs.stored_bytes(needs.size) / gpus,
        gradients=0 if spec.offloads else shard,
        optimizer=needs.states * shard + (shard if spec.offloads else 0),
        backward=gathered + (needs.compute + needs.size) * min(needs.largest_layer, needs.trainable),  # whole gradients
        update=0 if spec.offloads else _update_temporaries(shard, needs),
    )


def _update_temporaries(learned: float, needs: MemoryNeeds) -> float:
    """Temporary memory of an update that takes all parameters at once, torch's default, but not in one kernel."""
    return learned if needs.states and not needs.fused else 0.0


def list_runnable(needs: MemoryNeeds, hardware: Hardware) -> list[str]:
    """Strategies that could run: several GPUs need a strategy, and quantized weights are not sharded."""
    return [
        name
        for name, spec in STRATEGIES.items()
        if not (name == "single" and hardware.gpus > 1)
        and not (needs.quantized and (spec.stage == 3 or spec.engine == "fsdp"))
    ]


def list_sensible(needs: MemoryNeeds, hardware: Hardware, *, offload: bool) -> list[str]:
    """The runnable strategies worth a try: without `offload`, only those that keep all on GPUs. One GPU has no other to
    share with, but ZeRO-1 keeps weights in 16 bits."""
    alone = ("ddp", "zero2", "zero3", "fsdp2") if hardware.gpus == 1 else ()
    found = [name for name in list_runnable(needs, hardware) if name not in alone]
    return [name for name in found if offload or not STRATEGIES[name].offloads]


def find_cheapest(peaks: Mapping[str, Peak], hardware: Hardware) -> str | None:
    """The first strategy whose peak fits, or None."""
    return next((name for name in STRATEGIES if name in peaks and peaks[name].fits_hardware(hardware)), None)
