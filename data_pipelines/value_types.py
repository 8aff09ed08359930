"""Whether values of a configuration are of the annotated types. Both packages use this function."""

from __future__ import annotations

from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import to_json


def fits_type(value: Any, hint: Any) -> bool:
    """Whether a value from YAML is of a type, as strict JSON: a list may stand for a tuple, a text for no number."""
    try:
        _type_adapter(hint).validate_json(to_json(value, fallback=str), strict=True)
    except ValidationError:
        return False
    return True


@cache
def _type_adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(_make_literals_exact(hint), config=ConfigDict(arbitrary_types_allowed=True))


def _make_literals_exact(hint: Any) -> Any:
    """The same type, with literals that take only values of their own type: pydantic alone takes `true` for 1."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        allowed = {(type(value), value) for value in args}

        def check_type(value: Any) -> Any:
            if not isinstance(value, bool | int | float | str | None) or (type(value), value) not in allowed:
                raise ValueError(f"{value!r} is not of the type of a literal")
            return value

        return Annotated[hint, BeforeValidator(check_type)]
    if origin is Union or origin is UnionType:
        return Union[tuple(_make_literals_exact(arg) for arg in args)]  # noqa: UP007 (the number of types varies)
    if origin in (list, dict, tuple, set, frozenset):
        return origin[tuple(_make_literals_exact(arg) for arg in args)]
    return hint
