"""`mode=export` and `mode=import`: between a run folder and the native LLaVA format of `transformers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig

from vlm_train.config import run_dir, run_file, save_config
from vlm_train.errors import ConfigError

EXPORT_FOLDER = "export"
WEIGHTS = "model.safetensors"


def export(cfg: DictConfig) -> dict[str, Any]:
    """Write the run's newest weights as `<run>/export`, which is read back and compared before it counts as done."""
    from vlm_train.build import build
    from vlm_train.checkpoint import load_run_weights

    folder = run_dir(cfg)
    built = build(cfg)
    load_run_weights(built.model, cfg.init_from, folder)
    return {"export": str(write_export(built, folder))}


def write_export(built: Any, folder: Path) -> Path:
    """Write `<folder>/export` from a trained model and compare its logits."""
    from vlm_train.evaluation.answers import end_ids
    from vlm_train.export.llava import export_llava

    mode = getattr(built.image, "mode", "pad")
    model: Any = built.model.eval()
    out = export_llava(model, built.tokenizer, folder / EXPORT_FOLDER, image_mode=mode, eos_ids=end_ids(built))
    print(f"Exported to {out}; its logits equal the run's.")
    return out


def import_(cfg: DictConfig) -> dict[str, Any]:
    """Turn the LLaVA folder named by `init_from` into `<run>/model.safetensors`, which other runs can start from.

    Raises:
        ConfigError: `init_from` does not name exactly one folder.
    """
    from safetensors.torch import save_file

    from vlm_train.build import build
    from vlm_train.export.llava import import_llava

    if len(cfg.init_from) != 1:
        raise ConfigError(f"init_from: mode=import takes one LLaVA folder, got {len(cfg.init_from)} entries.")
    source, folder = Path(cfg.init_from[0].run), run_dir(cfg)
    cfg = cfg.copy()
    cfg.init_from = []
    built = build(cfg)
    import_llava(cast(Any, built.model), source)
    folder.mkdir(parents=True, exist_ok=True)
    save_config(cfg, run_file(folder))
    weights = {name: p.detach().contiguous() for name, p in built.model.named_parameters()}
    save_file(weights, folder / WEIGHTS)
    print(f"Imported {source} as {folder / WEIGHTS}. Start from it with init_from=[{{run: {folder / WEIGHTS}}}].")
    return {"weights": str(folder / WEIGHTS)}
