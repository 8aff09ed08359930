from typing import Any, Literal

import pytest

from data_pipelines.value_types import fits_type


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (True, Literal[1, 2, 3]),
        (1.0, Literal[1, 2, 3]),
        (1, Literal[True, "auto"]),
        (0, Literal[False, "auto"]),
        (True, Literal[1] | None),
        ([1, True], list[Literal[1]]),
        ([True], tuple[Literal[1], ...]),
        ({"a": True}, dict[str, Literal[1]]),
        ([1], Literal[1]),
        ({"a": 1}, Literal[1] | None),
    ],
)
def test_a_literal_takes_no_equal_value_of_another_type(value: Any, hint: Any) -> None:
    assert not fits_type(value, hint)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (1, Literal[1, 2, 3]),
        (True, Literal[True, "auto"]),
        ("auto", Literal[True, "auto"]),
        (None, Literal[1] | None),
        ([1, 2], list[Literal[1, 2]]),
        ([1, 1], tuple[Literal[1], ...]),
        ([], tuple[()]),
        ({"a": 1}, dict[str, Literal[1]]),
    ],
)
def test_a_literal_takes_its_own_values(value: Any, hint: Any) -> None:
    assert fits_type(value, hint)
