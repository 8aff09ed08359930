"""The report's page: sections filled from a `Report`, images embedded, every text escaped by the template."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image, UnidentifiedImageError

from vlm_train.report.charts import loss_chart, metric_charts, plotly_script, score_chart, training_charts
from vlm_train.report.read import Prediction, Report, Stage, Tried
from vlm_train.runs.sweep.summary import format_duration

MAX_IMAGES = 48  # in the whole page
THUMBNAIL = 256  # longest side of an embedded image, in pixels

# What a reader asks first; the whole configuration is shown folded.
KEY_SETTINGS = (
    "seed",
    "batch.samples",
    "batch.tokens",
    "batch.micro",
    "optim.lr",
    "trainer.epochs",
    "trainer.max_steps",
    "trainer.precision",
    "launch.devices",
    "launch.nodes",
)


@dataclass(frozen=True)
class Card:
    """One test image with its question and answers."""

    image: str | None  # data URI
    question: str
    reference: str
    prediction: str
    correct: bool


@dataclass(frozen=True)
class Sample:
    """What was answered to one sample in training: the newest answer, and (step, text) of those before it."""

    image: str | None  # data URI
    question: str
    reference: str
    prediction: str
    before: list[tuple[int, str]]


def render_page(report: Report) -> str:
    """The whole page as HTML."""
    environment = Environment(
        loader=PackageLoader("vlm_train.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["duration"] = format_duration
    environment.filters["steps"] = format_steps
    environment.filters["count"] = lambda number: f"{number:,}" if isinstance(number, int) else number
    environment.filters["trainable"] = count_trainable
    stages = [(stage, loss_chart(stage, f"loss-{index}")) for index, stage in enumerate(report.stages)]
    return environment.get_template("report.html.j2").render(
        report=report,
        finished=None
        if report.finished is None
        else f"{datetime.fromtimestamp(report.finished, UTC):%d %B %Y, %H:%M} UTC",
        seconds=sum(stage.seconds for stage in report.stages),
        settings=[(stage, key_settings(stage.config)) for stage in report.stages],
        losses=[(stage, chart) for stage, chart in stages if chart],
        scores=[chart for axis in ("seconds", "steps") if (chart := score_chart(report, axis, f"score-{axis}"))],
        metrics=[
            (stage, charts)
            for index, stage in enumerate(report.stages)
            if (charts := metric_charts(stage, f"metric-{index}"))
        ],
        galleries=list_galleries(report),
        training=[
            (stage, charts)
            for index, stage in enumerate(report.stages)
            if (charts := training_charts(stage, f"training-{index}"))
        ],
        samples=[(stage, [make_sample(one) for one in stage.tried]) for stage in report.stages if stage.tried],
        params=next((stage.params for stage in reversed(report.stages) if stage.params), []),
        plotly=plotly_script(),
    )


def list_galleries(report: Report) -> list[tuple[str, int, int, list[Card]]]:
    """(evaluation, number right, number of questions, cards) of the last stage that answered questions."""
    stage = next((stage for stage in reversed(report.stages) if any(stage.predictions.values())), None)
    if stage is None:
        return []
    evaluations = {name: rows for name, rows in stage.predictions.items() if rows}
    share = MAX_IMAGES // len(evaluations)
    return [
        (name, sum(row.correct for row in rows), len(rows), [make_card(row) for row in choose_predictions(rows, share)])
        for name, rows in evaluations.items()
    ]


def choose_predictions(rows: list[Prediction], most: int) -> list[Prediction]:
    """At most `most` rows, those with an image if any has one: wrong ones up to half, the others spread evenly."""
    rows = [row for row in rows if row.image is not None] or rows
    wrong = [row for row in rows if not row.correct]
    right = [row for row in rows if row.correct]
    few = min(len(wrong), max(most // 2, most - len(right)))
    return [*_spread_rows(wrong, few), *_spread_rows(right, most - few)]


def _spread_rows(rows: list[Prediction], most: int) -> list[Prediction]:
    count = min(len(rows), most)
    return [rows[index * len(rows) // count] for index in range(count)]


def count_trainable(row: dict[str, Any]) -> int | str:
    """How many parameters of a part learn: `trainable` says so, or says whether all do."""
    value = row.get("trainable", "")
    return (row.get("parameters", "") if value else 0) if isinstance(value, bool) else value


def make_card(row: Prediction) -> Card:
    """The card of a prediction, its image embedded."""
    image = None if row.image is None else data_uri(row.image)
    return Card(image, row.question, row.reference, row.prediction, row.correct)


def make_sample(one: Tried) -> Sample:
    """A sample's card, its image embedded."""
    image = None if one.image is None else data_uri(one.image)
    *before, (_, newest) = one.answers
    return Sample(image, one.question, one.reference, newest, before)


def data_uri(path: Path) -> str | None:
    """The image, decoded, scaled and encoded anew as PNG, as a data URI; null where it cannot be read."""
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
            picture.thumbnail((THUMBNAIL, THUMBNAIL))
            factor = THUMBNAIL // max(picture.size)  # small pictures show their pixels instead of a blur
            buffer = io.BytesIO()
            picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST).save(
                buffer, "PNG"
            )
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        return None
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def key_settings(config: str) -> dict[str, Any]:
    """`KEY_SETTINGS` that the configuration sets to something, interpolations as written."""
    from omegaconf import OmegaConf

    try:
        loaded = OmegaConf.to_container(OmegaConf.create(config), resolve=False) if config else {}
    except Exception:  # YAML, OmegaConf and grammar errors share no base class
        return {}
    found = {}
    for name in KEY_SETTINGS:
        value: Any = loaded
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            found[name] = value
    return found


def format_steps(stage: Stage) -> str:
    """How far a stage has come."""
    step, total = stage.record.get("step"), stage.record.get("total_steps")
    if not isinstance(step, int):
        return ""
    return f"{step:,} of {total:,} steps" if isinstance(total, int) and total != step else f"{step:,} steps"
