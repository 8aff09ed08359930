"""Pictures as they are shown: upright, in 8 bits, on a ground; what is no picture is named."""

from __future__ import annotations

import io
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data_pipelines.errors import BadSample
from data_pipelines.index import index_folder
from data_pipelines.lint import find_problems
from data_pipelines.media.limits import check_media, check_pixels, image_item, media_item, read_header
from data_pipelines.media.pictures import MAX_EXIF, decode_picture, list_traits, open_picture
from data_pipelines.sample import MediaItem
from data_pipelines.shards.shard_set import ShardSet


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def phone(orientation: int = 6, kind: str = "JPEG") -> bytes:
    """A 40 x 80 picture with a red top, stored as phones store it."""
    image, exif = Image.new("RGB", (40, 80), "white"), Image.Exif()
    ImageDraw.Draw(image).rectangle((0, 0, 39, 19), fill="red")
    stored = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270, 3: Image.Transpose.ROTATE_180}
    exif[0x0112] = orientation
    return encode(image.transpose(stored[orientation]), kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_pictures_are_turned_upright(orientation, kind):
    data = phone(orientation, kind)
    assert read_header(data) == (40, 80, kind) and list_traits(data) == ["turned picture"]
    pixels = np.asarray(decode_picture(data)[0]).astype(int)
    assert pixels.shape == (80, 40, 3)
    assert (pixels[2:18, :, 1] < 100).all() and (pixels[24:, :, 1] > 150).all()


def test_an_entry_of_before_pictures_were_turned_is_still_accepted():
    check_media(image_item(0, phone()), phone())
    check_media(MediaItem(name="0.jpg", width=80, height=40), phone())
    with pytest.raises(BadSample, match="0.jpg is 40 x 80 pixels, its entry says 80 x 80"):
        check_media(MediaItem(name="0.jpg", width=80, height=80), phone())


def test_damaged_exif_is_upright():
    assert read_header(encode(Image.new("RGB", (8, 4)), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f"))[:2] == (8, 4)


@pytest.mark.parametrize("shape", [(1, 256), (256, 1)])
def test_16_bits_are_scaled(shape):
    data = encode(Image.fromarray((np.arange(256, dtype=np.uint16) * 257).reshape(shape)))
    assert list_traits(data) == ["16-bit picture"]
    assert np.asarray(decode_picture(data)[0])[..., 2].ravel().tolist() == list(range(256))


def test_a_transparent_gray_of_16_bits_is_white():
    image = Image.fromarray(np.array([[0, 257 * 9]], np.uint16))
    assert np.asarray(decode_picture(encode(image, transparency=0))[0])[0].tolist() == [[255] * 3, [9] * 3]


def _inked(mode: str) -> bytes:
    image = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    image.putpixel((1, 1), (0, 0, 0, 255))
    if mode == "P":
        palette = Image.new("P", (4, 2), 0)
        palette.putpalette([0, 0, 0, 0, 0, 0])
        palette.putpixel((1, 1), 1)
        return encode(palette, transparency=0)
    return encode(image.convert(mode), "WEBP" if mode == "RGBA" else "PNG", lossless=True)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_dark_ink_on_transparent_ground_is_seen(mode):
    pixels = np.asarray(decode_picture(_inked(mode))[0])
    assert (pixels == 0).all(axis=2).sum() == 1 and (pixels == 255).all(axis=2).sum() == 7
    assert pixels[1, 1].tolist() == [0, 0, 0] and list_traits(_inked(mode)) == ["transparent picture"]


def _mpo() -> bytes:
    picture = Image.new("RGB", (20, 10), (200, 0, 0))
    return encode(picture, "MPO", save_all=True, append_images=[Image.new("RGB", (20, 10))])


def test_jpeg_files_of_several_pictures_are_jpeg(tmp_path):
    assert image_item(0, _mpo()) == MediaItem(name="0.jpg", width=20, height=10)
    assert np.asarray(decode_picture(_mpo())[0])[0, 0, 0] > 190
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, data in (("a.jpg", _mpo()), ("a.txt", b"red")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    index_folder(tmp_path, source="x", license="y")
    assert ShardSet(tmp_path).load_sample(0)[1] == [_mpo()]


def test_lint_warns_of_what_plain_readers_would_not_see(tmp_path):
    files = {"a": phone(), "b": encode(Image.fromarray(np.zeros((4, 4), np.uint16))), "c": _inked("LA")}
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for key, data in files.items():
            for name, content in ((f"{key}.png", data), (f"{key}.txt", b"x")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    index_folder(tmp_path, source="x", license="y")
    found = [problem.kind for problem in find_problems(tmp_path)]
    assert found == ["turned picture", "16-bit picture", "transparent picture"]


def test_what_is_no_picture_is_named():
    starts = {
        b"GIF89a": "GIF",
        b"BM": "BMP",
        b"II*\0": "TIFF",
        b"\0\0\0\x18ftypheic": "HEIC",
        b"\0\0\0\x1cftypavif": "AVIF",
        b"RIFF\xb4\x19\0\0AVI LIST": "AVI video",
        b"FLV\1": "FLV video",
        b"\n<!DOCTYPE html>": "an HTML page",
        b'<svg xmlns="': "SVG",
        b"version https://git-lfs.github.com": "a Git LFS pointer",
    }
    for start, name in starts.items():
        with pytest.raises(BadSample) as error:
            media_item(0, start + bytes(200))
        assert str(error.value) == f"found {name}; read are JPEG, PNG, WEBP and the videos mp4, webm, mkv"
    with pytest.raises(BadSample, match="^found an empty file; "):
        media_item(0, b"")


def test_reasons_hold_no_addresses():
    for data in (b"\x89PNG\r\n\x1a\n" + bytes(30), b"\xff\xd8\xff\xe0" + bytes(30), b"RIFF\0\0\0\0WEBPVP8 " + bytes(9)):
        reasons = []
        for _ in range(2):
            with pytest.raises(BadSample, match="damaged (PNG|JPEG|WEBP)") as error:
                open_picture(data)
            reasons.append(str(error.value))
        assert reasons[0] == reasons[1] and "0x" not in reasons[0]


def test_many_exif_segments_are_refused_before_they_are_read():
    plain = encode(Image.new("RGB", (8, 8)), "JPEG")
    segment = b"\xff\xe1" + struct.pack(">H", 60_000) + b"Exif\0\0" + bytes(60_000 - 8)
    assert read_header(plain[:2] + segment * MAX_EXIF + plain[2:])[:2] == (8, 8)
    with pytest.raises(BadSample, match=f"more than {MAX_EXIF} Exif segments"):
        check_pixels(plain[:2] + segment * (MAX_EXIF + 1) + plain[2:])


def test_a_jpeg_that_ends_in_the_middle_of_a_marker_is_a_bad_sample():
    plain = encode(Image.new("RGB", (8, 8)), "JPEG")
    with pytest.raises(BadSample, match="damaged JPEG"):
        open_picture(plain[: plain.index(b"\xff\xdb") + 1])


def test_sides_are_bounded():
    with pytest.raises(BadSample, match="70000 x 1 pixels; a side has at most 65535"):
        read_header(encode(Image.new("RGB", (70_000, 1))))
