"""The global random generators, for parts and callbacks of users that draw from them: our draws have addresses."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def rng_state() -> dict[str, Any]:
    """Where the generators of Python, NumPy and torch stand in this process: plain numbers and tensors."""
    version, numbers, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    state = {
        "python": [version, list(numbers), gauss],
        "numpy": [numpy_state["state"]["key"].tolist(), numpy_state["state"]["pos"]],
        "gauss": [numpy_state["has_gauss"], numpy_state["gauss"]],
        "torch": torch.get_rng_state(),
    }
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Go on with `rng_state()`. A step of training sets torch's generator by its address; others may not."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    (key, position), (has_gauss, gauss) = state["numpy"], state["gauss"]
    np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
