"""Packages that others import along: they are kept from talking about what this machine lacks."""

from __future__ import annotations

import logging
import os

import torch


def silence_libraries() -> None:
    """Keep packages that others import along from talking about what this machine lacks."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
