"""The data half's command line: `key=value`, composed by Hydra from `data_pipelines/conf`, errors in plain words.

`--config-dir <folder>` adds a folder of one's own sources and filters: `<folder>/source/<name>.yaml`.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from data_pipelines.errors import DataError
from data_pipelines.nearest import find_nearest
from data_pipelines.shards.manifest import Manifest
from data_pipelines.value_types import fits_type

CONF = Path(__file__).resolve().parent / "conf"
GROUPS = {
    "build": "source",
    "contract": "source",
    "filter": "filter",
    "index": "layout",
}  # by command, the group of components that it takes
RENAMED = {"licence": "license"}
"""Options that had another name -> what they are called now."""


def run_command(task: Callable[[DictConfig], int], name: str, doc: str, argv: list[str] | None = None) -> int:
    """Compose `conf/<name>.yaml` with the overrides `argv` and run `task`. Returns the exit code: 2 for any error."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--config-dir")
    flags, overrides = parser.parse_known_args(argv)
    folders = [CONF, *([Path(flags.config_dir).absolute()] if flags.config_dir else [])]
    if flags.help:
        print(format_usage(name, doc, folders))
        return 0
    try:
        if not folders[-1].is_dir():
            raise DataError(f"--config-dir: {flags.config_dir} is not a folder; expected one with source/<name>.yaml")
        return task(_compose_config(name, overrides, folders))
    except (DataError, HydraException, OmegaConfBaseException, OSError) as error:
        print(f"{type(error).__name__}: {_format_error(name, error, overrides, folders)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def format_usage(name: str, doc: str, folders: Sequence[Path] = (CONF,)) -> str:
    """What the command does, its options, and those of each source or filter in `folders`."""
    group = GROUPS.get(name)
    files = {name: CONF / f"{name}.yaml"}
    files |= {f"{group}/{choice}": file for choice, file in _list_choices(name, folders).items()}
    options = [f"--- {title}\n{file.read_text(encoding='utf-8')}" for title, file in files.items()]
    return "\n".join([doc, *options])


def _list_choices(name: str, folders: Sequence[Path]) -> dict[str, Path]:
    """The sources or filters that a command may take -> their files."""
    group = GROUPS.get(name)
    return {file.stem: file for folder in folders for file in sorted((folder / group).glob("*.yaml"))} if group else {}


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
        now = "".join(f"; {name} is called {RENAMED[name]} now" for name in unknown if name in RENAMED)
        named = ", ".join(f"{name}{_suggest_option(name, known)}" for name in unknown)
        raise DataError(f"{target} has no option {named}{now}; its options: {', '.join(known)}")
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
            f"{output} holds a shard set built with other arguments ({'; '.join(differing)}); choose another output or "
            "force=true"
        )


def _compose_config(name: str, overrides: list[str], folders: Sequence[Path]) -> DictConfig:
    searched = [f'hydra.searchpath=["file://{folder}"]' for folder in folders if folder != CONF]
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        given = [*map(_quote_text, overrides), *searched]
        config = compose(config_name=name, overrides=given, return_hydra_config=True)
    with open_dict(config):
        choices = config.pop("hydra").runtime.choices
        if "source" in choices:
            config.source = choices.source
    if config.get("allow_targets") and not any(one.lstrip("+").startswith("allow_targets=") for one in overrides):
        listed = f"[{','.join(config.allow_targets)}]"
        raise DataError(f"allow_targets: a file trusts {listed} by itself; if you do, say allow_targets={listed} here")
    missing = sorted(str(key) for key in OmegaConf.missing_keys(config))
    if missing:
        raise DataError(f"not given: {', '.join(f'{key}=<value>' for key in missing)}")
    _check_values(OmegaConf.load(CONF / f"{name}.yaml"), config)
    return config


def _quote_text(override: str) -> str:
    """The override, its value as text where Hydra's grammar does not read it: `{000..099}.tar`, `a photo, {label}`."""
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        option, _, value = override.partition("=")
        if value and not value.startswith("[") and re.fullmatch(r"\+{0,2}[\w.@]+", option):
            # A backslash counts before a quote, and at the end.
            value = re.sub(r"(\\+)$", r"\1\1", re.sub(r"(\\*)'", r"\1\1\\'", value))
            return f"{option}='{value}'"
    return override


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


def _format_error(name: str, error: BaseException, overrides: Sequence[str], folders: Sequence[Path]) -> str:
    """The message of `error`: in one line, with its cause where Hydra hides the reason there, and what is allowed."""
    first = str(error).splitlines()[0] if str(error) else ""
    if isinstance(error, OverrideParseException):
        return f"{str(error.override)!r} is not <option>=<value>, or its value needs quotes; see --help"
    if isinstance(error, MissingConfigException) or first.startswith("You must specify"):
        choices = sorted(_list_choices(name, folders))
        wanted = re.search(r"'[^'/]+/([^']+)'", first)
        near = _suggest_option(wanted[1], choices) if wanted else ""
        return f"{first.rstrip('.')}{near}. Available: {', '.join(choices)}"
    if found := re.match(r"Could not override '(.+)'", first):
        if now := RENAMED.get(found[1]):
            return f"no option {found[1]!r}: it is called {now} now"
        known = _list_options(name, overrides, folders)
        return f"no option {found[1]!r}{_suggest_option(found[1], known)}; options: {', '.join(known)}"
    cause = f" ({error.__cause__})" if isinstance(error, HydraException) and error.__cause__ else ""
    return f"{error}{cause}".strip()


def _suggest_option(name: str, known: Iterable[str]) -> str:
    """` (did you mean x?)`, or nothing."""
    near = find_nearest(name, known)
    return f" (did you mean {near}?)" if near else ""


def _list_options(name: str, overrides: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """The options of a command and of the sources or filters that are chosen."""
    found = [str(option) for option in OmegaConf.load(CONF / f"{name}.yaml") if option != "defaults"]
    known = _list_choices(name, folders)
    chosen = next((text for text in overrides if text.startswith(f"{GROUPS.get(name)}=")), "")
    for choice in re.findall(r"\w+", chosen):
        if file := known.get(choice):
            within = f"filters.{choice}." if name == "filter" else ""
            found += [f"{within}{option!s}" for option in OmegaConf.load(file) if option != "_target_"]
    return sorted(found)
