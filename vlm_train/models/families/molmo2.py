"""Molmo2 (arXiv 2601.10611): overlapping tiles, joined before the connector, and media that see each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_train.contracts.batch import Batch
from vlm_train.contracts.layout import CropLayout, MediaLayout, untiled_shape
from vlm_train.contracts.media import Features, MediaInput
from vlm_train.errors import ConfigError
from vlm_train.models.families.prefix_vlm import PrefixVLM
from vlm_train.models.layers.join_tiles import count_joined_views, join_overlapping_tiles


class Molmo2(PrefixVLM):
    """vision -> tiles joined -> connector -> merge -> llm, in which all media tokens of a sample, their marks included,
    see each other in both directions.

    Args:
        vision: a `VisionEncoder`; tiles are joined where the `shape` of its image plan tells of them.
        connector: a `Connector` that pools frames of videos by themselves, such as `AttentionPool`.
        llm: a `LanguageModel`.
    """

    def __init__(self, *, vision: Any, connector: Any, llm: Any) -> None:
        super().__init__(vision=vision, connector=connector, llm=llm)
        if not hasattr(connector, "frame_grid"):
            raise ConfigError(f"model: Molmo2 pools frames by themselves, {type(connector).__name__} does not")

    def media_layout(self, images: Mapping[str, Any]) -> MediaLayout:
        """Images and frames between marks, see `CropLayout`."""
        (image,) = images.values()
        shape = getattr(image, "shape", untiled_shape)
        return CropLayout(image.grids, shape, self.connector.token_grid, self.connector.frame_grid)

    def connect(self, patches: Features, batch: Batch) -> Features:
        """Width D_v -> D, of the view of all of an image and of the image that its tiles make up, and of frames."""
        shown = batch.media.inputs["vision"]
        joined, counts = join_overlapping_tiles(patches, shown), count_joined_views(shown)
        frames = [bool(shape.frames) for shape, count in zip(shown.shapes, counts) for _ in range(count)]
        blank = [False] * (len(joined.grids) - len(frames))
        return self.connector(joined, [*frames, *blank])

    def count_views(self, shown: MediaInput) -> tuple[int, ...]:
        """Views of each media item, as `connect` leaves them."""
        return count_joined_views(shown)
