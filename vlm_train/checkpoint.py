"""Checkpoints: what learns, its optimizer, schedule and position, written so that a half-written one is never used.

    checkpoints/step-00000100/   state.ckpt (Lightning, without weights), weights.safetensors, manifest.json (last)
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from vlm_train.errors import CheckpointError

STATE, WEIGHTS, MANIFEST = "state.ckpt", "weights.safetensors", "manifest.json"


def save(
    trainer: Any, root: Path, *, step: int, facts: Mapping[str, Any], keep_last: int, best: bool, rewrite: bool
) -> None:
    """Write the checkpoint of an optimizer step, point LATEST (and BEST) at it, drop old ones. Called on every rank.

    Args:
        facts: what the manifest says besides step and files: at least `run_id`.
        rewrite: replace a folder of this step that is there already; False: it is known to be good.
    """
    final = root / f"step-{step:08d}"
    try:
        if rewrite or not trainer.strategy.broadcast(final.exists()):
            _write(trainer, final, step, facts)
        if trainer.is_global_zero:
            _point(root / "LATEST", final.name)
            if best:
                _point(root / "BEST", final.name)
            _retain(root, keep_last, final.name)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(_partial(final), ignore_errors=True)
        raise CheckpointError(
            f"{final}: cannot be written: {error}. Earlier checkpoints are intact: make room, then the same command "
            "goes on from the newest."
        ) from error


def save_weights(root: Path, weights: Mapping[str, torch.Tensor], *, run_id: str, step: int = 0) -> Path:
    """A checkpoint of weights alone, for weights not trained here. Runs can start from it, none resumes it."""
    final = root / f"step-{step:08d}"
    temporary = _partial(final)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    _complete(temporary, final, weights, step, {"run_id": run_id, "frozen": []})
    _point(root / "LATEST", final.name)
    return final


def _partial(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial")


def _write(trainer: Any, final: Path, step: int, facts: Mapping[str, Any]) -> None:
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
        frozen = [n for n, p in named.items() if not p.requires_grad]
        _complete(temporary, final, learned, step, {**facts, "frozen": frozen})


def _complete(
    temporary: Path, final: Path, learned: Mapping[str, torch.Tensor], step: int, facts: Mapping[str, Any]
) -> None:
    """Add the weights and the manifest, then give the folder its name; an old folder of that name gives way."""
    save_file(dict(learned), temporary / WEIGHTS)
    _write_manifest(temporary, step, learned, facts)
    old = final.with_name(f".{final.name}.old")
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _write_manifest(folder: Path, step: int, learned: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(folder.iterdir())}
    manifest = {
        "format": 1,
        "step": step,
        **facts,
        "files": files,
        "learned": {name: list(tensor.shape) for name, tensor in learned.items()},
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


def _retain(root: Path, keep_last: int, newest: str) -> None:
    """Keep the newest `keep_last` checkpoints and what BEST points at. Later ones, damaged or left, do not count."""
    best = (root / "BEST").read_text().strip() if (root / "BEST").exists() else ""
    folders = sorted(folder for folder in root.glob("step-*") if folder.name <= newest)
    for folder in folders[: -max(keep_last, 1)]:
        if folder.name != best:
            shutil.rmtree(folder)


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a complete, undamaged checkpoint. Raises `CheckpointError` saying what is wrong."""
    manifest = _manifest(folder)
    for name, one in manifest["files"].items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != one["bytes"]:
            raise CheckpointError(f"{path}: {size} bytes, the manifest says {one['bytes']}: the checkpoint is damaged")
        if _sha256(path) != one["sha256"]:
            raise CheckpointError(f"{path}: its SHA-256 differs from the manifest: the checkpoint is damaged")
    return manifest


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest, with what we read of it checked for its types."""
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder}: no {MANIFEST}: not a checkpoint, or its writing was interrupted")
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {str(name): {k: one[k] for k in ("bytes", "sha256")} for name, one in manifest["files"].items()}
        typed = {"run_id": str(manifest["run_id"]), "step": int(manifest["step"]), "frozen": list(manifest["frozen"])}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: not a manifest of ours: {error!r}") from error
    return {**manifest, **typed, "files": files}


@dataclass(frozen=True)
class Resume:
    """A verified checkpoint that a run goes on from."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def state(self) -> Path:
        """Optimizer, schedule and position, in Lightning's format."""
        return self.folder / STATE

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    def require(self, **facts: Any) -> None:
        """Raises CheckpointError where the run's data or vocabulary are not those of the checkpoint."""
        for name, value in facts.items():
            if name in self.manifest and self.manifest[name] != value:
                raise CheckpointError(
                    f"{name} changed since {self.folder} was written ({self.manifest[name]} -> {value}). Restore it, "
                    "or start another run (run_name=...) from these weights (init_from)."
                )


def newest_valid(root: Path) -> Resume | None:
    """The newest undamaged checkpoint; damaged ones are skipped aloud. None if there never was one.

    Raises:
        CheckpointError: there are checkpoints, but none is valid.
    """
    problems = []
    for folder in sorted(root.glob("step-*"), reverse=True):
        try:
            return Resume(folder, verify(folder))
        except CheckpointError as error:
            problems.append(str(error))
            print(f"resume: skipping {error}", flush=True)
    if problems:
        raise CheckpointError(
            "no valid checkpoint to resume from: " + "; ".join(problems) + ". resume=never needs another run_name."
        )
    return None


def find_resume(resume: str, folder: Path, run_id: str) -> Resume | None:
    """What to resume from: this run's own (`auto`), a given checkpoint of this run, or nothing (`never`, `restart`).

    Raises:
        CheckpointError: damaged, of another run, without an optimizer's state, or `never` with checkpoints there.
    """
    root = folder / "checkpoints"
    if resume == "never":
        if any(root.glob("step-*")):
            raise CheckpointError(
                f"resume=never, but {root} holds checkpoints. Choose another run_name, or delete the folder."
            )
        return None
    if resume == "restart":
        return None
    if resume != "auto" and (Path(resume) / "checkpoints").is_dir():
        raise CheckpointError(f"resume: {resume} is a run; give one of its checkpoints, {resume}/checkpoints/step-...")
    found = newest_valid(root) if resume == "auto" else Resume(Path(resume), verify(Path(resume)))
    if found is None:
        return None
    if found.manifest["run_id"] != run_id:
        raise CheckpointError(
            f"resume: {found.folder} belongs to run {found.manifest['run_id']!r}, this is {run_id!r}. "
            "To start from its weights use init_from."
        )
    if not found.state.is_file():
        raise CheckpointError(f"resume: {found.folder} holds weights only. To start from them use init_from.")
    return found


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
    return set(_manifest(file.parent)["frozen"]) if (file.parent / MANIFEST).is_file() else set()


def hand_over(model: nn.Module, init_from: Sequence[Any]) -> list[str]:
    """Load the weights that `init_from` names, in order. Returns their SHA-256, which the run's checkpoints keep."""
    digests = []
    for one in init_from:
        file = weights_file(one.run, one.which)
        count = load_weights(model, file, one.parts)
        print(f"init_from {one.run}: {count} tensors ({', '.join(one.parts) if one.parts else 'all'})", flush=True)
        known = _manifest(file.parent)["files"][file.name]["sha256"] if (file.parent / MANIFEST).is_file() else None
        digests.append(known or _sha256(file))
    return digests


def load_run_weights(model: nn.Module, init_from: Sequence[Any], run: Path, which: str = "last") -> None:
    """The weights of a run: what it started from (its frozen parts), then what it learned.

    Raises:
        CheckpointError: damaged, or it did not start from what `init_from` holds now.
    """
    file = weights_file(run, which)
    Resume(file.parent, _manifest(file.parent)).require(init_from=hand_over(model, init_from))
    load_weights(model, file)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
