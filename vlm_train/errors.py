"""Errors that speak to the user: what failed, where, what it got, what is allowed or to do next.

The command line prints these without a traceback; anything else is a programming error and keeps its traceback,
as does, with VLM_TRAIN_TRACEBACK=1, what a component's own code raises when it is made (`PartError`).

| exit code | meaning | start it again? |
|---|---|---|
| 0 | done | |
| 1 | failed, or stood still | the same command resumes from the newest checkpoint |
| 2 | refused: a setting is wrong | not before it is corrected |
| 130 | Ctrl-C; a training saved its step | when you like |
| 129 | SIGHUP, a closed terminal; a training saved its step | yes: the same command resumes |
| 143 | preempted (SIGTERM, SIGUSR1, SIGUSR2); a training saved its step | yes: the same command resumes |

Codes from 128 on are what Unix says of a process that a signal ended, so they also hold where it came before there was
anything to save.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence

FAILED, REFUSED = 1, 2
"""The exit codes of a run that failed, and of one that was refused."""


class VLMTrainError(Exception):
    """Base of every error caused by the user's input or environment. `code` is the exit code of the command."""

    code: int = FAILED


class ConfigError(VLMTrainError):
    """A configuration that cannot run. Collects every problem found, each naming the setting that causes it."""

    code = REFUSED

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class AssetError(ConfigError):
    """Weights, tokenizers or shards that a configuration names and that are not there."""


class PartError(ConfigError):
    """A component whose own code raises with the options that it is given, when it is made or tried in a dry run."""


class BatchError(VLMTrainError):
    """A batch whose parts disagree, for example placeholders and image features."""


class CheckpointError(VLMTrainError):
    """A checkpoint that is incomplete, corrupt, of another run, or does not fit the model."""


class TrainingError(VLMTrainError):
    """Training cannot go on: non-finite loss, too few supervised tokens, too many bad samples."""


class Interrupted(SystemExit):
    """A signal ended the run, with a checkpoint if `step` says so. Not an error: it stops schedules and sweeps too.

    `code` is the exit code; `said`: the process that was interrupted has said so where we would.
    """

    code: int

    def __init__(self, number: int, step: int | None = None, *, said: bool = False) -> None:
        where = "" if step is None else f" at step {step}, which is saved"
        super().__init__(f"{signal.Signals(number).name}{where}. The same command resumes.")
        self.code = exit_code(number)
        self.said = said


PREEMPTING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""A scheduler wants the machine back. SLURM's `--signal=USR1@300` and submitit's SIGUSR2 come before SIGTERM does."""


ENDING = (signal.SIGINT, signal.SIGHUP, *PREEMPTING)
"""Signals that end a run, which resumes when it is started again: a training saves its step and leaves. One that was
ignored when we were started, as `nohup` does with SIGHUP, stays ignored."""


REPEATED = 3.0
"""Seconds in which a signal counts as the same one: schedulers signal every process, and supervisors forward it too."""


PREEMPTED = 128 + signal.SIGTERM


def exit_code(number: int) -> int:
    """The exit code of a run that this signal ended: one code for whatever says "resume me"."""
    return PREEMPTED if number in PREEMPTING else 128 + number
