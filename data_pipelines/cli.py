"""The data half's command line: `key=value`, composed by Hydra from `data_pipelines/conf`, errors in plain words."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from data_pipelines.errors import DataError
from data_pipelines.shards.manifest import Manifest
from data_pipelines.value_types import fits_type

CONF = Path(__file__).resolve().parent / "conf"
GROUPS = {"build": "source", "filter": "filter"}  # by command, the group of components that it takes


def run_command(task: Callable[[DictConfig], int], name: str, doc: str, argv: list[str] | None = None) -> int:
    """Compose `conf/<name>.yaml` with the overrides `argv` and run `task`. Returns the exit code: 2 for any error."""
    overrides = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(overrides):
        print(format_usage(name, doc))
        return 0
    try:
        return task(_compose_config(name, overrides))
    except (DataError, HydraException, OmegaConfBaseException, OSError) as error:
        print(f"{type(error).__name__}: {_format_error(name, error, overrides)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def format_usage(name: str, doc: str) -> str:
    """What the command does, its options, and those of each source or filter."""
    files = [CONF / f"{name}.yaml", *(sorted((CONF / GROUPS[name]).glob("*.yaml")) if name in GROUPS else ())]
    options = [f"--- {file.relative_to(CONF).with_suffix('')}\n{file.read_text(encoding='utf-8')}" for file in files]
    return "\n".join([doc, *options])


def make_component(options: Mapping[str, Any], trusted: tuple[str, ...], *, at: str = "") -> Any:
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
    hints = _read_type_hints(component)
    for name, value in options.items():
        if not fits_type(value, hints.get(name, Any)):
            quoted = f"; as text: \"{name}='{value}'\"" if fits_type(str(value), hints[name]) else ""
            raise DataError(f"{at}{name}: got {value!r}; expected {known[name].annotation}{quoted}")
    return component(**options)


def check_same(output: Path, arguments: Mapping[str, Any]) -> None:
    """Raise `DataError` unless the finished set was made with these arguments.

    An option that did not exist then, and is off now, changes nothing.
    """
    built = Manifest.read(output).build
    names = sorted({*built, *(name for name, value in arguments.items() if value or name in built)})
    differing = [
        f"{n}: {built.get(n)!r} there, {arguments.get(n)!r} now" for n in names if built.get(n) != arguments.get(n)
    ]
    if differing:
        raise DataError(
            f"{output} holds a shard set built otherwise ({'; '.join(differing)}); choose another output or force=true"
        )


def _compose_config(name: str, overrides: list[str]) -> DictConfig:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = compose(config_name=name, overrides=overrides, return_hydra_config=True)
    with open_dict(config):
        choices = config.pop("hydra").runtime.choices
        if "source" in choices:
            config.source = choices.source
    missing = sorted(str(key) for key in OmegaConf.missing_keys(config))
    if missing:
        raise DataError(f"not given: {', '.join(f'{key}=<value>' for key in missing)}")
    _check_values(OmegaConf.load(CONF / f"{name}.yaml"), config)
    return config


def _check_values(defaults: Any, config: DictConfig) -> None:
    """Values are of the type of their defaults, and numbers not negative."""
    for option, value in config.items():
        name = str(option)
        default = defaults.get(name)
        if isinstance(default, bool | int) and type(value) is not type(default):
            raise DataError(f"{name}: got {value!r}; expected {type(default).__name__}")
        if isinstance(value, int) and value < 0:
            raise DataError(f"{name}: got {value}; allowed: 0 or more")


def _read_type_hints(component: Any) -> dict[str, Any]:
    """The types of a component's options; none where they are names that only a type checker sees."""
    try:
        return get_type_hints(component.__init__)
    except NameError:
        return {}


def _format_error(name: str, error: BaseException, overrides: Sequence[str]) -> str:
    """The message of `error`: in one line, with its cause where Hydra hides the reason there, and what is allowed."""
    first = str(error).splitlines()[0] if str(error) else ""
    if isinstance(error, OverrideParseException):
        return f"{str(error.override)!r} is not <option>=<value>, or its value needs quotes; see --help"
    if isinstance(error, MissingConfigException) or first.startswith("You must specify"):
        choices = sorted(path.stem for path in (CONF / GROUPS.get(name, "")).glob("*.yaml"))
        return f"{first.rstrip('.')}. Available: {', '.join(choices)}"
    if found := re.match(r"Could not override '(.+)'", first):
        return f"no option {found[1]!r}; options: {', '.join(_list_options(name, overrides))}"
    cause = f" ({error.__cause__})" if isinstance(error, HydraException) and error.__cause__ else ""
    return f"{error}{cause}".strip()


def _list_options(name: str, overrides: Sequence[str]) -> list[str]:
    """The options of a command and of the sources or filters that are chosen."""
    found = [str(option) for option in OmegaConf.load(CONF / f"{name}.yaml") if option != "defaults"]
    group = GROUPS.get(name, "")
    for choice in re.findall(r"\w+", next((text for text in overrides if text.startswith(f"{group}=")), "")):
        if (file := CONF / group / f"{choice}.yaml").is_file():
            within = f"filters.{choice}." if name == "filter" else ""
            found += [f"{within}{option!s}" for option in OmegaConf.load(file) if option != "_target_"]
    return sorted(found)
