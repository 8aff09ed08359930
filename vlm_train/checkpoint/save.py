"""Writing checkpoints, every rank its own part, while training waits or while it goes on."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipelines.atomic_write import atomic_write
from vlm_train.checkpoint import files
from vlm_train.checkpoint.run_state import collect_run_state
from vlm_train.checkpoint.state import collect_owned
from vlm_train.errors import CheckpointError

PATIENCE = 300.0
"""Seconds that a run which fails gives the checkpoint under way."""


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay, besides BEST.

    Attributes:
        last: so many of the newest.
        best: so many of the best.
        every: those of every n-th step, for good.
        lower: whether a lower metric is better.
    """

    last: int = 2
    best: int = 1
    every: int | None = None
    lower: bool = True


@dataclass
class _Job:
    """One rank's part of a checkpoint on its way to the disk."""

    final: Path
    step: int
    facts: dict[str, Any]
    best: bool
    parts: dict[str, dict[str, Tensor] | bytes]  # file -> content
    world: int
    rank: int
    others_failed: threading.Event = field(default_factory=threading.Event)
    written: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None
    thread: threading.Thread | None = None


def _content_size(part: dict[str, Tensor] | bytes) -> int:
    """Bytes of a file's content."""
    return len(part) if isinstance(part, bytes) else sum(tensor.nbytes for tensor in part.values())


class CheckpointWriter:
    """Writes the checkpoints of a run. Every rank makes the same calls.

    A save that fails is said, and training goes on; a second one in a row, or a last one, raises.

    Args:
        root: the run's `checkpoints` folder.
        background: copy the state and write it while training goes on. A save waits for the one before. The copies stay
            in CPU memory: to fill fresh memory takes twice as long.
        agree: adds up numbers by name over ranks.
    """

    def __init__(self, root: Path, keep: Keep, *, background: bool, agree: Any) -> None:
        self.root, self.keep, self.background, self.agree = root, keep, background, agree
        self.job: _Job | None = None
        self.failures = 0
        self.copies: dict[str, Tensor] = {}

    def save_checkpoint(
        self, trainer: Any, *, step: int, facts: Mapping[str, Any], best: bool, must: bool = False, rewrite: bool = True
    ) -> None:
        """Write the checkpoint of an optimizer step, point LATEST (and BEST) at it, drop old ones.

        Args:
            facts: what the manifest says besides step and files: at least `run_id` and `frozen`.
            must: wait for it, and raise CheckpointError when it fails.
            rewrite: replace a folder of this step that is there already; False: it is known to be good.
        """
        self.wait_for_save()
        final = self.root / f"step-{step:08d}"
        if not rewrite and trainer.strategy.broadcast(final.is_dir()):
            if trainer.is_global_zero:
                self._update_pointers(final, best)
            return
        error = self._begin_save(trainer, final)
        if error is None:
            self.job = self._collect_state(trainer, final, step, dict(facts), best)
            if self.background and not must:
                self.job.thread = threading.Thread(target=self._write_job, args=(self.job,), daemon=True)
                self.job.thread.start()
                return
            self._write_parts(self.job)
            error = self._agree_on_result(self.job)
            self.job = None
        self._raise_failure(final, error, must)

    def wait_for_save(self, *, must: bool = False) -> None:
        """Wait for what is being written. Every rank calls it."""
        if self.job is None:
            return
        job, self.job = self.job, None
        job.written.wait()
        self._raise_failure(job.final, self._agree_on_result(job), must)

    def abandon_save(self) -> None:
        """Give what is being written time to end, without the other ranks: one of them may be gone."""
        if self.job is not None and self.job.thread is not None:
            self.job.thread.join(PATIENCE)

    def _begin_save(self, trainer: Any, final: Path) -> str | None:
        """Make room on rank 0. Returns what is wrong, on every rank."""
        error = None
        if trainer.is_global_zero:
            try:
                files.begin_checkpoint(final)
            except OSError as raised:
                error = str(raised)
        return trainer.strategy.broadcast(error)

    def _collect_state(self, trainer: Any, final: Path, step: int, facts: dict[str, Any], best: bool) -> _Job:
        """This rank's part, on the CPU; copied if training goes on meanwhile."""
        strategy, named = trainer.strategy, trainer.lightning_module.policy.named
        world, rank = trainer.world_size, trainer.global_rank
        state = collect_run_state(trainer)
        parts: dict[str, dict[str, Tensor] | bytes] = {}
        pieces = {
            name: self._copy_tensor(name, tensor) for name, tensor in collect_owned(strategy.pieces(named)).items()
        }
        whole = {}
        for name, tensor in strategy.whole(named):
            if rank == 0:
                whole[name] = self._copy_tensor(name, tensor)
        if pieces:
            parts[files.optimizer_file(rank, world)] = pieces
        if rank == 0:
            parts[files.WEIGHTS] = whole
            parts[files.STATE] = state
            facts["learned"] = {name: list(tensor.shape) for name, tensor in whole.items()}
        return _Job(final, step, facts, best, parts, world, rank)

    def _copy_tensor(self, name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if not self.background:
            return tensor.cpu()
        held = self.copies.get(name)
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            held = self.copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        return held.copy_(tensor)

    def _write_job(self, job: _Job) -> None:
        """In the background: this rank's part, and on rank 0 the rest when all parts are there."""
        self._write_parts(job)
        if job.rank == 0 and job.error is None:
            try:
                self._commit_save(job, self._wait_for_parts(job))
            except Exception as error:
                job.error = error

    def _write_parts(self, job: _Job) -> None:
        """Write the files of this rank, then a list of them, which shows that they are complete."""
        folder = files.partial_folder(job.final)
        try:
            need = sum(map(_content_size, job.parts.values()))
            free = shutil.disk_usage(folder).free
            if free < need:
                raise OSError(f"{need / 2**30:.2f} GiB needed, {free / 2**30:.2f} GiB free")
            done = {}
            for name, part in job.parts.items():
                write = files.write_bytes if isinstance(part, bytes) else files.write_tensors
                done[name] = write(folder / name, part)  # type: ignore[arg-type]
            with atomic_write(folder / f".part-{job.rank}.json", sync=True) as file:
                json.dump(done, file)
        except Exception as error:  # whatever it is: the other ranks, and `finish`, wait for this one
            job.error = error
        job.parts.clear()
        job.written.set()

    def _wait_for_parts(self, job: _Job) -> dict[str, Any]:
        """The files of all ranks, with bytes and hashes."""
        found: dict[str, Any] = {}
        for rank in range(job.world):
            listed = files.partial_folder(job.final) / f".part-{rank}.json"
            while not listed.is_file():
                if job.others_failed.wait(0.05):
                    raise OSError(f"rank {rank} could not write its part")
            found |= json.loads(listed.read_text(encoding="utf-8"))
            listed.unlink()
        return dict(sorted(found.items()))

    def _agree_on_result(self, job: _Job) -> str | None:
        """The error of any rank. Without one, rank 0 gives the folder its name."""
        bad = self.agree({"failed": float(job.error is not None)})["failed"]
        if bad:
            job.others_failed.set()
        if job.thread is not None:
            job.thread.join()
        elif job.rank == 0 and not bad:
            try:
                self._commit_save(job, self._wait_for_parts(job))
            except Exception as error:
                job.error = error
        failed = bad or self.agree({"failed": float(job.error is not None)})["failed"]
        return str(job.error or "another rank could not write its part") if failed else None

    def _commit_save(self, job: _Job, found: dict[str, Any]) -> None:
        files.commit_checkpoint(job.final, found, job.step, job.facts)
        self._update_pointers(job.final, job.best)

    def _update_pointers(self, final: Path, best: bool) -> None:
        files.write_pointer(self.root / "LATEST", final.name)
        if best:
            files.write_pointer(self.root / "BEST", final.name)
        keep = self.keep
        files.prune_checkpoints(
            self.root, final.name, keep_last=keep.last, keep_best=keep.best, keep_every=keep.every, lower=keep.lower
        )

    def _raise_failure(self, final: Path, error: str | None, must: bool) -> None:
        """Raise CheckpointError on every rank, unless it is the first failure in a row and may be retried."""
        if error is None:
            self.failures = 0
            return
        self.failures += 1
        shutil.rmtree(files.partial_folder(final), ignore_errors=True)
        said = f"{final}: cannot be written: {error}. Earlier checkpoints are intact"
        if must or self.failures > 1:
            raise CheckpointError(f"{said}: make room, then the same command resumes from the newest.")
        print(f"WARNING: {said}; training continues and tries again at the next checkpoint.", flush=True)
