"""Which functions of ours one training step calls, from a sample's shard to its loss."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from vlm_train.runs.folder import RunFolder


class StepTrace:
    """Functions of ours that run between the loading of a sample and the return of the objective, after a first step.

    The profiler watches this thread, so the data loader must have no workers.
    """

    def __init__(self, load: CodeType, loss: CodeType) -> None:
        self.load, self.loss = load, loss
        self.loaded = self.warm = self.within = self.done = self.reading = False
        self.seen: dict[CodeType, bool] = {}  # whether it also runs outside of the loading of a sample

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and not self.done:
            if code is self.load:
                self.loaded, self.within, self.reading = True, self.warm, True
            if self.within:
                self.seen[code] = self.seen.get(code, False) or not self.reading
        elif event == "return" and code is self.load:
            self.reading = False
        elif event == "return" and code is self.loss:  # also called without data, to count what a step computes
            self.warm, self.done = self.loaded, self.done or self.within

    def list_functions(self, root: Path, packages: Sequence[str], *, reading: bool = True) -> list[str]:
        """`file:name` in the order of their first call. Comprehensions, lambdas and class bodies are none.

        `reading=False` leaves out those that only turn a shard's bytes into its `Sample`.
        """
        ours = [f"{root}/{package}/" for package in packages]
        codes = [
            c
            for c, outside in self.seen.items()
            if (reading or outside) and c.co_filename.startswith(tuple(ours)) and not c.co_qualname.endswith(">")
        ]
        return list(
            dict.fromkeys(f"{Path(code.co_filename).relative_to(root).as_posix()}:{code.co_qualname}" for code in codes)
        )


def trace_step(root: Path, packages: Sequence[str]) -> tuple[list[str], list[str]]:
    """What a step of a tiny LLaVA calls of `packages`, folders of `root`: from a shard's Sample to the loss, and with
    the reading of the shard."""
    from data_pipelines.shards.shard_set import ShardSet
    from tests.support.small_run import command, make_data
    from vlm_train.config.compose import compose_config
    from vlm_train.config.run_file import save_config
    from vlm_train.config.run_identity import run_dir
    from vlm_train.objectives.lm import LanguageModeling
    from vlm_train.training.fit import fit_run

    trace = StepTrace(ShardSet.load_sample.__code__, LanguageModeling.__call__.__code__)
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder))
        cfg = compose_config(command(data, data / "runs", "data.workers=0", "trainer.max_steps=3"))
        save_config(cfg, RunFolder(run_dir(cfg)).config)
        sys.setprofile(trace)
        try:
            fit_run(cfg)
        finally:
            sys.setprofile(None)
    if not trace.done:
        raise RuntimeError(
            "the objective was never reached: ShardSet.load_sample or LanguageModeling.__call__ is not used"
        )
    return trace.list_functions(root, packages, reading=False), trace.list_functions(root, packages)
