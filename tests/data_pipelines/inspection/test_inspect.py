"""What inspect shows, and that nothing of a set becomes part of the page."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image

from data_pipelines.inspect import main as inspect
from data_pipelines.inspection.html import MAX_SIDE, sample_fields
from data_pipelines.sample import Annotation, Box, Media, Text, Turn
from data_pipelines.shards.tar_writer import ShardWriter

EVIL = '"><script>alert(1)</script>{{ 7 * 7 }}'


class _Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)


@pytest.fixture
def boxed(sample):
    record, blobs = sample(0)
    turns = (
        Turn(role="user", parts=(Media(item=0), Text(text=f"where? {EVIL}"))),
        Turn(
            role="assistant",
            parts=(Text(text="there"), *(Box(item=0, xyxy=(0.25, 0.1, x, 0.6)) for x in (0.5, 0.75))),
        ),
    )
    rejected = Turn(role="assistant", parts=(Text(text="nowhere"),))
    return replace(record, annotations=(Annotation(turns=turns, rejected=rejected),), meta={"note": EVIL}), blobs


def _page(tmp_path, capsys, *arguments: str) -> tuple[str, str]:
    assert inspect([f"folder={tmp_path / 'set'}", f"html={tmp_path / 'page.html'}", *arguments]) == 0
    return (tmp_path / "page.html").read_text(), capsys.readouterr().out


def test_boxes_are_drawn_where_they_are(tmp_path, boxed, capsys):
    with ShardWriter(tmp_path / "set", source=EVIL, license=EVIL) as writer:
        writer.write_sample(*boxed)
    page, out = _page(tmp_path, capsys)
    places = re.findall(r'class="box" style="([^;]+);([^;]+);([^;]+);([^;"]+)', page)
    assert places == [
        ("left:25.000%", "top:10.000%", "width:25.000%", "height:50.000%"),
        ("left:25.000%", "top:10.000%", "width:50.000%", "height:50.000%"),
    ]
    assert "[box 0.250 0.100 0.500 0.600 of media 0]" in out and "rejected  nowhere" in out
    assert "rejected" in page and "nowhere" in page


def test_texts_of_a_set_are_escaped(tmp_path, boxed, capsys):
    with ShardWriter(tmp_path / "set", source=EVIL, license=EVIL) as writer:
        writer.write_sample(*boxed)
    page, _ = _page(tmp_path, capsys)
    assert "script" not in _Tags(page).tags and "&lt;script&gt;" in page and "{{ 7 * 7 }}" in page
    assert _Tags(page).tags.count("img") == 1


def test_statistics_stand_at_the_top(tmp_path, shard_set, capsys):
    shard_set()
    page, out = _page(tmp_path, capsys, "n=1")
    assert page.index("characters") < page.index("sample-000") and page.count("data:image/") == 0
    for name in ("bytes of a file", "media items", "turns"):
        assert f"<b>{name}</b>" in page
    assert "chars" in out and "p50=18" in out


def test_key_random_and_span_choose_samples(tmp_path, shard_set, capsys):
    def keys(*arguments: str) -> list[str]:
        return re.findall(r"^(sample-\d+)  ", _page(tmp_path, capsys, *arguments)[1], re.MULTILINE)

    shard_set()
    assert keys("key=sample-007") == ["sample-007"]
    assert keys("n=2", "start=8") == ["sample-008", "sample-009"]
    drawn = keys("random=4")
    assert drawn == keys("random=4") and len(drawn) == 4 and drawn != keys("random=4", "seed=1")
    assert len(keys("random=99")) == 10
    assert inspect([f"folder={tmp_path / 'set'}", "key=none"]) == 2
    assert "no sample 'none'; the first keys: sample-000" in capsys.readouterr().err


def test_unusable_samples_are_shown_as_such(tmp_path, shard_set, capsys):
    path = shard_set() / "shard-000000.tar"
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    page, out = _page(tmp_path, capsys, "n=2")
    assert "unusable: " in out and "is corrupt (checksum differs" in page and "sample-001" in page


def test_large_pictures_are_made_small_and_broken_ones_named(sample, picture):
    record, _ = sample(0)
    blob = picture(size=(3 * MAX_SIDE, MAX_SIDE))
    wide = replace(record, media=(replace(record.media[0], width=3 * MAX_SIDE, height=MAX_SIDE),))
    (media,) = sample_fields(wide, [blob], "")["media"]
    import base64

    small = Image.open(io.BytesIO(base64.b64decode(media["image"].split(",")[1])))
    assert small.size == (MAX_SIDE, round(MAX_SIDE / 3)) and f"{3 * MAX_SIDE} × {MAX_SIDE}" in media["caption"]
    (media,) = sample_fields(wide, [blob[:-30]], "")["media"]
    assert "image" not in media and "does not decode" in media["caption"]
