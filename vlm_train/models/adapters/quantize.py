"""Frozen linear layers in 4 or 8 bits (`bitsandbytes`), so that a large base model fits beside its adapters.

Quantizing is a function of the weights alone, so a run that resumes from the same base holds the same numbers. On the
meta device a layer keeps its shape and is only marked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlm_train.errors import AssetError, ConfigError

BLOCK, OUTER_BLOCK = 64, 256
"""Weights that share a scale in 4 bits, and scales that share one of their own (arXiv 2305.14314, section 3)."""

OUTLIER = 6.0
"""Inputs beyond this are multiplied in 16 bits with 8-bit weights (LLM.int8(), arXiv 2208.07339, section 3.2)."""


@dataclass(frozen=True)
class Quantized:
    """How a layer's weight is stored; kept on the layer as `quantized`.

    Attributes:
        weights: how many there are: a packed tensor has fewer elements.
        stored: bytes that they take, scales included.
    """

    bits: int
    weights: int
    stored: int


def quantize_layers(
    model: nn.Module, names: Sequence[str], *, bits: int, double_quant: bool = True, compute: torch.dtype | None = None
) -> None:
    """Replace the linear layers of these names by ones with NF4 (4) or int8 (8) weights, which never learn.

    Args:
        double_quant: the scales of NF4 in 8 bits, too.
        compute: dtype of NF4 products; None: that of the inputs. int8 products are what the library makes them.

    Raises:
        ConfigError: NF4 for a layer whose inputs are no multiple of 64. AssetError: `bitsandbytes` is not installed.
    """
    for name in names:
        layer: Any = model.get_submodule(name)
        if bits == 4 and layer.in_features % BLOCK:  # bitsandbytes 0.50.2 reads such a layer with wrong scales on a CPU
            raise ConfigError(
                f"peft.quantize_match: {name} has {layer.in_features} inputs, and NF4 needs a multiple of {BLOCK}. "
                "Leave it out, or use peft.bits=8."
            )
        mark = _describe_quantized(layer, bits, double_quant)
        if not layer.weight.is_meta:
            layer = _make_nf4(layer, double_quant, compute) if bits == 4 else _make_int8(layer)
            model.set_submodule(name, layer)
        layer.quantized = mark
        layer.requires_grad_(False)


def _describe_quantized(layer: Any, bits: int, double_quant: bool) -> Quantized:
    count = layer.weight.numel()
    if bits == 8:
        return Quantized(bits, count, count + 4 * layer.out_features)
    blocks = -(-count // BLOCK)
    scales = blocks + 4 * -(-blocks // OUTER_BLOCK) if double_quant else 4 * blocks
    return Quantized(bits, count, -(-count // 2) + scales)


def _make_nf4(layer: Any, double_quant: bool, compute: torch.dtype | None) -> nn.Module:
    made = _import_bitsandbytes().nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=compute,
        compress_statistics=double_quant,
        quant_type="nf4",
        device="meta",
    )
    # The library would pack weights anew, in place, whenever a CPU of some kind evaluates.
    made.support_avx512bf16_for_cpu = False
    made.bias = layer.bias
    return _fill_layer(made, layer.weight)


def _make_int8(layer: Any) -> nn.Module:
    made = _import_bitsandbytes().nn.Linear8bitLt(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        has_fp16_weights=False,
        threshold=OUTLIER,
        device="meta",
    )
    made.bias = layer.bias
    made.register_forward_pre_hook(_move_scales)
    return _fill_layer(made, layer.weight)


def _move_scales(layer: Any, _: Any) -> None:
    """Bring int8 numbers and scales to where the weight is: `Module.to` of a model moves only the weight."""
    weight, device = layer.weight, layer.weight.device
    for held in (weight, layer.state):
        if held.CB is not None and held.CB.device != device:
            held.CB, held.SCB = weight.data, held.SCB.to(device)


def _fill_layer(layer: Any, weight: Tensor) -> nn.Module:
    """Quantize `weight` `[out, in]` into a layer of the library."""
    modules, exact = _import_bitsandbytes().nn, weight.detach()
    if isinstance(layer, modules.Linear4bit):
        held = modules.Params4bit(
            exact,
            requires_grad=False,
            blocksize=BLOCK,
            compress_statistics=layer.weight.compress_statistics,
            quant_type=layer.weight.quant_type,
            module=layer,
        )
    else:
        held = modules.Int8Params(exact, requires_grad=False, has_fp16_weights=False)
    layer.weight = held.to(exact.device)
    return layer


def full_shape(model: nn.Module, name: str) -> torch.Size:
    """The shape of a parameter, `[out, in]` for quantized weights however they are packed."""
    own, (layer, marked) = model.get_parameter(name), _layer_of(model, name)
    return torch.Size((layer.out_features, layer.in_features)) if marked else own.shape


def assign_values(model: nn.Module, name: str, weight: Tensor) -> None:
    """Give the parameter of this name other values, of `full_shape`; a quantized one quantizes them."""
    own, (layer, marked) = model.get_parameter(name), _layer_of(model, name)
    if marked and not own.is_meta:
        _fill_layer(layer, weight.to(own.device))
        return
    with torch.no_grad():
        own.copy_(weight)


def _layer_of(model: nn.Module, name: str) -> tuple[Any, bool]:
    """The module that holds a parameter, and whether the parameter is its quantized weight."""
    where, _, last = name.rpartition(".")
    layer = model.get_submodule(where)
    return layer, last == "weight" and hasattr(layer, "quantized")


def _import_bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise AssetError("peft: quantized weights need bitsandbytes: pip install 'vlm-train[qlora]'") from error
    return bitsandbytes


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Quantized]]:
    """Name and storage of every quantized layer."""
    for name, module in model.named_modules():
        if isinstance(mark := getattr(module, "quantized", None), Quantized):
            yield name, mark


def quantized_weights(model: nn.Module) -> dict[str, Quantized]:
    """Full names of quantized parameters, and how they are stored."""
    return {f"{name}.weight": mark for name, mark in quantized_layers(model)}


def dequantize_weight(layer: Any) -> Tensor:
    """The weight `[out, in]` that a layer computes with, in floating point."""
    mark = getattr(layer, "quantized", None)
    if mark is None:
        return layer.weight.detach()
    functional = _import_bitsandbytes().functional
    if mark.bits == 4:
        return functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return functional.int8_vectorwise_dequant(layer.weight.data, scales)
