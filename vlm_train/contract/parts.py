"""Vision encoders and connectors keep the contracts of `vlm_train.contracts.parts`.

Legend: N views, F features of all views, D width.
"""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Iterator
from typing import Any

import torch

from vlm_train.config.signatures import import_target
from vlm_train.contract.component import Component
from vlm_train.contract.finding import (
    Finding,
    check_gradients,
    check_on_meta,
    check_pickle,
    check_state,
    compare_tensors,
    compare_values,
    require_members,
    weigh_values,
)
from vlm_train.contracts.layout import GridLayout, MediaSize
from vlm_train.contracts.media import Features, Grid3, MediaInput
from vlm_train.errors import ConfigError
from vlm_train.models.vision.example import blank_input

WIDTHS: dict[str, Any] = {"in_dim": 48, "out_dim": 32}
"""Of the features that a connector is given, those of several layers joined, and of the language model."""

NATIVE = (MediaSize(112, 112), MediaSize(56, 168), MediaSize(112, 112))
"""Views for an encoder of native resolution."""

GRIDS = (
    (Grid3(1, 4, 4), Grid3(1, 4, 4)),
    (Grid3(1, 3, 5), Grid3(1, 3, 5)),
    (Grid3(1, 4, 4), Grid3(2, 3, 5), Grid3(1, 4, 4)),
)
"""Batches for a connector: views of one size, of sides that do not divide, and of several sizes."""


def check_vision(component: Component) -> Iterator[Finding]:
    """A vision encoder: views to features, `VisionEncoder`."""
    yield check_on_meta(component.make_on_meta())
    vision = component.make_small()
    members = ("out_dim", "image_size", "image_mean", "image_std", "patch_grid", "encode")
    yield (found := require_members(vision, members))
    if found.problem:
        return
    statistics = [*vision.image_mean, *vision.image_std]
    right = len(statistics) == 6 and all(0 <= value <= 1 for value in statistics)
    yield Finding(
        "image_mean and image_std are three numbers from 0 to 1", "" if right else f"got {statistics}, mean then std"
    )
    yield check_pickle("patch_grid can be sent to data workers", vision.patch_grid)

    media = blank_input(vision, 3, sizes=NATIVE if vision.image_size is None else ())
    media.values.random_(0, 256)
    features = vision.encode(media)
    yield compare_values("features of a view have the grid that patch_grid says", features.grids, media.grids)
    rows = sum(grid.size for grid in media.grids)
    yield compare_values("features are [F, out_dim]", list(features.values.shape), [rows, vision.out_dim])
    yield check_gradients(vision, weigh_values(features.values), _list_unused(vision))

    vision.eval()
    with torch.no_grad():
        together = vision.encode(media).values
        alone = [vision.encode(MediaInput(one.values, one.grids, (1,))).values for one in media.split(1)]
    yield compare_tensors("a view gives what it gives alone, whatever else is in the batch", together, torch.cat(alone))
    yield check_state(vision, component.make_small(), lambda one: one.encode(media).values)


def check_connector(component: Component) -> Iterator[Finding]:
    """A connector: features to the language model's width, `Connector`."""
    taken = inspect.signature(import_target(component.copy_options()._target_)).parameters
    several = "in_dim" in taken and "Mapping" in str(taken["in_dim"].annotation)
    if several:
        yield Finding("takes several encoders: model=<its family> checks it, with vision=<them>")
        return
    yield check_on_meta(component.make_on_meta(**WIDTHS))
    connector = component.make_small(**WIDTHS)
    yield (found := require_members(connector, ("token_grid",)))
    if found.problem:
        return
    yield check_pickle("token_grid can be sent to data workers", connector.token_grid)
    if not isinstance(tokens := connector(_make_features(GRIDS[0])), Features):
        yield Finding("forward returns Features", f"got {type(tokens).__name__}")
        return
    batches = _choose_batches(connector)
    for grids in batches:
        yield from _check_tokens(component.make_small(**WIDTHS), grids)
    yield _check_layout(connector)
    features = _make_features(batches[-1])
    yield check_state(connector, component.make_small(**WIDTHS), lambda one: one(features).values)


def _choose_batches(connector: Any) -> tuple[tuple[Grid3, ...], ...]:
    """`GRIDS`; for a connector that refuses sides which do not divide, those of four times the sides."""
    try:
        for grid in {grid for grids in GRIDS for grid in grids}:
            connector.token_grid(grid)
    except ConfigError:
        return tuple(tuple(Grid3(t, 4 * h, 4 * w) for t, h, w in grids) for grids in GRIDS)
    return GRIDS


def _check_tokens(connector: Any, grids: tuple[Grid3, ...]) -> Iterator[Finding]:
    """What a connector makes of views of these grids."""
    views = ", ".join("x".join(map(str, grid)) for grid in grids)
    features = _make_features(grids)
    tokens = connector(features)
    wanted = tuple(connector.token_grid(grid) for grid in grids)
    yield compare_values(f"tokens have the grid that token_grid says (patches {views})", tokens.grids, wanted)
    rows = sum(grid.size for grid in wanted)
    yield compare_values("tokens are [F, out_dim]", list(tokens.values.shape), [rows, WIDTHS["out_dim"]])
    yield check_gradients(connector, weigh_values(tokens.values), _list_unused(connector))

    connector.eval()
    together = connector(features).values
    views_alone = features.values.split(features.lengths)
    alone = torch.cat(
        [connector(Features(view, (grid,))).values for view, grid in zip(views_alone, grids, strict=True)]
    )
    yield compare_tensors("a view gives what it gives alone, whatever else is in the batch", together, alone)
    ours, expected = (torch.autograd.grad(weigh_values(values), features.values)[0] for values in (together, alone))
    yield compare_tensors("so does its gradient", ours, expected)


def _check_layout(connector: Any) -> Finding:
    """The text has a placeholder for every token, also in a process that has no weights."""
    plan = _OneGrid(GRIDS[0][0])
    layout = pickle.loads(pickle.dumps(GridLayout(plan, connector.token_grid)))  # noqa: S301 - our own bytes
    (pieces,) = layout([MediaSize(640, 480)])
    tokens = connector(_make_features(GRIDS[0][:1]))
    return compare_values("the text has a placeholder for every token of an image", pieces[0].count, tokens.lengths[0])


class _OneGrid:
    """The patch grids of an image that is one view."""

    def __init__(self, grid: Grid3) -> None:
        self.grid = grid

    def __call__(self, size: MediaSize) -> tuple[Grid3, ...]:
        return (self.grid,)


def _make_features(grids: tuple[Grid3, ...]) -> Features:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(sum(grid.size for grid in grids), WIDTHS["in_dim"], generator=generator)
    return Features(values.requires_grad_(), grids)


def _list_unused(part: Any) -> list[str]:
    return list(part.unused_parameters()) if hasattr(part, "unused_parameters") else []
