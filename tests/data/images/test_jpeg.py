"""simplejpeg makes Pillow's pixels, and every file that is not an ordinary JPEG is read or refused as by Pillow."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines.errors import BadSample
from data_pipelines.media.pictures import decode_ordinary_jpeg, decode_picture
from tests.data.arrays import ImageTransform
from vlm_train.data.images.native import NativeResolution
from vlm_train.data.images.transform import one_patch
from vlm_train.errors import ConfigError

simplejpeg = pytest.importorskip("simplejpeg")
SIZES = [(1, 1), (7, 5), (8, 8), (16, 17), (33, 31), (50, 3), (3, 70)]


def picture(width: int, height: int, side: int = 4) -> Image.Image:
    """Soft noise."""
    small = np.random.default_rng(width * 1000 + height).integers(0, 256, (height // side + 2, width // side + 2, 3))
    return Image.fromarray(small.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def assert_same(data: bytes) -> None:
    """simplejpeg takes it, and gives Pillow's pixels."""
    pixels = decode_ordinary_jpeg(data)
    assert pixels is not None and np.array_equal(pixels, np.asarray(decode_picture(data)[0]))


@pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411", "Gray"])
@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_those_of_pillow_with_every_subsampling(size: tuple[int, int], subsampling: str) -> None:
    for quality in (5, 50, 75, 95, 100):
        colors = "GRAY" if subsampling == "Gray" else "RGB"
        pixels = np.array(picture(*size).convert("L" if colors == "GRAY" else "RGB")).reshape(*size[::-1], -1)
        assert_same(simplejpeg.encode_jpeg(pixels, quality, colorspace=colors, colorsubsampling=subsampling))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("colors", ["RGB", "L"])
@pytest.mark.parametrize(
    "options",
    [
        {"progressive": True, "quality": 60},
        {"restart_marker_blocks": 2},
        {"optimize": True},
        {"keep_rgb": True},
        {"icc_profile": b"no profile" * 9000},
        {"comment": b"a comment"},
        {"exif": exif(1)},
    ],
)
def test_pixels_are_those_of_pillow_in_every_kind_of_file(
    size: tuple[int, int], colors: str, options: dict[str, Any]
) -> None:
    assert_same(encode(picture(*size).convert(colors), **options))


def test_what_stands_behind_the_picture_changes_nothing() -> None:
    data = encode(picture(33, 31))
    for more in (b"abc" * 9, bytes(100), encode(picture(9, 9))):
        assert_same(data + more)
    assert_same(encode(picture(33, 31), "MPO", save_all=True, append_images=[picture(20, 20)]))


def left_to_pillow() -> Iterator[tuple[str, bytes]]:
    """Files that simplejpeg must not decode."""
    for form in ("PNG", "WEBP", "BMP"):
        yield form, encode(picture(24, 20), form)
    yield "nothing", b""
    yield "text", b"not an image"
    yield "CMYK", encode(picture(24, 20).convert("CMYK"))
    for orientation in range(2, 9):
        yield f"orientation {orientation}", encode(picture(24, 20), exif=exif(orientation))
    for progressive in (False, True):
        data = encode(picture(24, 20), progressive=progressive)
        for kept in (3, 20, len(data) // 3, len(data) // 2, len(data) - 20, len(data) - 1):
            yield f"cut at {kept}", data[:kept]
        yield "cut and ended", data[: len(data) * 3 // 4] + b"\xff\xd9"
        yield "a byte too many", data[: len(data) * 3 // 4] + b"\xff\xd0" + data[len(data) * 3 // 4 :]
    start = data.index(b"\xff\xc2")
    yield "12 bits", data[: start + 4] + b"\x0c" + data[start + 5 :]
    yield "17 Exif segments", data[:2] + b"\xff\xe1\x00\x08Exif\0\0" * 17 + data[2:]


@pytest.mark.parametrize(("kind", "data"), left_to_pillow(), ids=lambda value: value if isinstance(value, str) else "")
def test_other_files_are_read_or_refused_by_pillow(kind: str, data: bytes) -> None:
    assert decode_ordinary_jpeg(data) is None, kind
    plans: list[dict[str, Any]] = [{"size": (16, 16), "mode": "crop"}, {"size": (16, 20), "mode": "pad"}]
    for plan in plans:
        assert seen(data, decode="simplejpeg", **plan) == seen(data, decode="pillow", **plan)


def seen(data: bytes, **plan: Any) -> str | bytes:
    """The view of a file, or the error."""
    try:
        return ImageTransform(**plan)(data, where="shard-3 key 17").tobytes()
    except BadSample as error:
        return str(error)


def test_damaged_files_are_the_same_picture_or_the_same_error() -> None:
    generator = np.random.default_rng(0)
    taken = 0
    for progressive in (False, True):
        data = encode(picture(24, 20), progressive=progressive)
        for _ in range(300):
            damaged = bytearray(data)
            for at in generator.integers(2, len(data), 2):
                damaged[at] = generator.integers(0, 256)
            pixels = decode_ordinary_jpeg(bytes(damaged))
            if pixels is not None:
                assert np.array_equal(pixels, np.asarray(decode_picture(bytes(damaged))[0]))
                taken += 1
    assert 50 < taken < 550


@pytest.mark.parametrize("limit", [30, 40, 63])  # above twice the limit Pillow raises, above the limit it warns
def test_a_decompression_bomb_is_a_bad_sample(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    data = encode(picture(8, 8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *_, **__: pytest.fail("pixels of a bomb"))
    with pytest.raises(BadSample, match="^shard-3 key 17: .*decompression bomb"):
        ImageTransform(size=(4, 4), decode="simplejpeg")(data, where="shard-3 key 17")


def test_a_picture_of_another_size_than_its_header_is_left_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *_, **__: np.zeros((8, 9, 3), np.uint8))
    assert decode_ordinary_jpeg(encode(picture(8, 8))) is None


def test_a_lying_picture_stays_so_where_asked() -> None:
    data = encode(picture(24, 20), exif=exif(6))
    pixels = decode_ordinary_jpeg(data, upright=False)
    assert pixels is not None and np.array_equal(pixels, np.asarray(decode_picture(data, upright=False)[0]))
    for upright in (False, True):
        plan: dict[str, Any] = {"size": (16, 16), "upright": upright}
        assert seen(data, decode="simplejpeg", **plan) == seen(data, decode="pillow", **plan)


@pytest.mark.parametrize("resize", ["pillow", "torch"])
@pytest.mark.parametrize("mode", ["crop", "pad", "resize"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"flip": True},
        {"random_resized_crop": [0.3, 0.6]},
        {"rand_augment": {"num_ops": 2, "magnitude": 5}},
        {"jpeg_draft": True},
    ],
)
def test_views_are_the_same(mode: str, resize: str, more: dict[str, Any]) -> None:
    for size, view in [((80, 60), (16, 16)), ((33, 90), (24, 20)), ((9, 7), (16, 16))]:
        data = encode(picture(*size))
        plans = [
            ImageTransform(mode=mode, size=view, resize=resize, decode=decode, **more)
            for decode in ("pillow", "simplejpeg")
        ]
        for seed in range(4):
            pillow, ours = (plan(data, np.random.default_rng(seed)) for plan in plans)
            assert ours.shape == pillow.shape and np.array_equal(ours, pillow)
        assert np.array_equal(*(plan(data) for plan in plans))


@pytest.mark.parametrize("resize", ["pillow", "torch"])
@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_long_thin_pictures_are_the_same(mode: str, resize: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_train.data.images.transform.MOST_PIXELS", 900)
    for size in ((60, 3), (3, 60)):
        data = encode(picture(*size))
        plan: dict[str, Any] = {"mode": mode, "size": (16, 16), "resize": resize}
        assert seen(data, decode="simplejpeg", **plan) == seen(data, decode="pillow", **plan)


@pytest.mark.parametrize("resize", ["pillow", "torch"])
def test_native_resolution_takes_it_too(resize: Any) -> None:
    for data in (encode(picture(100, 70)), encode(picture(100, 70), "PNG"), encode(picture(90, 60), exif=exif(6))):
        pillow, ours = (
            NativeResolution(patch_size=14, patch_grid=one_patch, resize=resize, decode=decode)(data)
            for decode in ("pillow", "simplejpeg")
        )
        assert np.array_equal(ours.values, pillow.values) and ours.grids == pillow.grids


def test_it_is_simplejpeg_that_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipelines.media.pictures.to_rgb", lambda *_, **__: pytest.fail("Pillow"))
    data = encode(picture(40, 30))
    assert ImageTransform(size=(16, 16), decode="simplejpeg")(data).shape == (1, 3, 16, 16)
    NativeResolution(patch_size=14, patch_grid=one_patch, decode="simplejpeg")(data)


@pytest.mark.parametrize("plan", [ImageTransform, NativeResolution])
def test_a_plan_without_the_package_is_refused(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm_train.data.images.plan.find_spec", lambda name: None)
    given = {"size": (8, 8)} if plan is ImageTransform else {"patch_size": 14, "patch_grid": one_patch}
    plan(**given)
    with pytest.raises(ConfigError, match=r"^image.decode: got simplejpeg.*pip install 'vlm-train\[jpeg\]'"):
        plan(**given, decode="simplejpeg")
