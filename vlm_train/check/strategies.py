"""Rules about what a strategy can do, as its class says it: see `vlm_train.training.strategies.state.OwnState`.

Our own classes are read from their source, without torch. Those of other packages are imported, once they are trusted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig

from vlm_train.check.settings import count_processes
from vlm_train.config.resolve import resolve_key
from vlm_train.config.signatures import UnknownTarget, is_ours, read_attribute

DECLARED = ("spans_processes", "scales_loss", "sharded_by", "compiles_shards", "keeps_fp32_copy")
"""What a strategy's class says of itself."""

BASE = "vlm_train.training.strategies.state.OwnState"


def check_own_strategy(cfg: DictConfig) -> Iterator[str]:
    """A strategy of ours can do what the run asks of it."""
    strategy = resolve_key(cfg, "strategy")
    if isinstance(strategy, dict) and is_ours(str(strategy.get("_target_"))):
        yield from _check_abilities(cfg, strategy)


def check_foreign_strategy(cfg: DictConfig) -> Iterator[str]:
    """A strategy of another package can. Imports it."""
    strategy = resolve_key(cfg, "strategy")
    if isinstance(strategy, dict) and not is_ours(str(strategy.get("_target_"))):
        yield from _check_abilities(cfg, strategy)


def _check_abilities(cfg: DictConfig, strategy: dict[str, Any]) -> Iterator[str]:
    target = str(strategy.get("_target_"))
    try:
        says = {name: read_attribute(target, name) for name in DECLARED}
    except UnknownTarget:  # said by `check_targets`
        return
    except AttributeError as error:
        yield f"strategy: {target} does not say {error.name}. Inherit from {BASE}, or set it."
        return
    name, world, shards = target.rpartition(".")[2], count_processes(cfg), shards_weights(strategy)
    sharded = name + "".join(f" with {setting}={value}" for setting, value in (says["sharded_by"] or {}).items())
    if not says["spans_processes"] and world and world > 1:
        yield f"strategy: {name} trains on one device, but {world} processes are started. Use ddp, or a sharded one."
    if shards and not says["compiles_shards"] and cfg.trainer.compile:
        yield f"trainer.compile: {sharded} gathers weights in between, which cannot be compiled. Use fsdp2 or zero2."
    if not says["scales_loss"] and cfg.trainer.precision == "16-mixed":
        yield f"trainer.precision: {name} has no loss scale for 16-mixed. Use bf16-mixed, or a ZeRO stage."
    peft = resolve_key(cfg, "peft")
    bits = peft.get("bits") if isinstance(peft, dict) else None
    if shards and bits is not None:
        yield (
            f"strategy: {sharded} cuts every weight into slices, but {bits}-bit weights have to stay with their "
            "scales, which slices do not. Use strategy=ddp, zero1 or zero2, where each GPU holds the whole "
            "quantized model, or peft=lora."
        )


def shards_weights(strategy: dict[str, Any]) -> bool:
    """Whether a strategy with these settings leaves a rank with a part of the weights only."""
    settings = read_attribute(str(strategy["_target_"]), "sharded_by")
    return settings is not None and all(strategy.get(name) == value for name, value in settings.items())
