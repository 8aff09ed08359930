"""The mapped index: what it costs, and that a damaged or hostile one leads nowhere."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.errors import BadSample, DataError
from data_pipelines.shards.index_file import Index
from data_pipelines.shards.shard_set import ShardSet


def _sign(folder: Path) -> None:
    """Let the manifest vouch for the index as it is now."""
    data, index = json.loads((folder / "manifest.json").read_text()), (folder / "index.npz").read_bytes()
    data["index"] |= {"bytes": len(index), "sha256": hashlib.sha256(index).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(data))


def _edit(folder: Path, **arrays: np.ndarray) -> None:
    with np.load(folder / "index.npz") as file:
        held = {name: file[name] for name in file.files}
    np.savez(folder / "index.npz", **held | arrays)
    _sign(folder)


def _column(folder: Path, name: str, at: int, value: int) -> np.ndarray:
    with np.load(folder / "index.npz") as file:
        column = file[name].copy()
    column[at] = value
    return column


def _pages() -> int:
    """Private (not file-backed) memory of this process in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def test_index_is_mapped_not_read(tmp_path, shard_set):
    folder = shard_set()
    count = 400_000
    arrays = {name: np.zeros(count, np.int32) for name in ("shard", "annotations", "width", "height", "frames", "name")}
    arrays |= {name: np.arange(count + 1) for name in ("member_start", "media_start", "key_start")}
    arrays |= {name: np.zeros(count, np.int64) for name in ("offset", "size", "crc")}
    arrays |= {"seconds": np.zeros(count), "keys": np.full(count, ord("k"), np.uint8)}
    np.savez(folder / "index.npz", names=np.frombuffer(b'["json"]', np.uint8), **arrays)
    before = _pages()
    index = Index.load(folder / "index.npz")
    assert len(index) == count and index.locate_sample(count - 1).key == "k"
    assert index.locate_sample(7).members[0].name == "json"
    assert _pages() - before < 4096  # KiB, of a file of 30 MiB


def test_index_outlives_its_file(shard_set):
    shards = ShardSet(shard_set())
    keys = shards.keys()
    os.unlink(shards.folder / "index.npz")
    assert shards.keys() == keys and shards.load_sample(9)[0].key == keys[9]


@pytest.mark.parametrize("i", [-1, 10])
def test_numbers_that_do_not_exist(shard_set, i):
    shards = ShardSet(shard_set())
    for ask in (shards.key, shards.load_sample, shards.media_items, shards.shard_name):
        with pytest.raises(IndexError):
            ask(i)


def test_changed_byte_is_found_at_once(shard_set):
    folder = shard_set()
    data = bytearray((folder / "index.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "index.npz").write_bytes(data)
    with pytest.raises(DataError, match="index.npz: sha256 .* the manifest says"):
        ShardSet(folder)


@pytest.mark.parametrize("limit", [0, 1 << 40])
def test_large_index_is_hashed_by_verify(shard_set, monkeypatch, limit):
    from data_pipelines.shards import shard_set as shards_shard_set

    monkeypatch.setattr(shards_shard_set, "HASHED_INDEX", limit)
    folder = shard_set()
    data = json.loads((folder / "manifest.json").read_text())
    data["index"]["sha256"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(DataError, match="index.npz: sha256"):
        ShardSet(folder).verify_hashes()


@pytest.mark.parametrize(
    "name, at, value, message",
    [
        ("offset", 9, -5, "bytes at -5 of"),
        ("offset", 9, 2**62, "bytes at 4611686018427387904 of"),
        ("size", 9, 2**62, "4611686018427387904 bytes at"),
        ("size", 9, -1, "-1 bytes at"),
        ("name", 9, 1000, r"damaged: member names \[1000"),
        ("name", 9, -1, r"damaged: member names \[-1"),
        ("member_start", 5, 2**40, r"damaged: sample 4 is at \d+ to 1099511627776 of"),
        ("member_start", 5, -1, r"damaged: sample 4 is at \d+ to -1 of"),
        ("media_start", 5, 2**40, r"damaged: sample 4 is at \d+ to 1099511627776 of"),
        ("key_start", 5, 2**40, r"damaged: sample 4 is at \d+ to 1099511627776 of"),
        ("key_start", 4, 9 * 10, "damaged: sample 4 is at 90 to 50 of 100"),
        ("shard", 5, 3, "puts sample 5 into shard 3 of 3"),
        ("shard", 5, -1, "puts sample 5 into shard -1 of 3"),
        ("width", 5, 13, "pixels, its entry says"),
        ("crc", 9, 2**40, "corrupt"),
    ],
)
def test_numbers_that_lead_elsewhere(shard_set, name, at, value, message):
    folder = shard_set()
    _edit(folder, **{name: _column(folder, name, at, value)})
    shards = ShardSet(folder)
    with pytest.raises(DataError, match=message):
        [shards.load_sample(i) for i in (4, 5)]
    assert shards.load_sample(9)[0].key == "sample-009"


@pytest.mark.parametrize("at, value", [(4, 90), (0, -3), (3, 20)])  # keys of 10 letters each
def test_keys_that_lead_elsewhere(shard_set, at, value):
    folder = shard_set()
    _edit(folder, key_start=_column(folder, "key_start", at, value))
    with pytest.raises(DataError, match="damaged: its keys are not all"):
        ShardSet(folder).keys()


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"shard": np.zeros((10, 1), np.int32)}, "only flat arrays of numbers"),
        ({"shard": np.zeros(10, "U4")}, "only flat arrays of numbers"),
        ({"shard": np.zeros(9, np.int32)}, "do not fit together"),
        ({"key_start": np.zeros(11, np.int64)}, "do not fit together"),
        ({"crc": np.zeros(3, np.int64)}, "do not fit together"),
        ({"names": np.frombuffer(b"[1]", np.uint8)}, "do not fit together"),
        ({"names": np.frombuffer(b'["a"', np.uint8)}, "not a readable index"),
        ({"names": np.frombuffer(b"[" * 100_000, np.uint8)}, "RecursionError"),
    ],
)
def test_arrays_that_do_not_fit(shard_set, arrays, message):
    folder = shard_set()
    _edit(folder, **arrays)
    with pytest.raises(DataError, match=message):
        ShardSet(folder)


def test_compressed_and_lying_archives(tmp_path, shard_set):
    path = shard_set() / "index.npz"
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    np.savez_compressed(tmp_path / "packed.npz", **arrays)
    with pytest.raises(DataError, match="only stored arrays are read"):
        Index.load(tmp_path / "packed.npz")
    with zipfile.ZipFile(tmp_path / "lying.npz", "w") as file:
        header = {"descr": "<i8", "fortran_order": False, "shape": (2**50,)}
        with file.open("shard.npy", "w") as member:
            np.lib.format.write_array_header_1_0(member, header)
    with pytest.raises(DataError, match=r"1125899906842624 items of int64 in \d+ bytes"):
        Index.load(tmp_path / "lying.npz")


def test_random_damage_never_leads_astray(shard_set):
    folder = shard_set(count=6)
    whole = (folder / "index.npz").read_bytes()
    right = list(ShardSet(folder))
    rng = np.random.default_rng(0)
    for _ in range(150):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), 3):
            data[place] = rng.integers(0, 256)
        (folder / "index.npz").write_bytes(data[: len(data) - int(rng.integers(0, 2)) * int(rng.integers(0, 600))])
        _sign(folder)
        try:
            shards = ShardSet(folder)
        except DataError:
            continue
        for i in range(len(shards)):
            try:
                sample, blobs = shards.load_sample(i)
            except (BadSample, DataError):
                continue
            assert blobs in [other for _, other in right], sample


def test_first_samples_of_shards(shard_set):
    shards = ShardSet(shard_set())
    assert shards.shard_starts.tolist() == [0, 4, 8]
    assert [shards.shard_name(int(i)) for i in shards.shard_starts] == [info.name for info in shards.manifest.shards]
    _edit(shards.folder, shard=_column(shards.folder, "shard", 4, 0))
    with pytest.raises(DataError, match="as many samples of each shard"):
        _ = ShardSet(shards.folder).shard_starts
