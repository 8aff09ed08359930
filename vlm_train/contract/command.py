"""`python -m vlm_train.contract <group>=<name> ...`: does a component keep what the framework expects of it?

    python -m vlm_train.contract connector=mlp2x_gelu
    python -m vlm_train.contract recipe=easyvqa_blip model=blip objective=itc_itm
    python -m vlm_train.contract --config-dir mine 'allow_targets=[mypackage.]' connector=mine

Every <group>=<name> of a group that has a contract is checked, with its small values (`tiny:`) and without weights of
files. What else is given (recipe=<name>, other groups, values) makes up the configuration around it.

Exit codes: 0 all is well, 1 a check failed, 2 the command is wrong.
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from vlm_train.contract.component import DOCSTRING, Component, compose_component, shrink_component
from vlm_train.contract.finding import Finding
from vlm_train.contract.inputs import check_image, check_template
from vlm_train.contract.models import check_family, check_objective_group
from vlm_train.contract.outputs import check_eval, check_exporter, check_importer, check_metric
from vlm_train.contract.parts import check_connector, check_vision
from vlm_train.contract.texts import check_llm
from vlm_train.errors import ConfigError
from vlm_train.models.libraries import silence_libraries
from vlm_train.runs.process import run_guarded

CONTRACTS: dict[str, Callable[[Component], Iterator[Finding]]] = {
    "vision": check_vision,
    "connector": check_connector,
    "llm": check_llm,
    "model": check_family,
    "objective": check_objective_group,
    "metric": check_metric,
    "eval": check_eval,
    "exporter": check_exporter,
    "importer": check_importer,
    "image": check_image,
    "template": check_template,
}
"""Group -> what its components keep."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m vlm_train.contract", description=__doc__, formatter_class=formatter)
    parser.add_argument("--config-dir", help="a further folder of YAML: <group>/<name>.yaml")
    parser.add_argument("overrides", nargs="+", metavar="<group>=<name>", help=f"groups: {', '.join(CONTRACTS)}")
    options = parser.parse_intermixed_args(argv)
    dirs = [options.config_dir] if options.config_dir else []
    failed: list[str] = []
    code = run_guarded(lambda: failed.extend(_print_findings(options.overrides, dirs)), options.overrides, dirs)
    return code or int(bool(failed))


def _print_findings(overrides: Sequence[str], dirs: Sequence[str]) -> Iterator[str]:
    """Check and print; yields the components that break their contract."""
    chosen = [one for one in overrides if one.partition("=")[0] in CONTRACTS]
    if not chosen:
        raise ConfigError(f"contract: nothing to check. Allowed: <group>=<name> of {', '.join(CONTRACTS)}.")
    if missing := [folder for folder in dirs if not Path(folder).is_dir()]:
        raise ConfigError(f"--config-dir: {missing[0]} is not a folder. Expected one with <group>/<name>.yaml.")
    for one in chosen:
        group, _, name = one.partition("=")
        around = [other for other in overrides if other.partition("=")[0] not in (group, "metric")]
        print(one, flush=True)
        problems = 0
        for finding in check_component(group, name, around, dirs):
            print(finding, flush=True)
            problems += bool(finding.problem)
        print(f"{one}: {f'{problems} of its checks failed' if problems else 'keeps its contract'}\n", flush=True)
        if problems:
            yield one


def check_component(
    group: str, name: str, overrides: Sequence[str] = (), config_dirs: Sequence[str | Path] = ()
) -> Iterator[Finding]:
    """Every check of `group=name`, in order. What a component raises ends its checks and is the last finding.

    Raises:
        ConfigError, and Hydra's own errors: the configuration around it is wrong, or there is no such component.
    """
    silence_libraries()
    written, findings = compose_component(group, name, overrides, config_dirs)
    yield from findings
    if any(finding.problem and finding.checked != DOCSTRING for finding in findings):
        return
    component = shrink_component(group, name, written, overrides, config_dirs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            yield from CONTRACTS[group](component)
        except Exception as error:  # a component's own code may raise anything
            yield Finding("runs", _describe_error(error))


def find_problems(
    group: str, name: str, overrides: Sequence[str] = (), config_dirs: Sequence[str | Path] = ()
) -> list[str]:
    """The checks of `group=name` that fail, as lines; none: it keeps its contract."""
    return [str(one).strip() for one in check_component(group, name, overrides, config_dirs) if one.problem]


def _describe_error(error: Exception) -> str:
    """The message, and the line of the component's own code that it came from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {str(error).strip() or 'no message'}{where}"
