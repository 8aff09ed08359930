"""A sweep's charts, as HTML fragments that need plotly's script once on the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from vlm_train.report.charts import COLORS, GRID, MUTED
from vlm_train.runs.sweep.records import Job, Sweep
from vlm_train.runs.sweep.summary import shorten_value

if TYPE_CHECKING:
    pass

FEW = 9  # so many different swept values get a tick each
WIDE = 15  # values that differ by more than this factor are drawn on a logarithmic axis
WORST_TO_BEST = [[0.0, "#a3adb8"], [0.5, COLORS[0]], [0.85, COLORS[3]], [1.0, COLORS[1]]]


def draw_coordinates(sweep: Sweep, rows: Sequence[Row], name: str) -> str:
    """One line a run through what was swept, its cost and the metric; empty for fewer than two runs.

    `rows` are the best first, and drawn last.
    """
    rows = rows[::-1]
    varied = [key for key in sweep.keys if len({row.job.value_of(key) for row in rows}) > 1]
    scores = [row.score for row in rows if row.score is not None]
    if len(scores) < 2 or not varied:
        return ""
    axes = [_category_axis(key, [row.job.value_of(key) for row in rows]) for key in varied]
    axes.append(_number_axis(_cost_title(rows), [row.cost for row in rows]))
    axes.append(_number_axis(str(sweep.metric), scores))
    line = {"color": list(range(len(rows))), "colorscale": WORST_TO_BEST}  # by rank: outliers hide none
    unseen = {"size": 1, "color": "rgba(0,0,0,0)"}  # the ends of an axis, which are ticks already
    figure = go.Figure(go.Parcoords(dimensions=axes, line=line, labelfont={"size": 13}, rangefont=unseen))
    return _figure_html(figure, name, height=380, margin={"l": 90, "r": 90, "t": 60, "b": 24})


def cost_chart(sweep: Sweep, rows: Sequence[Row], name: str) -> str:
    """The metric over what it cost, one point a run; a line joins those that nothing cheaper beats."""
    if not rows:
        return ""
    figure = go.Figure()
    front = _cheapest_best(sweep, rows)
    corner = {"color": MUTED, "width": 1, "dash": "dot"}
    figure.add_scatter(
        x=[row.cost for row in front], y=[row.score for row in front], mode="lines", line=corner, hoverinfo="skip"
    )
    for chosen, color in ((rows[:1], COLORS[1]), (rows[1:], COLORS[0])):
        figure.add_scatter(
            x=[row.cost for row in chosen],
            y=[row.score for row in chosen],
            text=[str(row.job.number) for row in chosen],
            hovertext=[escape(row.job.make_label(sweep.keys)) for row in chosen],
            mode="markers+text",
            textposition="top center",
            textfont={"color": MUTED},
            marker={"size": 10, "color": color},
            cliponaxis=False,
        )
    costs = [row.cost for row in rows]
    wide = min(costs) > 0 and max(costs) / min(costs) > WIDE
    figure.update_xaxes(title_text=_cost_title(rows), type="log" if wide else "linear")
    figure.update_yaxes(title_text=escape(str(sweep.metric)))
    return _figure_html(figure, name, height=380, margin={"l": 8, "r": 12, "t": 28, "b": 8})


def _cheapest_best(sweep: Sweep, rows: Sequence[Row]) -> list[Row]:
    """The runs that no cheaper run beats, by rising cost; `rows` are the best first."""
    front: list[Row] = []
    for row in rows:
        if not front or row.cost < front[-1].cost:
            front.append(row)
    return front[::-1]


def _category_axis(label: str, texts: Sequence[str]) -> dict[str, Any]:
    """An axis of swept values: numbers with a tick each, if they are few, or categories."""
    numbers = _parse_numbers(texts)
    if numbers is None:
        names = sorted(set(texts))
        ticks = {float(index): shorten_value(text) for index, text in enumerate(names)}
        return _make_dimension(label, [float(names.index(text)) for text in texts], ticks)
    return _number_axis(label, numbers, sorted(set(numbers)))


def _number_axis(label: str, numbers: Sequence[float], shown: Sequence[float] = ()) -> dict[str, Any]:
    """An axis of numbers, logarithmic where they differ much; ticks at `shown` or, for none or many, at five places."""
    low, high = min(numbers), max(numbers)
    log = low > 0 and high / low > WIDE
    if not 0 < len(shown) <= FEW:
        steps = [index / 4 for index in range(5)] if high > low else [0.0]
        shown = [low * (high / low) ** step if log else low + (high - low) * step for step in steps]
    place = math.log10 if log else float
    return _make_dimension(label, [place(number) for number in numbers], {place(at): f"{at:.3g}" for at in shown})


def _make_dimension(label: str, values: Sequence[float], ticks: dict[float, str]) -> dict[str, Any]:
    low, high = min(values), max(values)
    return {
        "label": escape(label),
        "values": list(values),
        "range": [low, high] if high > low else [low - 0.5, high + 0.5],
        "tickvals": list(ticks),
        "ticktext": [escape(text) for text in ticks.values()],
    }


def _parse_numbers(texts: Sequence[str]) -> list[float] | None:
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        return None
    return numbers if all(map(math.isfinite, numbers)) else None


def _cost_title(rows: Sequence[Row]) -> str:
    return "training time (s)" if all(row.job.devices == 1 for row in rows) else "training time × devices (s)"


def _figure_html(figure: Any, name: str, height: int, margin: dict[str, int]) -> str:
    """The figure as a `<div>`, transparent, so that the page's light or dark ground shows through."""
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12, "color": MUTED},
        margin=margin,
        height=height,
        showlegend=False,
        hoverlabel={"font": {"color": "#1f2328"}, "bgcolor": "#ffffff"},
    )
    axis = {"gridcolor": GRID, "zerolinecolor": GRID, "linecolor": GRID, "title_standoff": 8, "automargin": True}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    config = {"displaylogo": False, "responsive": True, "displayModeBar": False}
    return str(figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=config))


@dataclass(frozen=True)
class Row:
    """A job as the page shows it. `seconds` is its training time over all starts, `link` its report if there is one."""

    job: Job
    values: list[str]
    score: float | None
    seconds: float
    link: str | None

    @property
    def cost(self) -> float:
        """Training time times devices, in seconds."""
        return self.seconds * self.job.devices
