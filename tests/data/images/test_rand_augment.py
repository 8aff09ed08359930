"""RandAugment: what each distortion does to pixels, and what is drawn."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.data.arrays import ImageTransform
from tests.data.images.test_transform import encode
from vlm_train.data.images.rand_augment import DISTORTIONS, GRAY, distort_image, draw_distortions
from vlm_train.errors import ConfigError


def pixels(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(20, 200, (24, 32, 3), dtype=np.uint8)


def after(name: str, amount: float, image: np.ndarray | None = None) -> np.ndarray:
    return np.asarray(distort_image(Image.fromarray(pixels() if image is None else image), [(name, amount)]))


def test_levels_are_blip_s() -> None:
    """Level 5 of 10: factors of 1, shears of 0.15, shifts of 5 pixels, turns of 15 degrees."""
    seen = {
        name: abs(amount) for seed in range(300) for name, amount in draw_distortions(2, 5, np.random.default_rng(seed))
    }
    shears, shifts = dict.fromkeys(("shear_x", "shear_y"), 0.15), dict.fromkeys(("translate_x", "translate_y"), 5.0)
    none = dict.fromkeys(("identity", "autocontrast", "equalize"), 0.0)
    assert seen == pytest.approx(none | shears | shifts | {"brightness": 0.9, "sharpness": 0.9, "rotate": 15.0})


def test_what_is_drawn() -> None:
    drawn = [draw_distortions(2, 5, np.random.default_rng(seed)) for seed in range(4000)]
    lengths = Counter(map(len, drawn))
    assert lengths[0] == pytest.approx(1000, abs=150) and lengths[2] == pytest.approx(1000, abs=150)
    names = Counter(name for one in drawn for name, _ in one)
    assert all(names[name] == pytest.approx(400, abs=100) for name in DISTORTIONS)
    signs = Counter(amount > 0 for one in drawn for name, amount in one if name == "rotate")
    assert abs(signs[True] - signs[False]) < 100


def test_shifts_are_exact_and_leave_gray() -> None:
    image = pixels()
    right = after("translate_x", -5, image)
    assert np.array_equal(right[:, 5:], image[:, :-5]) and (right[:, :5] == GRAY).all()
    up = after("translate_y", 5, image)
    assert np.array_equal(up[:-5], image[5:]) and (up[-5:] == GRAY).all()


def test_shears_move_rows_and_columns() -> None:
    """A line that is vertical leans by the amount times the height."""
    image = np.zeros((40, 40, 3), np.uint8)
    image[:, 20] = 255
    place = after("shear_x", 0.15, image)[..., 0].argmax(axis=1)
    assert place[0] == 20 and place[-1] == pytest.approx(20 - 0.15 * 39, abs=1)
    place = after("shear_y", -0.15, image.transpose(1, 0, 2))[..., 0].argmax(axis=0)
    assert place[0] == 20 and place[-1] == pytest.approx(20 + 0.15 * 39, abs=1)


def test_a_turn_is_by_degrees() -> None:
    image = np.full((41, 41, 3), 128, np.uint8)
    image[20, 20:] = 255  # from the middle to the right
    turned = after("rotate", 90, image)
    assert (turned[:20, 20] == 255).all() and (turned[21:, 20] == 128).all()  # up


def test_tones() -> None:
    image = pixels()
    assert np.abs(after("brightness", 0.4, image) - 0.5 * image.astype(float)).max() <= 1
    assert np.array_equal(after("sharpness", 0.9, image), image) and np.array_equal(after("identity", 0), image)
    for name in ("autocontrast", "equalize"):
        assert np.array_equal(after(name, 0, image), np.asarray(getattr(ImageOps, name)(Image.fromarray(image))))


def test_it_is_a_function_of_the_generator_and_of_training() -> None:
    data = encode(Image.fromarray(pixels()))
    transform = ImageTransform(mode="resize", size=(16, 16), rand_augment={"num_ops": 2, "magnitude": 5})
    views = [transform(data, np.random.default_rng(seed)) for seed in range(12)]
    assert all(np.array_equal(a, transform(data, np.random.default_rng(n))) for n, a in enumerate(views))
    assert len({view.tobytes() for view in views}) > 4 and transform.random
    assert np.array_equal(transform(data), ImageTransform(mode="resize", size=(16, 16))(data))


@pytest.mark.parametrize(
    "rand_augment", [{"num_ops": 0, "magnitude": 5}, {"num_ops": 2, "magnitude": 11}, {"num_ops": 2}, {"ops": 2}]
)
def test_numbers_that_mean_nothing_are_refused(rand_augment: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="image.rand_augment"):
        ImageTransform(size=(4, 4), rand_augment=rand_augment)
