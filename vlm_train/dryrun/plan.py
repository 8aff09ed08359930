"""The plan of a run: what it trains, computes, holds in memory, takes in steps and leaves on disk."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from vlm_train.build import build_images, build_model, build_objectives, build_optimizer
from vlm_train.check.model import check_reference
from vlm_train.config.part_error import name_failing_code
from vlm_train.config.schema import MODEL_PARTS
from vlm_train.config.size import list_unsized
from vlm_train.contracts.layout import MediaSize
from vlm_train.contracts.model_parts import find_encoders, find_layers
from vlm_train.dryrun.length import Disk, Length, predict_disk, predict_length
from vlm_train.dryrun.memory import MemoryNeeds
from vlm_train.dryrun.round_trip import round_trip
from vlm_train.models.adapters.quantize import quantized_layers
from vlm_train.models.precision import find_halvable
from vlm_train.training.flops import Flops, count_flops
from vlm_train.training.meta_batch import ExampleImage, visual_tokens
from vlm_train.training.params import Policy, make_policy
from vlm_train.training.reference import START, reference_config
from vlm_train.training.trace import trace_step


@dataclass(frozen=True)
class MemoryPlan:
    """What a run holds in memory.

    Attributes:
        needs: what has to be stored.
        activations: bytes kept for backward by one row: without activation checkpointing (`none`), with (`full`), and
            where products and attention are kept (`selective`).
        longest: tokens of such a row, the longest that there can be.
        llm: parameters of adapters of the language model.
    """

    needs: MemoryNeeds
    activations: dict[str, int]
    longest: int
    llm: Linears


@dataclass(frozen=True)
class Plan(MemoryPlan):
    """Everything a dry run finds out.

    Attributes:
        round_trip: tensors of a tiny copy that came back equal from a file; None: there is no tiny copy, because the
            components `unsized` have no `tiny:` block.
    """

    recipe: str
    policy: Policy
    visual_tokens: int
    image_size: MediaSize | None
    flops: dict[str, Flops]
    length: Length
    disk: Disk
    round_trip: int | None
    unsized: list[str]


@dataclass(frozen=True)
class Linears:
    """Linear layers of the language model but its head.

    Attributes:
        parameters: of their weights.
        per_rank: parameters of LoRA adapters of rank 1 on all of them.
        learned: trainable parameters of the whole language model.
    """

    parameters: int = 0
    per_rank: int = 0
    learned: int = 0


def make_plan(cfg: DictConfig, model: Any) -> Plan:
    """The plan of a model on the meta device."""
    policy = make_policy(cfg, model)
    image = typical_image(cfg, model)
    visual = visual_tokens(model, image)
    with name_failing_code("model: no step can be computed with the settings of its parts"):
        text, supervised = cfg.target.text_tokens, cfg.target.supervised_tokens
        typical = trace_step(cfg, model, text_tokens=text, supervised=supervised, image=image)
    memory = predict_memory(cfg, model, policy)
    unsized = list_unsized(cfg, cfg.tiny, (*MODEL_PARTS, "parts"))
    return Plan(
        recipe=cfg.recipe_name,
        policy=policy,
        visual_tokens=visual,
        image_size=image.size if _follow_sizes(model, image) else None,
        flops=count_flops(typical.products),
        length=predict_length(cfg, visual + cfg.target.text_tokens),
        disk=predict_disk(cfg, policy.trainable, memory.needs.states),
        round_trip=None if unsized else round_trip(cfg),
        unsized=unsized,
        **vars(memory),
    )


def typical_image(cfg: DictConfig, model: Any) -> ExampleImage:
    """An image of `target.image_width` x `target.image_height` under the image plans of the configuration."""
    size = MediaSize(width=cfg.target.image_width, height=cfg.target.image_height)
    return ExampleImage(size, build_images(cfg, model))


def _follow_sizes(model: Any, image: ExampleImage) -> bool:
    """Whether the tokens of an image depend on its size."""
    native = any(encoder.image_size is None for encoder in find_encoders(model).values())
    return native or any(hasattr(plan, "shape") for plan in image.plans.values())


def predict_memory(cfg: DictConfig, model: Any, policy: Policy) -> MemoryPlan:
    """What training a model on the meta device holds in memory. Casts it to 16 bits where training computes in them."""
    image = typical_image(cfg, model)
    visual, pack = visual_tokens(model, image), cfg.data.get("pack")
    longest = pack or cfg.data.get("max_length") or visual + cfg.target.text_tokens
    images = max(pack // (visual + cfg.target.text_tokens), 1) if pack else 1  # a packed row has as many as samples
    text = max(longest - images * visual, 1)
    if not cfg.trainer.precision.startswith("32"):
        model.to(torch.bfloat16)
    biggest = trace_step(cfg, model, text_tokens=text, supervised=text, images=images, image=image)
    activations = {"none": biggest.activations, "selective": biggest.selective, "full": biggest.checkpointed}
    needs = _memory_needs(cfg, model, policy, activations[checkpointing_mode(cfg)], optimizer_states(cfg))
    return MemoryPlan(needs, activations, longest, _count_linears(model))


def checkpointing_mode(cfg: DictConfig) -> str:
    """`trainer.activation_checkpointing` as a key of `MemoryPlan.activations`."""
    return str(cfg.trainer.activation_checkpointing)


def rows_at_once(cfg: DictConfig) -> int:
    """Rows whose activations a device holds: those of a micro-batch, or of a chunk with gradient caching."""
    rows = _rows_per_micro_batch(cfg)
    return min(rows, cfg.model.get("cache_chunk") or rows)


def _rows_per_micro_batch(cfg: DictConfig) -> int:
    """Rows of a micro-batch: no more than a device's share of the step."""
    micro, samples = int(cfg.batch.micro), cfg.batch.samples
    return micro if samples is None else min(micro, math.ceil(samples / cfg.target.gpus))


def optimizer_states(cfg: DictConfig) -> int:
    """Numbers that the optimizer keeps per parameter, found by letting it step once."""
    parameter = nn.Parameter(torch.zeros(64))
    parameter.grad = torch.zeros(64)
    optimizer = build_optimizer(cfg, [{"params": [parameter]}])
    optimizer.step()
    return sum(value.numel() for value in optimizer.state[parameter].values() if value.numel() == 64) // 64


def _memory_needs(cfg: DictConfig, model: nn.Module, policy: Policy, activations: int, states: int) -> MemoryNeeds:
    layers = [sum(p.numel() for p in layer.parameters()) for layer in find_layers(model).values()]
    quantized = [how for _, how in quantized_layers(model)]
    rows = cfg.batch.micro * cfg.target.gpus
    return MemoryNeeds(
        parameters=policy.total + _reference_parameters(cfg, model, policy),
        trainable=policy.trainable,
        largest_layer=max([*layers, *_parameters_outside_blocks(model)]),
        outside=policy.total - sum(layers),
        states=states,
        precision=cfg.trainer.precision,
        activations=activations * rows_at_once(cfg),
        logits=_logits_bytes(cfg, model),
        quantized=sum(how.weights for how in quantized),
        quantized_bytes=sum(how.stored for how in quantized),
        accumulates=cfg.batch.samples is None or cfg.batch.samples > rows,
        fused=cfg.optim.get("fused") in ("auto", True),
        halved=_count_halved(cfg, model),
    )


def _count_halved(cfg: DictConfig, model: nn.Module) -> int:
    """Weights that `trainer.halve_frozen` keeps in 16 bits."""
    if not (cfg.trainer.halve_frozen and cfg.trainer.precision.endswith("-mixed")):
        return 0
    return sum(p.numel() for layer in find_halvable(model) for p in layer.parameters(recurse=False))


def _reference_parameters(cfg: DictConfig, model: Any, policy: Policy) -> int:
    """Number of parameters of a reference that has a model of its own."""
    other = reference_config(cfg)
    if other is None or cfg.reference.model == START:
        return 0 if other is None else policy.total
    if other.llm is not None and other.llm.config.get("vocab_size") is None:
        other.llm.config.vocab_size = cfg.llm.config.vocab_size  # it reads the token ids of this run
    reference = build_model(other, meta=True)
    check_reference(cfg, model, reference)
    return sum(parameter.numel() for parameter in reference.parameters())


def _parameters_outside_blocks(model: nn.Module) -> Iterator[int]:
    """Parameters of every module outside layers by itself (embeddings, heads, connectors)."""
    inside = {id(one) for layer in find_layers(model).values() for one in layer.modules()}
    for module in model.modules():
        if id(module) not in inside:
            yield sum(p.numel() for p in module.parameters(recurse=False))


def _count_linears(model: Any) -> Linears:
    llm = getattr(model, "llm", None)
    if llm is None:
        return Linears()
    head = llm.model.get_output_embeddings() if hasattr(llm, "model") else None  # else one that shares the embedding
    weights = [
        module.weight
        for name, module in llm.named_modules()
        if isinstance(module, nn.Linear) and module is not head and "lora_" not in name
    ]
    return Linears(
        parameters=sum(weight.numel() for weight in weights),
        per_rank=sum(sum(weight.shape) for weight in weights),
        learned=sum(p.numel() for p in llm.parameters() if p.requires_grad),
    )


def _logits_bytes(cfg: DictConfig, model: Any) -> int:
    """Bytes of one chunk of logits in 16 bits, its fp32 copy, and the gradients of both; or, of a loss that contrasts
    samples, five fp32 matrices of similarities."""
    nodes = [node for node in cfg.objective.values() if node is not None]
    chunk = max((node.get("chunk") or 0 for node in nodes), default=0)
    head = chunk * model.llm.vocab_size * (2 + 4 + 4 + 2) if chunk else 0
    contrasts = cfg.batch.samples and any(one.needs_whole_step for one in build_objectives(cfg).values())
    return max(head, 5 * 4 * _rows_per_micro_batch(cfg) * cfg.batch.samples if contrasts else 0)
