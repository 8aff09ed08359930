"""The data half's command line: `key=value`, composed by Hydra from `data_pipelines/conf`, errors in plain words."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, MissingConfigException
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from data_pipelines.errors import DataError
from data_pipelines.manifest import Manifest

CONF = Path(__file__).resolve().parent / "conf"
GROUPS = {"build": "source", "filter": "filter"}  # by command, the group of components that it takes


def run(task: Callable[[DictConfig], int], name: str, doc: str, argv: list[str] | None = None) -> int:
    """Compose `conf/<name>.yaml` with the overrides `argv` and run `task`. Returns the exit code: 2 for any error."""
    overrides = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(overrides):
        print(usage(name, doc))
        return 0
    try:
        return task(_compose(name, overrides))
    except (DataError, HydraException, OmegaConfBaseException, OSError) as error:
        print(f"{type(error).__name__}: {_plain(name, error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def usage(name: str, doc: str) -> str:
    """What the command does, its options, and those of each source or filter."""
    files = [CONF / f"{name}.yaml", *(sorted((CONF / GROUPS[name]).glob("*.yaml")) if name in GROUPS else ())]
    options = [f"--- {file.relative_to(CONF).with_suffix('')}\n{file.read_text(encoding='utf-8')}" for file in files]
    return "\n".join([doc, *options])


def make(options: Mapping[str, Any], trusted: tuple[str, ...], *, at: str = "") -> Any:
    """The object that `options` describe: `_target_`, which must be trusted, and its keyword arguments.

    `at` is where the options stand in the config.
    """
    target = str(options.get("_target_", ""))
    if not target.startswith(trusted):
        raise DataError(
            f"{at}_target_: {target!r} is not trusted; allowed prefixes: {', '.join(trusted)} (allow_targets=[...])"
        )
    component = get_class(target)
    known = inspect.signature(component).parameters
    options = {name: value for name, value in options.items() if name != "_target_"}
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise DataError(f"{target} has no option {', '.join(unknown)}; its options: {', '.join(known)}")
    return component(**options)


def check_same(output: Path, arguments: Mapping[str, Any]) -> None:
    """Raise `DataError` unless the finished set was made with these arguments."""
    built = Manifest.read(output).build
    names = sorted({*built, *arguments})
    differing = [
        f"{n}: {built.get(n)!r} there, {arguments.get(n)!r} now" for n in names if built.get(n) != arguments.get(n)
    ]
    if differing:
        raise DataError(
            f"{output} holds a shard set built otherwise ({'; '.join(differing)}); choose another output or force=true"
        )


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


def _plain(name: str, error: BaseException) -> str:
    """The message of `error`, with its cause where Hydra hides the reason there, and the options it does not list."""
    if isinstance(error, MissingConfigException) and name in GROUPS and not error.options:
        options = sorted(path.stem for path in (CONF / GROUPS[name]).glob("*.yaml"))
        return f"{str(error).splitlines()[0]} Available: {', '.join(options)}"
    cause = f" ({error.__cause__})" if isinstance(error, HydraException) and error.__cause__ else ""
    return f"{error}{cause}".strip()
