"""What must not be shown or sent: the user and password of an address."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/?#\s@'\"]+@")


def without_credentials(value: Any) -> Any:
    """`value`, with `user:password@` taken out of every address in every text of it; other values as they are."""
    if isinstance(value, str):
        return _USER.sub(r"\1", value)
    if isinstance(value, Mapping):
        return {key: without_credentials(item) for key, item in value.items()}
    return [without_credentials(item) for item in value] if isinstance(value, list | tuple) else value
