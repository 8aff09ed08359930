"""What `--help` prints. Hydra's own help copies the whole configuration for every group: five times as long."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterable
from pathlib import Path
from string import Template

from hydra._internal.hydra import Hydra
from omegaconf import OmegaConf

from vlm_train.config.folders import config_dir, recipes_dir

OWN = ("hydra", "schema")
"""What lies in `conf/` and is nobody's choice."""


def format_help(parser: ArgumentParser, config_dirs: Iterable[str | Path] = ()) -> str:
    """The text of `conf/hydra/vlm_train.yaml` with the options of every group, those of `config_dirs` too, and the
    flags."""
    written = OmegaConf.to_container(OmegaConf.load(config_dir() / "hydra" / "vlm_train.yaml"), resolve=False)
    assert isinstance(written, dict)
    groups = "".join(f"{name}: {', '.join(options)}\n" for name, options in list_options(config_dirs).items())
    flags = Hydra.format_args_help(parser)
    return Template(written["help"]["template"]).substitute(APP_CONFIG_GROUPS=groups, FLAGS_HELP=flags)


def list_options(config_dirs: Iterable[str | Path] = ()) -> dict[str, list[str]]:
    """Group -> its options, both sorted. What only other options extend, `_base.yaml`, is none."""
    found: dict[str, set[str]] = {}
    for folder in (config_dir(), recipes_dir(), *map(Path, config_dirs)):
        for path in folder.rglob("*.yaml"):
            group = path.parent.relative_to(folder).as_posix()
            if group != "." and not path.stem.startswith("_") and group.split("/")[0] not in OWN:
                found.setdefault(group, set()).add(path.stem)
    return {group: sorted(found[group]) for group in sorted(found)}
