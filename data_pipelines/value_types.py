"""Whether values of a configuration are of the annotated types. Both packages use this function."""

from __future__ import annotations

from functools import cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
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
    return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
