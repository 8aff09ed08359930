"""Whether a run that is about to start is predicted to fit on the devices that it has; said once if not."""

from __future__ import annotations

import copy
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from vlm_train.distributed import count_started, say_once
from vlm_train.dryrun.advice import Advice, advise_run, describe_rows
from vlm_train.dryrun.memory import GIB
from vlm_train.dryrun.plan import predict_memory
from vlm_train.training.params import make_policy

MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""What a container may take, by version of control groups."""


def say_shortage(cfg: DictConfig, skeleton: Any) -> None:
    """Print a warning where the model, on the meta device, is predicted not to fit. Leaves it and `cfg` as they are."""
    host = read_host_memory()
    device = read_device_memory() if cfg.trainer.accelerator != "cpu" else None
    if device is None and host is None:
        return
    cfg = cfg.copy()
    cfg.target.gpus = count_started(cfg.launch.kind)
    cfg.target.gpus_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", cfg.launch.devices))
    cfg.target.cpu_gib = (host or math.inf) / GIB
    if device is None:
        cfg.trainer.accelerator = "cpu"
    shared = min(cfg.target.gpus, cfg.target.gpus_per_node)
    cfg.target.memory_gib = (device or (host or math.inf) / shared) / GIB
    try:
        model = copy.deepcopy(skeleton)
        plan = predict_memory(cfg, model, make_policy(cfg, model))
        advice = advise_run(cfg, plan)
    except Exception:  # of any model's own code, which a run may do without: it is no prediction then
        return
    if advice.configured in advice.peaks and not advice.fits:
        say_once(f"warning: {_describe_shortage(cfg, advice, plan.longest)}")


def _describe_shortage(cfg: DictConfig, advice: Advice, longest: int) -> str:
    """What is predicted, what there is, and what to change."""
    own, peak = str(advice.configured), advice.peaks[str(advice.configured)]
    place = "process (its share of this machine)" if cfg.trainer.accelerator == "cpu" else "GPU"
    needed, there = peak.total / GIB, cfg.target.memory_gib
    if peak.total <= advice.hardware.memory:
        needed, there, place = peak.cpu / GIB, cfg.target.cpu_gib, "node's CPU memory"
    said = (
        f"memory: this run is predicted to need {needed:.3g} GiB of a {place}, which has {there:.3g} (strategy {own}, "
        f"{describe_rows(cfg, longest)} at once)."
    )
    helping = next((place for place, one in enumerate(advice.suggestions) if one.fits), None)
    if advice.best is not None:
        changes = [f"strategy={advice.best}"]
    elif helping is not None:
        changes = [one.flag for one in advice.suggestions[: helping + 1]]
        strategy = advice.suggestions[helping].strategy
        changes += [f"strategy={strategy}"] if strategy not in (own, "single") else []
    else:
        flags = " ".join(one.flag for one in advice.suggestions)
        return f"{said} Nothing that is known fits here{f', not even {flags}' if flags else ''}: take more devices."
    return f"{said} Predicted to fit: {' '.join(changes)}. dry_run=true compares all of them."


def read_device_memory() -> float | None:
    """Bytes of this machine's first GPU; None without one."""
    import torch

    return float(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None


def read_host_memory() -> float | None:
    """Bytes of memory of this machine, or of what its container may take; None where nothing says it."""
    found = []
    with suppress(AttributeError, OSError, ValueError):  # Windows
        found.append(float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))
    for path in MEMORY_LIMITS:
        with suppress(OSError, ValueError):  # `max`
            found.append(float(Path(path).read_text(encoding="ascii")))
    return min(found, default=None)
