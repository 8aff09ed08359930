"""What every test relies on."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def own_log_handlers() -> Iterator[None]:
    """Hydra and our command line set handlers, which would write to a later test's closed output."""
    before = logging.root.handlers[:]
    yield
    logging.root.handlers[:] = before
