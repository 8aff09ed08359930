"""The page of `inspect`: one HTML file without scripts, everything inside it, every text of the set escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from jinja2 import Environment
from PIL import Image

from data_pipelines.errors import BadSample
from data_pipelines.media.limits import check_pixels
from data_pipelines.media.pictures import decode_picture
from data_pipelines.sample import Box, Media, MediaItem, Part, Sample, Text, Turn
from data_pipelines.shards.manifest import Manifest
from data_pipelines.shards.members import member_extension

COLORS = ("#e6194b", "#1d7fe0", "#2e9e44", "#b8860b", "#8e44ad", "#d35400", "#16a085", "#7f4f24")
SHOWN = {"chars": "characters", "turns": "turns", "media": "media items", "width": "width", "height": "height"}
SHOWN |= {"media_bytes": "bytes of a file", "seconds": "seconds of a video"}
MAX_SIDE = 800  # pixels of a picture on the page
MAX_VIDEO = 8 * 2**20  # bytes of a video on the page

STYLE = """
:root{--line:#e3e6ea;--soft:#f6f7f9;--dim:#6b7480;--ink:#1c2126}
*{box-sizing:border-box}body{margin:0;background:var(--soft);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:66rem;margin:0 auto;padding:2rem 1.2rem}h1{font-size:1.35rem;margin:0;overflow-wrap:anywhere}
.dim{color:var(--dim);font-size:.85rem}.card{background:#fff;border:1px solid var(--line);border-radius:10px;
padding:1.1rem 1.3rem;margin-top:1.1rem}.tiles,.media{display:flex;flex-wrap:wrap;gap:.8rem;margin-top:.9rem}
.tile{background:var(--soft);border-radius:8px;padding:.5rem .9rem;min-width:7rem}
.tile b{display:block;font-size:1.2rem}
.stats{margin-top:1.2rem;display:grid;grid-template-columns:repeat(auto-fill,minmax(16rem,1fr));gap:1.1rem 1.6rem}
.bars{display:flex;align-items:flex-end;gap:2px;height:52px;margin:.35rem 0 .1rem}
.bars i{flex:1;background:#7aa7dc;border-radius:2px 2px 0 0;min-height:1px}.ends{display:flex;
justify-content:space-between}.head{display:flex;justify-content:space-between;gap:1rem;flex-wrap:wrap}
.head b{overflow-wrap:anywhere}figure{margin:0;max-width:100%}.frame{position:relative;display:inline-block;
border:1px solid var(--line);line-height:0}.frame img,.frame video{min-height:9rem;max-height:18rem;
max-width:100%;display:block}.box{position:absolute;border:2px solid}
.box span,.chip{border-radius:3px;color:#fff;font:600 12px/1.35
system-ui;padding:0 .35em}.box span{position:absolute;left:-2px;top:-2px}.chip{margin-right:.3em;white-space:nowrap}
.talk{border-top:1px solid var(--line);margin-top:.9rem;padding-top:.7rem}.turn{display:flex;gap:.8rem;margin:.35rem 0}
.role{flex:0 0 5.2rem;color:var(--dim);font-size:.8rem;text-align:right;padding-top:.35rem}.say{border-radius:9px;
padding:.3rem .8rem;background:#edf0f3;white-space:pre-wrap;overflow-wrap:anywhere;max-width:46rem}
.assistant .say{background:#dcebfb}.rejected .say{background:#fbe3e0}.system .say{background:#f5efd9}
summary{cursor:pointer;color:var(--dim);font-size:.85rem}pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:.4rem 0}
table{border-collapse:collapse;margin-top:.8rem;font-size:.9rem}td{padding:.1rem .8rem .1rem 0}.bad{color:#b3261e}
"""

TEMPLATE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title><style>{{ style | safe }}</style><main>
<section class="card"><h1>{{ title }}</h1><div class="dim">{{ about | join(" · ") }}</div>
<div class="tiles">{% for name, value in tiles %}<div class="tile"><b>{{ value }}</b>{{ name }}</div>{% endfor %}</div>
<div class="stats">{% for stat in stats %}<div class="stat"><b>{{ stat.name }}</b>
<div class="dim">median {{ stat.p50 }}, 90 % within {{ stat.p5 }} – {{ stat.p95 }}</div>
<div class="bars">{% for low, count, share in stat.bars -%}
<i style="height:{{ share }}%" title="from {{ low }}: {{ count }}"></i>{% endfor %}</div>
<div class="ends dim"><span>{{ stat.min }}</span><span>{{ stat.max }}</span></div></div>{% endfor %}
</div>{% if left_out %}<table><tr><td><b>left out</b></td></tr>
{% for reason, count in left_out %}<tr><td>{{ count }}</td><td>{{ reason }}</td></tr>
{% endfor %}</table>{% endif %}</section>
{% for s in samples %}<section class="card">
<div class="head"><b>{{ s.key }}</b><span class="dim">{{ s.where }}</span></div>
{% if s.error %}<p class="bad">{{ s.error }}</p>{% endif %}
<div class="media">{% for m in s.media %}<figure><div class="frame">
{%- if m.image %}<img alt="{{ m.name }}" src="{{ m.image }}">
{%- elif m.video %}<video controls src="{{ m.video }}"></video>{% endif %}
{%- for b in m.boxes %}<div class="box" style="{{ b.place }};border-color:{{ b.color }}">
<span style="background:{{ b.color }}">{{ b.number }}</span></div>{% endfor %}</div>
<figcaption class="dim">{{ m.caption }}</figcaption></figure>{% endfor %}</div>
{% for turns in s.annotations %}<div class="talk">{% for turn in turns %}<div class="turn {{ turn.name }}">
<div class="role">{{ turn.name }}</div><div class="say">{% for p in turn.parts %}
{%- if p.color %}<span class="chip" style="background:{{ p.color }}" title="{{ p.title }}">{{ p.text }}</span>
{%- else %}{{ p.text }}{% endif %}{% endfor %}</div></div>{% endfor %}</div>{% endfor %}
{% if s.meta %}<details><summary>meta</summary><pre>{{ s.meta }}</pre></details>{% endif %}</section>{% endfor %}
</main></html>
"""


def render_page(title: str, manifest: Manifest, samples: Sequence[dict[str, Any]]) -> str:
    """The page of a set: its statistics, then the samples as `shown` and `unusable` give them."""
    about = [manifest.source or "source unknown", manifest.license or "license unknown", manifest.split]
    megabytes = f"{manifest.bytes / 1e6:,.1f} MB"
    tiles = [
        ("samples", f"{manifest.samples:,}"),
        ("shards", f"{len(manifest.shards):,}"),
        ("in the shards", megabytes),
    ]
    left_out = [*manifest.bad.items(), *manifest.dropped.items()]
    if left_out:
        tiles.append(("left out", f"{sum(count for _, count in left_out):,}"))
    return (
        Environment(autoescape=True)
        .from_string(TEMPLATE)
        .render(
            title=title,
            style=STYLE,
            about=[word for word in (*about, "a view" if manifest.is_view else "") if word],
            tiles=tiles,
            stats=[
                _histogram_fields(label, manifest.stats[name])
                for name, label in SHOWN.items()
                if name in manifest.stats
            ],
            left_out=left_out,
            samples=samples,
        )
    )


def sample_fields(sample: Sample, blobs: Sequence[bytes], where: str) -> dict[str, Any]:
    """A sample for the page: its media with the boxes of all annotations drawn, and what is said."""
    boxes: dict[int, list[dict[str, Any]]] = {}
    annotations = []
    for annotation in sample.annotations:
        turns = [_turn_fields(turn.role, turn, boxes) for turn in annotation.turns]
        annotations.append(
            turns + ([_turn_fields("rejected", annotation.rejected, boxes)] if annotation.rejected else [])
        )
    media = [_media_fields(i, *pair, boxes.get(i, [])) for i, pair in enumerate(zip(sample.media, blobs, strict=True))]
    origin = f"{where} · {sample.source or 'source unknown'} · {sample.license or 'license unknown'}"
    meta = "\n".join(f"{name}: {value}" for name, value in sample.meta.items())
    return {"key": sample.key, "where": origin, "media": media, "annotations": annotations, "meta": meta}


def unusable_fields(key: str, where: str, error: BadSample) -> dict[str, Any]:
    """A sample that cannot be read, for the page."""
    return {"key": key, "where": where, "error": str(error)}


def _histogram_fields(label: str, stat: dict[str, Any]) -> dict[str, Any]:
    """Bars for every power of two between the lowest and the highest, empty ones too."""
    counts = {int(low): count for low, count in stat.get("histogram", {}).items()}
    top = max(counts.values(), default=1)
    lows = sorted({*counts, *(1 << n for n in range(64) if counts and min(counts) < 1 << n < max(counts))})
    bars = [(low, counts.get(low, 0), round(100 * counts.get(low, 0) / top, 1)) for low in lows]
    return {"name": label, "bars": bars} | {name: stat.get(name, "?") for name in ("p5", "p50", "p95", "min", "max")}


def _turn_fields(name: str, turn: Turn, boxes: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    return {"name": name, "parts": [_part_fields(part, boxes) for part in turn.parts]}


def _part_fields(part: Part, boxes: dict[int, list[dict[str, Any]]]) -> dict[str, str]:
    match part:
        case Text():
            return {"text": part.text}
        case Media():
            return {"text": f"media {part.item}", "color": "#5b6672", "title": ""}
        case Box():
            number = sum(map(len, boxes.values()))
            color = COLORS[number % len(COLORS)]
            left, top, right, bottom = (100 * value for value in part.xyxy)
            place = f"left:{left:.3f}%;top:{top:.3f}%;width:{right - left:.3f}%;height:{bottom - top:.3f}%"
            box = {"place": place, "color": color, "number": number}
            boxes.setdefault(part.item, []).append(box)
            title = f"{part.xyxy} of media {part.item}"
            return {"text": f"box {number}", "color": color, "title": title}


def _media_fields(number: int, item: MediaItem, blob: bytes, boxes: list[dict[str, Any]]) -> dict[str, Any]:
    caption = f"media {number}: {item.name}, {item.width} × {item.height}, {len(blob):,} bytes"
    if item.kind == "video":
        caption += f", {item.frames} frames, {item.seconds:.1f} s"
        small = len(blob) <= MAX_VIDEO
        return {"video": _data_url(f"video/{member_extension(item.name)}", blob) if small else "", "caption": caption}
    try:
        return {"name": item.name, "image": _picture_url(item, blob), "boxes": boxes, "caption": caption}
    except BadSample as error:
        return {"caption": f"{caption}: {error}"}


def _picture_url(item: MediaItem, blob: bytes) -> str:
    """The picture for a browser: as it is, or smaller."""
    check_pixels(blob)
    if max(item.width, item.height) <= MAX_SIDE:
        return _data_url(f"image/{member_extension(item.name).replace('jpg', 'jpeg')}", blob)
    image, file = Image.fromarray(np.asarray(decode_picture(blob, item.name)[0])), io.BytesIO()
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    image.save(file, "JPEG", quality=85)
    return _data_url("image/jpeg", file.getvalue())


def _data_url(kind: str, blob: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(blob).decode()}"
