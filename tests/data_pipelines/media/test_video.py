"""Videos in shards: headers without decoding, frames by number, what is refused, lint, inspect, foreign tars."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from dataclasses import replace

import av
import numpy as np
import pytest

from data_pipelines.errors import BadSample, DataError
from data_pipelines.index import index_folder
from data_pipelines.inspect import main as inspect
from data_pipelines.lint import main as lint
from data_pipelines.media import video as module
from data_pipelines.media.limits import check_media, check_pixels, media_item
from data_pipelines.media.video import frames_at, read_frames, read_video_header, spread_frames
from data_pipelines.sample import Annotation, Media, Sample, Text, Turn
from data_pipelines.shards.shard_set import ShardSet
from data_pipelines.shards.tar_writer import ShardWriter
from tests.support.videos import numbers, video

KINDS = [("libx264", "mp4", "mp4"), ("libvpx-vp9", "webm", "webm"), ("libx264", "matroska", "mkv")]


@pytest.fixture(scope="module")
def clip() -> bytes:
    return video()


def _sample(blob: bytes, **changes) -> Sample:
    ask = Turn(role="user", parts=(Media(item=0), Text(text="What happens?")))
    answer = Turn(role="assistant", parts=(Text(text="It gets brighter."),))
    item = replace(media_item(0, blob), **changes)
    return Sample(key="a", media=(item,), annotations=(Annotation(turns=(ask, answer)),))


@pytest.mark.parametrize(("codec", "container", "extension"), KINDS)
def test_header_and_frames_of_every_container(codec, container, extension):
    data = video(codec=codec, container=container)
    header = read_video_header(data)
    assert (header.width, header.height, header.frames, header.seconds) == (48, 40, 20, 2.0)
    assert media_item(3, data).name == f"3.{extension}" and media_item(3, data).kind == "video"
    every = list(read_frames(data, range(20)))
    assert numbers(every) == list(range(20)) and every[0].shape == (40, 48, 3) and every[0].dtype == np.uint8
    some = list(read_frames(data, [3, 3, 8, 17]))  # over key frames that are not decoded
    assert all(np.array_equal(frame, every[n]) for frame, n in zip(some, [3, 3, 8, 17], strict=True))
    assert not list(read_frames(data, []))


def test_frames_between_are_not_decoded(clip, monkeypatch):
    decoded = []
    monkeypatch.setattr(module._Video, "_iterate_frames", _counting(module._Video._iterate_frames, decoded))
    assert numbers(read_frames(clip, [0, 16])) == [0, 16] and len(decoded) < 8


CODECS = {
    "libx264": {"bf": "3", "g": "{key_every}"},
    "libx265": {"x265-params": "bframes=3:keyint={key_every}:log-level=none"},
    "libvpx-vp9": {"g": "{key_every}", "cpu-used": "8"},
    "libsvtav1": {"g": "{key_every}", "preset": "12"},
}
"""Encoders and their settings: frames that no other refers to, where the codec has them."""


@pytest.mark.parametrize("codec", CODECS)
def test_any_frame_of_any_codec_is_that_of_decoding_all(codec, monkeypatch):
    """Frames between that no other refers to are not decoded."""
    moving = _moving_clip(codec)
    with av.open(io.BytesIO(moving)) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(every) == 40
    decoded = []
    monkeypatch.setattr(module._Video, "_iterate_frames", _counting(module._Video._iterate_frames, decoded))
    for wanted in ([0, 13, 27, 39], *([n] for n in range(40)), [5, 6, 7], list(range(40))):
        found = list(read_frames(moving, wanted))
        assert all(np.array_equal(frame, every[n]) for frame, n in zip(found, wanted, strict=True)), wanted
    decoded.clear()
    list(read_frames(moving, [0, 39]))
    assert codec not in ("libx264", "libx265") or len(decoded) < 32, "of 40; the others are B-frames"


def _moving_clip(codec: str, key_every: int = 250) -> bytes:
    """40 frames of noise that moves."""
    options = {name: value.format(key_every=key_every) for name, value in CODECS[codec].items()}
    file = io.BytesIO()
    base = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    with av.open(file, "w", format="mp4") as container:
        try:
            stream = container.add_stream(codec, rate=10, options=options)
        except av.codec.codec.UnknownCodecError:
            pytest.skip(f"this build of PyAV has no {codec}")
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for number in range(40):
            picture = np.ascontiguousarray(np.roll(base, (number, 2 * number), (0, 1)))
            picture = np.ascontiguousarray(np.concatenate([picture, picture[:16]]))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def _counting(function, decoded):
    def frames(self, start, end, wanted):
        for frame in function(self, start, end, wanted):
            decoded.append(frame)
            yield frame

    return frames


@pytest.mark.parametrize("codec", CODECS)
def test_packets_behind_the_last_wanted_frame_are_not_decoded(codec, monkeypatch):
    """A decoder gives frames late. It is told that the video ends, not fed from the next key frame on."""
    moving = _moving_clip(codec, key_every=10)
    runs, decoded, plan = [], [], module._Video._plan_runs
    monkeypatch.setattr(module._Video, "_plan_runs", lambda self, times: runs.extend(plan(self, times)) or runs)
    monkeypatch.setattr(module._Video, "_iterate_frames", _counting(module._Video._iterate_frames, decoded))
    assert len(list(read_frames(moving, [3, 12, 14, 35]))) == 4
    with module._open_video(moving) as opened:
        keys = [number for number, packet in enumerate(opened.packets) if packet.is_keyframe]
        own = [[packet.pts for packet in opened.packets].index(opened.times[number]) for number in (3, 14, 35)]
    assert len(keys) == 4 and [run[:2] for run in runs] == [*zip([keys[0], keys[1], keys[3]], own, strict=True)]
    assert len({frame.pts for frame in decoded}) == len(decoded) <= 4 + 5 + 6, (
        "none twice: the first reading was enough"
    )


def test_frames_that_come_only_with_later_packets_are_read_on_for(clip, monkeypatch):
    plan = module._Video._plan_runs
    monkeypatch.setattr(module._Video, "_plan_runs", lambda self, times: [(0, 0, run[2]) for run in plan(self, times)])
    assert numbers(read_frames(clip, [2, 4, 9, 19])) == [2, 4, 9, 19]


def test_frames_by_time_and_evenly(clip):
    assert frames_at(clip, [0.0, 0.05, 0.1, 1.99, 99.0]) == [0, 0, 1, 19, 19]
    assert [spread_frames(20, n) for n in (1, 2, 3)] == [[9], [0, 19], [0, 9, 19]] and spread_frames(3, 8) == [0, 1, 2]
    for wrong in ([3, 1], [20], [-1]):
        with pytest.raises(ValueError, match="numbers: "):
            list(read_frames(clip, wrong))


UNEVEN = [0, 40, 80, 120, 160, 200, 240, 1000, 2000, 3000]
"""Milliseconds at which frames of a variable rate are shown: 25 in a second, then one."""


@pytest.mark.parametrize(("codec", "container"), [kind[:2] for kind in KINDS])
def test_times_are_those_of_the_container(codec, container):
    """No rate is assumed: of 10 or 25 frames a second, the clip would last 1 s or 0.4 s."""
    data = video(10, codec=codec, container=container, rate=25, times=[time + 500 for time in UNEVEN])
    header = read_video_header(data)
    assert header.frames == 10 and 3.0 <= header.seconds <= 4.0  # the last frame is shown for as long as the file says
    assert media_item(0, data).seconds == header.seconds
    assert frames_at(data, [0.0, 0.05, 0.23, 0.5, 0.99, 1.01, 1.9, 2.5, 3.0]) == [0, 1, 5, 6, 6, 7, 7, 8, 9]
    assert numbers(read_frames(data, frames_at(data, [0.05, 1.01, 3.0]))) == [1, 7, 9]


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [
        ("MAX_BYTES", 100, "at most 100 are read"),
        ("MAX_PIXELS", 1000, "48 x 40 pixels; 1 to 1000"),
        ("MAX_FRAMES", 19, "more than 19 frames"),
        ("MAX_SECONDS", 1.5, "2 seconds; at most 2"),
    ],
)
def test_limits(clip, monkeypatch, limit, value, message):
    monkeypatch.setattr(module, limit, value)
    with pytest.raises(BadSample, match=message):
        read_video_header(clip)


def test_one_frame_is_no_video():
    with pytest.raises(BadSample, match="video of 1 frames; at least 2 make a video"):
        read_video_header(video(1))


@pytest.mark.parametrize("index", range(len(KINDS)))
def test_damaged_videos_decode_or_are_bad_samples(index):
    codec, container, _ = KINDS[index]
    data = video(6, codec=codec, container=container)
    generator, refused = np.random.default_rng(index), 0
    for _ in range(60):
        damaged = bytearray(data)
        for at in generator.integers(8, len(data), 4):
            damaged[at] = generator.integers(0, 256)
        try:
            check_pixels(bytes(damaged))
        except BadSample:
            refused += 1
    assert refused
    for share in (0.05, 0.3):
        with pytest.raises(BadSample):
            check_pixels(data[: int(len(data) * share)])


def test_a_video_whose_end_is_missing_is_refused():
    data = video(index_first=True)
    reasons = set()
    for cut in range(data.index(b"mdat") + 8, len(data)):
        with pytest.raises(BadSample, match="packet .* corrupt|cut off") as error:
            read_video_header(data[:cut])
        reasons.add(str(error.value))
    assert "video is cut off: 10 of its 20 frames are there" in reasons  # between two frames


def test_frames_that_a_decoder_makes_up_are_refused():
    data = video(10, codec="mpeg4")
    reasons = []
    for at in range(data.index(b"mdat") + 40, data.index(b"moov"), 29):
        damaged = bytearray(data)
        damaged[at] ^= 0xFF
        try:
            check_pixels(bytes(damaged))
        except BadSample as error:
            reasons.append(str(error))
    assert any(reason.endswith("pixels, corrupt; the video is 48 x 40") for reason in reasons)


def test_playlists_and_other_containers_are_no_videos(tmp_path, clip):
    (tmp_path / "clip.mp4").write_bytes(clip)
    playlist = f"#EXTM3U\n#EXTINF:1,\n{tmp_path / 'clip.mp4'}\n#EXT-X-ENDLIST\n".encode()
    concat = f"ffconcat version 1.0\nfile {tmp_path / 'clip.mp4'}\n".encode()
    for data in (
        playlist,
        concat,
        b"RIFF\0\0\0\0AVI LIST",
        b"\0\0\0\x18ftypisom" + playlist,
        b"\x1aE\xdf\xa3" + concat,
    ):
        with pytest.raises(BadSample):
            read_video_header(data)


def test_shards_hold_videos(tmp_path, clip):
    with ShardWriter(tmp_path / "set") as writer:
        writer.write_sample(_sample(clip), [clip])
        for changes, message in [
            ({"frames": 19}, "0.mp4 is video of 20 frames, its entry says video of 19 frames"),
            ({"kind": "image"}, "its entry says image of 20 frames"),
            ({"width": 50}, "48 x 40 pixels, its entry says 50 x 40"),
        ]:
            with pytest.raises(BadSample, match=message):
                writer.write_sample(_sample(clip, **changes), [clip])
    shards = ShardSet(tmp_path / "set")
    sample, blobs = shards.load_sample(0)
    assert sample == _sample(clip) and blobs == [clip]
    (item,) = shards.media_items(0)
    assert (item.kind, item.frames, item.seconds) == ("video", 20, 2.0)
    assert shards.manifest.stats["frames"]["max"] == 20 and shards.manifest.stats["seconds"]["mean"] == 2.0


def test_an_image_that_is_called_a_video_is_refused(picture, clip):
    with pytest.raises(BadSample, match="0.mp4 is image of 1 frames, its entry says video of 20 frames"):
        check_media(media_item(0, clip), picture())


def test_lint_and_inspect(tmp_path, clip, capsys):
    broken = bytearray(video(20, gop=20))
    middle = broken.index(b"mdat") + (len(broken) - broken.index(b"mdat")) // 3
    broken[middle : middle + 30] = bytes(30)
    with ShardWriter(tmp_path / "set", source="s", license="CC0") as writer:
        writer.write_sample(_sample(clip), [clip])
        writer.write_sample(replace(_sample(bytes(broken)), key="b"), [bytes(broken)])
    assert lint([f"folder={tmp_path / 'set'}"]) == 1
    found, *counts = capsys.readouterr().out.splitlines()
    assert "key 'b': 0.mp4: " in found and "damaged video" in counts[0] and len(counts) == 2
    assert inspect([f"folder={tmp_path / 'set'}", "n=1", f"html={tmp_path / 'page.html'}"]) == 0
    assert "48 x 40, 20 frames in 2.0 s" in capsys.readouterr().out
    assert (tmp_path / "page.html").read_text().count("<video controls") == 1


def test_foreign_tars_of_captioned_videos(tmp_path, clip):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, data in (("7.mp4", clip), ("7.txt", b"brighter"), ("7.json", json.dumps({"fps": 10}).encode())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    index_folder(tmp_path)
    sample, blobs = ShardSet(tmp_path).load_sample(0)
    assert sample.media == (media_item(0, clip),) and blobs == [clip] and sample.meta == {"fps": 10}


def test_without_pyav_the_error_says_what_to_install(clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r"pip install 'vlm-train\[data\]'") as error:
        media_item(0, clip)
    assert not isinstance(error.value, BadSample)
