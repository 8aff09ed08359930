"""The length index: equal to what is rendered, measured once, and measured again whenever anything changes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

from data_pipelines.errors import BadSample, DataError
from tests.data.test_datamodule import data, write
from tests.data.text.rendering import assistant, load, user
from tests.support.small_run import make_data
from vlm_train.data.order import lengths
from vlm_train.data.order.lengths import cached_lengths, hash_content
from vlm_train.data.order.mixture import SampleRef
from vlm_train.errors import ConfigError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data")) / "tiny"


def test_measured_is_rendered(root: Path, tmp_path: Path) -> None:
    module = data(root / "train", root / "val", cache=str(tmp_path))
    found = module.train.measure_lengths(tmp_path, workers=1)
    items = [module.train.load_example(SampleRef(number, 0), training=True) for number in range(16)]
    assert found.tokens.tolist() == [len(item.rendered.llm) for item in items]
    assert found.patches.tolist() == [
        sum(one.size for views in item.views["vision"] for one in views.grids) for item in items
    ]


def test_processes_measure_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lengths, "CHUNK", 7)
    monkeypatch.setattr(lengths, "FEW", 1)

    def measure(number: int) -> list[tuple[int, int]]:
        if number % 10 == 3:
            raise BadSample("no")
        return [(number * 3, n) for n in range(number % 2 + 1)]

    alone = cached_lengths("x", 100, "a" * 24, measure, tmp_path, 1)
    spread = cached_lengths("x", 100, "b" * 24, measure, tmp_path, 2)
    for name in ("samples", "pieces", "tokens", "patches"):
        assert np.array_equal(getattr(alone, name), getattr(spread, name))
    assert alone.tokens[alone.samples == 13].tolist() == [0] and len(alone.tokens) == 140  # 10 of the 50 odd are bad
    assert alone.slice_samples(20, 22).samples.tolist() == [20, 21, 21]


def test_lengths_are_measured_once_for_the_same_rendering(root: Path, tmp_path: Path) -> None:
    def files() -> int:
        return len(list(tmp_path.glob("*.npz")))

    for _ in range(2):
        data(root / "train", cache=str(tmp_path)).train.measure_lengths(tmp_path)
        assert files() == 1
    data(root / "train", cache=str(tmp_path), limit=5, val_share=0.2).train.measure_lengths(tmp_path)
    assert files() == 1  # a stretch of the same
    data(root / "train", cache=str(tmp_path), annotations="independent").train.measure_lengths(tmp_path)
    data(root / "train", cache=str(tmp_path), max_length=40).train.measure_lengths(tmp_path)
    data(root / "val", cache=str(tmp_path)).train.measure_lengths(tmp_path)
    assert files() == 4


def test_a_stretch_has_its_own_lengths(root: Path, tmp_path: Path) -> None:
    whole = data(root / "train", cache=str(tmp_path))
    split = data(root / "train", cache=str(tmp_path), val_share=0.25)
    tokens = whole.train.measure_lengths(tmp_path).tokens.tolist()
    assert split.train.measure_lengths(tmp_path).tokens.tolist() == tokens[:9]
    assert split.val.measure_lengths(tmp_path).tokens.tolist() == tokens[9:]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off"])
def test_a_damaged_cache_is_measured_again(content: bytes, root: Path, tmp_path: Path) -> None:
    first = data(root / "train", cache=str(tmp_path)).train.measure_lengths(tmp_path)
    (path,) = tmp_path.glob("*.npz")
    path.write_bytes(content)
    again = data(root / "train", cache=str(tmp_path)).train.measure_lengths(tmp_path)
    assert again.tokens.tolist() == first.tokens.tolist() and path.stat().st_size > 100


def test_one_wrong_bit_of_a_cache_is_never_believed(tmp_path: Path) -> None:
    """A length of 0 would leave a sample out without a word."""

    def measure(number: int) -> list[tuple[int, int]]:
        return [(100 + number, 7)]

    cached_lengths("x", 3, "k", measure, tmp_path, 1)
    (path,) = tmp_path.glob("*.npz")
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 64]) + whole[position + 1 :])
        found = cached_lengths("x", 3, "k", measure, tmp_path, 1)
        assert found.tokens.tolist() == [100, 101, 102] and found.patches.tolist() == [7, 7, 7], position
        assert found.pieces.tolist() == [0, 0, 0]


def test_samples_that_cannot_be_used_stay_holes(tmp_path: Path) -> None:
    good, long = [(user("Q", 0), assistant("a"))], [(user("Q", 0), assistant("a" * 300))]
    folder = write(tmp_path / "set", good, long, good)
    module = data(folder, max_length=50, over_length="drop", pack=64, cache=str(tmp_path / "lengths"))
    tokens = module.train.measure_lengths(tmp_path / "lengths").tokens.tolist()
    assert tokens[1] == 0 and tokens[0] == tokens[2] > 0
    (batch, *_) = module.train_dataloader()
    assert {key for row in batch.keys for key in row} == {"k0", "k2"} and batch.window.samples == 3  # of 4
    assert len(batch.window.problems) == 1 and "k1" in batch.window.problems[0].reason


def test_lengths_follow_what_the_tokenizer_calls_its_tokens(root: Path, tmp_path: Path) -> None:
    for change in ({}, {"bos_token": None}, {"eos_token": "<pad>"}, {"chat_template": "{{ messages }}"}):
        made = data(root / "train", cache=str(tmp_path))
        for name, value in change.items():
            setattr(made.train.processor.tokenizer, name, value)
        tokens = made.train.measure_lengths(tmp_path).tokens.tolist()
        assert tokens == [len(made.train.load_example(SampleRef(n, 0), training=True).rendered.llm) for n in range(12)]
    assert len(list(tmp_path.glob("*.npz"))) == 4


def test_lengths_follow_the_template(root: Path, tmp_path: Path) -> None:
    found = []
    for name in ("qa", "chatml"):  # which writes more around a turn
        samples = data(root / "train", cache=str(tmp_path)).train
        samples.processor = replace(samples.processor, template=load(name))
        found.append(samples.measure_lengths(tmp_path).tokens)
    assert (found[0] < found[1]).all()


def test_patches_follow_the_image_plan_where_images_stand_in_no_text(root: Path, tmp_path: Path) -> None:
    for frames in (8, 4):
        made = data(root / "train", cache=str(tmp_path))
        made.train.processor.images["vision"].frames = frames
        made.train.measure_lengths(tmp_path)
    assert len(list(tmp_path.glob("*.npz"))) == 2


def test_a_cache_that_cannot_be_written_is_named(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data\.cache: .*file.* cannot be written: Not a directory"):
        data(root / "train").train.measure_lengths(tmp_path / "file" / "lengths")

    def full(file: IO[bytes], **arrays: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(DataError, match=r"data\.cache: .* No space left on device.*make room"):
        data(root / "train").train.measure_lengths(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == ["file"]


def test_no_usable_sample_is_an_error_at_the_start(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", [(user("Q", 0), assistant("a" * 300))])
    with pytest.raises(ConfigError, match=r"none of the 1 samples can be used with data\.max_length=50 .*=drop"):
        data(folder, pack=64, max_length=50, over_length="drop", cache=str(tmp_path / "lengths"))


def test_samples_of_more_patches_than_a_row_holds_are_named_at_the_start(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", [(user("Q", 0), assistant("a"))], [(user("Q", 0, 1), assistant("a"))])
    with pytest.raises(
        ConfigError, match=r"data\.pack_patches: rows of 1 patches cannot hold 1 samples, .* 2 patches: .*k1"
    ):
        data(folder, pack=64, max_length=64, pack_patches=1, cache=str(tmp_path / "lengths"))


class Layout:
    def __init__(self, tokens: int) -> None:
        self.tokens = tokens


def same(a: Any, b: Any) -> bool:
    return hash_content(a) == hash_content(b)


def test_fingerprints_follow_contents_not_identities() -> None:
    assert same(Layout(3), Layout(3)) and not same(Layout(3), Layout(4))
    assert same(partial(max, 1), partial(max, 1)) and not same(partial(max, 1), partial(min, 1))
    assert same({"a": [1, None], "b": 2.0}, {"b": 2.0, "a": [1, None]}) and not same([1], ["1"])
    assert same(Layout.__init__, Layout.__init__) and not same("a", Layout)


def test_lengths_are_mapped_and_a_damaged_file_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lengths, "SCANNED", 4)
    measured: list[int] = []

    def measure(number: int) -> list[tuple[int, int]]:
        measured.append(number)
        return [(number + 1, number)] * (1 + number % 2)

    def found() -> lengths.Lengths:
        measured.clear()
        return cached_lengths("x", 10, "a" * 24, measure, tmp_path, 1)

    first, again = found(), found()
    assert measured == [] and not again.tokens.flags.owndata and not again.tokens.flags.writeable
    assert again.find_longer(7) == (3, 12) and again.find_longer(9) is None and first.find_longer(8) == (2, 13)
    path = tmp_path / f"{'a' * 24}.npz"
    for samples in ([*range(9)], [*range(5), *range(6, 11)], [*range(5), 3, *range(5, 10)], [1, *range(1, 10)]):
        wrong = np.array(samples, np.int32)
        np.savez(path, samples=wrong, pieces=wrong, tokens=wrong, patches=wrong)
        assert found().tokens.tolist() == first.tokens.tolist() and measured == [*range(10)]
