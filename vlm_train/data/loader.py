"""Planned rows -> batches, in loader processes.

Every loader worker makes whole accumulation windows (all micro-batches of an optimizer step of this rank), because only
the whole window knows the denominator of its losses. Step s is made by worker s modulo workers: their number changes
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from data_pipelines.errors import BadSample
from vlm_train.contracts.batch import Batch, Problem, Window
from vlm_train.data.collate import Example, collate_rows
from vlm_train.data.dataset import Samples
from vlm_train.data.order.mixture import SampleRef
from vlm_train.data.order.sample_plan import Plan
from vlm_train.data.text.tokenizer import find_unknown_id
from vlm_train.data.worker_transfer import WorkerMessage


@dataclass
class WindowStream(IterableDataset):
    """Optimizer steps `first` to the plan's end, as lists of micro-batches of one rank."""

    samples: Samples
    plan: Plan
    first: int
    rank: int
    normalize: str

    def __post_init__(self) -> None:
        self.unknown_id = find_unknown_id(self.samples.processor.tokenizer)

    def __iter__(self) -> Iterator[list[Batch] | WorkerMessage]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        for step in range(self.first + number, self.plan.steps, count):
            window = self.load_window(step)
            yield WorkerMessage.pack_batches(window) if worker else window

    def load_window(self, step: int) -> list[Batch]:
        """All micro-batches of one optimizer step. A bad sample is skipped: its row is shorter."""
        micros: list[list[list[Example]]] = []
        problems: list[Problem] = []
        for rows in self.plan.step(step, self.rank):
            loaded = [load_row(self.samples, row, problems, training=True) for row in rows]
            micros.append([row for row in loaded if row])
        how: dict[str, Any] = {"streams": self.samples.streams, "normalize": self.normalize}
        how |= {"columns": self.samples.columns, "top_tokens": self.samples.top_tokens}
        batches = [collate_rows(rows, self.samples.processor.images, **how) for rows in micros]
        window = self._describe_window(step, micros, batches, tuple(problems))
        return [replace(batch, window=replace(window, micro=m)) for m, batch in enumerate(batches)]

    def _describe_window(
        self,
        step: int,
        micros: Sequence[Sequence[Sequence[Example]]],
        batches: Sequence[Batch],
        problems: tuple[Problem, ...],
    ) -> Window:
        """What the whole step holds: `batches` are those of `micros`."""
        # Ranks reduce the sums by name, so a rank without samples needs all names, too.
        sums: dict[str, dict[str, float]] = {name: {} for name in ("samples", *self.samples.streams)}
        tokens = positions = supervised = unknown = 0
        for rows, batch in zip(micros, batches, strict=True):
            if not rows:  # its batch is one row of padding
                continue
            for item in (item for row in rows for item in row):
                sums["samples"][item.source] = sums["samples"].get(item.source, 0.0) + 1.0
            for name, stream in batch.text.items():
                for row, weights in zip(rows, stream.weights.numpy(), strict=True):
                    start = 0
                    for item in row:
                        end = start + len(item.rendered.streams[name])
                        sums[name][item.source] = sums[name].get(item.source, 0.0) + float(weights[start:end].sum())
                        start = end
                    tokens += start
                positions += stream.ids.numel()
                supervised += len(stream.supervised)
                unknown += int((stream.labels == self.unknown_id).sum()) if self.unknown_id is not None else 0
        return Window(
            step=step,
            micro=0,
            micro_count=len(micros),
            sums=sums,
            samples=sum(len(row) for rows in micros for row in rows),
            tokens=tokens,
            positions_total=positions,
            supervised=supervised,
            unknown=unknown,
            problems=problems,
        )


def load_row(samples: Samples, row: Sequence[SampleRef], problems: list[Problem], *, training: bool) -> list[Example]:
    """The usable samples of a row; why the others are not goes to `problems`."""
    items = []
    for ref in row:
        try:
            items.append(samples.load_example(ref, training=training))
        except BadSample as error:
            problems.append(Problem.from_error(error))
    return items


class MicroBatches:
    """Unrolls a loader's windows into micro-batches."""

    def __init__(self, loader: DataLoader[list[Batch] | WorkerMessage]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Batch]:
        for window in self.loader:
            yield from window.unpack_batches() if isinstance(window, WorkerMessage) else window


@dataclass
class ValidationStream(IterableDataset):
    """The held-out samples in order, each once, dealt to ranks and workers; bad ones are named in `Batch.problems`.

    `normalize` is that of training, so that the best checkpoint is best by what is trained. `source` is `token` here:
    its factors depend on what else is in a training step.
    """

    samples: Samples
    rows: int
    rank: int
    world: int
    normalize: str = "token"

    @property
    def batches(self) -> int:
        """Batches of every rank."""
        return -(-len(self.samples) // (self.rows * self.world))

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        for batch in range(number, self.batches, count):
            first = (batch * self.world + self.rank) * self.rows
            problems: list[Problem] = []
            row = [SampleRef(index, 0) for index in range(first, min(first + self.rows, len(self.samples)))]
            items = load_row(self.samples, row, problems, training=False)
            how: dict[str, Any] = {"streams": self.samples.streams, "normalize": self.normalize}
            how |= {"columns": self.samples.columns, "top_tokens": self.samples.top_tokens}
            yield replace(
                collate_rows([[i] for i in items], self.samples.processor.images, **how), problems=tuple(problems)
            )
