"""Writing a file so that it is whole whenever it is there. Both packages use this function."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic_write(path: Path, mode: str = "w", *, newline: str | None = None, sync: bool = False) -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`, which takes its place when the block ends without an error.

    Readers, and writers in other processes, see the old file or a new one, never a part. After an error, such as a full
    disk, the old file is still there and the temporary one is removed.

    Args:
        mode: `w` for text in UTF-8, `wb` for bytes.
        sync: write the content to the disk before the file gets its name, so that it outlives a crash of the machine.
    """
    partial = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.partial")
    try:
        with open(partial, mode, encoding=None if "b" in mode else "utf-8", newline=newline) as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
