"""The report's charts, as HTML fragments that need plotly's script once on the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from os.path import commonprefix
from typing import Any

import plotly.graph_objects as go

from vlm_train.report.read import Point, Report, Stage
from vlm_train.report.results import Metric, Result

COLORS = ("#3b82c4", "#e0793a", "#3f9f6b", "#a767c4", "#c9a227", "#d4567a")  # readable on white and on near-black
MUTED = "#8a8f98"
GRID = "rgba(138, 143, 152, 0.22)"
MAX_POINTS = 1500  # per curve: more cannot be told apart on a screen
LABEL_GAP = 0.02  # controls closer than this share a label
LABEL_SHARE = 0.07  # of the axis: narrower stages get no label
PAD = 1.02  # room to the right of the last point
ROOM = 0.06  # above and below, as a share of the values' range
LOG_RANGE = 15  # a loss that falls by more than this factor is drawn on a logarithmic axis

PANELS = (
    ("gradient norm", ("grad_norm",), ""),
    ("learning rate", ("lr/",), ""),
    ("tokens per second", ("tokens_per_second",), ""),
    ("TFLOP/s of a device", ("tflops",), ""),
    ("shares of time and of tokens", ("mfu", "data_wait", "padding_share", "supervised_share"), ".0%"),
    ("samples by source", ("share/",), ".0%"),
    ("peak memory (GiB)", ("peak_memory_gib",), ""),
    ("left out", ("skipped",), ""),
)
"""Title, beginnings of the training metrics that it shows, and how their axis is written."""


def training_charts(stage: Stage, name: str) -> list[tuple[str, str]]:
    """(title, chart) of every panel that has something to show: values that are not all zero."""
    found = []
    for number, (title, begins, ticks) in enumerate(PANELS):
        curves = {
            metric: thin_points(points)
            for (split, metric), points in sorted(stage.curves.items())
            if split == "train" and metric.startswith(begins) and any(point.value for point in points)
        }
        if not curves:
            continue
        figure = go.Figure()
        for index, (metric, points) in enumerate(curves.items()):
            line = {"color": COLORS[index % len(COLORS)], "width": 1.6}
            mode = "lines" if len(points) > 1 else "markers"
            _draw_curve(figure, [(point.step, point.value) for point in points], metric, mode=mode, line=line)
        figure.update_xaxes(title_text="step")
        figure.update_yaxes(tickformat=ticks, rangemode="tozero")
        found.append((title, _figure_html(figure, f"{name}-{number}", height=220)))
    return found


def loss_chart(stage: Stage, name: str) -> str:
    """Training and validation losses of one stage over its steps; empty where none was recorded."""
    curves = {key: thin_points(points) for key, points in stage.curves.items() if "loss" in key[1].lower()}
    total = {split: points for (split, metric), points in curves.items() if metric == "loss"}
    curves = {key: points for key, points in curves.items() if key[1] == "loss" or points != total.get(key[0])}
    metrics = sorted({metric for _, metric in curves}, key=lambda metric: (metric != "loss", metric))
    figure = go.Figure()
    for index, metric in enumerate(metrics):
        for split in sorted({split for split, other in curves if other == metric}, key=lambda split: split != "train"):
            points = curves[split, metric]
            label = split if metric == "loss" else f"{split} {metric}"
            color = COLORS[(2 * index + (split != "train")) % len(COLORS)]
            mode = "lines" if split == "train" and len(points) > 1 else "lines+markers"
            line = {"color": color, "width": 1.6 if split == "train" else 2.2}
            _draw_curve(figure, [(point.step, point.value) for point in points], label, mode=mode, line=line)
    values = [point.value for points in curves.values() for point in points]
    if not values:
        return ""
    figure.update_xaxes(title_text="step", range=[0, PAD * max(points[-1].step for points in curves.values())])
    if min(values) > 0 and max(values) / min(values) > LOG_RANGE:
        ticks = _log_ticks(min(values), max(values))
        texts = [f"{tick:g}" for tick in ticks]
        figure.update_yaxes(title_text="loss (log scale)", type="log", tickvals=ticks, ticktext=texts)
    else:
        figure.update_yaxes(title_text="loss", range=_axis_range(values))
    return _figure_html(figure, name, height=300)


def score_of(metric: str, known: Mapping[str, Metric]) -> str | None:
    """What to call a metric among the scores: primary ones where higher is better, and accuracies of losses."""
    if (found := known.get(metric)) is not None:
        return found.evaluation if found.primary and found.higher_is_better else None
    return metric if "accuracy" in metric.lower() else None


def metric_charts(stage: Stage, name: str) -> list[tuple[str, str]]:
    """(title, chart) of every metric of an evaluation that is not among the scores."""
    found = []
    for number, (metric, about) in enumerate(sorted(stage.metrics.items())):
        curves = {split: points for (split, other), points in stage.curves.items() if other == metric}
        if not curves or score_of(metric, stage.metrics) is not None:
            continue
        figure = go.Figure()
        for index, (split, points) in enumerate(sorted(curves.items(), key=lambda one: one[0] != "val")):
            line = {"color": COLORS[index % len(COLORS)], "width": 1.6}
            _draw_curve(figure, [(point.step, point.value) for point in points], split, mode="lines+markers", line=line)
        figure.update_xaxes(title_text="step")
        figure.update_yaxes(range=_axis_range([point.value for points in curves.values() for point in points]))
        better = "higher" if about.higher_is_better else "lower"
        found.append((f"{metric} ({better} is better)", _figure_html(figure, f"{name}-{number}", height=220)))
    return found


def score_chart(report: Report, axis: str, name: str) -> str:
    """Scores of every stage, one after the other, over `axis` ("seconds" or "steps"); controls as dotted lines."""
    figure, start, ends = go.Figure(), 0.0, [0.0]
    values = [control.value for control in controls_of(report.results)]
    names = short_names([stage.name for stage in report.stages])
    for index, stage in enumerate(report.stages):
        for (split, metric), points in stage.curves.items():
            score = score_of(metric, stage.metrics)
            if score is None:
                continue
            values += [point.value for point in points]
            places = [(start + (point.seconds if axis == "seconds" else point.step), point.value) for point in points]
            label = f"{names[index]}: {split} {score}"
            line = {"color": COLORS[index % len(COLORS)], "dash": "dot" if split == "train" else "solid"}
            _draw_curve(figure, places, label, mode="lines+markers", line=line)
        length = stage.seconds if axis == "seconds" else _last_step(stage)
        ends.append(start := start + length)
    if not figure.data:
        return ""
    if len(report.stages) > 1:
        _mark_stages(figure, names, ends)
    for controls in _control_groups(report.results):
        for control in controls:
            figure.add_hline(y=control.value, line={"color": MUTED, "width": 1, "dash": "dot"})
        text = ", ".join(escape(control.name) for control in controls)
        _add_note(figure, text, x=1, xref="paper", xanchor="right", y=controls[-1].value, yanchor="bottom")
    title = "training time (s)" if axis == "seconds" else "optimizer steps"
    figure.update_xaxes(title_text=title, range=[0, (PAD * ends[-1]) or 1])
    shares = all(0 <= value <= 1 for value in values)
    figure.update_yaxes(title_text="score", tickformat=".0%" if shares else "", range=_axis_range(values))
    return _figure_html(figure, name, height=360)


def _draw_curve(figure: Any, places: Sequence[tuple[float, float]], label: str, **style: Any) -> None:
    """A curve through (x, y); points on the frame are drawn whole."""
    xs, ys = [x for x, _ in places], [y for _, y in places]
    figure.add_scatter(x=xs, y=ys, name=escape(label), cliponaxis=False, **style)


def _axis_range(values: Sequence[float]) -> list[float]:
    """An axis range with room around the values; one value alone stands above zero, as its bar would."""
    low, high = min(values), max(values)
    if low == high:
        return sorted([0.0, 1.25 * high]) if high else [-1.0, 1.0]
    return [low - ROOM * (high - low), high + ROOM * (high - low)]


def thin_points(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
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


def controls_of(results: Sequence[Result]) -> list[Result]:
    """What to compare with: every row of the first evaluation's first metric but the run's own."""
    first = next(((row.evaluation, row.metric) for row in results), None)
    return [row for row in results[1:] if row.higher_is_better and (row.evaluation, row.metric) == first]


def _control_groups(results: Sequence[Result]) -> list[list[Result]]:
    """`controls_of`, lowest first; those too close to be labelled apart together."""
    groups: list[list[Result]] = []
    for row in sorted(controls_of(results), key=lambda row: row.value):
        if groups and row.value - groups[-1][-1].value < LABEL_GAP:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _last_step(stage: Stage) -> int:
    return max((points[-1].step for points in stage.curves.values()), default=0)


def _mark_stages(figure: Any, names: Sequence[str], ends: Sequence[float]) -> None:
    """Shade every second stage; write above those that are wide enough which one it is."""
    for index, (name, start, end) in enumerate(zip(names, ends[:-1], ends[1:], strict=True)):
        if index % 2:
            figure.add_vrect(x0=start, x1=end, fillcolor=MUTED, opacity=0.10, line_width=0, layer="below")
        if end - start > LABEL_SHARE * ends[-1]:
            _add_note(figure, escape(name), x=(start + end) / 2, y=1, yref="paper", yanchor="bottom")


def _add_note(figure: Any, text: str, **place: Any) -> None:
    figure.add_annotation(text=text, showarrow=False, font={"size": 11, "color": MUTED}, **place)


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten that the values span."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]


def _figure_html(figure: Any, name: str, height: int) -> str:
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
        legend={"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"},
        hovermode="x unified",
        hoverlabel={"font": {"color": "#1f2328"}, "bgcolor": "#ffffff"},
    )
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    config = {"displaylogo": False, "responsive": True, "displayModeBar": False}
    return str(figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=config))
