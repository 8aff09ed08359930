"""Weights of checkpoints: found, checked and copied into models, for hand-over between runs, evaluation and export."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from vlm_train.checkpoint.files import (
    MANIFEST,
    WEIGHTS,
    begin_checkpoint,
    commit_checkpoint,
    hash_file,
    manifest_of,
    partial_folder,
    read_pointer,
    verify_checkpoint,
    write_pointer,
    write_tensors,
)
from vlm_train.checkpoint.resume import Resume
from vlm_train.config.run_file import load_config
from vlm_train.contracts.model_parts import find_parts
from vlm_train.distributed import say_once
from vlm_train.errors import CheckpointError
from vlm_train.models.adapters.lora import base_names
from vlm_train.models.adapters.quantize import assign_values, full_shape
from vlm_train.models.weights.fingerprint import hash_sources
from vlm_train.runs.folder import RunFolder

WHOLE = "whole_runs"
"""In the manifest of a run that took the runs of its `init_from` with what they had kept frozen, as all do now."""


@dataclass
class HandedOver:
    """What `init_from` gave a model.

    Attributes:
        digests: SHA-256 of every entry's file, which the checkpoints of the run keep.
        filled: names of the parameters that came from a file.
    """

    digests: list[str] = field(default_factory=list)
    filled: set[str] = field(default_factory=set)


def save_weights(root: Path, weights: Mapping[str, torch.Tensor], *, run_id: str, step: int = 0) -> Path:
    """A checkpoint of weights alone, for weights not trained here. Runs can start from it, none resumes it."""
    final = root / f"step-{step:08d}"
    begin_checkpoint(final)
    files = {WEIGHTS: write_tensors(partial_folder(final) / WEIGHTS, weights)}
    commit_checkpoint(final, files, step, {"run_id": run_id, "frozen": []})
    write_pointer(root / "LATEST", final.name)
    return final


def weights_file(run: str | Path, which: str = "last") -> Path:
    """The weights of a run folder, a checkpoint folder, or a safetensors file.

    Raises:
        CheckpointError: nothing there, or damaged.
    """
    path = Path(run)
    if path.is_file() and path.suffix == ".safetensors":
        return path
    if (root := RunFolder(path).checkpoints).is_dir():
        pointer = root / ("BEST" if which == "best" else "LATEST")
        if not pointer.is_file():
            raise CheckpointError(f"{path}: has no finished checkpoint ({pointer.name} is missing)")
        if not (name := read_pointer(pointer)):
            raise CheckpointError(f"{pointer}: is damaged: expected the name of a folder, step-..., beside it")
        path = root / name
    verify_checkpoint(path)
    return path / WEIGHTS


def load_weights(model: nn.Module, file: Path, parts: Sequence[str] | None = None) -> set[str]:
    """Copy weights into the model, only those of `parts` if given. Returns the names of the parameters.

    A checkpoint may lack what its run kept frozen, which its manifest names; nothing else may be missing.

    Raises:
        CheckpointError: a tensor that only one of file and model has, or of another shape, or nothing of a part.
    """
    tensors = _read_weights(file)
    if parts is not None:
        absent = [part for part in parts if not any(is_in_parts(name, [part]) for name in tensors)]
        if absent:
            held = ", ".join(sorted({name.split(".", 1)[0] for name in tensors}))
            raise CheckpointError(f"init_from: {file} holds no {', '.join(absent)}; it holds {held}")
        tensors = {n: t for n, t in tensors.items() if is_in_parts(n, parts)}
    own, adapted = dict(model.named_parameters()), base_names(model)
    tensors = {adapted.get(n, n): t for n, t in tensors.items()}
    declared = {adapted.get(n, n) for n in _frozen_names(file)}
    if not any(".lora_" in n for n in tensors):  # of a model without adapters: they start here
        declared |= {n for n in own if ".lora_" in n}
    expected = [n for n in own if (parts is None or is_in_parts(n, parts)) and n not in declared]
    problems = [f"{n}: not in the model" for n in tensors if n not in own]
    problems += [f"{n}: not in the file" for n in expected if n not in tensors]
    problems += [
        f"{n}: shape {list(t.shape)}, the model has {list(shape)}"
        for n, t in tensors.items()
        if n in own and t.shape != (shape := full_shape(model, n))
    ]
    if problems:
        raise CheckpointError(f"{file} does not fit the model: " + "; ".join(problems[:5]))
    for name, tensor in tensors.items():
        assign_values(model, name, tensor)
    return set(tensors)


def is_in_parts(name: str, parts: Sequence[str]) -> bool:
    """Whether a parameter belongs to one of `parts`, or is one: vision, connector.qformer, temperature ..."""
    return any(name == part or name.startswith(part + ".") for part in parts)


def _read_weights(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: cannot be read as safetensors: {error}") from error


def _frozen_names(file: Path) -> set[str]:
    """The parameters that the run of this checkpoint kept as it found them; none for a bare file."""
    return set(manifest_of(file.parent)["frozen"]) if (file.parent / MANIFEST).is_file() else set()


def load_init_from(model: nn.Module, init_from: Sequence[Any], *, alone: bool = False) -> HandedOver:
    """Load the weights that `init_from` names, in order.

    An entry without `parts` is the whole model that its run trained with: what that run kept frozen comes from where
    the run had it from, its own `init_from`, or the `weights` of the same part.

    Args:
        alone: take only what a run learned, as runs did whose manifest lacks `WHOLE`.

    Raises:
        CheckpointError: weights that are damaged, do not fit, or are no longer where a run took them from.
    """
    found = HandedOver()
    for one in init_from:
        file = weights_file(one.run, one.which)
        beneath = set() if one.parts is not None or alone else _load_frozen(model, file)
        names = load_weights(model, file, one.parts)
        what = ", ".join(one.parts) if one.parts else "all that it learned" if _frozen_names(file) else "all"
        kept = f", and {len(beneath)} that it kept frozen" if beneath else ""
        say_once(f"init_from {one.run}: {len(names)} tensors ({what}){kept}")
        known = manifest_of(file.parent)["files"][file.name]["sha256"] if (file.parent / MANIFEST).is_file() else None
        found.digests.append(known or hash_file(file))
        found.filled |= names | beneath
    return found


def _load_frozen(model: nn.Module, file: Path) -> set[str]:
    """Give the model what the run of a checkpoint kept frozen. Returns the names of what came from files.

    A part that has `weights` keeps them: they are the run's, which may lie elsewhere by now.
    """
    own, adapted = dict(model.named_parameters()), base_names(model)
    frozen = {name for name in (adapted.get(n, n) for n in _frozen_names(file)) if name in own}
    if not frozen:
        return set()
    read = {n for p, part in find_parts(model).items() if getattr(part, "weights", None) for n in _names_below(p, own)}
    run = file.parent.parent.parent
    config = RunFolder(run).config
    if not config.is_file():
        if rest := sorted({name.split(".", 1)[0] for name in frozen - read}):
            raise CheckpointError(
                f"init_from: {run} kept {', '.join(rest)} frozen, and {config}, which says where they came from, is "
                "missing. Put it back, or take parts only: parts: [<part>, ...]."
            )
        return frozen
    theirs = load_config(config)
    try:
        filled = _load_own_start(model, theirs.init_from, file) | read
    except CheckpointError as error:
        raise CheckpointError(f"init_from: {run} kept parts frozen that it had from another run: {error}") from error
    for part in find_parts(model):
        source = OmegaConf.select(theirs, f"{part}.weights", throw_on_missing=False)
        if source and _names_below(part, frozen - filled):
            raise CheckpointError(
                f"init_from: {run} kept {part} frozen, as {source} has it, but this run has {part}.weights=null. Give "
                f"it the same weights, {part}.weights={source}, or take other parts only: parts: [<part>, ...]."
            )
    return filled & frozen


def _names_below(part: str, names: Iterable[str]) -> set[str]:
    return {name for name in names if name.startswith(f"{part}.")}


def load_run_weights(model: nn.Module, init_from: Sequence[Any], run: Path, which: str = "last") -> None:
    """The weights of a run: what it started from (its frozen parts), then what it learned.

    Raises:
        CheckpointError: damaged, or it did not start from what `init_from`, or the `weights` of its parts, hold now.
    """
    file = weights_file(run, which)
    Resume(file.parent, manifest_of(file.parent)).require_same_data(weights=hash_sources(model))
    _load_own_start(model, init_from, file)
    load_weights(model, file)


def _load_own_start(model: nn.Module, init_from: Sequence[Any], file: Path) -> set[str]:
    """What the run of a checkpoint started from. Returns the names; raises CheckpointError if it has changed."""
    manifest = manifest_of(file.parent)
    found = load_init_from(model, init_from, alone=not manifest.get(WHOLE))
    Resume(file.parent, manifest).require_same_data(init_from=found.digests)
    return found.filled
