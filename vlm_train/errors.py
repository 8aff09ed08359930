"""Errors that speak to the user: what failed, where, what it got, what is allowed or to do next.

The command line prints these without a traceback; anything else is a programming error and keeps its traceback.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence

from vlm_train.stopping import exit_code


class VLMTrainError(Exception):
    """Base of every error caused by the user's input or environment."""


class ConfigError(VLMTrainError):
    """A configuration that cannot run. Collects every problem found, each naming the setting that causes it."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class AssetError(ConfigError):
    """Weights, tokenizers or shards that a configuration names and that are not there."""


class BatchError(VLMTrainError):
    """A batch whose parts disagree, for example placeholders and image features."""


class CheckpointError(VLMTrainError):
    """A checkpoint that is incomplete, corrupt, of another run, or does not fit the model."""


class TrainingError(VLMTrainError):
    """Training cannot go on: non-finite loss, too few supervised tokens, too many bad samples."""


class Interrupted(SystemExit):
    """A signal ended the run, with a checkpoint if `step` says so. Not an error: it stops schedules and sweeps too.

    `code` is the exit code.
    """

    code: int

    def __init__(self, number: int, step: int | None = None) -> None:
        where = "" if step is None else f" at step {step}, which is saved"
        super().__init__(f"{signal.Signals(number).name}{where}. The same command resumes.")
        self.code = exit_code(number)
