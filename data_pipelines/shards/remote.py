"""Shard sets on s3, gs, hf, http and https: whole files, fetched once a node into a bounded cache, checked, and read
there.

A cached file is named by the sha256 of its content, so sets and views of them share files. Any number of processes use
one cache folder: one of them downloads a file under a lock while others wait, and it takes its name only when its
checksum is right. The longest unused files are removed for new ones. Removing one that is open elsewhere is safe: it
stays readable there, and its space is freed when it is closed. Only files that are just being downloaded may exceed the
bound. The locks are `flock` itself, on the downloads: a killed process unlocks its own, which others may then continue
or remove, and no lock files stay in the cache, as filelock's would.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import posixpath
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.shards.file_lock import hold_lock, is_at
from data_pipelines.shards.manifest import MANIFEST, FileInfo, Manifest

SCHEMES = ("http", "https", "s3", "gs", "hf")
CACHE_BYTES = 50 * 10**9
MAX_MANIFEST = 256 * 2**20
ATTEMPTS = 6
LONGEST_WAIT = 30.0
"""Seconds between two attempts at most: each waits up to twice as long as the one before, at random."""
TIMEOUT = 60.0
"""Seconds without a byte after which an http download is tried again."""

SLOWEST = 1000
"""Bytes a second that an http download brings on average, `TIMEOUT` after its start, or it is tried again."""

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.:-]*)://(.*)", re.DOTALL)
PIPE = re.compile(r"pipe:")
CACHED = re.compile(r"[0-9a-f]{64}(?:\.(\d+)\.partial)?")


def is_remote(address: str) -> bool:
    """Whether `address` is fetched rather than opened. Raises `DataError` for one that is neither."""
    match = URL.fullmatch(address)
    if match and match[1] in SCHEMES:
        if re.search(r"[?#@]", match[2]):
            raise DataError(f"{address}: a shard set's address has no ?, # or @; give credentials by the environment")
        return True
    if (match and match[1] != "file") or PIPE.match(address):
        allowed = ", ".join(f"{scheme}://" for scheme in ("file", *SCHEMES))
        raise DataError(f"{address}: shards are not read from there; allowed: a folder, {allowed}")
    return False


def local_path(address: str) -> Path:
    """The folder of a local set, given as a path or as file://."""
    return Path(address.removeprefix("file://"))


def default_cache() -> Path:
    """`$VLM_TRAIN_CACHE`, or `~/.cache/vlm_train/shards`."""
    return Path(os.environ.get("VLM_TRAIN_CACHE") or Path.home() / ".cache" / "vlm_train" / "shards")


def join_address(address: str, name: str) -> str:
    """The address of a file of a set; `name` may lead into another set of the same host or bucket, not further."""
    scheme, _, rest = address.partition("://")
    host, _, path = rest.partition("/")
    return f"{scheme}://{host}{posixpath.normpath(f'/{path}/{name}')}"


def read_manifest(address: str) -> Manifest:
    """Fetch the manifest of a remote set. Raises `DataError`."""
    with tempfile.TemporaryDirectory() as folder:
        download_file(join_address(address, MANIFEST), Path(folder) / MANIFEST, at_most=MAX_MANIFEST)
        try:
            manifest = Manifest.read(Path(folder))
            if manifest.elsewhere:
                raise DataError(f"{folder}: its shards lie elsewhere; download this folder, and name it instead")
            return manifest
        except DataError as error:
            raise DataError(str(error).replace(folder, address)) from error


@dataclass(frozen=True)
class Cache:
    """Local copies of remote files, at most `max_bytes` of them in `folder`."""

    folder: Path
    max_bytes: int

    def open_cached(self, url: str, info: FileInfo) -> FileIO:
        """The whole file, open for reading. Raises `DataError` if it cannot be had or is not what `info` says."""
        path = self.folder / info.sha256
        if not CACHED.fullmatch(info.sha256):
            raise DataError(f"{url}: its manifest gives no sha256, but {info.sha256!r}")
        if info.bytes > self.max_bytes:
            raise DataError(f"{url}: {info.bytes} bytes do not fit into a cache of {self.max_bytes}; allow it more")
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            if file := _open_whole(path, info.bytes):
                return file
            partial = path.with_name(f"{path.name}.{info.bytes}.partial")
            with hold_lock(partial):
                if _is_whole(path, info.bytes):  # fetched by another process meanwhile
                    partial.unlink(missing_ok=True)
                    continue
                self._make_room(url, info.bytes, partial)
                fetch_file(url, partial, info)
                partial.rename(path)

    def cached_path(self, url: str, info: FileInfo) -> Path:
        """Where the file is now; use it at once, since it may be removed for others."""
        self.open_cached(url, info).close()
        return self.folder / info.sha256

    def drop_damaged(self, file: FileIO, info: FileInfo) -> bool:
        """Whether an open copy is not what was fetched any more. If so, it is removed, and fetched again when asked."""
        file.seek(0)
        if hashlib.file_digest(file, "sha256").hexdigest() == info.sha256:
            return False
        path = self.folder / info.sha256
        if is_at(file.fileno(), path):
            path.unlink(missing_ok=True)
        return True

    def _make_room(self, url: str, needed: int, mine: Path) -> None:
        """Remove the longest unused files until `needed` bytes fit under the bound and on the disk."""
        with hold_lock(self.folder / ".lock"):
            held = dict(self._list_entries(but=mine))
            total = sum(_reserved_bytes(entry, stat.st_size) for entry, stat in held.items())
            for entry in sorted(held, key=lambda entry: held[entry].st_mtime_ns):
                if total + needed <= self.max_bytes and shutil.disk_usage(self.folder).free >= needed:
                    return
                if _remove_entry(entry):
                    total -= _reserved_bytes(entry, held[entry].st_size)
            if (free := shutil.disk_usage(self.folder).free) < needed:
                raise DataError(
                    f"{url}: {needed} bytes do not fit on the disk of {self.folder}, which has {free} free; free some, "
                    "or name another folder in VLM_TRAIN_CACHE"
                )

    def _list_entries(self, but: Path) -> Iterator[tuple[Path, os.stat_result]]:
        for entry in self.folder.iterdir():
            if entry != but and CACHED.fullmatch(entry.name):
                with suppress(FileNotFoundError):  # just completed by another process
                    yield entry, entry.stat()


def fetch_file(url: str, path: Path, info: FileInfo) -> None:
    """Download a file and check it; one that arrives corrupt is fetched once more. Raises `DataError`."""
    for _ in range(2):
        download_file(url, path, exactly=info.bytes)
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest == info.sha256:
            return
    path.unlink()
    raise DataError(
        f"{url}: arrived twice with sha256 {digest[:12]}, the manifest says {info.sha256[:12]}: the file is damaged or "
        "was replaced; upload the set again"
    )


def download_file(url: str, path: Path, *, exactly: int | None = None, at_most: int | None = None) -> None:
    """Copy a remote file to `path`, trying again while the trouble may pass. Raises `DataError`."""
    import tenacity

    attempts = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=tenacity.wait_random_exponential(max=LONGEST_WAIT),
        retry=tenacity.retry_if_exception(_may_pass),
        reraise=True,
    )
    try:
        attempts(_download_once, url, path, exactly, at_most)
    except ImportError as error:
        raise DataError(
            f"{url}: reading it needs another package: pip install 'vlm-train[remote]' ({error})"
        ) from error
    except FileNotFoundError as error:
        raise DataError(f"{url}: no such file: the address is wrong, or the set was not uploaded whole") from error
    except Exception as error:
        if not (isinstance(error, OSError) or is_backend_error(error)):
            raise
        raise DataError(f"{url}: cannot be fetched: {type(error).__name__}: {error or 'no answer'}") from error


class _WrongSize(OSError):
    """The file broke off, goes on after its end, or would never end."""


def _download_once(url: str, path: Path, exactly: int | None, at_most: int | None) -> None:
    from fsspec.callbacks import Callback
    from fsspec.core import url_to_fs

    limit = exactly if at_most is None else at_most
    begun = time.monotonic()

    class Bounded(Callback):
        def relative_update(self, inc: int = 1) -> None:
            super().relative_update(inc)
            if limit is not None and self.value > limit:
                raise _WrongSize(f"more than {limit} bytes")
            if self.value < SLOWEST * (time.monotonic() - begun - TIMEOUT):
                raise _WrongSize(f"{self.value} bytes in {time.monotonic() - begun:.0f} s")

    filesystem, name = url_to_fs(url, **_client_options(url))
    filesystem.get_file(name, str(path), callback=Bounded())
    if exactly is not None and path.stat().st_size != exactly:
        raise _WrongSize(f"{path.stat().st_size} bytes, the manifest says {exactly}")


def _client_options(url: str) -> dict[str, Any]:
    """A shard may take long, as long as it comes (aiohttp allows 5 minutes in all); proxies as the environment says."""
    if not url.startswith("http"):
        return {}
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
    return {"client_kwargs": {"timeout": timeout, "trust_env": True}}


def _may_pass(error: BaseException) -> bool:
    """Whether another attempt may succeed: not if something is missing, forbidden, full, or wrong in the program."""
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError | ImportError):
        return False
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if isinstance(status, int) and 400 <= status < 500 and status not in (408, 429):
        return False
    if isinstance(error, OSError):
        return error.errno not in (errno.ENOSPC, errno.EDQUOT)
    return is_backend_error(error)


def is_backend_error(error: BaseException) -> bool:
    """Whether an error comes from a package that talks to a storage service."""
    return type(error).__module__.partition(".")[0] in (
        "aiohttp",
        "aiobotocore",
        "botocore",
        "gcsfs",
        "google",
        "huggingface_hub",
        "httpx",
    )


def _is_whole(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _open_whole(path: Path, size: int) -> FileIO | None:
    """The cached file, marked as just used."""
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115
    except FileNotFoundError:
        return None
    if os.fstat(file.fileno()).st_size != size:  # cut off by a full disk
        file.close()
        path.unlink(missing_ok=True)
        return None
    with suppress(OSError):  # another user's cache
        os.utime(file.fileno())
    return file


def _reserved_bytes(entry: Path, size: int) -> int:
    """Bytes that a cached file takes, or will when it is complete."""
    match = CACHED.fullmatch(entry.name)
    return int(match[1]) if match and match[1] else size


def _remove_entry(entry: Path) -> bool:
    """Remove a cached file, unless it is just being downloaded."""
    try:
        descriptor = os.open(entry, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        entry.unlink(missing_ok=True)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
