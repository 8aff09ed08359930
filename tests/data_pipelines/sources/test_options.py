"""Every option file names its source's options, no more and no less, with the constructor's defaults."""

from __future__ import annotations

import inspect

import pytest
import yaml
from hydra.utils import get_class

from data_pipelines.cli import CONF

FILES = sorted((CONF / "source").glob("*.yaml"))
SHARED = {"okvqa": {"name", "license"}}
"""What an option file says of its own where another file of the same class has the constructor's defaults."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_options_are_the_constructor_s(path):
    options = yaml.safe_load(path.read_text())
    component = get_class(options.pop("_target_"))
    parameters = inspect.signature(component).parameters
    assert set(options) == set(parameters)
    for name, value in options.items():
        default = parameters[name].default
        if value == "???":
            assert default is inspect.Parameter.empty, name
        elif name not in SHARED.get(path.stem, ()):
            assert value == (list(default) if isinstance(default, tuple) else default), name
