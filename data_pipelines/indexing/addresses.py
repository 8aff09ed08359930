"""Addresses of tars as WebDataset's users write them: `{000000..009999}`, `{a,b}`, `one::other`, lists, `*`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from glob import has_magic
from pathlib import Path

from braceexpand import braceexpand

from data_pipelines.errors import DataError
from data_pipelines.shards.remote import PIPE, is_backend_error, is_remote, local_path


def expand_addresses(addresses: str | Sequence[str]) -> list[str]:
    """Every tar that `addresses` name, each once, in their order; those of a folder or a `*` by name. Local ones become
    absolute paths.

    Raises `DataError` for an address that names nothing, is not read from, or is named twice, and for `pipe:`.
    """
    texts = [addresses] if isinstance(addresses, str) else list(addresses)
    found = [tar for text in texts for one in text.split("::") for tar in _expand_one(one.strip())]
    if not found:
        raise DataError("shards: names no tar; expected addresses such as s3://bucket/set/{000000..000999}.tar")
    if len(set(found)) < len(found):
        twice = next(one for number, one in enumerate(found) if one in found[:number])
        raise DataError(f"shards: {twice} is named twice")
    return found


def _expand_one(text: str) -> list[str]:
    if PIPE.match(text):
        raise DataError(
            f"shards: {text!r}: pipe: runs a shell command, which is refused; give the address that the command reads, "
            "such as s3://bucket/set/{000000..000999}.tar (s3, gs, hf and https are read by themselves)"
        )
    try:
        return [tar for address in braceexpand(text) for tar in _find_tars(address)]
    except ValueError as error:
        raise DataError(f"shards: {text!r}: its braces do not match: {error}") from error


def _find_tars(address: str) -> list[str]:
    if is_remote(address):
        return [address] if address.endswith(".tar") else _list_remote(address)
    path = Path(os.path.abspath(local_path(address)))
    if path.is_dir():
        return list(map(str, list_tars(path)))
    tars = sorted(path.parent.glob(path.name)) if has_magic(path.name) else [path]
    if not tars or not all(tar.is_file() for tar in tars):
        raise DataError(
            f"shards: {address}: no such tar; expected a tar, a folder of tars, or a pattern of their names"
        )
    return [str(tar) for tar in tars]


def list_tars(folder: Path) -> list[Path]:
    """The tars in a folder by name, but for hidden ones. Raises `DataError` if there is none."""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    tars = [path for path in found if path.suffix == ".tar" and not path.name.startswith(".") and path.is_file()]
    if not tars:
        packed = next((path.name for path in found if ".tar." in path.name or path.suffix == ".tgz"), None)
        more = f"; {packed} is compressed, and samples can be found in an unpacked .tar only" if packed else ""
        wrong = f"no *.tar files to index{more}" if folder.is_dir() else "no such folder; expected one of *.tar files"
        raise DataError(f"{folder}: {wrong}")
    return tars


def _list_remote(address: str) -> list[str]:
    """The addresses of the tars in a remote folder, or that match a pattern, by name. Raises `DataError`."""
    from fsspec.core import url_to_fs

    if address.startswith("http"):
        raise DataError(f"{address}: a web server lists no files; name the tars, as in .../{{000000..000999}}.tar")
    try:
        filesystem, path = url_to_fs(address)
        found = sorted(filesystem.glob(path if "*" in path else f"{path.rstrip('/')}/*.tar"))
    except ImportError as error:
        raise DataError(f"{address}: needs another package: pip install 'vlm-train[remote]' ({error})") from error
    except Exception as error:
        if not (isinstance(error, OSError) or is_backend_error(error)):
            raise
        raise DataError(f"{address}: cannot be listed: {type(error).__name__}: {error}") from error
    if not found:
        raise DataError(f"{address}: no tars there")
    return [str(filesystem.unstrip_protocol(name)) for name in found]
