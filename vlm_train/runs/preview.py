"""`mode=show` and `mode=lengths`: what a run would read, before it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from data_pipelines.shards.shard_set import ShardSet
from vlm_train.config.run_identity import run_dir


def show_sample(cfg: DictConfig) -> None:
    """Print the first training sample as tokens and save its views as `show.png`: in the folder of `run=`, or else in
    `<paths.runs>/show/<recipe>`."""
    from vlm_train.build import build_assembly
    from vlm_train.data.show import show_sample

    options = {name: cfg.data[name] for name in ("annotations", "max_length", "over_length")}
    options["prefix_split"] = cfg.data.get("prefix_split") or False
    folder = run_dir(cfg) if cfg.run else Path(cfg.paths.runs) / "show" / cfg.recipe_name
    show_sample(build_assembly(cfg).processor, _open_first(cfg), options, seed=cfg.seed, folder=folder)


def _open_first(cfg: DictConfig) -> Any:
    """The shards of the first entry of `data.train`, tars without an index in the order of their files."""
    from vlm_train.data.stream import open_stream

    entry = cfg.data.train[0]
    if "tars" not in entry:
        return ShardSet(entry.shards)
    how = {"seed": cfg.seed, "cache": cfg.data.cache, "fetched": cfg.data.get("shard_cache")}
    return open_stream(OmegaConf.to_container(entry, resolve=True), 1, "none", **how)["shards"]  # type: ignore[arg-type]


def measure_lengths(cfg: DictConfig) -> None:
    """Print how long the training samples are, and leave the length index behind, so that a run on expensive machines
    need not make it. Needs no weights and no GPU."""
    from vlm_train.build import build_assembly, build_data
    from vlm_train.data.survey import measure_sources

    cfg = cfg.copy()
    if cfg.data.get("val"):  # not looked at, so it need not be there
        cfg.data.val, cfg.data.val_share = [], 0.0
    measure_sources(build_data(cfg, build_assembly(cfg, meta=True).processor), cfg.trainer.guard.max_unknown)
