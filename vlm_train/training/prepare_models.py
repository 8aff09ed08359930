"""The models of a run before it trains: checked on the meta device, built, weights read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from vlm_train.build import build_assembly, build_evaluators, build_on_meta
from vlm_train.check.model import check_model, check_reference
from vlm_train.checkpoint.files import WEIGHTS
from vlm_train.checkpoint.resume import Resume
from vlm_train.checkpoint.weights import WHOLE, HandedOver, load_init_from, load_weights
from vlm_train.distributed import process_rank
from vlm_train.models.precision import cast_to_bf16
from vlm_train.training.params import make_policy
from vlm_train.training.reference import (
    START,
    build_reference,
    is_model_without_adapters,
    reference_config,
    require_frozen_base,
)

LookAt = Callable[[DictConfig, Any], None]
"""What looks at the model of a configuration on the meta device."""


@dataclass(frozen=True)
class PreparedModels:
    """The models of a run, with their weights loaded.

    Attributes:
        skeleton: the model on the meta device; None where it cannot be built there.
        handed: what `init_from` gave.
        reference: the frozen second model, with the digests of its weights; None: the run has none.
    """

    assembly: Any
    skeleton: Any
    evaluators: dict[str, Any]
    handed: HandedOver
    reference: Any
    digests: Any


def prepare_models(
    cfg: DictConfig, resumed: Resume | None, *, shares: bool, to_bf16: bool, look_at: LookAt | None = None
) -> PreparedModels:
    """Check on the meta device, build, read weights.

    Args:
        shares: build without weights, which rank 0 spreads later.
        to_bf16: cast all weights to bf16.
        look_at: called with the model on the meta device, before weights are read, on rank 0.
    """
    skeleton = build_on_meta(cfg)
    if skeleton is not None:
        check_model(cfg, skeleton)
        make_policy(cfg, skeleton)
        if is_model_without_adapters(cfg):
            require_frozen_base(skeleton)
        if look_at is not None and process_rank() == 0:
            look_at(cfg, skeleton)
    evaluators, other = build_evaluators(cfg), reference_config(cfg)
    teacher = build_on_meta(other) if other is not None and cfg.reference.model != START else None
    if skeleton is not None and teacher is not None:
        check_reference(cfg, skeleton, teacher)
    assembly = build_assembly(cfg, meta=shares)
    if skeleton is None:
        check_model(cfg, assembly.model)
    alone = resumed is not None and not resumed.manifest.get(WHOLE)  # go on with what the run began with
    handed = HandedOver()
    if not shares:
        handed = load_init_from(assembly.model, cfg.init_from, alone=alone)
        if resumed:
            handed.filled |= load_weights(assembly.model, resumed.folder / WEIGHTS)
    reference, digests = build_reference(cfg, other, assembly.processor.tokenizer, meta=shares, alone=alone)
    if to_bf16:
        cast_to_bf16(assembly.model)
        if reference is not None:
            cast_to_bf16(reference)
    return PreparedModels(assembly, skeleton, evaluators, handed, reference, digests)
