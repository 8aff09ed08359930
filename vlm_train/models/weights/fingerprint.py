"""Digests of the files that parts read their weights from, so that a run notices when they are exchanged."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import nn

from vlm_train.config.hub_files import find_local_file
from vlm_train.config.package_files import resolve_package_file

BLOCKS, BLOCK = 64, 4096
"""So many pieces of so many bytes of each file are read: other weights differ everywhere, and a digest of 15 GB would
take a minute."""


def hash_sources(model: nn.Module) -> dict[str, str]:
    """Name of every module with `weights` -> a digest of the files behind them, wherever they lie. Files that are not
    found are left out: loading tells."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        source = getattr(module, "weights", None)
        if isinstance(source, str) and (files := _list_files(source)):
            digest = hashlib.sha256()
            for file in files:
                _add_file(digest, file)
            found[name] = digest.hexdigest()[:16]
    return found


def _list_files(source: str) -> list[Path]:
    path = Path(resolve_package_file(source)).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        described = find_local_file(source, "config.json")
        if described is None:
            return []
        path = described.parent  # the snapshot in the hub's cache
    return sorted(path.glob("*.safetensors"))


def _add_file(digest: hashlib._Hash, file: Path) -> None:
    size = file.stat().st_size
    digest.update(f"{file.suffix} {size}\n".encode())
    with file.open("rb") as opened:
        for number in range(BLOCKS):
            opened.seek(max(0, size - BLOCK) * number // (BLOCKS - 1))
            digest.update(opened.read(BLOCK))
