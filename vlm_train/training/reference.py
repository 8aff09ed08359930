"""The reference of a run: a second, frozen model that an objective compares the trained one with.

It is built anew by every process that starts or resumes the run, from what `reference` and `init_from` name, and is
never saved. Where the run trains adapters, and no `reference.init_from` is given, it is the trained model itself
with its adapters off, and takes no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from vlm_train.build import build_model
from vlm_train.check.check import check_config
from vlm_train.checkpoint.files import hash_file, manifest_of
from vlm_train.checkpoint.weights import load_init_from, load_run_weights, weights_file
from vlm_train.config.run_file import load_run
from vlm_train.config.trust import check_environment_unread
from vlm_train.contracts.family import Family
from vlm_train.data.text.tokenizer import hash_vocabulary
from vlm_train.errors import ConfigError

START = "start"
"""The reference is what the run starts from; any other value of `reference.model` is a run folder."""


def is_model_without_adapters(cfg: DictConfig) -> bool:
    """Whether the reference is the trained model with its adapters off."""
    return cfg.reference.model == START and cfg.peft is not None and cfg.reference.init_from is None


def reference_config(cfg: DictConfig) -> DictConfig | None:
    """The configuration of the reference's own model; None where the run has no reference, or none of its own.

    Raises:
        ConfigError: that of `reference.model` is not trusted, or no longer valid.
    """
    if cfg.reference.model is None or is_model_without_adapters(cfg):
        return None
    if cfg.reference.model != START:
        other = load_run(Path(cfg.reference.model))
        other.allow_targets = cfg.allow_targets  # the folder may be somebody else's
        try:
            check_environment_unread(str(cfg.reference.model), other)
            check_config(other, need_assets=False)
        except ConfigError as error:
            raise ConfigError([f"reference.model: {problem}" for problem in error.problems]) from error
        return other
    own = cfg.copy()
    if cfg.reference.init_from is not None:
        own.init_from = cfg.reference.init_from
    return own


def build_reference(
    cfg: DictConfig, other: DictConfig | None, tokenizer: Any, *, meta: bool = False, alone: bool = False
) -> tuple[Family | None, list[str]]:
    """The reference's own model, frozen and in eval mode, and the SHA-256 of the weights that it starts from.

    Args:
        other: its `reference_config`.
        tokenizer: of the run, whose token ids the reference reads.
        meta: on the meta device, without weights: rank 0 spreads them later.
        alone: see `load_init_from`.

    Raises:
        ConfigError: the reference was trained with another vocabulary.
        CheckpointError: weights that are damaged or do not fit.
    """
    if other is None:
        return None, []
    model = build_model(other, tokenizer, meta=meta)
    digests: list[str] = []
    if not meta and cfg.reference.model != START:
        run, which = Path(cfg.reference.model), cfg.reference.which
        file = weights_file(run, which)
        if manifest_of(file.parent).get("vocabulary") != hash_vocabulary(tokenizer):
            raise ConfigError(
                f"reference.model: {run} was trained with another vocabulary than this run's tokenizer has."
            )
        load_run_weights(model, other.init_from, run, which)
        digests = [hash_file(file)]
    elif not meta:
        digests = load_init_from(model, other.init_from, alone=alone).digests
    model.requires_grad_(False)
    return model.eval(), digests


def lend(cfg: DictConfig, model: Family, reference: Family | None) -> Callable[[], AbstractContextManager[Any]] | None:
    """What objectives are given: how to borrow the reference; None where the run has none.

    Raises:
        ConfigError: the model with its adapters off would change while it is trained.
    """
    if reference is not None:
        return partial(frozen, reference)
    if cfg.reference.model is None:
        return None
    require_frozen_base(model)
    return partial(without_adapters, model)


def require_frozen_base(model: nn.Module) -> None:
    """Raises ConfigError if the model with its adapters off would change while it is trained."""
    learned = [n for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n]
    if learned:
        raise ConfigError(
            f"reference.model: the model with its adapters off is not a reference, because {len(learned)} parameters "
            f"beside them learn, for example {learned[0]}. Give it weights of its own, reference.init_from=[...] "
            "([]: as the run starts)."
        )


@contextmanager
def frozen(model: Any) -> Iterator[Any]:
    """The reference's own model, without gradients."""
    with torch.no_grad():
        yield model


@contextmanager
def without_adapters(model: Any) -> Iterator[Any]:
    """The trained model as it was before its adapters, in eval mode and without gradients."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapters = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    training = [module for module in model.modules() if module.training]
    try:
        for adapter in adapters:
            adapter._disable_adapters = True  # `enable_adapters(False)` would also say that they do not learn
        for module in training:
            module.training = False
        model.plays_reference = True
        with torch.no_grad():
            yield model
    finally:
        model.plays_reference = False
        for module in training:
            module.training = True
        for adapter in adapters:
            adapter._disable_adapters = False
