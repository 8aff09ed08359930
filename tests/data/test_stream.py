"""A set without an index streams: every sample once a pass, one order for all processes, exact to resume, and the
indexes that are written in passing are those of the index command."""

from __future__ import annotations

import errno
import io
import json
import pickle
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import webdataset

from data_pipelines.build import main as build
from data_pipelines.errors import BadSample, DataError
from data_pipelines.index import main as index
from data_pipelines.indexing import shard_index, tar_samples
from data_pipelines.shards.shard_set import ShardSet
from tests.data.test_datamodule import data
from tests.data_pipelines.shards.test_remote import Server
from tests.support.small_run import picture
from vlm_train.data import stream
from vlm_train.data.datamodule import VLMData
from vlm_train.data.order.cost import Cost
from vlm_train.data.stream import StreamShards
from vlm_train.errors import ConfigError

SIZES = (5, 9, 4, 7)
KEYS = {f"{shard:05d}{i:04d}" for shard, size in enumerate(SIZES) for i in range(size)}


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Uneven tars: `<shard><number>.jpg`, `.txt`, and a member that nothing reads."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for shard, size in enumerate(SIZES):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as file:
            for i in range(size):
                members = {
                    "png": picture(16 * shard + i),
                    "txt": f"shape {shard}-{i}".encode(),
                    "pickle": b"never read",
                }
                for name, content in members.items():
                    info = tarfile.TarInfo(f"{shard:05d}{i:04d}.{name}")
                    info.size = len(content)
                    file.addfile(info, io.BytesIO(content))
    return folder


def open_shards(tars: Path, *, seed: int = 0, batch: int = 4, shuffle: bool = True, **entry: Any) -> StreamShards:
    entry = {"tars": f"{tars}/{{00000..0000{len(SIZES) - 1}}}.tar", "shuffle_buffer": 3, "index": str(tars)} | entry
    return StreamShards(entry, seed=seed, shuffle=shuffle, batch=batch, cache=tars)


def read_keys(shards: StreamShards, positions: Any) -> list[str]:
    return [shards.load_sample(i)[0].key for i in positions]


def read_passes(shards: StreamShards, passes: int = 3) -> Iterator[tuple[int, int, list[str]]]:
    """Pass, shard and keys of what the lanes read, from the order of their shards."""
    found: dict[int, list[str]] = {lane: [] for lane in range(shards.lanes)}
    for position in range(passes * 8 * len(KEYS)):
        found[shards.deal.locate_place(position)[0]].append(shards.load_sample(position)[0].key)
    for lane, keys in found.items():
        for epoch in range(passes):
            for place in range(lane, len(SIZES), shards.lanes):
                shard = shards.find_shard(epoch, place)
                yield epoch, shard, keys[: SIZES[shard]]
                del keys[: SIZES[shard]]


@pytest.mark.parametrize("lanes", [1, 2, 3, 16])
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_every_sample_comes_once_a_pass(tars: Path, lanes: int, batch: int) -> None:
    shards = open_shards(tars, lanes=lanes, batch=batch)
    assert shards.lanes == {1: 1, 2: 2, 3: 2, 16: 4}[lanes]
    orders, inside = set(), set()
    read = list(read_passes(shards))
    for epoch in range(3):
        of_pass = [(shard, keys) for one, shard, keys in read if one == epoch]
        assert sorted(key for _, keys in of_pass for key in keys) == sorted(KEYS)
        orders.add(tuple(shard for shard, _ in of_pass))
        inside.add(tuple(keys) if (keys := dict(of_pass)[1]) else None)
    assert len(orders) > 1 and len(inside) == 3  # shards, and the samples of a shard, in another order


def test_the_order_is_this_one(tars: Path) -> None:
    """What a seed gives, so that no new version of a package changes the order of a run unseen."""
    shards = open_shards(tars, lanes=2)
    assert [key.lstrip("0") or "0" for key in read_keys(shards, range(12))] == ORDER
    assert read_keys(open_shards(tars, seed=1, lanes=2), range(12)) != read_keys(open_shards(tars, lanes=2), range(12))
    plain = open_shards(tars, lanes=1, shuffle=False)
    assert read_keys(plain, range(len(KEYS))) == sorted(KEYS)


ORDER = ["30000", "10001", "30003", "10002", "30004", "10003", "30005", "10004", "30002", "10000", "30001", "10005"]


def test_samples_are_those_that_webdataset_reads(tars: Path) -> None:
    shards = open_shards(tars, lanes=1, shuffle=False)
    paths = [str(tars / f"{number:05d}.tar") for number in range(len(SIZES))]
    plain = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert len(plain) == len(KEYS)
    for position, expected in enumerate(plain):
        sample, (blob,) = shards.load_sample(position)
        assert (sample.key, blob) == (expected["__key__"], expected["png"])
        assert sample.annotations[0].turns[1].text.encode() == expected["txt"]


def test_what_build_writes_is_read_by_webdataset(tmp_path: Path) -> None:
    assert build(["source=tiny", "split=train", f"output={tmp_path}/set", "samples_per_shard=20"]) == 0
    ours = ShardSet(tmp_path / "set")
    paths = sorted(str(path) for path in (tmp_path / "set").glob("*.tar"))
    plain = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert len(paths) > 1 and [one["__key__"] for one in plain] == ours.keys()
    for (sample, blobs), one in zip(ours, plain, strict=True):
        assert [one[item.name] for item in sample.media] == blobs
        assert json.loads(one["json"])["annotations"] == sample.to_json()["annotations"]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("lanes", [1, 2])
def test_it_goes_on_anywhere(tars: Path, lanes: int, known: bool) -> None:
    """Also where the indexes of finished shards are lost: then they are read again."""
    keys = read_keys(open_shards(tars, lanes=lanes), range(70))
    for first in range(70):
        if not known:
            for path in (tars / "index").iterdir():
                path.unlink()
        assert read_keys(open_shards(tars, lanes=lanes), range(first, min(first + 9, 70))) == keys[first : first + 9]


def test_finished_shards_are_passed_over_unread(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = read_keys(open_shards(tars, lanes=1), range(60))
    read: list[int] = []
    inner = stream.read_shard
    monkeypatch.setattr(stream, "read_shard", lambda job, *more: read.append(more[0]) or inner(job, *more))
    again = open_shards(tars, lanes=1)
    assert read_keys(again, [59]) == keys[59:] and len(read) == 1
    assert read_keys(again, range(5)) == keys[:5]  # backwards as well


def open_data(tars: Path, *, workers: int = 0, first: int = 0, rank: int = 0, world: int = 1, **entry: Any) -> VLMData:
    entry = {"tars": str(tars), "shuffle_buffer": 3, "index": str(tars / "out")} | entry
    made = data(entry, shuffle="shards", workers=workers, cache=str(tars))
    made.plan = made.make_plan(batch=4, tokens=None, epochs=None, most=12, world=world, cost=Cost())
    made.trainer.global_step, made.trainer.global_rank, made.trainer.world_size = first, rank, world
    return made


def read_steps(made: VLMData) -> list[Any]:
    """Keys, tokens and pixels of every sample of every step, in the order of its rows."""
    steps: dict[int, list[Any]] = {}
    for batch in made.train_dataloader():
        assert batch.window is not None and not batch.window.problems
        ids, pixels = batch.text["llm"].ids.tolist(), batch.media.inputs["vision"].values
        rows = [(key, ids[row], pixels[row].sum().item()) for row, (key,) in enumerate(batch.keys)]
        steps.setdefault(batch.window.step, []).extend(rows)
    return [steps[step] for step in sorted(steps)]


def test_the_number_of_processes_changes_nothing(tars: Path) -> None:
    alone = read_steps(open_data(tars))
    assert len(alone) == 12 and all(len(step) == 4 for step in alone)
    for workers in (1, 2, 3):  # 3 share the lanes
        assert read_steps(open_data(tars, workers=workers)) == alone
    assert read_steps(open_data(tars, workers=2, first=5)) == alone[5:]


def test_two_ranks_take_the_steps_of_one(tars: Path) -> None:
    alone = read_steps(open_data(tars))
    ranks = [read_steps(open_data(tars, rank=rank, world=2)) for rank in (0, 1)]
    assert [[key for key, *_ in step] for step in alone] == [
        [key for pair in zip(*pairs, strict=True) for key, *_ in pair] for pairs in zip(*ranks, strict=True)
    ]


def test_another_order_is_other_data(tars: Path) -> None:
    """A checkpoint of one does not go on with the other."""
    options: list[dict[str, Any]] = [
        {},
        {"lanes": 1},
        {"shuffle_buffer": 4},
        {"shuffle": False},
        {"layout": "img2dataset"},
    ]
    assert len({open_shards(tars, **one).fingerprint for one in options}) == len(options)
    before = open_shards(tars).fingerprint
    assert open_shards(tars, index="elsewhere").fingerprint == before
    cut(tars / "00002.tar")
    assert open_shards(tars).fingerprint != before


def test_a_process_reads_its_own_lanes(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = open_data(tars, lanes=4, rank=1, world=2)
    shards: Any = made.train.sources[0].shards
    read_steps(made)
    assert sorted(shards._lanes) == [1, 3] and (shards.deal.rows, shards.deal.steps) == (2, 2)
    assert "into 1 process;" in shards.describe_reading(2, 2) and "into 2 processes;" in shards.describe_reading(1, 4)
    assert "into 1 process;" in shards.describe_reading(1, 0) and "into 6 processes;" in shards.describe_reading(3, 4)


def test_it_travels_without_its_open_shards(tars: Path) -> None:
    shards = open_shards(tars)
    keys = read_keys(shards, range(20))
    assert read_keys(pickle.loads(pickle.dumps(shards)), range(20)) == keys


def test_indexes_written_in_passing_are_those_of_the_command(
    tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses = f"shards='{tars}/{{00000..00003}}.tar'"
    assert index([addresses, f"output={tmp_path}/command", "layout=img2dataset", "workers=1"]) == 0
    shards = open_shards(tars, index=str(tmp_path / "passing"), layout="img2dataset")
    read_keys(shards, range(2 * len(KEYS)))
    command, passing = (
        {p.name: p.read_bytes() for p in (tmp_path / f / "index").iterdir()} for f in ("command", "passing")
    )
    assert command == passing and len(passing) == 2 * len(SIZES)
    monkeypatch.setattr(shard_index, "read_shard", None)  # nothing is read again
    assert index([addresses, f"output={tmp_path}/passing", "layout=img2dataset", "workers=1"]) == 0
    later = ShardSet(tmp_path / "passing")
    assert sorted(later.keys()) == sorted(KEYS) and later.load_sample(7)[0].key == "000010002"
    assert len(data(tmp_path / "passing").train) == len(KEYS)


def test_an_index_is_written_once_and_of_whole_shards_only(tars: Path) -> None:
    shards = open_shards(tars, lanes=1)
    shards.load_sample(0)
    assert not list((tars / "index").iterdir())
    read_keys(shards, range(len(KEYS)))
    times = {path: path.stat().st_mtime_ns for path in (tars / "index").iterdir()}
    read_keys(shards, range(len(KEYS), 3 * len(KEYS)))
    assert len(times) == 2 * len(SIZES) and {path: path.stat().st_mtime_ns for path in times} == times


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:3000])


@pytest.mark.parametrize("damage", [cut, lambda path: path.write_bytes(b"no tar" * 999)])
def test_a_damaged_tar_is_one_bad_sample(tars: Path, damage: Any) -> None:
    damage(tars / "00001.tar")
    shards = open_shards(tars, lanes=1, shuffle=False)
    good, bad, last = [], [], 0
    for position in range(40):
        try:
            good.append(shards.load_sample(position)[0].key)
            last = position
        except BadSample as error:
            bad.append(error)
    assert [error.shard for error in bad] == [str(tars / "00001.tar")] * len(bad) and 1 <= len(bad) <= 3
    assert bad[0].kind == "malformed" and str(bad[0]).startswith(f"{tars}/00001.tar: truncated")
    assert {key for key in KEYS if key[4] != "1"} <= set(good)
    again = open_shards(tars, lanes=1, shuffle=False)  # it holds its place when the run goes on
    assert read_keys(again, [last]) == good[-1:]


def test_a_disk_that_fails_leaves_no_record(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = open_shards(tars, lanes=1, shuffle=False)

    def fail(*_: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(tar_samples, "_read_members", fail)
        with pytest.raises(DataError, match=r"00000\.tar: cannot be read: .*Input/output error"):
            shards.load_sample(0)
    assert not list((shards.job.folder / "index").iterdir())
    whole = read_keys(open_shards(tars, lanes=1, shuffle=False), range(len(KEYS)))
    assert sorted(whole) == sorted(KEYS)


def test_a_record_that_counts_otherwise_is_written_anew(tars: Path) -> None:
    read_keys(open_shards(tars, lanes=1, shuffle=False), range(len(KEYS)))
    job = open_shards(tars, lanes=1, shuffle=False).job
    path = shard_index.record_path(job.folder, 0)
    right = path.read_text()
    path.write_text(json.dumps(json.loads(right) | {"bad": [["none", "made up"]]}))
    shard_index.index_shard(job, 0)
    assert path.read_text() == right


def test_bad_samples_are_named_and_counted(tars: Path, tmp_path: Path) -> None:
    with tarfile.open(tars / "00004.tar", "w") as file:
        info = tarfile.TarInfo("lonely.txt")
        file.addfile(info)
    made = open_data(tars, lanes=1)
    problems = [one for batch in made.train_dataloader() if not batch.window.micro for one in batch.window.problems]
    assert {(one.shard, one.key, one.kind) for one in problems} == {(str(tars / "00004.tar"), "lonely", "malformed")}
    assert "no picture or video" in problems[0].reason


def test_what_cannot_be_had_is_one_error(tars: Path) -> None:
    shards = open_shards(tars, lanes=1, shuffle=False)
    (tars / "00001.tar").unlink()
    with pytest.raises(DataError, match=r"00001\.tar: cannot be read: .*No such file"):
        read_keys(shards, range(20))
    for number in range(len(SIZES)):
        tarfile.open(tars / f"{number:05d}.tar", "w").close()
    with pytest.raises(DataError, match=r"\.tar: no sample in it, nor in the other shards of the stream"):
        open_shards(tars).load_sample(0)


def test_one_empty_shard_is_passed_over(tars: Path) -> None:
    tarfile.open(tars / "00002.tar", "w").close()
    keys = read_keys(open_shards(tars, lanes=4), range(300))
    assert set(keys) == {key for key in KEYS if key[4] != "2"}


def test_remote_shards_stream_and_leave_nothing(tars: Path, tmp_path: Path) -> None:
    local = read_keys(open_shards(tars), range(40))
    server = Server(tars)
    try:
        address = f"{server.address}/{{00000..00003}}.tar"
        shards = StreamShards(
            {"tars": address, "shuffle_buffer": 3},
            seed=0, shuffle=True, batch=4, cache=tmp_path / "cache", fetched=tmp_path / "fetched",
        )  # fmt: skip
        assert read_keys(shards, range(40)) == local
        assert not list((tmp_path / "fetched").iterdir())
        assert len(list((shards.job.folder / "index").glob("*.json"))) == len(SIZES)
    finally:
        server.closed.set()
        server.server.shutdown()
        server.server.server_close()


@pytest.mark.parametrize(
    ("entry", "options", "message"),
    [
        ({"lanse": 2}, {}, r"an entry of tars has no lanse; its keys: tars, layout"),
        ({"columns": "x"}, {}, r"an entry of tars has no columns"),
        ({"lanes": 0}, {}, r"lanes is a whole number from 1 to 1048576, got 0"),
        ({"shuffle_buffer": True}, {}, r"shuffle_buffer is a whole number"),
        ({"layout": "laion"}, {}, r"layout: got 'laion'; allowed: captions, img2dataset"),
        ({"layout": {"txt": "a"}}, {}, r"layout: got .*; expected text"),
        ({"layout": None}, {}, r"layout: got None; allowed"),
        ({"tars": "pipe:cat a.tar"}, {}, r"pipe: runs a shell command, which is refused"),
        ({"tars": 3}, {}, r"tars: expected addresses of tars.* got 3"),
        ({"tars": []}, {}, r"tars: expected addresses of tars"),
        (
            {},
            {"shuffle": "full"},
            r"data\.shuffle: tars are shuffled by shards and a buffer; use shards, or none",
        ),
        ({}, {"pack": 64}, r"data\.pack: needs an index of all samples, which tars have not, got 64"),
        ({}, {"group_by": "modality"}, r"data\.group_by: needs an index"),
        ({}, {"val_share": 0.1}, r"data\.val_share: needs an index"),
        ({}, {"limit": 3}, r"data\.limit: needs an index"),
        ({}, {"over_length": "split"}, r"data\.over_length: needs an index"),
    ],
)
def test_what_a_stream_cannot_is_refused(tars: Path, entry: dict[str, Any], options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        data({"tars": str(tars)} | entry, **{"shuffle": "shards", "cache": str(tars)} | options)


def test_a_stream_is_the_only_entry(tars: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.train: an entry of tars is the only one, got 2 entries"):
        data({"tars": str(tars)}, {"shards": "x"}, shuffle="shards", cache=str(tars))
    with pytest.raises(DataError, match="an objective reads the columns a beside it"):
        data({"tars": str(tars)}, shuffle="shards", cache=str(tars), columns=["a"])


def test_a_folder_that_takes_no_index_is_told_at_once(tars: Path) -> None:
    (tars / "taken").write_text("a file")
    with pytest.raises(DataError, match=r"tars: .*taken.*name a folder that can be written with index=<folder>"):
        open_shards(tars, index=str(tars / "taken"))
