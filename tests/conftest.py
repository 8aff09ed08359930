"""What every test relies on."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator

import pytest

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # `make test &` in a script; every process of a test would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def own_log_handlers() -> Iterator[None]:
    """Hydra and our command line set handlers, which would write to a later test's closed output."""
    before = logging.root.handlers[:]
    yield
    logging.root.handlers[:] = before


@pytest.fixture(autouse=True)
def own_signal_handlers() -> Iterator[None]:
    """What a run does about signals must not outlive it: the next test's signal would go to a run that is gone."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.getsignal(number) for number in numbers]
    yield
    after = [signal.getsignal(number) for number in numbers]
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    assert after == before
