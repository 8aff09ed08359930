"""The counts between two log lines, and the line that they give.

Sums of tensors stay on their device until a line is due: nothing here makes a step wait for the GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vlm_train.contracts.batch import Batch, Window
from vlm_train.distributed import process_rank
from vlm_train.errors import TrainingError
from vlm_train.training.device import peak_memory, peak_tflops
from vlm_train.training.loss_sums import PAIR, OverRanks, Sums
from vlm_train.training.params import Policy

COUNTS = ("samples", "tokens", "places", "supervised", "skipped")
"""What is always counted; other names appear when they are first counted."""

TIMED = ("seconds", "samples_per_second", "tokens_per_second", "data_wait", "tflops", "mfu", "peak_memory_gib")
"""Names in a line that depend on the machine, not only on what was trained."""


class Work(Protocol):
    """FLOPs of what steps held, see `vlm_train.training.step_flops`."""

    def __call__(self, *, patches: float, tokens: float, pairs: float, supervised: float) -> float: ...


class Meter:
    """Counts, sums and times of training since the last line, and the sums of a validation.

    Args:
        over_ranks: adds up over ranks.
        min_supervised: least share of the tokens that must be supervised; 0: any.
        work: gives TFLOP/s; None: they are not logged.
        count_work: makes `work` when the first line is due, as it takes seconds: training has begun by then.
        peak_tflops: of one device, gives MFU; None: known for common GPUs, else MFU is not logged.
    """

    def __init__(
        self,
        over_ranks: OverRanks,
        *,
        min_supervised: float = 0.0,
        work: Work | None = None,
        count_work: Callable[[], Work | None] | None = None,
        peak_tflops: float | None = None,
    ) -> None:
        self.over_ranks, self.min_supervised = over_ranks, min_supervised
        self.work, self.count_work, self.peak_tflops = work, count_work, peak_tflops
        self.weights: dict[str, float] = {}
        self.held_out = Sums(self.weights)
        self.before = 0.0  # seconds since the last line in the process that a run goes on from
        self.earlier = 0.0  # seconds of training before this process, up to the step that it goes on from
        self.start_clock()
        self._reset_counts()

    def _reset_counts(self) -> None:
        self.train = Sums(self.weights)
        self.counts = dict.fromkeys(COUNTS, 0.0)
        self.drawn: dict[str, float] = {}  # source -> samples

    def add_count(self, name: str, number: float = 1.0) -> None:
        """Add to what is counted under `name` on this rank."""
        self.counts[name] = self.counts.get(name, 0.0) + number

    def open_step(self, window: Window) -> None:
        """Count what an optimizer step holds on this rank, and what was left out of it."""
        self.marked = self.train.copy_sums()
        for source, number in window.sums.get("samples", {}).items():
            self.drawn[source] = self.drawn.get(source, 0.0) + number
        for name in ("samples", "tokens", "supervised"):
            self.add_count(name, getattr(window, name))
        self.add_count("places", window.positions_total)
        for problem in window.problems:
            self.add_count("skipped")
            self.add_count(f"skipped/{problem.kind}")

    def leave_out_where(self, veto: Tensor) -> None:
        """Forget the losses of the last step where `veto`, a bool `[]` on the device, says so."""
        self.train.put_back_where(veto, self.marked)

    def leave_out(self, *, opened: bool = False) -> None:
        """Forget the losses of the last step, which made no update. `opened`: the next one has begun, and the device
        has forgotten them."""
        self.train = self.train if opened else self.marked
        self.add_count("skipped_steps")

    def start_clock(self, step: int = 0) -> None:
        """Training begins, or goes on after `step`."""
        self.first = step
        self.began = self.paused = self.left = time.perf_counter()
        self.since = self.left - self.before

    def count_seconds(self) -> float:
        """Seconds since training began, its validations and saves included; the time between two starts is not, nor is
        what a killed process did after its last checkpoint."""
        return self.earlier + time.perf_counter() - self.began

    def estimate_rest(self, step: int, total: int) -> float:
        """Seconds left after `step`, at the speed of this process so far."""
        done = step - self.first
        return (time.perf_counter() - self.began) / done * (total - step) if done > 0 else 0.0

    def on_step_end(self) -> None:
        """A step is done: the wait for data begins."""
        self.left = time.perf_counter()

    def add_batch(self, batch: Batch) -> None:
        """The next micro-batch is there: count the wait for it, and what it makes the model compute."""
        now = time.perf_counter()
        pairs = 0.0
        for stream in batch.text.values():
            rows: Sequence[Sequence[float]] | None = stream.sample_lengths
            if rows is None:  # only a mask tells them: as if those of a row were equally long
                rows = [[stream.ids.shape[1] / len(keys) for _ in keys] for keys in batch.keys]
            pairs += sum(length**2 for lengths in rows for length in lengths)
        inputs = batch.media.inputs.values()  # the views of media items come first, the blank view is of none
        patches = sum(grid.size for one in inputs for grid in one.grids[: sum(one.view_counts)])
        for name, number in (("wait", now - self.left), ("pairs", pairs), ("patches", patches)):
            self.counts[name] = self.counts.get(name, 0.0) + number
        self.left = now

    def make_line(self, device: torch.device) -> dict[str, float]:
        """Means, rates and shares since the last line, on every rank of `device`. Starts the next one.

        Raises:
            TrainingError: too few of the tokens are supervised.
        """
        if self.count_work is not None:
            self.pause_clock()
            self.work, self.count_work = self.count_work(), None
            self.go_on()
        row = self.train.compute_means(self.over_ranks)
        peak = f"peak/{process_rank()}"  # a sum of one rank's value
        counts = self.over_ranks(self.counts | {"ranks": 1.0, peak: peak_memory(device) / 2**30})
        drawn = self.over_ranks(self.drawn)
        row |= self._compute_rates(counts, self.peak_tflops or peak_tflops(device))
        row["peak_memory_gib"] = max(number for name, number in counts.items() if name.startswith("peak/"))
        row |= {name: number for name, number in sorted(counts.items()) if name.startswith("skipped")}
        if len(drawn) > 1:
            row |= {f"share/{name}": number / sum(drawn.values()) for name, number in sorted(drawn.items())}
        if counts["tokens"] and row["supervised_share"] < self.min_supervised:  # no tokens: all samples are left out
            raise TrainingError(
                f"data: only {row['supervised_share']:.2%} of the last {counts['tokens']:.0f} tokens are supervised, "
                f"less than trainer.min_supervised_ratio={self.min_supervised:.2%}. Look at what is learned with "
                "mode=show."
            )
        self._reset_counts()
        return row

    def _compute_rates(self, counts: Mapping[str, float], peak: float | None) -> dict[str, float]:
        """What one line says about speed and about what was in the batches, from the counts of all ranks."""
        now = time.perf_counter()
        seconds, self.since = max(now - self.since, 1e-9), now
        tokens = counts["tokens"]
        row = {
            "samples_per_second": counts["samples"] / seconds,
            "tokens_per_second": tokens / seconds,
            "supervised_share": counts["supervised"] / max(tokens, 1),
            "padding_share": 1 - tokens / max(counts["places"], 1) if tokens else 0.0,
            "data_wait": counts.get("wait", 0.0) / (seconds * counts["ranks"]),
        }
        if self.work is not None:
            held = {name: counts.get(name, 0.0) for name in ("patches", "tokens", "pairs", "supervised")}
            row["tflops"] = self.work(**held) / (seconds * counts["ranks"]) / 1e12
            if peak:
                row["mfu"] = row["tflops"] / peak
        return row

    def hold_out(self) -> None:
        """Start the sums of a validation."""
        self.held_out = Sums(self.weights)

    def pause_clock(self) -> None:
        """Stop the clock of the training speed."""
        self.paused = time.perf_counter()

    def go_on(self) -> None:
        """Start the clock again after a pause."""
        self.since += time.perf_counter() - self.paused
        self.on_step_end()

    def export_state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the sums of all ranks since the last line, and the time since then. A collective."""
        return {
            "totals": self.over_ranks(self.train.read_sums()),
            "sources": self.over_ranks(self.train.read_sources()),
            "counts": self.over_ranks(self.counts),
            "drawn": self.over_ranks(self.drawn),
            "seconds": time.perf_counter() - self.since,
            "training_seconds": self.count_seconds(),
        }

    def load_state(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on with `export_state()`: for one rank, which takes the sums of all."""
        self.train.totals = {name: torch.tensor(value, device=device) for name, value in state["totals"].items()}
        sources, both = state["sources"], {name.rpartition("/")[0] for name in state["sources"]}
        pairs = {name: [sources[f"{name}/{kind}"] for kind in PAIR] for name in both}
        self.train.sources = {name: torch.tensor(pair, device=device) for name, pair in pairs.items()}
        self.counts, self.drawn = dict(state["counts"]), dict(state["drawn"])
        self.before = float(state["seconds"])
        self.earlier = float(state.get("training_seconds", 0.0))  # older checkpoints do not say it


def part_norms(policy: Policy) -> dict[str, Tensor]:
    """Part -> the norm of its gradients, whole or in shards; a part without gradients is left out."""
    held: dict[str, list[Tensor]] = {}
    for group in policy.groups:
        gradients = [parameter.grad for parameter in group.parameters if parameter.grad is not None]
        held.setdefault(group.name, []).extend(gradients)
    norms: dict[str, Any] = {part: nn.utils.get_total_norm(gradients) for part, gradients in held.items() if gradients}
    return {part: norm.full_tensor() if hasattr(norm, "full_tensor") else norm for part, norm in norms.items()}


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no tensor holds a NaN or an infinity. A sum tells (and is ten times as fast), unless it overflows."""
    sums = torch.stack([tensor.sum(dtype=torch.float32) for tensor in tensors])
    return bool(sums.isfinite().all()) or all(bool(tensor.isfinite().all()) for tensor in tensors)
