"""The hidden folder in which a shard set is made, and which takes the set's name when it is complete.

Its lock is `flock` itself: the nodes of one build share it, and filelock's shared locks are SQLite databases, which are
not safe on network file systems.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType

from data_pipelines.errors import DataError
from data_pipelines.shards.manifest import MANIFEST

LOCK = ".lock"


class Partial:
    """`.<name>.partial` beside `folder`, locked against other processes, or `shared` with some that share it too.

    Raises `DataError` if `folder` exists, unless `overwrite` and it holds a shard set, and if another process has the
    lock. Left as a context manager, it is unlocked, and removed if nothing is in it. A file system without locks gets
    none.
    """

    def __init__(self, folder: Path | str, *, overwrite: bool = False, shared: bool = False) -> None:
        self.folder = Path(os.path.abspath(folder))
        self.path = partial_path(self.folder)
        _check_free(self.folder, overwrite)
        self._lock = _lock_file(self.path / LOCK, shared)
        try:
            _check_free(self.folder, overwrite)  # finished while this process waited for nothing but the lock
        except DataError:
            self.remove_folder()
            raise

    def remove_matching(self, pattern: str = "*") -> None:
        """Remove what matches `pattern`, but for the lock."""
        for path in self.path.glob(pattern):
            if path.name != LOCK:
                _remove_path(path)

    def publish_folder(self) -> None:
        """Give the folder its name; what was there before goes."""
        old = self.folder.parent / f".{self.folder.name}.old"
        self.remove_matching(".*.partial")  # files that a killed process was writing
        (self.path / LOCK).unlink(missing_ok=True)
        if self.folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.folder.rename(old)
        self.path.rename(self.folder)
        shutil.rmtree(old, ignore_errors=True)
        self.release_lock()

    def remove_folder(self) -> None:
        """Remove the folder with everything in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.release_lock()

    def release_lock(self) -> None:
        """Unlock the folder."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Partial:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock >= 0 and [path.name for path in self.path.iterdir()] == [LOCK]:
            self.remove_folder()
        self.release_lock()


def partial_path(folder: Path) -> Path:
    """The hidden folder in which the set `folder` is made."""
    return folder.parent / f".{folder.name}.partial"


def _remove_path(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _check_free(folder: Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / MANIFEST).is_file():
        raise DataError(f"{folder} exists and is not a shard set; choose another folder or remove it")
    if not overwrite:
        raise DataError(f"{folder} already holds a shard set; choose another folder, or overwrite it with force=true")


def _lock_file(path: Path, shared: bool) -> int:
    """Lock the file `path`. It is a file because NFS locks exclusively only what is open for writing."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # the folder was published or removed after it was seen
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(lock)
            raise DataError(f"{path.parent}: another process is writing this shard set") from error
        except OSError:
            return lock  # no locks on this file system
        if os.fstat(lock).st_nlink:
            return lock
        os.close(lock)
