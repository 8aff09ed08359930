"""Peak memory per GPU for every way of spreading a model, from counts and the traced activations.

Weights, gradients and optimizer states follow the ZeRO paper (Rajbhandari et al. 2020, section 3); frozen parameters
have neither gradient nor state. A prediction, not a measurement: allocator fragmentation is left out, and the CUDA
context and library workspaces are one constant.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1024**3
RUNTIME = 1.5 * GIB
"""CUDA context, cuBLAS and NCCL workspaces."""

RUNTIME_CPU = 0.5 * GIB
"""Python, torch, Lightning and transformers in one process, measured on a tiny run."""

STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp")
"""From the least to the most communication: the first that fits is the cheapest."""


@dataclass(frozen=True)
class Needs:
    """What has to be stored.

    Attributes:
        parameters, trainable: counts.
        largest_layer: parameters of the largest block that is gathered at once under ZeRO-3 and FSDP.
        states: optimizer numbers per trainable parameter (AdamW: 2).
        precision: as `trainer.precision`.
        activations: bytes kept for backward by one micro-batch.
        logits: bytes of the loss head at its peak.
    """

    parameters: int
    trainable: int
    largest_layer: int
    states: int
    precision: str
    activations: int
    logits: int


@dataclass(frozen=True)
class Peak:
    """Bytes per GPU (or process, on a CPU)."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    runtime: float

    @property
    def total(self) -> float:
        """Everything."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.runtime


def peak(strategy: str, needs: Needs, gpus: int, runtime: float = RUNTIME) -> Peak:
    """Peak bytes per GPU under one of `STRATEGIES`; `runtime` is what the libraries take themselves."""
    weights, gradients, optimizer = {
        "single": _replicated,
        "ddp": _replicated,
        "zero1": _zero,
        "zero2": _zero,
        "zero3": _zero,
        "fsdp": _fsdp,
    }[strategy](strategy, needs, 1 if strategy == "single" else gpus)
    return Peak(weights, gradients, optimizer, needs.activations, needs.logits, runtime)


def _replicated(strategy: str, needs: Needs, gpus: int) -> tuple[float, float, float]:
    """Everything on every GPU. Mixed precision keeps fp32 weights, and autocast a 16-bit copy of those that learn."""
    size = 2 if needs.precision.endswith("-true") and not needs.precision.startswith("32") else 4
    copies = 2 * (needs.trainable + needs.largest_layer) if needs.precision.endswith("-mixed") else 0
    buckets = 2 if strategy == "ddp" and gpus > 1 else 1  # DDP all-reduces copies of the gradients
    return (
        size * needs.parameters + copies,
        buckets * size * needs.trainable,
        size * needs.states * needs.trainable,
    )


def _zero(strategy: str, needs: Needs, gpus: int) -> tuple[float, float, float]:
    """DeepSpeed: 16-bit weights and gradients with an fp32 master copy, or everything in fp32."""
    full = needs.precision.startswith("32")
    size, master = (4, 0) if full else (2, 4)
    weights: float = size * needs.parameters
    if strategy == "zero3":
        weights = weights / gpus + 2 * size * needs.largest_layer  # the running layer and the prefetched one
    gradients = size * needs.trainable / (gpus if strategy != "zero1" else 1)
    return weights, gradients, (master + 4 * needs.states) * needs.trainable / gpus


def _fsdp(strategy: str, needs: Needs, gpus: int) -> tuple[float, float, float]:
    """FSDP: fp32 shards of everything (16-bit ones with bf16-true), each layer gathered in the compute precision."""
    del strategy
    size = 2 if needs.precision.endswith("-true") and not needs.precision.startswith("32") else 4
    compute = 4 if needs.precision.startswith("32") else 2
    gathered = 2 * compute * needs.largest_layer
    return (
        size * needs.parameters / gpus + gathered,
        size * needs.trainable / gpus,
        size * needs.states * needs.trainable / gpus,
    )


def cheapest(peaks: dict[str, Peak], limit: float, gpus: int) -> str | None:
    """The first strategy whose peak is at most `limit` bytes, or None. More than one GPU rules out `single`."""
    usable = (name for name in STRATEGIES if name in peaks and not (name == "single" and gpus > 1))
    return next((name for name in usable if peaks[name].total <= limit), None)
