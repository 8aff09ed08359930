"""Check a source: `python -m data_pipelines.contract source=<name> [option=value ...]`

The options are those of `build`. A few raw records of the source's own layout are enough: the first `records` of every
part are read. Prints a line a check. Exit codes: 0 all is well, 1 a check failed, 2 the command is wrong.
"""

from __future__ import annotations

import inspect
import pickle
import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from data_pipelines.cli import make_component, run_command
from data_pipelines.errors import BadSample
from data_pipelines.sample import Sample
from data_pipelines.sources import Record, Source

OWN = ("source", "records", "allow_targets")
"""Options that are the command's, not the source's."""

PARTS = 3
"""Parts that are read, of a source with more."""


def check_source(source: Source, records: int = 200) -> Iterator[tuple[str, str]]:
    """What was checked, and what is wrong with it; "" if nothing is."""
    said = "" if (type(source).__doc__ or "").strip() else "say in a sentence what it reads"
    yield "has a docstring", said
    texts = {name: getattr(source, name, None) for name in ("name", "license", "split")}
    wrong = [f"{name} is {value!r}" for name, value in texts.items() if not isinstance(value, str)]
    yield "name, license and split are texts", ", ".join(wrong)
    parts = source.parts
    yield "has one part or more", "" if isinstance(parts, int) and parts > 0 else f"parts is {parts!r}"
    pickle.loads(pickle.dumps(source))  # noqa: S301 - our own bytes
    yield "can be sent to the processes of a build", ""

    numbers = range(min(parts, PARTS))
    found = {number: list(islice(source.read(number), records)) for number in numbers}
    again = {number: list(islice(source.read(number), records)) for number in reversed(numbers)}
    differing = [
        str(number) for number in numbers if describe_records(found[number]) != describe_records(again[number])
    ]
    yield "a part gives the same records in any order", f"part {', '.join(differing)} differs" if differing else ""

    good = [record for part in found.values() for record in part if not isinstance(record, BadSample)]
    bad = [record for part in found.values() for record in part if isinstance(record, BadSample)]
    reason = f"; the first of {len(bad)} bad ones: {bad[0]}" if bad else ""
    yield "gives usable samples", "" if good else f"none of {len(bad)}{reason}"
    keys = [sample.key for sample, _ in good]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    yield "every sample has a key of its own", f"twice: {', '.join(twice[:3])}" if twice else ""
    lost = [sample.key for sample, blobs in good if len(blobs) != len(sample.media)]
    yield "every media item comes with its bytes", f"not so: {', '.join(lost[:3])}" if lost else ""
    changed = [one.key for one, _ in good if Sample.from_json(one.key, one.to_json()) != one]
    yield "a sample is the same after it was written as JSON", f"not so: {', '.join(changed[:3])}" if changed else ""
    foreign = sorted({sample.source for sample, _ in good} - {source.name})
    yield "samples name the source", f"got {', '.join(map(repr, foreign))}" if foreign else ""


def check_options(options: dict[str, Any]) -> tuple[str, str]:
    """The YAML file lists the options of the constructor, no more and no less."""
    parameters = inspect.signature(get_class(options["_target_"])).parameters
    lacking = sorted(parameters.keys() - options.keys())
    return "its YAML lists every option of the constructor", f"not {', '.join(lacking)}" if lacking else ""


def describe_records(records: list[Record]) -> list[Any]:
    """What can be compared: an error says what it says."""
    return [str(record) if isinstance(record, BadSample) else record for record in records]


def check_config(config: DictConfig) -> int:
    """Check the source of a composed configuration, and print; returns the exit code."""
    plain: Any = OmegaConf.to_container(config, resolve=True)
    options = {name: value for name, value in plain.items() if name not in OWN}
    source = make_component(options, ("data_pipelines.", *config.allow_targets))
    problems = 0
    print(f"source={config.source}")
    for checked, problem in (check_options(options), *check_source(source, config.records)):
        print(f"  FAIL  {checked}: {problem}" if problem else f"  ok    {checked}")
        problems += bool(problem)
    print(f"source={config.source}: {f'{problems} of its checks failed' if problems else 'keeps its contract'}")
    return int(bool(problems))


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    return run_command(check_config, "contract", __doc__ or "", argv)


if __name__ == "__main__":
    sys.exit(main())
