"""Remote shard sets: what is fetched, checked, kept and removed, and what a bad line or a bad server does."""

from __future__ import annotations

import fcntl
import hashlib
import os
import pickle
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
import tenacity

from data_pipelines.errors import BadSample, DataError
from data_pipelines.shards import remote
from data_pipelines.shards.manifest import FileInfo
from data_pipelines.shards.remote import Cache, default_cache, is_remote, join_address
from data_pipelines.shards.shard_set import ShardSet


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(tenacity, "wait_random_exponential", lambda **_: tenacity.wait_none())
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


class Server:
    """Serves a folder; `faults[name]` lists what happens to the next requests of a file instead."""

    def __init__(self, folder: Path) -> None:
        self.faults: dict[str, list[str]] = {}
        self.requests: Counter[str] = Counter()
        self.sent = 0  # bytes of spoilt answers
        self.dripped = 0
        self.closed = threading.Event()
        outer = self

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.rsplit("/", 1)[-1]
                outer.requests[name] += 1
                faults = outer.faults.get(name)
                fault = faults.pop(0) if faults else None
                if fault is None:
                    return super().do_GET()
                if fault.isdigit():
                    return self.send_error(int(fault))
                data = Path(self.translate_path(self.path)).read_bytes()
                self.send_response(200)
                if fault == "long":  # no length is promised, and it does not end where it should
                    body = data * 3
                elif fault == "endless":
                    body = bytes(100 * 2**20)
                else:
                    self.send_header("Content-Length", str(len(data)))
                    body = data[: len(data) // 2] if fault == "cut" else bytes(len(data))
                self.end_headers()
                if fault == "drip":
                    outer.dripped += 1
                    self.wfile.write(data[:1])
                    outer.closed.wait(30)
                    return None
                with suppress(OSError):  # whoever asked may have heard enough
                    for start in range(0, len(body), 2**16):
                        self.wfile.write(body[start : start + 2**16])
                        outer.sent += 2**16
                return None

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture
def server(shard_set, tmp_path):
    """A server of `set`: 10 samples in 3 shards."""
    shard_set()
    one = Server(tmp_path)
    yield one
    one.closed.set()
    one.server.shutdown()
    one.server.server_close()


@pytest.fixture
def opened(server, tmp_path):
    """The set, opened over http with a cache of its own."""
    return partial(ShardSet, f"{server.address}/set", cache_dir=tmp_path / "cache")


def _cached(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_remote_samples_equal_local_ones_and_are_fetched_once(server, opened, tmp_path):
    local, far = ShardSet(tmp_path / "set"), opened()
    assert far.fingerprint == local.fingerprint and far.keys() == local.keys()
    assert server.requests == {"manifest.json": 1, "index.npz": 1}  # no shard before it is read
    assert list(far) == list(local) and list(far) == list(opened())
    assert server.requests == {"manifest.json": 2, "index.npz": 1, **{f"shard-00000{i}.tar": 1 for i in range(3)}}
    assert far.describe_sample(9) == f"{server.address}/set/shard-000002.tar, key 'sample-009'"
    opened().verify_hashes()


def test_every_scheme_of_fsspec_will_do(shard_set, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "SCHEMES", (*remote.SCHEMES, "memory"))
    local = ShardSet(shard_set())
    fsspec.filesystem("memory").put(str(local.folder), "/bucket/set", recursive=True)
    far = ShardSet("memory://bucket/set", cache_dir=tmp_path / "cache")
    assert list(far) == list(local)
    with pytest.raises(DataError, match=r"memory://bucket/none/manifest.json: no such file"):
        ShardSet("memory://bucket/none", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("faults", [["503", "503"], ["cut"], ["long"], ["429", "cut", "500"], ["wrong"]])
def test_passing_trouble_is_waited_out(server, opened, tmp_path, faults):
    server.faults["shard-000001.tar"] = list(faults)
    assert opened().load_sample(5) == ShardSet(tmp_path / "set").load_sample(5)
    assert server.requests["shard-000001.tar"] == len(faults) + 1
    assert not [name for name in _cached(tmp_path / "cache") if "partial" in name]


def test_what_does_not_end_is_not_read_to_its_end(server, opened, tmp_path):
    server.faults = {"manifest.json": ["endless"], "shard-000000.tar": ["endless"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "MAX_MANIFEST", 10**6)
        assert opened().load_sample(0) == ShardSet(tmp_path / "set").load_sample(0)
    assert server.sent < 50 * 2**20


@pytest.mark.parametrize(
    "faults, requests, message",
    [
        (["503"] * 9, 6, "shard-000001.tar: cannot be fetched: ClientResponseError: 503"),
        (["cut"] * 9, 6, "shard-000001.tar: cannot be fetched: ClientPayloadError"),
        (["403"] * 9, 1, "shard-000001.tar: cannot be fetched: .*403"),
        (["404"] * 9, 1, "shard-000001.tar: no such file"),
        (["wrong"] * 9, 2, "shard-000001.tar: arrived twice with sha256 .*, the manifest says"),
    ],
)
def test_lasting_trouble_is_one_clear_error(server, opened, faults, requests, message):
    server.faults["shard-000001.tar"] = list(faults)
    shards = opened()
    with pytest.raises(DataError, match=message):
        shards.load_sample(5)
    assert server.requests["shard-000001.tar"] == requests
    assert shards.load_sample(0)[0].key == "sample-000"


def test_missing_and_malformed_manifest_name_the_address(server, tmp_path):
    with pytest.raises(DataError, match=f"{server.address}/none/manifest.json: no such file"):
        ShardSet(f"{server.address}/none", cache_dir=tmp_path / "cache")
    (tmp_path / "set" / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match=f"{server.address}/set/manifest.json: malformed"):
        ShardSet(f"{server.address}/set", cache_dir=tmp_path / "cache")


def _load_all(shards: ShardSet) -> list[str]:
    return [sample.key for sample, _ in shards]


def test_processes_share_one_download_and_one_manifest(server, opened, tmp_path):
    shards = opened()
    (tmp_path / "set" / "manifest.json").unlink()  # who gets the set pickled does not ask again
    with ProcessPoolExecutor(3, mp_context=get_context("fork")) as pool:
        assert list(pool.map(_load_all, [shards] * 3)) == [shards.keys()] * 3
    assert set(server.requests.values()) == {1}
    assert pickle.loads(pickle.dumps(shards)).load_sample(3) == shards.load_sample(3)


def test_longest_unused_files_go_and_open_ones_stay_readable(server, tmp_path):
    local = ShardSet(tmp_path / "set")
    bound = max(info.bytes for info in (local.manifest.index, *local.manifest.shards)) + 1  # one file
    folder = tmp_path / "cache"
    shards = ShardSet(f"{server.address}/set", cache_dir=folder, cache_bytes=bound)
    first = shards.load_sample(0)
    assert shards.load_sample(9) == local.load_sample(9)
    assert _cached(folder) == [local.manifest.shards[2].sha256] and shards.keys() == local.keys()
    assert shards.load_sample(0) == first and server.requests["shard-000000.tar"] == 1  # by the open file
    shards._local = threading.local()
    assert shards.load_sample(0) == first and server.requests["shard-000000.tar"] == 2


def test_room_is_made_by_age_and_not_from_what_others_are_downloading(tmp_path):
    names = ["a" * 64 + ".400.partial", "b" * 64 + ".400.partial", "c" * 64, "d" * 64]
    running, dead, old, new = (tmp_path / name for name in names)
    for age, path in enumerate((new, old, dead, running)):
        path.write_bytes(bytes(100))
        os.utime(path, (1000 - age, 1000 - age))
    with open(running, "rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        Cache(tmp_path, 1100)._make_room("url", 500, tmp_path / ("e" * 64))
        assert new.exists() and old.exists() and not dead.exists()  # 400 reserved, 100, 100, 500
        Cache(tmp_path, 1100)._make_room("url", 900, tmp_path / ("e" * 64))
    assert running.exists() and not new.exists()


def test_full_disk_and_small_cache_say_so(server, opened, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="do not fit into a cache of 10; allow it more"):
        opened(cache_bytes=10)
    shards = opened()
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 5}))
    with pytest.raises(DataError, match=r"do not fit on the disk of .*, which has 5 free.*VLM_TRAIN_CACHE"):
        shards.load_sample(0)


def test_cached_file_of_another_size_is_fetched_again(server, opened, tmp_path):
    path = tmp_path / "cache" / ShardSet(tmp_path / "set").manifest.shards[0].sha256
    opened().load_sample(0)
    path.write_bytes(path.read_bytes()[:100])
    assert opened().load_sample(0)[0].key == "sample-000" and server.requests["shard-000000.tar"] == 2


def test_bytes_that_come_one_by_one_for_ever_are_not_waited_for(server, opened, monkeypatch):
    shards = opened()
    monkeypatch.setattr(remote, "time", SimpleNamespace(monotonic=lambda: 100.0 * server.dripped))
    server.faults["shard-000000.tar"] = ["drip"]
    assert shards.load_sample(0)[0].key == "sample-000" and server.requests["shard-000000.tar"] == 2
    server.faults["shard-000001.tar"] = ["drip"] * remote.ATTEMPTS
    with pytest.raises(DataError, match=r"shard-000001\.tar: cannot be fetched: .*: 1 bytes in 100 s"):
        shards.load_sample(5)


@pytest.mark.parametrize("name", ["shard-000000.tar", "index.npz"])
def test_a_copy_that_was_damaged_in_the_cache_is_fetched_again(server, opened, tmp_path, name):
    """Its size is right. Each process that has it open finds out by itself."""
    local = ShardSet(tmp_path / "set")
    files = {info.name: info.sha256 for info in (local.manifest.index, *local.manifest.shards)}
    early, path = opened(), tmp_path / "cache" / files[name]
    early.load_sample(0)
    data = bytearray(path.read_bytes())
    for position in range(700, len(data)):  # in place: who has it open sees it
        data[position] ^= 1
    path.write_bytes(data)
    late = opened()
    assert list(late) == list(local) == list(opened()) and server.requests[name] == 2
    if name != "index.npz":
        assert list(early) == list(local) and server.requests[name] == 2
    late.verify_hashes()


def test_a_damaged_sample_of_a_whole_copy_stays_a_bad_sample(server, opened, monkeypatch):
    far = opened()
    monkeypatch.setattr("data_pipelines.shards.shard_set.crc32", lambda data: -1)
    with pytest.raises(BadSample, match="checksum differs"):
        far.load_sample(0)
    assert server.requests["shard-000000.tar"] == 1


def test_content_decides_the_name_so_sets_share_files(tmp_path, monkeypatch):
    calls = []

    def get(url, path, exactly, at_most):
        calls.append(url)
        Path(path).write_bytes(b"data")

    monkeypatch.setattr(remote, "_download_once", get)
    info = FileInfo(name="x", bytes=4, sha256=hashlib.sha256(b"data").hexdigest())
    cache = Cache(tmp_path, 100)
    assert (
        cache.open_cached("s3://a/x", info).read() == cache.open_cached("s3://b/y", info).read() == b"data"
        and len(calls) == 1
    )
    with pytest.raises(DataError, match="gives no sha256, but '../escape'"):
        cache.open_cached("s3://a/x", FileInfo(name="x", bytes=4, sha256="../escape"))


def test_missing_package_says_what_to_install(tmp_path, monkeypatch):
    def get(*_):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(remote, "_download_once", get)
    with pytest.raises(DataError, match=r"s3://a/set/manifest.json: .*pip install 'vlm-train\[remote\]'.*s3fs"):
        ShardSet("s3://a/set")


@pytest.mark.parametrize("error", [TypeError("a bug"), KeyError("a bug")])
def test_programming_errors_are_neither_retried_nor_hidden(tmp_path, monkeypatch, error):
    calls = []

    def get(*_):
        calls.append(1)
        raise error

    monkeypatch.setattr(remote, "_download_once", get)
    with pytest.raises(type(error), match="a bug"):
        remote.download_file("s3://a/x", tmp_path / "x")
    assert len(calls) == 1


@pytest.mark.parametrize(
    "address",
    ["pipe:cat /etc/passwd", "pipe://cat", "ftp://host/set", "simplecache::s3://b/set", "github://a:b@/", "memory://x"],
)
def test_other_schemes_are_refused(address):
    with pytest.raises(DataError, match="not read from there; allowed: a folder, file://, http://"):
        ShardSet(address)


def test_addresses(shard_set, monkeypatch, tmp_path):
    assert len(ShardSet(f"file://{shard_set()}")) == 10
    assert is_remote("s3://bucket/set") and not is_remote("data/a:b")
    with pytest.raises(DataError, match="credentials by the environment"):
        is_remote("https://user:secret@host/set")
    assert join_address("s3://bucket/a/view/", "../set/0.tar") == "s3://bucket/a/set/0.tar"
    assert join_address("s3://bucket/a", "../../../other/0.tar") == "s3://bucket/other/0.tar"
    monkeypatch.setenv("VLM_TRAIN_CACHE", str(tmp_path / "here"))
    assert default_cache() == tmp_path / "here"
