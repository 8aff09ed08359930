"""The folder of a checkpoint: its files, their hashes, and how it gets its name only when it is complete.

    checkpoints/step-00000100/      manifest.json                              what there is, written last
                                    weights.safetensors                        every learning parameter as a whole
                                    optimizer-00000-of-00002.safetensors ...   optimizer states, in pieces
                                    state.ckpt                                 position, schedule, counters
    checkpoints/LATEST, BEST        names of folders

Tensors are kept as safetensors, never as pickles. Frozen weights are not copied: a run knows from its configuration
where they came from, and the manifest holds the hashes of what it started from.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipelines.atomic_write import atomic_write
from vlm_train.errors import CheckpointError

STATE, WEIGHTS, MANIFEST = "state.ckpt", "weights.safetensors", "manifest.json"

FORMAT = 2
"""Version of the manifest and of the files that it names."""

OWN_HASH = "sha256"
"""The manifest's own hash in it; checkpoints of before have none."""

_CHUNK = 16 * 2**20
_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def optimizer_file(rank: int, world: int) -> str:
    """The file in which a rank writes its pieces."""
    return f"optimizer-{rank:05d}-of-{world:05d}.safetensors"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write tensors of the CPU as safetensors and return the file's `{bytes, sha256}`.

    Streams: neither a second copy in memory (as `save_file` makes), nor a second reading for the hash.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        first, end = end, end + tensor.nbytes
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [first, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return write_bytes(path, len(text).to_bytes(8, "little"), text, *map(_tensor_bytes, tensors.values()))


def _tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a tensor, uncopied where it is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data


def write_bytes(path: Path, *pieces: bytes | memoryview) -> dict[str, Any]:
    """Write to the disk, not only to the system's cache, and return `{bytes, sha256}`."""
    digest, total = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for piece in pieces:
            for start in range(0, len(piece), _CHUNK):
                part = piece[start : start + _CHUNK]
                file.write(part)
                digest.update(part)
            total += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": total, "sha256": digest.hexdigest()}


def partial_folder(final: Path) -> Path:
    """The temporary folder of a checkpoint."""
    return final.with_name(f".{final.name}.partial")


def begin_checkpoint(final: Path) -> None:
    """An empty temporary folder for a checkpoint."""
    shutil.rmtree(partial_folder(final), ignore_errors=True)
    partial_folder(final).mkdir(parents=True)


def commit_checkpoint(final: Path, files: Mapping[str, Any], step: int, facts: Mapping[str, Any]) -> None:
    """Add the manifest of `files`, then give the folder its name; an old folder of that name is removed."""
    manifest = {"format": FORMAT, "step": step, **facts, "files": files, "torch": torch.__version__}
    manifest[OWN_HASH] = hash_manifest(manifest)
    write_bytes(partial_folder(final) / MANIFEST, json.dumps(manifest, indent=1).encode())
    old = final.with_name(f".{final.name}.old")
    if final.exists():
        final.rename(old)
    partial_folder(final).rename(final)
    _sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def hash_manifest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's content, but for the hash itself."""
    rest = {name: value for name, value in manifest.items() if name != OWN_HASH}
    return hashlib.sha256(json.dumps(json.loads(json.dumps(rest)), sort_keys=True).encode()).hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make names in a folder outlive a crash of the machine."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_pointer(pointer: Path, name: str) -> None:
    """Let LATEST or BEST name a folder."""
    with atomic_write(pointer) as file:
        file.write(name + "\n")


def read_pointer(pointer: Path) -> str:
    """The folder that LATEST or BEST names; empty without one, and where a damaged pointer names none of ours."""
    name = pointer.read_bytes()[:99].decode(errors="replace").strip() if pointer.is_file() else ""
    return name if re.fullmatch(r"step-\d+", name) else ""


def prune_checkpoints(
    root: Path, newest: str, *, keep_last: int, keep_best: int, keep_every: int | None, lower: bool
) -> None:
    """Delete all checkpoints but the newest, the best by their manifest's `metric`, and those of every n-th step.

    Later ones than `newest`, damaged or left behind, do not count.
    """
    folders = sorted(folder for folder in root.glob("step-*") if folder.name <= newest)
    older = folders[: -max(keep_last, 1)]
    kept = {read_pointer(root / "BEST")}
    if keep_every:
        kept |= {folder.name for folder in older if int(folder.name.removeprefix("step-")) % keep_every == 0}
    measured = [(value, folder.name) for folder in folders if older and (value := _metric_of(folder)) is not None]
    kept |= {name for _, name in sorted(measured, reverse=not lower)[:keep_best]}
    for folder in older:
        if folder.name not in kept:
            shutil.rmtree(folder, ignore_errors=True)  # the next time, then: the newest is written


def _metric_of(folder: Path) -> float | None:
    """The metric of a checkpoint; None where it has none, or NaN, which is neither better nor worse than a number."""
    try:
        value = manifest_of(folder).get("metric")
    except CheckpointError:
        return None
    return None if value is None or math.isnan(value) else float(value)


def verify_checkpoint(folder: Path) -> dict[str, Any]:
    """The manifest of a complete, undamaged checkpoint. Raises `CheckpointError` saying what is wrong."""
    manifest = manifest_of(folder)
    if OWN_HASH in manifest and manifest[OWN_HASH] != hash_manifest(manifest_as_written(folder)):
        raise CheckpointError(f"{folder / MANIFEST}: its SHA-256 is not that in it: the checkpoint is damaged")
    if not manifest["files"]:
        raise CheckpointError(f"{folder / MANIFEST}: names no files: the checkpoint is damaged")
    for name, one in manifest["files"].items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != one["bytes"]:
            raise CheckpointError(f"{path}: {size} bytes, the manifest says {one['bytes']}: the checkpoint is damaged")
        if hash_file(path) != one["sha256"]:
            raise CheckpointError(f"{path}: its SHA-256 differs from the manifest: the checkpoint is damaged")
    return manifest


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest, with what we read of it checked for its types."""
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder}: no {MANIFEST}: not a checkpoint, or its writing was interrupted")
    try:
        manifest = manifest_as_written(folder)
        files = {str(name): {k: one[k] for k in ("bytes", "sha256")} for name, one in manifest["files"].items()}
        typed = {"run_id": str(manifest["run_id"]), "step": int(manifest["step"]), "frozen": list(manifest["frozen"])}
        typed["rollbacks"] = int(manifest.get("rollbacks", 0))
        typed["metric"] = None if manifest.get("metric") is None else float(manifest["metric"])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: not a manifest of ours: {error!r}") from error
    except RecursionError:
        raise CheckpointError(f"{folder / MANIFEST}: not a manifest of ours: nested too deeply") from None
    return {**manifest, **typed, "files": files}


def manifest_as_written(folder: Path) -> dict[str, Any]:
    """The content of a manifest, unchecked. Raises `ValueError` and `RecursionError`."""
    found: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return found


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
