"""Errors of components' own code: which component, with which values, and what its code said."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.errors import InstantiationException
from omegaconf import DictConfig

from data_pipelines.errors import DataError
from vlm_train.config.origins import flatten_leaves, shorten_value
from vlm_train.config.redact import without_credentials
from vlm_train.errors import PartError, VLMTrainError

DEVICE_ERRORS = ("OutOfMemoryError", "AcceleratorError")
"""torch's errors of a device or its memory, by name: torch is not imported for them."""


@contextmanager
def name_failing_part(group: str, node: DictConfig) -> Iterator[None]:
    """Errors inside are those of the component that `node` describes, and name it with its options.

    Raises:
        PartError: as `name_failing_code`.
    """
    leaves = {key: value for key, value in flatten_leaves(node).items() if value is not None}
    target = leaves.pop("_target_")
    values = ", ".join(f"{key}={shorten_value(without_credentials(value))}" for key, value in leaves.items())
    with name_failing_code(f"{group}: {target} cannot be made with {values or 'no options'}"):
        yield


@contextmanager
def name_failing_code(what: str) -> Iterator[None]:
    """Errors inside follow from settings, and `what` says of which. Errors that already say what to do stay.

    Raises:
        PartError: the code inside, or a package that it calls, raised anything else.
    """
    try:
        yield
    except (VLMTrainError, DataError, OSError, MemoryError, ImportError):
        raise
    except Exception as error:
        while isinstance(error, InstantiationException) and isinstance(error.__cause__, Exception):
            error = error.__cause__  # Hydra's, around that of a component inside the component
        if isinstance(error, (VLMTrainError, DataError)):
            raise error from None
        if type(error).__name__ in DEVICE_ERRORS or "CUDA error" in str(error):  # not one of settings
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        said = (str(error).strip() or "no message").splitlines()[0]
        raise PartError(
            f"{what}. {type(error).__name__}: {said} ({Path(frame.filename).name}, line {frame.lineno}). "
            "VLM_TRAIN_TRACEBACK=1 shows the way there."
        ) from error
