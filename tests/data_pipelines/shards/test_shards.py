"""Writing shards, and reading them back by number."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import webdataset

from data_pipelines.errors import BadSample, DataError
from data_pipelines.index import index_folder
from data_pipelines.sample import Sample
from data_pipelines.shards.checksum import crc32
from data_pipelines.shards.shard_set import ShardSet
from data_pipelines.shards.tar_writer import ShardWriter


def _files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_same_samples_give_the_same_bytes(shard_set):
    first, second = _files(shard_set("a")), _files(shard_set("b"))
    assert sorted(first) == ["index.npz", "manifest.json", *(f"shard-{i:06d}.tar" for i in range(3))]
    assert first == second


def test_random_access_equals_sequential_reading_by_webdataset(shard_set):
    folder = shard_set(count=10)
    shards = ShardSet(folder)
    paths = [str(folder / info.name) for info in shards.manifest.shards]
    sequential = list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False))
    assert [row["__key__"] for row in sequential] == shards.keys() and len(shards) == len(sequential) == 10
    for i in reversed(range(10)):
        sample, blobs = shards.load_sample(i)
        row = sequential[i]
        assert sample.to_json() == json.loads(row["json"])
        assert blobs == [row[item.name] for item in sample.media]
        assert sample == Sample.from_json(row["__key__"], json.loads(row["json"]))


def test_sizes_and_counts_are_known_without_reading_a_shard(shard_set):
    folder = shard_set()
    shards = ShardSet(folder)
    expected = [shards.load_sample(i)[0] for i in range(len(shards))]
    for path in folder.glob("*.tar"):
        path.write_bytes(b"")
    for i, sample in enumerate(expected):
        sizes = [(item.width, item.height, item.kind, item.frames) for item in shards.media_items(i)]
        assert sizes == [(item.width, item.height, item.kind, item.frames) for item in sample.media]
        assert shards.count_annotations(i) == len(sample.annotations)
        assert shards.key(i) == sample.key


def test_shards_are_cut_at_max_bytes(tmp_path, sample):
    with ShardWriter(tmp_path / "set", max_bytes=4096) as writer:
        for number in range(6):
            writer.write_sample(*sample(number))
    shards = ShardSet(tmp_path / "set").manifest.shards
    assert [shard.samples for shard in shards] == [2, 2, 2]
    assert all(shard.bytes <= 4096 + 1024 for shard in shards)  # 1024: the end of a tar


def test_manifest_says_what_is_there(shard_set):
    manifest = ShardSet(shard_set(count=9)).manifest
    assert (manifest.samples, manifest.source, manifest.license, manifest.split) == (9, "test", "CC0", "train")
    assert [shard.samples for shard in manifest.shards] == [4, 4, 1]
    assert manifest.stats["media"] == {
        "count": 9,
        "min": 0,
        "mean": 1.0,
        "max": 2,
        "p5": 0,
        "p50": 1,
        "p95": 2,
        "histogram": {"0": 3, "1": 3, "2": 3},
    }
    assert manifest.stats["turns"]["histogram"] == {"2": 9}
    assert manifest.stats["width"]["max"] == 20


def test_fingerprint_follows_the_samples(shard_set):
    same, again, other = (ShardSet(shard_set(name, n)).fingerprint for name, n in (("a", 5), ("b", 5), ("c", 6)))
    assert same == again != other


@pytest.mark.parametrize("key", ["a.b", "a/b", "", "..", "x" * 81, "schlüssel"])
def test_keys_that_break_tar_names_are_refused(tmp_path, sample, key):
    record, blobs = sample(0)
    with pytest.raises(BadSample, match="a key has 1 to 80"), ShardWriter(tmp_path / "set") as writer:
        writer.write_sample(replace(record, key=key), blobs)


def test_refused_sample_leaves_no_trace_in_the_set(tmp_path, sample):
    with ShardWriter(tmp_path / "set") as writer:
        writer.write_sample(*sample(0))
        with pytest.raises(BadSample, match="'sample-000': duplicate key"):
            writer.write_sample(*sample(0))
        with pytest.raises(BadSample, match="1 media files for 2 media items"):
            writer.write_sample(sample(1, media=2)[0], sample(1)[1])
        with pytest.raises(BadSample, match="0.png is 12 x 8 pixels, its entry says 13 x 8"):
            writer.write_sample(sample(1)[0], sample(0)[1])
        writer.write_sample(*sample(2))
    shards = ShardSet(tmp_path / "set")
    shards.verify_hashes()
    assert shards.keys() == ["sample-000", "sample-002"] == [record.key for record, _ in shards]


def test_interrupted_writing_leaves_nothing(tmp_path, sample):
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path / "set") as writer:
        writer.write_sample(*sample(0))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_process_are_replaced_and_a_living_one_is_respected(tmp_path, sample):
    killed = ShardWriter(tmp_path / "set")
    killed.write_sample(*sample(7))
    with pytest.raises(DataError, match="another process is writing"):
        ShardWriter(tmp_path / "set")
    (killed.partial / "shard-000009.tar").write_bytes(b"half")
    (killed.partial / ".manifest.json.node-1.partial").write_bytes(b"half")
    killed._hidden.release_lock()  # what the death of the process does
    with ShardWriter(tmp_path / "set") as writer:
        writer.write_sample(*sample(0))
    assert ShardSet(tmp_path / "set").keys() == ["sample-000"]
    names = sorted(path.name for path in (tmp_path / "set").iterdir())
    assert names == ["index.npz", "manifest.json", "shard-000000.tar"]


def test_existing_folders_are_not_overwritten(tmp_path, shard_set):
    folder = shard_set()
    with pytest.raises(DataError, match="already holds a shard set"):
        ShardWriter(folder)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("x")
    with pytest.raises(DataError, match="is not a shard set"):
        ShardWriter(tmp_path / "notes", overwrite=True)
    assert (tmp_path / "notes" / "thesis.txt").exists()


def test_empty_source_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no usable sample"), ShardWriter(tmp_path / "set"):
        pass
    assert list(tmp_path.iterdir()) == []


def _load_key(shards: ShardSet, i: int) -> str:
    return shards.load_sample(i)[0].key


def test_threads_forks_and_pickles_read_the_same(shard_set):
    shards = ShardSet(shard_set())
    numbers = [*range(10)] * 4
    expected = [_load_key(shards, i) for i in numbers]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda i: _load_key(shards, i), numbers)) == expected
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.starmap(_load_key, [(shards, i) for i in numbers]) == expected
    copy = pickle.loads(pickle.dumps(shards))
    assert [_load_key(copy, i) for i in numbers] == expected


def test_many_shards_keep_few_files_open(tmp_path, sample, monkeypatch):
    monkeypatch.setattr("data_pipelines.shards.shard_set.MAX_OPEN_FILES", 3)
    with ShardWriter(tmp_path / "set", samples_per_shard=1) as writer:
        for number in range(8):
            writer.write_sample(*sample(number))
    shards = ShardSet(tmp_path / "set")
    assert [record.key for record, _ in shards] == shards.keys()
    assert len(shards._local.files) == 3


def test_a_sample_without_its_media_is_the_same(shard_set, tmp_path, tar, picture):
    ours = ShardSet(shard_set())
    assert [ours.read_sample(i) for i in range(len(ours))] == [ours.load_sample(i)[0] for i in range(len(ours))]
    tar(
        tmp_path / "foreign" / "0.tar",
        [("a.jpg", picture(1, "JPEG")), ("a.txt", b"a cat"), ("a.json", b'{"url": "x"}')],
    )
    index_folder(tmp_path / "foreign")
    foreign = ShardSet(tmp_path / "foreign")
    assert foreign.read_sample(0) == foreign.load_sample(0)[0] and foreign.read_sample(0).meta == {"url": "x"}


def test_checksums_are_those_of_zlib():
    for data in (b"", b"a", bytes(range(256)) * 999):
        assert crc32(data) == zlib.crc32(data)
