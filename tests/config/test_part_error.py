"""Which errors of a component's own code are those of its settings."""

from __future__ import annotations

import pytest
import torch
from hydra.errors import InstantiationException
from omegaconf import OmegaConf

from vlm_train.config.part_error import name_failing_code, name_failing_part
from vlm_train.errors import ConfigError, PartError


def test_an_error_of_values_names_the_part_and_its_options() -> None:
    node = OmegaConf.create({"_target_": "a.B", "heads": 0, "other": None})
    said = r"^llm: a.B cannot be made with heads=0. ZeroDivisionError: .*, line \d+\)"
    with pytest.raises(PartError, match=said), name_failing_part("llm", node):
        1 / 0  # noqa: B018


@pytest.mark.parametrize(
    "error",
    [
        ImportError("no package"), OSError("no file"), MemoryError(), torch.OutOfMemoryError("all gone"),
        RuntimeError("CUDA error: device-side assert"), ConfigError("heads: got 0; allowed: 1 or more"),
    ],
)  # fmt: skip
def test_what_no_setting_causes_and_what_says_what_to_do_stays_as_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, name_failing_code("part"):
        raise error
    assert caught.value is error


def test_the_error_of_a_component_inside_is_the_one_that_is_told() -> None:
    def fail(cause: Exception) -> None:
        with name_failing_code("eval"):
            try:
                raise cause
            except Exception as inner:
                raise InstantiationException("Error in call to target") from inner

    with pytest.raises(ConfigError, match="^threshold: got 2$"):
        fail(ConfigError("threshold: got 2"))
    with pytest.raises(PartError, match="eval. KeyError: 'x'"):
        fail(KeyError("x"))
