"""The data half's command line: `key=value`, composed by Hydra from `data_pipelines/conf`, errors in plain words."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from data_pipelines.errors import DataError

CONF = Path(__file__).resolve().parent / "conf"


def run(task: Callable[[DictConfig], int], name: str, doc: str, argv: list[str] | None = None) -> int:
    """Compose `conf/<name>.yaml` with the overrides `argv` and run `task`. Returns the exit code: 2 for any error."""
    overrides = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(overrides):
        print(usage(name, doc))
        return 0
    try:
        return task(_compose(name, overrides))
    except (DataError, HydraException, OmegaConfBaseException, OSError) as error:
        print(f"{type(error).__name__}: {_plain(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def usage(name: str, doc: str) -> str:
    """What the command does, its options, and each source's own."""
    files = [CONF / f"{name}.yaml", *(sorted((CONF / "source").glob("*.yaml")) if name == "build" else ())]
    options = [f"--- {file.relative_to(CONF).with_suffix('')}\n{file.read_text(encoding='utf-8')}" for file in files]
    return "\n".join([doc, *options])


def _compose(name: str, overrides: list[str]) -> DictConfig:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = compose(config_name=name, overrides=overrides, return_hydra_config=True)
    with open_dict(config):
        choices = config.pop("hydra").runtime.choices
        if "source" in choices:
            config.source = choices.source
    missing = sorted(str(key) for key in OmegaConf.missing_keys(config))
    if missing:
        raise DataError(f"not given: {', '.join(f'{key}=<value>' for key in missing)}")
    return config


def _plain(error: BaseException) -> str:
    """The message of `error`, with its cause where Hydra hides the reason there."""
    cause = f" ({error.__cause__})" if isinstance(error, HydraException) and error.__cause__ else ""
    return f"{error}{cause}".strip()
