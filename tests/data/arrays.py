"""The image plan with views as an array, for tests that look at pixels alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from vlm_train.data.images import transform


class ImageTransform(transform.ImageTransform):
    """Gives `[V, 3, H, W]`."""

    def __call__(self, *arguments: Any, **options: Any) -> np.ndarray:  # type: ignore[override]
        return super().__call__(*arguments, **options).values
