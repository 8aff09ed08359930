"""What every evaluator needs: the model in evaluation mode, and samples that cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from data_pipelines.errors import BadSample
from data_pipelines.shards.shard_set import ShardSet
from vlm_train.distributed import process_rank
from vlm_train.errors import ConfigError

NAMED = 10
"""Unusable samples of a shard set that are named in full."""


class Unusable:
    """Samples of `shards` that cannot be read: noted and named, so that one of them does not end an evaluation.

    Args:
        reported: samples named before, to be named once only; shared by the evaluations of one run.
    """

    def __init__(self, shards: ShardSet, reported: set[tuple[str, int]] | None = None) -> None:
        self.shards = shards
        self.reported = set() if reported is None else reported
        self.reasons: dict[int, str] = {}

    def __contains__(self, number: int) -> bool:
        return number in self.reasons

    @contextmanager
    def catch_bad_sample(self, number: int) -> Iterator[None]:
        """Notes and swallows a `BadSample` of sample `number`, naming its shard and key."""
        try:
            yield
        except BadSample as error:
            where = self.shards.describe_sample(number)
            self.reasons[number] = str(error) if str(error).startswith(where) else f"{where}: {error}"
            self._report_sample(number)

    def _report_sample(self, number: int) -> None:
        known = (self.shards.address, number)
        if process_rank() == 0 and known not in self.reported and len(self.reasons) <= NAMED:
            more = "; further ones are only counted" if len(self.reasons) == NAMED else ""
            print(f"eval: unusable, left out: {self.reasons[number]}{more}", flush=True)
        self.reported.add(known)

    @property
    def note(self) -> str:
        """ ", 2 samples unusable", or nothing."""
        count = len(self.reasons)
        return f", {count:,} sample{'s' * (count > 1)} unusable" if count else ""

    def require_usable(self, count: int) -> None:
        """Raises `ConfigError` if all `count` samples (one or more) are unusable."""
        if self.reasons and len(self.reasons) == count:
            first = next(iter(self.reasons.values()))
            raise ConfigError(f"eval: none of the {count:,} samples of {self.shards.address} can be used: {first}")


def trained_precision(model: Any) -> AbstractContextManager[Any]:
    """Autocast, where frozen layers are kept in 16 bits (`trainer.halve_frozen`) and compute under it only."""
    import torch

    from vlm_train.models.precision import HALVED

    halved = getattr(model, HALVED, None)
    return torch.autocast(next(model.parameters()).device.type, halved) if halved else nullcontext()


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode is restored afterwards."""
    import torch

    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode(), trained_precision(model):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def progress_bar(unit: str, total: int) -> Callable[[int], Any]:
    """A function that advances a progress bar, which shows on a terminal only."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    return tqdm(total=total, unit=f" {unit}", leave=False, disable=True if process_rank() else None).update
