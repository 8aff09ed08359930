"""Image views: equal to the reference processors, and no bad bytes pass."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from data_pipelines.errors import BadSample
from data_pipelines.media.pictures import decode_picture
from tests.data.arrays import ImageTransform
from vlm_train.data.images.transform import random_part
from vlm_train.errors import ConfigError

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
SIZES = [(32, 32), (64, 48), (48, 64), (37, 91), (101, 33), (35, 34), (20, 31), (31, 19), (333, 50)]


def picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def encode(image: Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


@pytest.mark.parametrize("side", [32, 33])
@pytest.mark.parametrize("size", SIZES)
def test_crop_equals_the_clip_processor(size, side):
    image = picture(*size)
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    expected = torch.as_tensor(np.asarray(processor(image)["pixel_values"][0]))
    transform = ImageTransform(mode="crop", size=(side, side), mean=MEAN)
    view = torch.from_numpy(transform(encode(image))[0])
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    torch.testing.assert_close((view / 255 - mean) / std, expected, rtol=1e-5, atol=1e-5)
    assert np.array_equal(transform(encode(image), np.random.default_rng(0))[0], view)  # training


def expand2square(image, background):
    """As in LLaVA's `mm_utils.py`."""
    width, height = image.size
    if width == height:
        return image
    elif width > height:
        result = Image.new(image.mode, (width, width), background)
        result.paste(image, (0, (width - height) // 2))
        return result
    else:
        result = Image.new(image.mode, (height, height), background)
        result.paste(image, ((height - width) // 2, 0))
        return result


@pytest.mark.parametrize("size", SIZES)
def test_pad_equals_llava(size):
    image = picture(*size)
    square = expand2square(image, tuple(int(x * 255) for x in MEAN))
    expected = np.asarray(square.resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    transform = ImageTransform(mode="pad", size=(32, 32), mean=MEAN)
    view = transform(encode(image))
    assert view.dtype == np.uint8 and view.shape == (1, 3, 32, 32)
    assert np.array_equal(view[0], expected)
    assert np.array_equal(transform(encode(image), np.random.default_rng(0)), view)  # training


@pytest.mark.parametrize("mode", ["crop", "pad", "resize"])
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_every_view_has_the_size_of_the_tower(mode, form):
    for size in SIZES:
        assert ImageTransform(mode=mode, size=(28, 28))(encode(picture(*size), form)).shape == (1, 3, 28, 28)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_truncated_bytes_name_the_place(form):
    data = encode(picture(64, 48), form)
    for share in (0.0, 0.01, 0.1, 0.5, 0.9):
        with pytest.raises(BadSample, match=r"^shard-3 key 17: cannot decode image"):
            ImageTransform(size=(32, 32))(data[: int(len(data) * share)], where="shard-3 key 17")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_corrupt_bytes_decode_or_are_a_bad_sample(form):
    data = encode(picture(24, 20), form)
    generator = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(data)
        for at in generator.integers(0, min(len(data), 200), 3):
            damaged[at] = generator.integers(0, 256)
        try:
            decode_picture(bytes(damaged), "here")
        except BadSample as error:
            assert str(error).startswith("here: ")


def test_other_formats_are_bad_samples():
    for data in (b"", b"not an image", encode(picture(8, 8), "BMP"), encode(picture(8, 8), "GIF")):
        with pytest.raises(BadSample, match="^here: "):
            decode_picture(data, "here")


@pytest.mark.parametrize("limit", [30, 40, 63])  # above twice the limit Pillow raises, above the limit it warns
def test_a_decompression_bomb_is_a_bad_sample(monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(BadSample, match="^shard-3 key 17: .*decompression bomb"):
        ImageTransform(size=(4, 4))(encode(picture(8, 8)), where="shard-3 key 17")


def test_flip_depends_on_the_generator_only():
    data = encode(picture(32, 32))
    plain = ImageTransform(size=(32, 32))(data)
    flipping = ImageTransform(size=(32, 32), flip=True)
    views = [flipping(data, np.random.default_rng(seed)) for seed in range(20)]
    again = [flipping(data, np.random.default_rng(seed)) for seed in range(20)]
    assert all(np.array_equal(a, b) for a, b in zip(views, again))
    mirrored = [np.array_equal(view, plain[..., ::-1]) for view in views]
    assert all(is_mirrored or np.array_equal(view, plain) for view, is_mirrored in zip(views, mirrored))
    assert 0 < sum(mirrored) < 20
    assert np.array_equal(flipping(data), plain)  # evaluation


def test_a_random_part_is_one_of_the_image():
    rng = np.random.default_rng(0)
    parts = [random_part((640, 480), [0.5, 1.0], rng) for _ in range(500)]
    shares = [(right - left) * (bottom - top) / (640 * 480) for left, top, right, bottom in parts]
    aspects = [(right - left) / (bottom - top) for left, top, right, bottom in parts]
    assert all(left >= 0 and top >= 0 and right <= 640 and bottom <= 480 for left, top, right, bottom in parts)
    assert 0.499 < min(shares) < 0.52 and 0.95 < max(shares) <= 1.0 and 0.6 < sum(shares) / 500 < 0.75
    assert 0.74 < min(aspects) < 0.85 and 1.25 < max(aspects) < 1.34
    assert len({part[0] for part in parts}) > 50 and len({part[1] for part in parts}) > 50
    assert random_part((1000, 10), [0.9, 1.0], rng) == (493, 0, 506, 10)  # none fits
    assert random_part((10, 1000), [0.9, 1.0], rng) == (0, 493, 10, 506)


def test_a_random_part_is_resized_while_training_only():
    image = picture(64, 48)
    data = encode(image)
    transform = ImageTransform(mode="resize", size=(16, 16), random_resized_crop=[0.5, 1.0])
    part = random_part((64, 48), [0.5, 1.0], np.random.default_rng(3))
    expected = np.asarray(image.crop(part).resize((16, 16), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(transform(data, np.random.default_rng(3))[0], expected)
    assert np.array_equal(transform(data), ImageTransform(mode="resize", size=(16, 16))(data))
    assert transform.random


@pytest.mark.parametrize("area", [[0.0, 1.0], [0.5], [0.9, 0.5], [0.5, 1.5]])
def test_an_area_is_a_range_of_shares(area):
    with pytest.raises(ConfigError, match="image.random_resized_crop"):
        ImageTransform(size=(4, 4), random_resized_crop=area)


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise whose spectrum falls as that of photographs does."""
    generator = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1.0
    spectrum = generator.normal(size=(3, *frequency.shape, 2)).view(np.complex128)[..., 0] / frequency**1.2
    waves = np.fft.irfft2(spectrum, s=(height, width))
    pixels = np.clip(128 + 55 * waves / waves.std(axis=(1, 2), keepdims=True), 0, 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))


@pytest.mark.parametrize("mode", ["crop", "pad", "resize"])
def test_scaled_decoding_changes_pixels_little(mode):
    data = encode(photograph(1024, 768), "JPEG")
    views = [ImageTransform(mode=mode, size=(336, 336), jpeg_draft=draft)(data).astype(int) for draft in (False, True)]
    difference = np.abs(views[0] - views[1])
    assert 0.1 < difference.mean() < 3 and difference.max() < 30  # of 255; colours of photographs are closer


@pytest.mark.parametrize(
    ("mode", "size", "decoded", "resized"),
    [
        ("crop", (128, 96), (64, 48), (42, 32)),
        ("crop", (126, 128), (63, 64), (32, 32)),
        ("crop", (257, 131), (65, 33), (62, 32)),  # of the decoded sizes it would be 63
        ("crop", (63, 200), (63, 200), (32, 101)),
        ("pad", (256, 32), (32, 4), (32, 32)),
        ("pad", (100, 130), (25, 33), (32, 32)),
        ("resize", (256, 64), (128, 32), (32, 32)),
        ("resize", (256, 256), (32, 32), (32, 32)),
        ("resize", (255, 255), (64, 64), (32, 32)),
    ],
)
def test_scaled_decoding_stays_above_the_size_of_the_resize(mode, size, decoded, resized, monkeypatch):
    seen: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def spy(image, target, *more):
        seen.append(target)
        return resize(image, target, *more)

    def spy_decode(*arguments, **options):
        image, size = decode_picture(*arguments, **options)
        seen.append(image.size)
        return image, size

    monkeypatch.setattr(Image.Image, "resize", spy)
    monkeypatch.setattr("vlm_train.data.images.transform.decode_picture", spy_decode)
    view = ImageTransform(mode=mode, size=(32, 32), jpeg_draft=True)(encode(picture(*size), "JPEG"))
    assert seen[:2] == [decoded, resized] and view.shape == (1, 3, 32, 32)


@pytest.mark.parametrize(("form", "size"), [("PNG", (256, 192)), ("WEBP", (256, 192)), ("JPEG", (63, 62))])
@pytest.mark.parametrize("mode", ["crop", "pad", "resize"])
def test_scaled_decoding_is_of_large_jpegs_only(mode, form, size):
    data = encode(picture(*size), form)
    plain, scaled = (ImageTransform(mode=mode, size=(32, 32), jpeg_draft=draft)(data) for draft in (False, True))
    assert np.array_equal(plain, scaled)


def test_scaled_decoding_takes_any_colors_and_no_truncated_file():
    for colors in ("L", "CMYK"):
        data = encode(picture(128, 128).convert(colors), "JPEG")
        assert ImageTransform(size=(32, 32), jpeg_draft=True)(data).shape == (1, 3, 32, 32)
    with pytest.raises(BadSample, match="^here: cannot decode image"):
        ImageTransform(size=(32, 32), jpeg_draft=True)(data[:-400], where="here")


def turned(orientation: int = 6) -> tuple[bytes, np.ndarray]:
    """A JPEG that is stored on its side, and its pixels as they are shown, `[80, 40, 3]`."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    shown = Image.fromarray(np.kron(picture(5, 10), np.ones((8, 8, 1), np.uint8)))
    file = io.BytesIO()
    shown.transpose(Image.Transpose.ROTATE_90).save(file, "JPEG", exif=exif, quality=100, subsampling=0)
    return file.getvalue(), np.asarray(shown).astype(int)


@pytest.mark.parametrize("draft", [False, True])
def test_pictures_are_seen_upright(draft):
    data, shown = turned()
    size = (shown.shape[0], shown.shape[1])
    view = ImageTransform(mode="resize", size=size, jpeg_draft=draft)(data).astype(int)[0]
    assert np.abs(view - shown.transpose(2, 0, 1)).max() < 16
    lying = ImageTransform(mode="resize", size=size[::-1], upright=False)(data).astype(int)[0]
    assert np.abs(lying - np.rot90(shown).transpose(2, 0, 1)).max() < 16


def test_transparent_pictures_stand_on_a_ground():
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((1, 1), (0, 0, 0, 255))
    file = io.BytesIO()
    image.save(file, "PNG")
    for background, value in (((255, 255, 255), 255), ([10, 10, 10], 10), (None, 0)):
        view = ImageTransform(size=(4, 4), background=background)(file.getvalue())[0]
        assert view[:, 1, 1].tolist() == [0] * 3 and (view[:, 0] == value).all()
    with pytest.raises(ConfigError, match=r"image.background: \[0, 0, 300\]; allowed: \[red, green, blue\]"):
        ImageTransform(size=(4, 4), background=(0, 0, 300))


def test_16_bits_are_scaled_to_8():
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    assert np.array_equal(ImageTransform(size=(16, 16))(file.getvalue())[0, 1], values // 257)


@pytest.mark.parametrize("mode", ["pad", "crop", "resize"])
def test_long_thin_pictures_take_little_memory(mode, monkeypatch):
    """What is made on the way to a view has at most `MOST_PIXELS`, whatever the sides."""
    sizes = []
    make, new = Image.Image._new, Image.new
    monkeypatch.setattr(Image.Image, "_new", lambda self, core: sizes.append(core.size) or make(self, core))
    monkeypatch.setattr(Image, "new", lambda mode, size, *color: sizes.append(size) or new(mode, size, *color))
    for size in ((65_535, 1), (1, 65_535), (40, 30_000)):
        pixels = np.zeros((size[1], size[0], 3), np.uint8)
        pixels[...] = (30, 60, 90)
        view = ImageTransform(mode=mode, size=(336, 336))(encode(Image.fromarray(pixels)))[0]
        middle = view[:, 160:176, 167] if size[1] > size[0] else view[:, 167, 160:176]
        assert (middle == np.array([[30], [60], [90]])).all()
    assert max(w * h for w, h in sizes) <= 2**26
    with pytest.raises(BadSample, match="70000 x 1 pixels; a side has at most 65535"):
        ImageTransform(mode=mode, size=(32, 32))(encode(Image.new("RGB", (70_000, 1))))


def test_a_large_picture_is_padded_and_cropped_as_a_small_one(monkeypatch):
    data = encode(Image.fromarray(np.kron(picture(20, 5), np.ones((16, 16, 1), np.uint8))))
    plain = {mode: ImageTransform(mode=mode, size=(32, 32))(data).astype(int) for mode in ("pad", "crop")}
    monkeypatch.setattr("vlm_train.data.images.resize.MOST_PIXELS", 100)
    monkeypatch.setattr("vlm_train.data.images.transform.MOST_PIXELS", 100)
    assert np.abs(ImageTransform(mode="crop", size=(32, 32))(data) - plain["crop"]).max() <= 1
    padded = np.abs(ImageTransform(mode="pad", size=(32, 32))(data) - plain["pad"])
    assert np.median(padded) <= 1 and padded[:, :, 14:18].max() <= 4  # away from the edge of the padding
