"""`mode=export` and `mode=import`: between a run folder and the native LLaVA format of `transformers`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from vlm_train.config import run_dir, run_id, save_config
from vlm_train.errors import AssetError, ConfigError
from vlm_train.evaluation.run import require_own_weights
from vlm_train.runs.folder import RunFolder


def export(cfg: DictConfig) -> dict[str, Any]:
    """Write the run's newest weights as `<run>/export`, which is read back and compared before it counts as done."""
    from vlm_train.build import build
    from vlm_train.checkpoint import load_run_weights

    folder = run_dir(cfg)
    require_own_weights(cfg, folder)
    built = build(cfg)
    load_run_weights(built.model, cfg.init_from, folder)
    return {"export": str(write_export(built, folder))}


def write_export(built: Any, folder: Path) -> Path:
    """Write `<folder>/export` from a trained model, once its logits and prompts were compared. A failure keeps the old.

    Raises:
        ConfigError: `transformers` has no such model. AssetError: what was written does not give the same logits.
    """
    from vlm_train.export.blip import export_blip
    from vlm_train.export.blip2 import export_blip2, speaks_blip2
    from vlm_train.export.chat import add_chat_template
    from vlm_train.export.llava import export_llava
    from vlm_train.export.merged import quantised, unquantised
    from vlm_train.models.blip import Blip
    from vlm_train.models.vision.example import typical_size

    if quantised(built.model):
        print("export: adapters are merged into a fresh copy of the base, not into its quantised weights", flush=True)
        built = unquantised(built)
    model: Any = built.model.eval()
    processor = built.processor
    tokenizer, mode = processor.tokenizer, getattr(processor.images.get("vision"), "mode", "pad")
    out = RunFolder(folder).export
    if isinstance(model, Blip):
        with replacing(out) as partial:
            export_blip(model, partial, tokenizer)
        print(f"Exported to {out}: for retrieval and for captioning, each with the run's weights.", flush=True)
        return out
    with replacing(out) as partial:
        if speaks_blip2(model):
            asks = getattr(processor.instruction, "tokenizer", None)
            export_blip2(model, tokenizer, partial, image_mode=mode, eos_ids=processor.end_ids, instruction=asks)
        else:
            export_llava(model, tokenizer, partial, image_mode=mode, eos_ids=processor.end_ids)
        problem = add_chat_template(partial, processor, typical_size(model.vision))
    chat = f"it has no chat template: {problem}" if problem else "its chat template gives the prompts of training"
    print(f"Exported to {out}; its logits equal the run's; {chat}.", flush=True)
    return out


@contextmanager
def replacing(final: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `final` when the block ends well and is deleted when it does not."""
    partial, old = (final.with_name(f"{final.name}.{kind}") for kind in ("partial", "old"))
    for leftover in (partial, old):
        if leftover == old and old.exists() and not final.exists():
            old.rename(final)  # a kill between the two renames below
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if final.exists():
            final.rename(old)
        partial.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def import_(cfg: DictConfig) -> dict[str, Any]:
    """Turn the local LLaVA folder that `init_from` names into a run that others can start from, evaluate and export.

    Raises:
        ConfigError: `init_from` does not name exactly one whole LLaVA folder.
    """
    from vlm_train import checkpoint, record
    from vlm_train.build import build
    from vlm_train.export.llava import import_llava

    source = _llava_folder(cfg)
    cfg = cfg.copy()
    cfg.run_name = cfg.run_name or f"{run_id(cfg)}-imported"  # never the folder of the run that trains this recipe
    folder = run_dir(cfg)
    cfg.init_from = []
    for part in ("vision", "llm"):
        cfg[part].weights = None
    if str(cfg.tokenizer.get("_target_")).endswith(".pretrained"):
        cfg.tokenizer.name = str(source.absolute())
    OmegaConf.update(cfg, "llm.new_tokens", 0, force_add=True)  # its <image> and <pad> are ids that we never use
    if RunFolder(folder).checkpoints.exists():
        raise ConfigError(f"run_name: {folder} already holds checkpoints. Choose another run_name, or delete it.")
    built = build(cfg)
    import_llava(cast(Any, built.model), source)
    folder.mkdir(parents=True, exist_ok=True)
    save_config(cfg, RunFolder(folder).config)
    weights = {name: p.detach().contiguous() for name, p in built.model.named_parameters()}
    checkpoint.save_weights(RunFolder(folder).checkpoints, weights, run_id=run_id(cfg), step=0)
    built.processor.tokenizer.save_pretrained(RunFolder(folder).tokenizer)
    record.update(folder, run_id=run_id(cfg), recipe=cfg.recipe_name, status="imported", source=str(source.absolute()))
    print(f"Imported {source} as {folder}. Start from it with init_from=[{{run: {folder}}}].", flush=True)
    return {"run": str(folder)}


def _llava_folder(cfg: DictConfig) -> Path:
    if len(cfg.init_from) != 1:
        raise ConfigError(f"init_from: mode=import takes one LLaVA folder, got {len(cfg.init_from)} entries.")
    (entry,) = cfg.init_from
    if entry.parts is not None:
        raise ConfigError(
            "init_from.0.parts: mode=import takes the whole LLaVA; name parts where a run starts from it."
        )
    if not (Path(entry.run) / "config.json").is_file():
        raise AssetError(
            f"init_from.0.run: {entry.run} has no config.json. Expected a local folder with the config.json, weights "
            "(safetensors) and tokenizer of a LlavaForConditionalGeneration; download it first."
        )
    return Path(entry.run)
