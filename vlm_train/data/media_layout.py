"""Where the media of a model stand in its text, as its parts say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_train.contracts.family import Family
from vlm_train.contracts.layout import GridLayout, MediaLayout, NoMedia, StitchedLayout, untiled_shape
from vlm_train.data.text.mrope import MRopeLayout
from vlm_train.errors import ConfigError


def make_layout(model: Family, images: Mapping[str, Any], *, views_apart: bool = False) -> MediaLayout:
    """The media layout of a model, with positions on as many axes as its language model has.

    `views_apart`: every view of an item has a run of its own, for templates that write text between them. Raises: see
    `_lay_out`.
    """
    layout, llm = _lay_out(model, images, views_apart), getattr(model, "llm", None)
    if getattr(llm, "position_axes", 1) == 1 or hasattr(layout, "positions"):
        return layout
    return MRopeLayout(layout, getattr(llm, "tokens_per_second", None))


def _lay_out(model: Family, images: Mapping[str, Any], views_apart: bool) -> MediaLayout:
    """The media layout: a picklable object without weights. A family whose media stand otherwise brings its own.

    Raises:
        ConfigError: the features of several encoders go through connectors, and the family does not say where to; or
            views are to stand apart that have no names, that a stitcher joins, or that share positions on three axes. A
            layout of a family's own that sets `Slot.view` says so with an attribute `names_views`.
    """
    connector: Any = getattr(model, "connector", None)
    if (own := model.media_layout(images)) is not None:
        for image in images.values() if connector is not None else ():
            _check_thin_grids(image, connector)
        if views_apart and not getattr(own, "names_views", False):
            raise ConfigError(f"template.views: {type(model).__name__} lays its media out itself, without their views")
        return own
    if connector is None or not images:
        return NoMedia()
    if len(images) > 1:
        raise ConfigError(
            f"model: {type(model).__name__} has several vision encoders: {', '.join(images)}. Its media_layout has to "
            "say where their features stand in the text."
        )
    (image,) = images.values()
    _check_thin_grids(image, connector)
    name_views = getattr(image, "name_views", None) if views_apart else None
    if views_apart and (name_views is None or getattr(model, "stitcher", None) is not None):
        why = f"image: {type(image).__name__} does not name them" if name_views is None else "parts.stitcher joins them"
        raise ConfigError(f"template.views: it writes text between the views of an image or a video, but {why}")
    if views_apart and getattr(getattr(model, "llm", None), "position_axes", 1) > 1:
        raise ConfigError(
            "template.views: it writes text between the views of an image or a video, but llm counts positions inside "
            "them on three axes; use a template without views"
        )
    if (stitcher := getattr(model, "stitcher", None)) is not None:
        shape = getattr(image, "shape", untiled_shape)
        return StitchedLayout(image.grids, connector.token_grid, shape, stitcher.count_tokens)
    return GridLayout(image.grids, connector.token_grid, name_views=name_views)


def _check_thin_grids(image: Any, connector: Any) -> None:
    """Raises `ConfigError` where a plan makes views of any number of patches a side, and the connector takes some of
    those only."""
    make = [getattr(connector, name) for name in ("token_grid", "frame_grid") if hasattr(connector, name)]
    for grid in getattr(image, "thin_grids", tuple)():
        try:
            for one in make:
                one(grid)
        except ConfigError as error:
            raise ConfigError(
                f"connector: {type(connector).__name__} does not take every view of {type(image).__name__}, whose "
                f"sides are any multiple of image.merge={image.merge} patches: {error}. Choose connector=mlp2x_gelu, "
                "or a larger image.merge"
            ) from error
