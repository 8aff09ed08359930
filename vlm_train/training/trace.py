"""One forward pass on the meta device, watched: its matrix products, who gets gradients, and what backward keeps.

Nothing is computed and nothing takes memory, so a 13B model is traced in about a second. Legend: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vlm_train.build import build_objectives
from vlm_train.contracts.model_parts import find_layers, find_parts, name_part
from vlm_train.contracts.objective import StepContext
from vlm_train.training.meta_batch import ExampleImage, meta_batch
from vlm_train.training.reference import frozen

_MATMULS = (torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm)


@dataclass(frozen=True)
class Product:
    """A matrix product of the forward pass, or one attention (its two products together).

    Attributes:
        part: the part it belongs to.
        flops: forward FLOPs, a multiply-add counted as two.
        input_grads: forward-sized products that backward adds for its inputs (attention: 2, one per operand).
        weight_grads: the same for a weight that learns.
        causal: attention of which the upper triangle is masked away.
    """

    part: str
    flops: float
    input_grads: int
    weight_grads: int
    causal: bool = False


@dataclass
class Trace:
    """What a forward pass did. Bytes count each storage once and leave out parameters and buffers.

    Attributes:
        products: every matrix product, in order.
        outside: bytes kept for backward outside numbered layers.
        layers: per layer, (bytes of its input, bytes kept inside it).
        outputs: per layer, bytes of what its matrix products and attention give.
    """

    products: list[Product] = field(default_factory=list)
    outside: int = 0
    layers: dict[str, tuple[int, int]] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)

    @property
    def activations(self) -> int:
        """Bytes that the backward pass needs."""
        return self.outside + sum(kept for _, kept in self.layers.values())

    @property
    def checkpointed(self) -> int:
        """Bytes that backward needs with activation checkpointing: the inputs of all layers and the inside of one."""
        kept = [(given, inside) for given, inside in self.layers.values() if inside]
        return self.outside + sum(given for given, _ in kept) + max((inside for _, inside in kept), default=0)

    @property
    def selective(self) -> int:
        """Bytes that backward needs if checkpointing also keeps the costly outputs: products and attention."""
        kept = sum(self.outputs.get(name, 0) for name, (_, inside) in self.layers.items() if inside)
        return min(self.checkpointed + kept, self.activations)


class _Products(TorchFunctionMode):
    """Notes the products. Attention is done by a fused kernel, so that no `[T, T]` scores are kept, as on a GPU."""

    def __init__(self, trace: Trace, owners: Mapping[int, str], layers: _Layers) -> None:
        super().__init__()
        self.trace = trace
        self.owners = owners
        self.layers = layers
        self.part = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._trace_attention(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in (F.linear, F.conv2d):
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            self.part = self.owners.get(id(weight), self.part)
            per_output = prod(weight.shape[1:])
            self._add_product(2.0 * result.numel() * per_output, args[0].requires_grad, weight.requires_grad)
            self._keep_output(result)
        elif func in _MATMULS:
            left, right = args[0], args[1]
            self._add_product(2.0 * result.numel() * left.shape[-1], left.requires_grad, right.requires_grad)
            self._keep_output(result)
        return result

    def _keep_output(self, result: Tensor) -> None:
        if self.layers.current and result.requires_grad:
            self.layers.current.outputs += result.nbytes

    def _add_product(self, flops: float, input_grads: int, weight_grads: int, causal: bool = False) -> None:
        self.trace.products.append(Product(self.part, flops, int(input_grads), int(weight_grads), causal))

    def _trace_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        groups = query.shape[-3] // key.shape[-3] if enable_gqa else 1
        if groups > 1:
            key, value = (tensor.repeat_interleave(groups, dim=-3) for tensor in (key, value))
        flops = 2.0 * query.numel() * key.shape[-2] + 2.0 * query[..., 0].numel() * key.shape[-2] * value.shape[-1]
        grads = 2 * any(tensor.requires_grad for tensor in (query, key, value))
        # Every mask of ours between a text and itself is causal inside its segments; encoders that see everything pass
        # none.
        masked = attn_mask is not None and query.shape[-2] == key.shape[-2]
        self._add_product(flops, grads, 0, causal=is_causal or masked)
        if attn_mask is not None:
            attn_mask = attn_mask.detach()  # learned distances (T5): this kernel has no gradients for them
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        result: Tensor = kernel(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
        self._keep_output(result)
        return result


def trace_forward(model: nn.Module, forward: Callable[[], Any]) -> Trace:
    """Run `forward` (which calls `model`, all on the meta device) and note what it does."""
    result = Trace()
    parts = find_parts(model)
    owners = {id(parameter): name_part(name, parts) for name, parameter in model.named_parameters()}
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    with _watch_layers(model) as layers, _Products(result, owners, layers), _watch_saved(own, layers) as outside:
        loss = forward()  # held until the end: what its graph keeps is what backward needs
    del loss
    result.outside = sum(outside.values())
    result.layers = {name: (layer.given, sum(layer.kept.values())) for name, layer in layers.seen.items()}
    result.outputs = {name: layer.outputs for name, layer in layers.seen.items()}
    return result


@dataclass
class _Layer:
    given: int = 0
    outputs: int = 0
    kept: dict[int, int] = field(default_factory=dict)


@dataclass
class _Layers:
    seen: dict[str, _Layer] = field(default_factory=dict)
    current: _Layer | None = None


@contextmanager
def _watch_layers(model: nn.Module) -> Iterator[_Layers]:
    """Know which numbered layer of which part is running."""
    layers = _Layers()
    handles = []
    for name, block in find_layers(model).items():
        layers.seen[name] = layer = _Layer()

        def enter_layer(_: nn.Module, args: Any, kwargs: Any, layer: _Layer = layer) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            layer.given, layers.current = hidden.nbytes, layer

        def leave_layer(_: nn.Module, args: Any, output: Any) -> None:
            layers.current = None

        handles += [
            block.register_forward_pre_hook(enter_layer, with_kwargs=True),
            block.register_forward_hook(leave_layer),
        ]
    try:
        yield layers
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _watch_saved(own: set[int], layers: _Layers) -> Iterator[dict[int, int]]:
    """Bytes of every storage that autograd saves, by storage; those saved inside a layer go to the layer."""
    outside: dict[int, int] = {}
    known: set[int] = set(own)

    def pack_saved(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            known.add(storage._cdata)
            (layers.current.kept if layers.current else outside)[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_saved, lambda tensor: tensor):
        yield outside


def trace_step(
    cfg: DictConfig,
    model: nn.Module,
    *,
    text_tokens: int,
    supervised: int,
    images: int = 1,
    image: ExampleImage | None = None,
) -> Trace:
    """Trace the losses of one row: a sample, or a packed row of so many images, all like `image` (None: one view)."""
    objectives = build_objectives(cfg).values()
    streams = [name for objective in objectives for name in objective.streams]
    columns = [name for objective in objectives for name in getattr(objective, "columns", ())]
    told = [name for objective in objectives for name in getattr(objective, "top_tokens", ())]
    sizes = {"rows": 1, "text_tokens": text_tokens, "supervised": supervised, "images": images}
    batch = meta_batch(model, streams=streams, columns=columns, top_tokens=told, image=image, **sizes)
    context = StepContext(reference=None if cfg.reference.model is None else partial(frozen, model))

    def run_objectives() -> list[Any]:
        return [objective(model, batch, context) for objective in objectives]

    with torch.device("meta"):
        return trace_forward(model, run_objectives)
