"""Builds in parts: the same bytes whoever writes them, and nothing that is finished is written again."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.build import main as build
from data_pipelines.build import write_shards
from data_pipelines.building import engines
from data_pipelines.errors import BadSample, DataError, common_reason
from data_pipelines.index import index_folder
from data_pipelines.shards.index_file import Index, IndexBuilder
from data_pipelines.shards.manifest import Manifest
from data_pipelines.shards.members import Member
from data_pipelines.shards.shard_set import ShardSet
from data_pipelines.shards.stats import Stats
from data_pipelines.shards.tar_writer import _Shard
from tests.data_pipelines.made_source import MadeSource

ROOT = Path(__file__).parents[3]
COUNTS = [5, 3, 0, 7, 1, 4]


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _write(folder: Path, **options):
    return write_shards(MadeSource(counts=COUNTS, bad=[1, 3], twice=[3, 5]), folder, samples_per_shard=2, **options)


def test_shards_end_with_their_part_and_all_is_in_order(tmp_path):
    source = MadeSource(counts=COUNTS)
    manifest = write_shards(source, tmp_path / "set", samples_per_shard=3)
    assert [shard.samples for shard in manifest.shards] == [3, 2, 3, 3, 3, 1, 1, 3, 1]
    shards = ShardSet(tmp_path / "set")
    assert [sample for sample, _ in shards] == [sample for part in range(6) for sample, _ in source.read(part)]
    shards.verify_hashes()
    (tmp_path / "set" / "manifest.json").unlink()
    indexed = index_folder(tmp_path / "set")
    assert (indexed.stats, indexed.index, indexed.shards) == (manifest.stats, manifest.index, manifest.shards)


def test_same_bytes_for_any_number_of_processes(tmp_path):
    _write(tmp_path / "one", workers=1)
    one = _files(tmp_path / "one")
    assert len(one) == 3 + 10 and one["quarantine.jsonl"]
    for workers in (2, 4):
        _write(tmp_path / "many", workers=workers, overwrite=True)
        assert _files(tmp_path / "many") == one
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many", "one"]


def test_keys_of_an_earlier_part_are_bad_records(tmp_path):
    write_shards(MadeSource(counts=[2, 3, 2], twice=[1, 2]), tmp_path / "set")
    shards = ShardSet(tmp_path / "set")
    assert shards.keys() == ["0-0", "0-1", "1-0", "1-1", "2-0"]
    shards.verify_hashes()
    assert "sample …: duplicate key, also in an earlier part" not in shards.manifest.bad
    assert shards.manifest.bad == {"duplicate key, also in an earlier part": 2}
    rows = [json.loads(line) for line in (tmp_path / "set" / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["part"], row["record"]) for row in rows] == [(1, 2), (2, 1)]
    with pytest.raises(DataError, match=r"2 bad records among 7, max_bad=1.*\n.*part 1.*'0-0': duplicate"):
        write_shards(MadeSource(counts=[2, 3, 2], twice=[1, 2]), tmp_path / "other", max_bad=1)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_keeps_the_finished_parts_and_the_next_run_reads_only_the_others(tmp_path, workers, capsys):
    log = tmp_path / "log"
    source = MadeSource(counts=[2] * 4, broken=[3], log=str(log))
    with pytest.raises(ZeroDivisionError):
        write_shards(source, tmp_path / "set", workers=workers)
    assert not (tmp_path / "set").exists()
    kept = {path.name for path in (tmp_path / ".set.partial").glob("part-*")}
    assert f"{len(kept)} of 4 parts are finished and kept" in capsys.readouterr().err
    assert kept == {f"part-{n:06d}" for n in range(4) if n < 3 and f"part-{n:06d}" in kept} and len(kept) >= 2
    log.unlink()
    source.broken = []
    write_shards(source, tmp_path / "set", workers=workers)
    begun = {f"part-{int(line):06d}" for line in log.read_text().split()}
    assert begun == {f"part-{n:06d}" for n in range(4)} - kept
    write_shards(MadeSource(counts=[2] * 4), tmp_path / "whole")
    assert _files(tmp_path / "whole") == _files(tmp_path / "set")


def test_parts_of_other_arguments_are_thrown_away(tmp_path, capsys):
    for broken, shard in (([1], 2), ([], 1)):
        source = MadeSource(counts=[2, 2], broken=broken)
        try:
            write_shards(source, tmp_path / "set", samples_per_shard=shard)
        except ZeroDivisionError:
            assert (tmp_path / ".set.partial" / "part-000000").is_dir()
    assert "other arguments are deleted" in capsys.readouterr().err
    assert [info.samples for info in Manifest.read(tmp_path / "set").shards] == [1, 1, 1, 1]


def test_merging_may_stop_after_every_file(tmp_path, monkeypatch):
    _write(tmp_path / "whole")
    seen, stops = [], 0

    def stop_at_second(rename, path, target):
        seen.append(target)
        if len([t for t in seen if Path(t).name.startswith(("shard", "manifest", "set"))]) == 2:
            raise KeyboardInterrupt
        return rename(path, target)

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, partial(stop_at_second, getattr(os, name)))
    for _ in range(12):
        seen.clear()
        try:
            _write(tmp_path / "set")
        except KeyboardInterrupt:
            stops += 1
    assert stops == 11  # 10 shards, the manifest and the folder, one a run
    assert _files(tmp_path / "set") == _files(tmp_path / "whole")


def _start(tmp_path: Path, *more: str) -> subprocess.Popen:
    code = "import sys; sys.path.insert(0, '.'); from data_pipelines.build import main; sys.exit(main())"
    arguments = ["source=tiny", "~count", "~split", "_target_=tests.data_pipelines.made_source.MadeSource"]
    arguments += ["+counts=[4,4,4,4]", f"+gate={tmp_path / 'gate'}", "+slow=2", "allow_targets=[tests.]"]
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments, f"output={tmp_path / 'set'}", *more],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def _wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _half_done(tmp_path: Path) -> bool:
    names = {path.name for path in (tmp_path / ".set.partial").glob("part-*")}
    return {"part-000000", "part-000001"} <= names and len(names) > 2


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_build_goes_on(tmp_path, stop):
    (tmp_path / "gate").touch()
    process = _start(tmp_path, "workers=2")
    _wait_for(lambda: _half_done(tmp_path))
    workers = _children(process.pid)
    process.send_signal(stop)
    _wait_for(lambda: not any(map(_lives, workers)))
    error = process.communicate(timeout=60)[1]
    assert "Traceback" not in error
    if stop != signal.SIGKILL:
        assert process.returncode == 130 and "2 of 4 parts are finished and kept" in error
        assert not list((tmp_path / ".set.partial").glob("part-??????.*"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / ".set.partial").glob("part-??????/*.tar")}
    assert len(before) == 2 and not (tmp_path / "set").exists()
    (tmp_path / "gate").unlink()
    process = _start(tmp_path, "workers=2")
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and "going on with 2 of 4 parts" in error
    tars = sorted((tmp_path / "set").glob("*.tar"))
    assert [path.stat().st_mtime_ns for path in tars[:2]] == [before[path] for path in sorted(before)]
    write_shards(MadeSource(counts=[4] * 4), tmp_path / "whole")
    assert Manifest.read(tmp_path / "set").fingerprint == Manifest.read(tmp_path / "whole").fingerprint
    assert (tmp_path / "set" / "index.npz").read_bytes() == (tmp_path / "whole" / "index.npz").read_bytes()


def test_a_damaged_part_is_named(tmp_path):
    source = MadeSource(counts=[1, 1])
    write_shards(source, tmp_path / "set", node=0, nodes=2)
    (tmp_path / ".set.partial" / "part-000000" / "part.json").write_text("{")
    with pytest.raises(DataError, match="part-000000: a damaged part .*remove it"):
        write_shards(source, tmp_path / "set")
    assert (tmp_path / ".set.partial" / "part-000000").is_dir()


def test_nodes_build_shares_and_the_plain_command_finishes(tmp_path):
    _write(tmp_path / "whole")
    for node in (2, 0):
        assert _write(tmp_path / "set", node=node, nodes=3) is None
    names = sorted(path.name for path in (tmp_path / ".set.partial").glob("part-*"))
    assert names == [f"part-{n:06d}" for n in (0, 2, 3, 5)]  # node 1 was lost
    _write(tmp_path / "set")
    assert _files(tmp_path / "set") == _files(tmp_path / "whole")


def test_nodes_do_not_disturb_each_other(tmp_path):
    source = MadeSource(counts=[1] * 4)
    write_shards(source, tmp_path / "set", node=0, nodes=2)
    (tmp_path / ".set.partial" / "part-000000.other-1").mkdir()  # half written by node 0
    write_shards(source, tmp_path / "set", node=1, nodes=2)
    assert (tmp_path / ".set.partial" / "part-000000.other-1").is_dir()
    with pytest.raises(DataError, match="holds parts of a build with other arguments"):
        write_shards(source, tmp_path / "set", samples_per_shard=9, node=1, nodes=2)
    with pytest.raises(DataError, match="node: got 2 with nodes=2"):
        write_shards(source, tmp_path / "set", node=2, nodes=2)
    write_shards(source, tmp_path / "set")
    assert len(ShardSet(tmp_path / "set")) == 4


@pytest.mark.parametrize("workers", [1, 2])
def test_full_disk_is_one_plain_error_and_loses_nothing(tmp_path, monkeypatch, capsys, workers):
    counts = [1, 1, 20, 1]
    if workers == 1:
        put = _Shard._write_bytes
        monkeypatch.setattr(
            _Shard, "_write_bytes", lambda self, data: _full() if self.samples == 9 else put(self, data)
        )
        with pytest.raises(DataError, match=r"\.set\.partial: no space left on this disk"):
            write_shards(MadeSource(counts=counts), tmp_path / "set")
        assert "2 of 4 parts are finished and kept" in capsys.readouterr().err
        assert not list((tmp_path / ".set.partial").glob("part-??????.*"))
        monkeypatch.undo()
    write_shards(MadeSource(counts=counts), tmp_path / "set", workers=workers)
    assert len(ShardSet(tmp_path / "set")) == 23


def _full():
    raise OSError(errno.ENOSPC, "No space left on device")


def test_bad_records_of_all_processes_share_one_budget(tmp_path):
    source = MadeSource(counts=[3] * 6, bad=[0, 1, 2, 3])
    with pytest.raises(DataError, match=r"4 bad records among \d+, max_bad=3.*\n.*record 0-2: no answer"):
        write_shards(source, tmp_path / "set", max_bad=3, workers=2)
    rows = [json.loads(line) for line in (tmp_path / "set.quarantine.jsonl").read_text().splitlines()]
    assert [row["part"] for row in rows] == [0, 1, 2, 3]
    assert write_shards(source, tmp_path / "set", max_bad=4, workers=2).bad == {"no answer": 4}


def test_a_part_with_too_many_bad_records_is_not_read_to_its_end(tmp_path):
    class Endless(MadeSource):
        def read(self, part):
            yield from (record for _ in iter(int, 1) for record in MadeSource.read(self, part))

    with pytest.raises(DataError, match="3 bad records among 4"):
        write_shards(Endless(counts=[1]), tmp_path / "set", max_bad=2)


def test_a_part_stopped_by_the_budget_is_not_taken_for_a_finished_one(tmp_path):
    class Alternating(MadeSource):
        def read(self, part):
            for i in range(6):
                yield BadSample(f"record {i}: bad") if i % 2 else (self.sample(part, i), [])

    source = Alternating(counts=[6, 6])
    with pytest.raises(DataError, match="6 bad records among 12, max_bad=4"):
        write_shards(source, tmp_path / "set", max_bad=4)
    assert not (tmp_path / ".set.partial").exists()  # bad records are read again
    with pytest.raises(DataError, match="1 bad records among 2, max_bad=0"):
        write_shards(source, tmp_path / "other", max_bad=0)
    assert not (tmp_path / ".other.partial").exists()
    assert write_shards(source, tmp_path / "set", max_bad=6).samples == 6


def test_unpicklable_sources_and_wrong_options_are_plain_errors(tmp_path):
    source = MadeSource(counts=[1, 1])
    source.file = (line for line in ())
    with pytest.raises(DataError, match="cannot be sent to a worker process.*workers=1"):
        write_shards(source, tmp_path / "set", workers=2)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="workers: got 0"):
        write_shards(source, tmp_path / "set", workers=0)
    with pytest.raises(DataError, match="engine: got 'spark'; allowed: local, ray"):
        write_shards(source, tmp_path / "set", engine="spark")


def _exit(_, job):
    os._exit(job)


def test_a_worker_that_dies_is_an_error(tmp_path):
    with pytest.raises(DataError, match="a worker process died"):
        list(engines.run_jobs(_exit, None, [1, 1], workers=2))


def test_empty_source_leaves_nothing(tmp_path):
    with pytest.raises(DataError, match="no usable sample"):
        write_shards(MadeSource(counts=[0, 0]), tmp_path / "set")


def test_own_source_by_command(tmp_path, capsys):
    arguments = ["source=tiny", "~count", "~split", "_target_=tests.data_pipelines.made_source.MadeSource"]
    arguments += ["+counts=[2,2]", "+bad=[1]", f"output={tmp_path / 'set'}", "workers=2"]
    assert build(arguments) == 2 and "is not trusted" in capsys.readouterr().err
    assert build([*arguments, "allow_targets=[tests.]"]) == 0
    assert "1  no answer" in capsys.readouterr().out
    assert build([*arguments, "allow_targets=[tests.]", "workers=1"]) == 0 and "already" in capsys.readouterr().out


def test_ray_writes_the_same_bytes(tmp_path):
    pytest.importorskip("ray")
    _write(tmp_path / "one")
    _write(tmp_path / "ray", engine="ray", workers=2)
    assert _files(tmp_path / "ray") == _files(tmp_path / "one")


def test_ray_missing_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DataError, match=r"pip install 'vlm-train\[ray\]'"):
        _write(tmp_path / "set", engine="ray")


def test_statistics_of_parts_are_those_of_all():
    whole, first, second = Stats(), Stats(), Stats()
    values = [0, 1, 3, 7, 8, 99, 100, 199, 200, 123456]
    for i, value in enumerate(values):
        whole.add_lengths([("x", value)])
        (first if i < 4 else second).add_lengths([("x", value)])
    first.merge_state(json.loads(json.dumps(second.export_state())))
    assert first.to_json() == whole.to_json()
    assert first.to_json()["x"] == {
        "count": 10, "min": 0, "mean": 12407.3, "max": 123456, "p5": 0, "p50": 8, "p95": 120000,
        "histogram": {"0": 1, "1": 1, "2": 1, "4": 1, "8": 1, "64": 2, "128": 2, "65536": 1},
    }  # fmt: skip


def test_index_of_parts_equals_index_of_all(tmp_path, shard_set):
    one, two = (Index.load(shard_set(name, count) / "index.npz") for name, count in (("a", 10), ("b", 7)))
    builder = IndexBuilder()
    builder.add_index(one, [0, 1, 2], rows=np.arange(7))
    builder.write_file(tmp_path / "part.npz")
    assert (tmp_path / "part.npz").read_bytes() == (tmp_path / "b" / "index.npz").read_bytes()
    with pytest.raises(DataError, match="duplicate key 'sample-000'"):
        builder.add_index(two, [3, 4])


def test_indexes_with_other_member_names_are_joined(tmp_path, sample):
    joined = IndexBuilder()
    for number, name in enumerate(("0.png", "0.jpg", "0.png")):
        builder = IndexBuilder()
        record, _ = sample(number)
        builder.add_sample(0, record, [Member(name, 512, 9, 7), Member("json", 2048, number, 8)])
        builder.write_file(tmp_path / "part.npz")
        joined.add_index(Index.load(tmp_path / "part.npz"), [number])
    joined.write_file(tmp_path / "all.npz")
    index = Index.load(tmp_path / "all.npz")
    names = [[member.name for member in index.locate_sample(i).members] for i in range(3)]
    assert names == [["0.png", "json"], ["0.jpg", "json"], ["0.png", "json"]]
    assert index.shard.tolist() == [0, 1, 2] and [index.locate_sample(i).members[1].size for i in range(3)] == [0, 1, 2]
    assert index.width.tolist() == [12, 13, 14]


def test_results_are_put_in_order():
    assert list(engines.in_order([(2, "c"), (0, "a"), (3, "d"), (1, "b")])) == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("record 'a:b': 2 <image> tags, 1 images", "… <image> tags, … images"),
        ("sample 'x': image /data/a b.jpg: No such file", "image … b.jpg: No such file"),
        ("record 7: sample 'k': duplicate key", "duplicate key"),
        ("record 7: found GIF; read are mp4, webm", "found GIF; read are mp4, webm"),
    ],
)
def test_reasons_are_counted_without_names_and_numbers(message, expected):
    assert common_reason(message) == expected


class Later(MadeSource):
    """All but the first record of each part are bad until the file `ready` is there."""

    def __init__(self, *, counts, ready) -> None:
        super().__init__(counts=counts)
        self.ready = ready

    def read(self, part):
        for i in range(self.counts[part]):
            bad = i and not self.ready.exists()
            yield BadSample(f"record {i}: img/{i}.jpg: No such file") if bad else (self.sample(part, i), [])


def test_a_build_that_failed_for_its_records_reads_them_again(tmp_path):
    ready, output = tmp_path / "ready", tmp_path / "set"
    source = Later(counts=[3, 3], ready=ready)
    with pytest.raises(DataError, match="4 bad records among 6, max_bad=3"):
        write_shards(source, output, max_bad=3)
    ready.touch()
    assert write_shards(source, output, max_bad=3).samples == 6
    assert not (tmp_path / "set.quarantine.jsonl").exists()


def test_a_source_without_a_usable_sample_says_why(tmp_path):
    class Bad(MadeSource):
        def read(self, part):
            yield BadSample("record 0: img/0.jpg: No such file")

    with pytest.raises(
        DataError, match=r"(?s)1 bad records among 1, the source gave no usable sample; all in .*No such file"
    ):
        write_shards(Bad(counts=[1]), tmp_path / "set")
    assert "img/0.jpg" in (tmp_path / "set.quarantine.jsonl").read_text() and not (tmp_path / ".set.partial").exists()


def test_force_begins_again(tmp_path):
    ready, output = tmp_path / "ready", tmp_path / "set"
    source = Later(counts=[5, 2], ready=ready)
    (tmp_path / ".set.partial").mkdir()
    assert write_shards(source, output, nodes=2, node=0) is None  # its part holds bad records, and is kept
    ready.touch()
    assert write_shards(source, output, overwrite=True).samples == 3  # other nodes' work is never discarded
    assert write_shards(source, output, overwrite=True).samples == 7
    assert sorted(path.name for path in output.iterdir()) == sorted(
        ["index.npz", "manifest.json", *(f"shard-{n:06d}.tar" for n in range(2))]
    )
