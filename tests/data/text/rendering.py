"""Small builders for rendering tests."""

from __future__ import annotations

from pathlib import Path

import yaml

from data_pipelines.sample import Annotation, Media, MediaItem, Sample, Text, Turn
from vlm_train.contracts.layout import Piece, Slot
from vlm_train.contracts.media import Grid3
from vlm_train.data.text import template as templates

TEMPLATES = sorted(Path(__file__).parents[3].glob("conf/template/*.yaml"))
NAMES = [path.stem for path in TEMPLATES if path.stem != "library"]  # that one needs the processor of a whole model


def load(name: str, **changes: object) -> templates.Template:
    """The template of `conf/template/<name>.yaml`."""
    path = next(path for path in TEMPLATES if path.stem == name)
    options = yaml.safe_load(path.read_text())
    return getattr(templates, options.pop("_target_").rsplit(".", 1)[1])(**(options | changes))


def user(text: str, *items: int) -> Turn:
    return Turn(role="user", parts=(*(Media(item=item) for item in items), Text(text=text)))


def assistant(text: str, weight: float = 1.0) -> Turn:
    return Turn(role="assistant", parts=(Text(text=text),), weight=weight)


def sample(*annotations: tuple[Turn, ...] | Annotation, media: int = 0) -> Sample:
    return Sample(
        key="s1",
        media=tuple(MediaItem(name=f"{i}.png", width=8, height=8) for i in range(media)),
        annotations=tuple(a if isinstance(a, Annotation) else Annotation(turns=a) for a in annotations),
    )


def layout(sizes: object) -> list[list[Piece]]:
    """Item i takes 3 + i placeholders."""
    return [[Slot(index, 3 + index, Grid3(1, 1, 3 + index))] for index in range(len(sizes))]  # type: ignore[arg-type]


def bounded(sizes: object) -> list[list[Piece]]:
    """Placeholders between literal tokens."""
    return [["<im_start>", *pieces, "<im_end>"] for pieces in layout(sizes)]
