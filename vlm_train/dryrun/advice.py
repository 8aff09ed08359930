"""Which strategy to take on given hardware, and what to change where none fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vlm_train.build import build_objectives
from vlm_train.config.folders import config_dir
from vlm_train.dryrun.memory import (
    GIB,
    NF4,
    RUNTIME,
    RUNTIME_CPU,
    STRATEGIES,
    Hardware,
    MemoryNeeds,
    Peak,
    find_cheapest,
    list_runnable,
    list_sensible,
    predict_peak,
)
from vlm_train.dryrun.plan import MemoryPlan, checkpointing_mode, rows_at_once


@dataclass(frozen=True)
class Suggestion:
    """A change of settings, with those before it: the memory under `strategy`, the first that fits or, where none
    does, the one that needs the least of a GPU."""

    flag: str
    strategy: str
    peak: Peak
    fits: bool


@dataclass(frozen=True)
class Advice:
    """The strategies that fit, and the changes that help if none does.

    Attributes:
        peaks: per strategy.
        best: the cheapest strategy that fits GPU and CPU, or None.
        configured: the run's own strategy, None if it is not one of ours; `fits`: whether it fits.
        suggestions: changes by which something fits, in the order to try; where only offload fits, those that avoid it.
    """

    hardware: Hardware
    peaks: dict[str, Peak]
    best: str | None
    configured: str | None
    fits: bool
    suggestions: list[Suggestion]


def advise_run(cfg: DictConfig, plan: MemoryPlan) -> Advice:
    """Advice for the run on `target`."""
    hardware = hardware_of(cfg)
    peaks = _peaks_of_strategies(cfg, plan.needs, hardware, offload=True)
    best, own = find_cheapest(peaks, hardware), configured_strategy(cfg)
    if own in list_runnable(plan.needs, hardware):
        peaks |= {own: predict_peak(own, plan.needs, hardware)}
    return Advice(
        hardware=hardware,
        peaks=peaks,
        best=best,
        configured=own,
        fits=own in peaks and peaks[own].fits_hardware(hardware),
        suggestions=[] if best and not STRATEGIES[best].offloads else _find_suggestions(cfg, plan, hardware, best),
    )


def describe_rows(cfg: DictConfig, longest: int) -> str:
    """What a device computes at once: `16 rows of 2048 tokens`."""
    rows = rows_at_once(cfg)
    return f"{rows} {'row' if rows == 1 else 'rows'} of {longest} tokens"


def hardware_of(cfg: DictConfig) -> Hardware:
    """The hardware that `target` describes."""
    return Hardware(
        gpus=cfg.target.gpus,
        memory=cfg.target.memory_gib * GIB,
        gpus_per_node=cfg.target.gpus_per_node,
        cpu=cfg.target.cpu_gib * GIB,
        runtime=RUNTIME_CPU if cfg.trainer.accelerator == "cpu" else RUNTIME,
    )


def configured_strategy(cfg: DictConfig) -> str | None:
    """The name of the run's strategy: without one `single` or `ddp`, else the option of the group most like it."""
    if cfg.strategy is None:
        return "ddp" if cfg.target.gpus > 1 else "single"
    own = _flatten(OmegaConf.to_container(cfg.strategy))
    similarity: dict[str, int] = {}
    for file in sorted((config_dir() / "strategy").glob("*.yaml")):
        loaded: Any = OmegaConf.to_container(OmegaConf.load(file))
        option = _flatten(loaded.get("strategy", loaded))
        if file.stem in STRATEGIES and option.get("_target_") == own.get("_target_"):
            same = sum(own.get(key) == value for key, value in option.items())
            similarity[file.stem] = 2 * same - len(option)
    return max(similarity, key=similarity.__getitem__) if similarity else None


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """A nested dictionary with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in (node or {}).items():
        found |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _find_suggestions(cfg: DictConfig, plan: MemoryPlan, hardware: Hardware, best: str | None) -> list[Suggestion]:
    """Changes up to the first with which something fits: by preference a strategy that does not offload, and a run that
    learns the same. Where an offloading one fits already, only such changes."""
    found: list[Suggestion] = []
    for offload in (False,) if best else (False, True):
        found = []
        for flag, needs, same_run in _possible_changes(cfg, plan, hardware, offload=offload):
            if not (same_run or offload):
                break
            peaks = _peaks_of_strategies(cfg, needs, hardware, offload=offload)
            fitting = find_cheapest(peaks, hardware)
            strategy = fitting or min(peaks, key=lambda name: peaks[name].total)
            found.append(Suggestion(flag, strategy, peaks[strategy], fitting is not None))
            if fitting:
                return found
    return [] if best else found


def _peaks_of_strategies(cfg: DictConfig, needs: MemoryNeeds, hardware: Hardware, *, offload: bool) -> dict[str, Peak]:
    """Peaks of the strategies worth a try; there is nowhere to offload to from a CPU."""
    names = list_sensible(needs, hardware, offload=offload and cfg.trainer.accelerator != "cpu")
    return {name: predict_peak(name, needs, hardware) for name in names}


def _possible_changes(
    cfg: DictConfig, plan: MemoryPlan, hardware: Hardware, *, offload: bool
) -> Iterator[tuple[str, MemoryNeeds, bool]]:
    """Settings, cheapest first: the plan together with the settings before, and whether the run learns the same."""
    needs, micro = plan.needs, cfg.batch.micro
    kept = plan.activations[checkpointing_mode(cfg)]
    if plan.activations["full"] < kept:
        kept = plan.activations["full"]
        needs = replace(needs, activations=kept * rows_at_once(cfg))
        yield "trainer.activation_checkpointing=full", needs, True
    if micro > 1 and not any(objective.needs_whole_step for objective in build_objectives(cfg).values()):
        while micro > 1:
            micro //= 2
            needs = replace(needs, activations=kept * micro, accumulates=True)
            if find_cheapest(_peaks_of_strategies(cfg, needs, hardware, offload=offload), hardware):
                break
        yield f"batch.micro={micro}", needs, True
    pack, longest = cfg.data.get("pack"), cfg.data.get("max_length")
    if pack and longest and longest < pack and cfg.batch.samples is not None:  # only shares the samples out otherwise
        needs = replace(needs, activations=kept * micro * longest // pack)
        yield f"data.pack={longest}", needs, True
    options = {file.stem: OmegaConf.load(file) for file in (config_dir() / "peft").glob("*.yaml")}
    if cfg.peft is None and plan.llm.learned and "lora" in options:
        added = options["lora"].rank * plan.llm.per_rank
        learned = needs.trainable - plan.llm.learned + added
        needs = replace(needs, parameters=needs.parameters + added, trainable=learned)
        yield "peft=lora", needs, False
    if (cfg.peft is not None or plan.llm.learned) and not needs.quantized and "qlora" in options:
        count = plan.llm.parameters
        yield "peft=qlora", replace(needs, quantized=count, quantized_bytes=count * NF4), False
