"""Signals that stop a run, and the exit codes that say so.

| code | meaning | start it again? |
|---|---|---|
| 0 | done | |
| 1 | failed, or stood still | the same command resumes from the newest checkpoint |
| 2 | refused: a setting is wrong | not before it is corrected |
| 130 | Ctrl-C; a training saved its step | when you like |
| 143 | preempted (SIGTERM, SIGUSR1, SIGUSR2); a training saved its step | yes: the same command resumes |

Codes from 128 on are what Unix says of a process that a signal ended, so they also hold where it came before there was
anything to save.
"""

from __future__ import annotations

import signal

PREEMPTING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""A scheduler wants the machine back. SLURM's `--signal=USR1@300` and submitit's SIGUSR2 come before SIGTERM does."""

STOPPING = (signal.SIGINT, *PREEMPTING)
"""Signals at which a training saves its step and leaves."""

ENDING = (*STOPPING, signal.SIGHUP)
"""Signals that end a run, which resumes when it is started again."""

REPEATED = 3.0
"""Seconds in which a signal counts as the same one: schedulers signal every process, and supervisors forward it too."""

PREEMPTED = 128 + signal.SIGTERM


def exit_code(number: int) -> int:
    """The exit code of a run that this signal ended: one code for whatever says "resume me"."""
    return PREEMPTED if number in PREEMPTING else 128 + number
