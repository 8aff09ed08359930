"""Checkpoints: what learns, its optimizer, schedule and position, written so that a half-written one is never used.

    checkpoints/step-00000100/   state.ckpt (Lightning), weights.safetensors, manifest.json (last: sizes, SHA-256)
    checkpoints/LATEST, BEST     names of folders

A folder is filled under a temporary name and renamed when complete. Frozen weights are not copied: a run knows from its
configuration where they came from. Weights are always read from safetensors.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from vlm_train.errors import CheckpointError

STATE, WEIGHTS, MANIFEST = "state.ckpt", "weights.safetensors", "manifest.json"


def save(trainer: Any, root: Path, *, run_id: str, step: int, keep_last: int, best: bool) -> None:
    """Write the checkpoint of an optimizer step, point LATEST (and BEST) at it, drop old ones. Called on every rank."""
    final = root / f"step-{step:08d}"
    try:
        if not trainer.strategy.broadcast(final.exists()):
            _write(trainer, final, run_id, step)
        if trainer.is_global_zero:
            _point(root / "LATEST", final.name)
            if best:
                _point(root / "BEST", final.name)
            _retain(root, keep_last)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(_partial(final), ignore_errors=True)
        raise CheckpointError(
            f"{final}: cannot be written: {error}. Earlier checkpoints are intact: make room, then the same command "
            "goes on from the newest."
        ) from error


def _partial(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial")


def _write(trainer: Any, final: Path, run_id: str, step: int) -> None:
    """Fill a temporary folder on rank 0 (and what the strategy writes on others), then give it its name."""
    temporary = _partial(final)
    if trainer.is_global_zero:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    trainer.strategy.barrier()
    trainer.save_checkpoint(temporary / STATE)
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        named = {n.removeprefix("model."): p for n, p in trainer.lightning_module.named_parameters()}
        learned = {n: p.detach().cpu().contiguous() for n, p in named.items() if p.requires_grad}
        save_file(learned, temporary / WEIGHTS)
        frozen = [n for n, p in named.items() if not p.requires_grad]
        _write_manifest(temporary, run_id, step, learned, frozen)
        temporary.rename(final)


def _write_manifest(
    folder: Path, run_id: str, step: int, learned: Mapping[str, torch.Tensor], frozen: Sequence[str]
) -> None:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    manifest = {
        "format": 1,
        "run_id": run_id,
        "step": step,
        "files": files,
        "learned": {name: list(tensor.shape) for name, tensor in learned.items()},
        "frozen": list(frozen),
        "torch": torch.__version__,
    }
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _point(pointer: Path, name: str) -> None:
    temporary = pointer.with_suffix(".partial")
    temporary.write_text(name + "\n", encoding="utf-8")
    os.replace(temporary, pointer)


def _retain(root: Path, keep_last: int) -> None:
    """Keep the newest `keep_last` checkpoints and what BEST points at."""
    best = (root / "BEST").read_text().strip() if (root / "BEST").exists() else ""
    for folder in sorted(root.glob("step-*"))[: -max(keep_last, 1)]:
        if folder.name != best:
            shutil.rmtree(folder)


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a complete, undamaged checkpoint. Raises `CheckpointError` saying what is wrong."""
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder}: no {MANIFEST}: not a checkpoint, or its writing was interrupted")
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = dict(manifest["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: unreadable: {error}") from error
    for name, expected in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != expected["bytes"]:
            raise CheckpointError(
                f"{path}: {size} bytes, the manifest says {expected['bytes']}: the checkpoint is damaged"
            )
        if _sha256(path) != expected["sha256"]:
            raise CheckpointError(f"{path}: its SHA-256 differs from the manifest: the checkpoint is damaged")
    return manifest


def newest_valid(root: Path) -> Path | None:
    """The newest undamaged checkpoint; damaged ones are skipped aloud. None if there never was one.

    Raises:
        CheckpointError: there are checkpoints, but none is valid.
    """
    folders = sorted(root.glob("step-*"), reverse=True)
    problems = []
    for folder in folders:
        try:
            verify(folder)
            return folder
        except CheckpointError as error:
            problems.append(str(error))
            print(f"resume: skipping {error}", flush=True)
    if problems:
        raise CheckpointError(
            "no valid checkpoint to resume from: " + "; ".join(problems) + ". resume=never needs another run_name."
        )
    return None


def resume_state(resume: str, folder: Path, run_id: str) -> Path | None:
    """The Lightning state to resume from: this run's own (`auto`), a given checkpoint of this run, or none (`never`).

    Raises:
        CheckpointError: damaged, of another run, or `never` with checkpoints already there.
    """
    root = folder / "checkpoints"
    if resume == "never":
        if any(root.glob("step-*")):
            raise CheckpointError(
                f"resume=never, but {root} holds checkpoints. Choose another run_name, or delete the folder."
            )
        return None
    chosen = newest_valid(root) if resume == "auto" else Path(resume)
    if chosen is None:
        return None
    manifest = verify(chosen)
    if manifest["run_id"] != run_id:
        raise CheckpointError(
            f"resume: {chosen} belongs to run {manifest['run_id']!r}, this is {run_id!r}. "
            "To start from its weights use init_from."
        )
    return chosen / STATE


def weights_file(run: str | Path, which: str = "last") -> Path:
    """The weights of a run folder, a checkpoint folder, or a safetensors file.

    Raises:
        CheckpointError: nothing there, or damaged.
    """
    path = Path(run)
    if path.is_file() and path.suffix == ".safetensors":
        return path
    if (path / "checkpoints").is_dir():
        pointer = path / "checkpoints" / ("BEST" if which == "best" else "LATEST")
        if not pointer.is_file():
            raise CheckpointError(f"{path}: has no finished checkpoint ({pointer.name} is missing)")
        path = path / "checkpoints" / pointer.read_text(encoding="utf-8").strip()
    verify(path)
    return path / WEIGHTS


def load_weights(model: nn.Module, file: Path, parts: Sequence[str] | None = None) -> int:
    """Copy weights into the model, only those of `parts` if given. Returns the number of tensors.

    A checkpoint may lack what its run kept frozen, which its manifest names; nothing else may be missing.

    Raises:
        CheckpointError: a tensor that only one of file and model has, or of another shape, or nothing of a part.
    """
    tensors = _read(file)
    if parts is not None:
        absent = [part for part in parts if not any(name.startswith(part + ".") for name in tensors)]
        if absent:
            held = ", ".join(sorted({name.split(".", 1)[0] for name in tensors}))
            raise CheckpointError(f"init_from: {file} holds no {', '.join(absent)}; it holds {held}")
        tensors = {n: t for n, t in tensors.items() if n.split(".", 1)[0] in parts}
    own = dict(model.named_parameters())
    declared = _frozen(file)
    expected = [n for n in own if (parts is None or n.split(".", 1)[0] in parts) and n not in declared]
    problems = [f"{n}: not in the model" for n in tensors if n not in own]
    problems += [f"{n}: not in the file" for n in expected if n not in tensors]
    problems += [
        f"{n}: shape {list(t.shape)}, the model has {list(own[n].shape)}"
        for n, t in tensors.items()
        if n in own and t.shape != own[n].shape
    ]
    if problems:
        raise CheckpointError(f"{file} does not fit the model: " + "; ".join(problems[:5]))
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    return len(tensors)


def _read(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: cannot be read as safetensors: {error}") from error


def _frozen(file: Path) -> set[str]:
    """The parameters that the run of this checkpoint kept as it found them; none for a bare file."""
    manifest = file.parent / MANIFEST
    return set(json.loads(manifest.read_text(encoding="utf-8"))["frozen"]) if manifest.is_file() else set()


def hand_over(model: nn.Module, init_from: Sequence[Any]) -> None:
    """Load the weights that `init_from` names, in order."""
    for one in init_from:
        count = load_weights(model, weights_file(one.run, one.which), one.parts)
        print(f"init_from {one.run}: {count} tensors ({', '.join(one.parts) if one.parts else 'all'})", flush=True)


def load_run_weights(model: nn.Module, init_from: Sequence[Any], run: Path, which: str = "last") -> None:
    """The weights of a run: what it started from (its frozen parts), then what it learned."""
    hand_over(model, init_from)
    load_weights(model, weights_file(run, which))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
