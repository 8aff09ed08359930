"""The report's charts, as HTML fragments that need plotly's script once on the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from os.path import commonprefix
from typing import Any

import plotly.graph_objects as go

from vlm_train.report.read import Point, Report, Result, Stage

COLOURS = ("#3b82c4", "#e0793a", "#3f9f6b", "#a767c4", "#c9a227", "#d4567a")  # readable on white and on near-black
MUTED = "#8a8f98"
GRID = "rgba(138, 143, 152, 0.22)"
MAX_POINTS = 1500  # per curve: more cannot be told apart on a screen
LABEL_GAP = 0.02  # controls closer than this share a label
LABEL_SHARE = 0.07  # of the axis: narrower stages get no label
LOG_RANGE = 15  # a loss that falls by more than this factor is drawn on a logarithmic axis


def loss_chart(stage: Stage, name: str) -> str:
    """Training and validation losses of one stage over its steps; empty where none was recorded."""
    curves = {key: points for key, points in stage.curves.items() if "loss" in key[1].lower()}
    metrics = sorted({metric for _, metric in curves}, key=lambda metric: (metric != "loss", metric))
    figure = go.Figure()
    values: list[float] = []
    for index, metric in enumerate(metrics):
        for split in sorted({split for split, other in curves if other == metric}, key=lambda split: split != "train"):
            points = thin(curves[split, metric])
            values += [point.value for point in points]
            label = split if metric == "loss" else f"{split} {metric}"
            colour = COLOURS[(2 * index + (split != "train")) % len(COLOURS)]
            mode = "lines" if split == "train" and len(points) > 1 else "lines+markers"
            figure.add_scatter(
                x=[point.step for point in points],
                y=[point.value for point in points],
                name=escape(label),
                mode=mode,
                line={"color": colour, "width": 1.6 if split == "train" else 2.2},
            )
    if not values:
        return ""
    figure.update_xaxes(title_text="step")
    if min(values) > 0 and max(values) / min(values) > LOG_RANGE:
        ticks = _log_ticks(min(values), max(values))
        texts = [f"{tick:g}" for tick in ticks]
        figure.update_yaxes(title_text="loss (log scale)", type="log", tickvals=ticks, ticktext=texts)
    else:
        figure.update_yaxes(title_text="loss")
    return _html(figure, name, height=300)


def accuracy_chart(report: Report, axis: str, name: str) -> str:
    """Accuracies of every stage, one after the other, over `axis` ("seconds" or "steps"); controls as dotted lines."""
    figure, start, ends, drawn = go.Figure(), 0.0, [0.0], False
    names = short_names([stage.name for stage in report.stages])
    for index, stage in enumerate(report.stages):
        curves = {key: points for key, points in stage.curves.items() if "accuracy" in key[1].lower()}
        for (split, metric), points in curves.items():
            drawn = True
            figure.add_scatter(
                x=[start + (point.seconds if axis == "seconds" else point.step) for point in points],
                y=[point.value for point in points],
                name=escape(f"{names[index]}: {split} {metric}"),
                mode="lines+markers",
                line={"color": COLOURS[index % len(COLOURS)], "dash": "dot" if split == "train" else "solid"},
            )
        length = stage.seconds if axis == "seconds" else _steps(stage)
        ends.append(start := start + length)
    if not drawn:
        return ""
    if len(report.stages) > 1:
        _mark_stages(figure, names, ends)
    for controls in _control_groups(report.results):
        for control in controls:
            figure.add_hline(y=control.value, line={"color": MUTED, "width": 1, "dash": "dot"})
        text = ", ".join(escape(control.name) for control in controls)
        _note(figure, text, x=1, xref="paper", xanchor="right", y=controls[-1].value, yanchor="bottom")
    figure.update_xaxes(title_text="training time (s)" if axis == "seconds" else "optimizer steps", range=[0, ends[-1]])
    figure.update_yaxes(title_text="accuracy", tickformat=".0%")
    return _html(figure, name, height=360)


def thin(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """At most about `most` points: the mean of each run of neighbours, at the last one's step."""
    size = -(-len(points) // most) if points else 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [Point(g[-1].step, g[-1].seconds, sum(point.value for point in g) / len(g)) for g in groups]


def short_names(names: Sequence[str]) -> list[str]:
    """Stage names without what they all begin with: easyvqa_stage1, easyvqa_stage2 -> stage1, stage2."""
    shared = commonprefix(list(names)).rpartition("_")[0] if len(names) > 1 else ""
    return [name[len(shared) :].lstrip("_") or name for name in names]


def plotly_script() -> str:
    """plotly's own script, put into the page so that it works offline."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def _control_groups(results: Sequence[Result]) -> list[list[Result]]:
    """What to compare with, lowest first: every row but the run's own; rows too close to be labelled apart together."""
    groups: list[list[Result]] = []
    for row in sorted((row for row in results[1:] if row.is_fraction), key=lambda row: row.value):
        if groups and row.value - groups[-1][-1].value < LABEL_GAP:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _steps(stage: Stage) -> int:
    return max((points[-1].step for points in stage.curves.values()), default=0)


def _mark_stages(figure: Any, names: Sequence[str], ends: Sequence[float]) -> None:
    """Shade every second stage; write above those that are wide enough which one it is."""
    for index, (name, start, end) in enumerate(zip(names, ends[:-1], ends[1:], strict=True)):
        if index % 2:
            figure.add_vrect(x0=start, x1=end, fillcolor=MUTED, opacity=0.10, line_width=0, layer="below")
        if end - start > LABEL_SHARE * ends[-1]:
            _note(figure, escape(name), x=(start + end) / 2, y=1, yref="paper", yanchor="bottom")


def _note(figure: Any, text: str, **place: Any) -> None:
    figure.add_annotation(text=text, showarrow=False, font={"size": 11, "color": MUTED}, **place)


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten that the values span."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]


def _html(figure: Any, name: str, height: int) -> str:
    """The figure as a `<div>`, transparent, so that the page's light or dark ground shows through."""
    axis = {"gridcolor": GRID, "zerolinecolor": GRID, "linecolor": GRID, "title_standoff": 8, "automargin": True}
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12, "color": MUTED},
        margin={"l": 8, "r": 12, "t": 28, "b": 8},
        height=height,
        showlegend=True,
        legend={"orientation": "h", "x": 0, "y": -0.22, "yanchor": "top"},
        hovermode="x unified",
        hoverlabel={"font": {"color": "#1f2328"}, "bgcolor": "#ffffff"},
    )
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    config = {"displaylogo": False, "responsive": True, "displayModeBar": False}
    return str(figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=config))
