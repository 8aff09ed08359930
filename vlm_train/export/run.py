"""`mode=export` and `mode=import`: between a run folder and the formats of other libraries."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from vlm_train.config.run_file import save_config
from vlm_train.config.run_identity import run_dir, run_id
from vlm_train.contracts.exporter import Exporter, Importer
from vlm_train.errors import AssetError, ConfigError
from vlm_train.evaluation.run import require_own_weights
from vlm_train.runs.folder import RunFolder, require_writable

if TYPE_CHECKING:
    from vlm_train.build import Assembly


def export_run(cfg: DictConfig) -> dict[str, Any]:
    """Write the run's newest weights as `<run>/export`, which is read back and compared before it counts as done."""
    from vlm_train.build import build_assembly, build_exporters
    from vlm_train.checkpoint.weights import load_run_weights

    folder = run_dir(cfg)
    require_own_weights(cfg, folder)
    require_writable(folder)
    assembly = build_assembly(cfg)
    load_run_weights(assembly.model, cfg.init_from, folder)
    return {"export": str(write_export(assembly, folder, build_exporters(cfg)))}


def write_export(assembly: Assembly, folder: Path, exporters: Mapping[str, Exporter]) -> Path:
    """Write `<folder>/export` from a trained model, once what it computes was compared. A failure keeps the old one.

    Raises:
        ConfigError: no exporter can express the model. AssetError: what was written does not compute the same.
    """
    from vlm_train.export.merged import find_quantized, unquantize_model

    if find_quantized(assembly.model):
        print("export: adapters are merged into a fresh copy of the base, not into its quantized weights", flush=True)
        assembly = unquantize_model(assembly)
    model = assembly.model.eval()
    name = choose_exporter(model, exporters)
    out = RunFolder(folder).export
    with replace_folder(out) as partial:
        has = exporters[name].write(model, assembly.processor, partial)
        difference = exporters[name].verify(model, partial)
        if not math.isfinite(difference):
            raise AssetError(f"export: {name} wrote a folder that computes no numbers: it differs by {difference}")
        for file in partial.rglob("*"):  # safetensors gives its files to the owner alone
            if file.is_file():
                file.chmod(partial.stat().st_mode & 0o666)
    same = f"what it computes equals the run's; it has {has}"
    print(
        f"Exported to {out} ({name}); {same}. Largest difference: {difference:.0e} of the largest number.", flush=True
    )
    return out


def choose_exporter(model: Any, exporters: Mapping[str, Exporter]) -> str:
    """The name of the first exporter that has no problems with `model`. Raises ConfigError with those of all."""
    found = ((name, one.problems(model)) for name, one in exporters.items())
    return _choose_first(found, "exporter", "", "write the model")


def _choose_first(asked: Iterable[tuple[str, list[str]]], group: str, setting: str, task: str) -> str:
    """The first name of `group` without problems; later ones are not asked. Raises ConfigError with those of all, each
    behind `setting`."""
    refused = []
    for name, problems in asked:
        if not problems:
            return name
        refused.append(f"{setting}{group}.{name}: {'; '.join(problems)}")
    raise ConfigError(refused or f"{group} is empty: nothing can {task}. Choose an option, {group}=default.")


@contextmanager
def replace_folder(final: Path) -> Iterator[Path]:
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


def import_run(cfg: DictConfig) -> dict[str, Any]:
    """Turn the local folder that `init_from` names into a run that others can start from, evaluate and export.

    Raises:
        ConfigError: `init_from` does not name exactly one whole folder, or no importer reads it.
    """
    from vlm_train.build import build_assembly, build_importers
    from vlm_train.checkpoint.weights import save_weights
    from vlm_train.runs import record

    source = _source_folder(cfg)
    importer = _choose_importer(source, build_importers(cfg))
    cfg = cfg.copy()
    cfg.run_name = cfg.run_name or f"{run_id(cfg)}-imported"  # never the folder of the run that trains this recipe
    folder = run_dir(cfg)
    cfg.init_from = []
    importer.adapt(cfg, source)
    if RunFolder(folder).checkpoints.exists():
        raise ConfigError(f"run_name: {folder} already holds checkpoints. Choose another run_name, or delete it.")
    assembly = build_assembly(cfg)
    importer.read(assembly.model, source)
    folder.mkdir(parents=True, exist_ok=True)
    save_config(cfg, RunFolder(folder).config)
    weights = {name: p.detach().contiguous() for name, p in assembly.model.named_parameters()}
    save_weights(RunFolder(folder).checkpoints, weights, run_id=run_id(cfg), step=0)
    assembly.processor.tokenizer.save_pretrained(RunFolder(folder).tokenizer)
    record.update_record(
        folder, run_id=run_id(cfg), recipe=cfg.recipe_name, status="imported", source=str(source.absolute())
    )
    print(f"Imported {source} as {folder}. Start from it with init_from=[{{run: {folder}}}].", flush=True)
    return {"run": str(folder)}


def _source_folder(cfg: DictConfig) -> Path:
    if len(cfg.init_from) != 1:
        raise ConfigError(f"init_from: mode=import takes one folder, got {len(cfg.init_from)} entries.")
    (entry,) = cfg.init_from
    if entry.parts is not None:
        raise ConfigError("init_from.0.parts: mode=import takes a whole model; name parts where a run starts from it.")
    return Path(entry.run)


def _choose_importer(source: Path, importers: Mapping[str, Importer]) -> Importer:
    """The first importer that can read `source`. Raises ConfigError with the problems of all."""
    found = ((name, one.problems(source)) for name, one in importers.items())
    return importers[_choose_first(found, "importer", "init_from.0.run: ", "read the folder")]
