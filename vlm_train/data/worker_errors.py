"""What ends loader processes from outside, as one error that says what to do. Needs no torch."""

from __future__ import annotations

import errno

from data_pipelines.errors import DataError


def explain_loader_error(error: BaseException) -> DataError | None:
    """What to do where a worker process died, or the system gives no more files; None: it is another error.

    torch says so in the main process wherever it is just then.
    """
    text = str(error)
    if isinstance(error, RuntimeError) and "DataLoader worker" in text:
        advice = "it was killed, perhaps for want of memory; lower data.workers and data.prefetch need less"
        return DataError(f"a worker process of the data loader ended: {advice} ({text})")
    if "Too many open files" in text or (isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)):
        return DataError(
            f"the limit on open files is reached: raise it (ulimit -n 4096), or lower data.workers ({text})"
        )
    return None
