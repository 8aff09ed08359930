"""Where the YAML lies: groups of components, recipes and schedules."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def packaged_folder(name: str) -> Path:
    """A folder of YAML: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / name
    return inside if inside.is_dir() else package.parent / name


def config_dir() -> Path:
    """The folder of `config.yaml` and the groups of components."""
    return packaged_folder("conf")


def recipes_dir() -> Path:
    """The folder of the groups `recipe/` and `schedule/`."""
    return packaged_folder("recipes")


def find_recipe(name: str, config_dirs: Iterable[str | Path] = ()) -> Path | None:
    """The file of a recipe, or None."""
    for folder in (recipes_dir(), *config_dirs):
        path = (Path(folder) / "recipe" / name).with_suffix(".yaml")
        if path.is_file():
            return path
    return None


def list_groups(config_dirs: Iterable[str | Path] = ()) -> set[str]:
    """Names of all groups: the folders of options."""
    folders = (config_dir(), recipes_dir(), *map(Path, config_dirs))
    return {entry.name for folder in folders for entry in folder.iterdir() if entry.is_dir()}
