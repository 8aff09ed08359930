"""Filters: each drops what it says, and what is left is the same set as a view and as a copy."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data_pipelines.cli import CONF
from data_pipelines.errors import DataError
from data_pipelines.filter import main as filter_command
from data_pipelines.filters.common import Duplicates, Scores
from data_pipelines.filters.image import AspectRatio, Corrupt, ImageSize, SimilarImages
from data_pipelines.filters.judging import Verdicts, judge_samples
from data_pipelines.filters.text import Language, SimilarTexts, TextLength
from data_pipelines.filters.views import write_view
from data_pipelines.index import main as index_command
from data_pipelines.lint import main as lint
from data_pipelines.media.limits import image_item
from data_pipelines.sample import Annotation, Sample, Text, Turn
from data_pipelines.shards.index_file import IndexBuilder
from data_pipelines.shards.index_parts import IndexParts
from data_pipelines.shards.manifest import Manifest
from data_pipelines.shards.shard_set import ShardSet
from data_pipelines.shards.stats import Stats
from data_pipelines.shards.tar_writer import ShardWriter

FOX = "The quick brown fox jumps over the lazy dog and then runs away into the dark forest behind the old house"
GERMAN = "Der schnelle braune Fuchs springt über den faulen Hund und läuft dann in den dunklen Wald hinter dem Haus"


def _png(size=(80, 60), shift=0, quality=None, flip=False, turn=False) -> bytes:
    rows, columns = np.mgrid[: size[1], : size[0]]
    pixels = np.stack([(3 * columns + shift) % 256, 2 * rows % 256, (columns * rows) % 256], -1).astype(np.uint8)
    image = Image.fromarray(pixels[::-1].copy() if flip else pixels)
    ImageDraw.Draw(image).ellipse((10, 10, 40, 50), fill="black")
    image = image.rotate(90) if turn else image
    file = io.BytesIO()
    image.save(file, "JPEG" if quality else "PNG", **({"quality": quality} if quality else {}))
    return file.getvalue()


def _sample(key: str, text: str = "yes", blobs: tuple[bytes, ...] = (), **meta) -> tuple[Sample, list[bytes]]:
    turns = (Turn(role="user", parts=(Text(text="?"),)), Turn(role="assistant", parts=(Text(text=text),)))
    media = tuple(image_item(i, blob) for i, blob in enumerate(blobs))
    return Sample(key=key, media=media, annotations=(Annotation(turns=turns),), meta=meta), list(blobs)


@pytest.fixture
def made(tmp_path):
    def make(*records, name="set", per_shard=2) -> ShardSet:
        with ShardWriter(tmp_path / name, source="s", license="MIT", samples_per_shard=per_shard) as writer:
            for record in records:
                writer.write_sample(*record)
        return ShardSet(tmp_path / name)

    return make


def _dropped(shards: ShardSet, one, workers: int = 1) -> dict[str, str]:
    return {row["key"]: row["reason"] for row in judge_samples(shards, {"f": one}, workers=workers).dropped}


def test_sizes_and_ratios(made):
    shards = made(
        _sample("small", blobs=(_png(), _png((90, 20)))), _sample("fine", blobs=(_png(),)), _sample("text"),
        _sample("large", blobs=(_png((300, 200)),)),
    )  # fmt: skip
    sizes = ImageSize(min_side=21, max_side=299)
    assert _dropped(shards, sizes) == {"small": "shorter side below 21", "large": "longer side above 299"}
    assert _dropped(shards, ImageSize(min_side=20, max_side=300)) == {}
    assert _dropped(shards, AspectRatio(max_ratio=4.4)) == {"small": "aspect ratio above 4.4"}
    assert _dropped(shards, AspectRatio(max_ratio=4.5)) == {}


def test_pictures_that_do_not_decode(made):
    shards = made(_sample("cut", blobs=(_png(), _png(quality=90)[:-900])), _sample("fine", blobs=(_png(),)))
    assert _dropped(shards, Corrupt()) == {"cut": "picture does not decode"}
    for filters, name in (({"similar": SimilarImages()}, "read"), ({"cut": Corrupt(), "s": SimilarImages()}, "cut")):
        assert [(row["key"], row["filter"]) for row in judge_samples(shards, filters).dropped] == [("cut", name)]


def test_members_that_cannot_be_read_are_dropped(made):
    shards = made(*(_sample(key, blobs=(_png(shift=i),)) for i, key in enumerate("abc")))
    place = shards.index.locate_sample(1).members[1]
    with open(shards.folder / "shard-000000.tar", "r+b") as file:
        file.seek(place.offset + 50)
        file.write(b"damage")
    verdicts = judge_samples(ShardSet(shards.folder), {"f": AspectRatio(max_ratio=9)})
    assert [row["key"] for row in verdicts.dropped] == ["b"]
    assert list(verdicts.count_dropped()) == ["read: member ….png is corrupt (checksum differs from the index)"]


def test_text_length_counts_the_turns_of_the_roles(made):
    shards = made(_sample("short", "ab"), _sample("fine", "abcd"), _sample("long", "abcdefgh"))
    both = TextLength(min_chars=4, max_chars=8)
    assert _dropped(shards, both) == {"short": "characters below 4", "long": "characters above 8"}
    assert _dropped(shards, TextLength(min_chars=3, roles=["assistant"])) == {"short": "characters below 3"}


def test_language(made):
    shards = made(_sample("en", FOX), _sample("de", GERMAN), _sample("few", "ja"))
    assert _dropped(shards, Language(allowed=["en"])) == {"de": "language de"}
    assert _dropped(shards, Language(allowed=["en", "de"])) == {}
    assert set(_dropped(shards, Language(allowed=["en", "de"], min_probability=1.1))) == {"en", "de"}


def test_exact_duplicates(made):
    one, two = _png(), _png(shift=9)
    shards = made(
        _sample("a", "A  cat", (one,)), _sample("b", "a CAT\n", (one,)), _sample("c", "a cat", (two,)),
        _sample("d", "dog", (one,)), _sample("e", "a cat"), _sample("f", "ａ cat"), _sample("g", "dog", (one, two)),
    )  # fmt: skip
    assert _dropped(shards, Duplicates()) == dict.fromkeys("bf", "same media and text as an earlier sample")
    assert set(_dropped(shards, Duplicates(text=False))) == {"b", "d"}
    assert set(_dropped(shards, Duplicates(media=False))) == {"b", "c", "e", "f", "g"}


def test_similar_images(made):
    one, again, other = _png(), _png(quality=60), _png(flip=True)
    shards = made(
        _sample("a", blobs=(one,)), _sample("b", blobs=(again,)), _sample("c", blobs=(other,)), _sample("d"),
        _sample("e", blobs=(other, again)), _sample("f", blobs=(other, _png(turn=True))),
    )  # fmt: skip
    reason = "pictures look like those of an earlier sample"
    assert _dropped(shards, SimilarImages(max_distance=6)) == {"b": reason, "e": reason}


@pytest.mark.parametrize("distance", [0, 3, 9])
def test_similar_images_finds_every_pair(distance):
    rng = np.random.default_rng(0)
    for _ in range(50):
        one = int(rng.integers(2**63))
        near = one
        for bit in rng.choice(64, distance, replace=False):
            near ^= 1 << int(bit)
        far = near ^ sum(1 << b for b in range(64) if not (one ^ near) >> b & 1 and b % 2)
        same = SimilarImages(max_distance=distance)
        assert same.verdict("a", [one]) is None and same.verdict("b", [near]) and same.verdict("c", [far]) is None


def test_similar_texts(made):
    shards = made(_sample("a", FOX), _sample("b", FOX.replace("old", "big")), _sample("c", GERMAN), _sample("d", "ok"))
    assert _dropped(shards, SimilarTexts(threshold=0.6)) == {"b": "text is nearly that of an earlier sample"}
    assert _dropped(shards, SimilarTexts(threshold=0.95)) == {}


def test_scores_of_meta_and_of_files(made, tmp_path):
    records = [_sample(key, clip=value) for key, value in (("a", 0.1), ("b", 0.5), ("c", None), ("d", "x"))]
    shards = made(*records)
    low = {"a": "clip below 0.3", "c": "no clip", "d": "no clip"}
    assert _dropped(shards, Scores(ranges={"clip": [0.3, None]})) == low
    assert _dropped(shards, Scores(ranges={"clip": [None, 0.3]}, keep_missing=True)) == {"b": "clip above 0.3"}
    rows = [{"key": "a", "clip": 0.9, "blur": 1}, {"key": "b", "clip": 0.1, "blur": 2}, {"key": "d", "clip": 0.8}]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist(rows), tmp_path / "s.parquet")
    for name in ("s.jsonl", "s.parquet"):
        scores = Scores(ranges={"clip": [0.5, None], "blur": [None, 1.5]}, file=str(tmp_path / name))
        assert _dropped(shards, scores) == {"b": "clip below 0.5", "c": "no clip", "d": "no blur"}
    with pytest.raises(DataError, match="no column sharp; its columns: key, clip, blur"):
        _dropped(shards, Scores(ranges={"sharp": [0, 1]}, file=str(tmp_path / "s.parquet")))
    (tmp_path / "bad.jsonl").write_text('{"key": "a"}\n{"key": "a"}\n')
    with pytest.raises(DataError, match="bad.jsonl, row 1: key 'a' was there before"):
        _dropped(shards, Scores(ranges={"clip": [0, 1]}, file=str(tmp_path / "bad.jsonl")))
    (tmp_path / "note.jsonl").write_text(json.dumps({"key": "a", "n": "x\u2028y", "clip": 0.1}, ensure_ascii=False))
    assert (
        _dropped(shards, Scores(ranges={"clip": [0.5, 1]}, file=str(tmp_path / "note.jsonl")))["a"] == "clip below 0.5"
    )
    (tmp_path / "cut.jsonl").write_text('{"key": "a"}\n\n{"key": "b\n')
    with pytest.raises(DataError, match="cut.jsonl, line 3: not JSON"):
        _dropped(shards, Scores(ranges={"clip": [0, 1]}, file=str(tmp_path / "cut.jsonl")))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="not a readable parquet file"):
        _dropped(shards, Scores(ranges={"clip": [0, 1]}, file=str(tmp_path / "bad.parquet")))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: ImageSize(), lambda: ImageSize(min_side=9, max_side=3), lambda: AspectRatio(max_ratio=0.5),
        lambda: TextLength(), lambda: TextLength(min_chars=1, roles=["human"]), lambda: Language(allowed=["klingon"]),
        lambda: Duplicates(media=False, text=False), lambda: SimilarImages(max_distance=64),
        lambda: SimilarTexts(threshold=0), lambda: Scores(ranges={}), lambda: Scores(ranges={"a": [1]}),
        lambda: Scores(ranges={"a": [0, 1]}, file="none.jsonl"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(wrong):
    with pytest.raises(DataError):
        wrong()


def test_a_dropped_sample_is_nobodys_original(made):
    shards = made(_sample("a", "cat", (_png((20, 20)),)), _sample("b", "cat", (_png(),)), _sample("c", "cat"))
    filters = {"size": ImageSize(min_side=40), "same": Duplicates(media=False)}
    assert [(r["key"], r["filter"]) for r in judge_samples(shards, filters).dropped] == [("a", "size"), ("c", "same")]


def test_view_and_copy_hold_the_same_samples(made, tmp_path, capsys):
    shards = made(*(_sample(f"k{i}", "x" * i, (_png(shift=i),)) for i in range(9)))
    command = [f"folder={tmp_path / 'set'}", "filter=[text_length,duplicates]", "filters.text_length.min_chars=4"]
    assert filter_command([*command, "filters.text_length.max_chars=8", f"output={tmp_path / 'view'}"]) == 0
    assert "5 of 9 samples kept" in capsys.readouterr().out
    assert filter_command([*command, "filters.text_length.max_chars=8", "copy=true", f"output={tmp_path / 'c'}"]) == 0
    view, copy = ShardSet(tmp_path / "view"), ShardSet(tmp_path / "c")
    assert view.keys() == copy.keys() == [f"k{i}" for i in range(3, 8)]
    assert list(view) == list(copy) == [shards.load_sample(i) for i in range(3, 8)]
    assert [view.media_items(i) for i in range(5)] == [copy.media_items(i) for i in range(5)]
    assert view.manifest.stats == copy.manifest.stats and view.manifest.license == "MIT"
    assert sorted(path.name for path in view.folder.iterdir()) == ["dropped.jsonl", "index.npz", "manifest.json"]
    assert [info.name for info in view.manifest.shards] == [f"../set/shard-00000{i}.tar" for i in (1, 2, 3)]
    assert [info.samples for info in view.manifest.shards] == [1, 2, 2]
    counts = {"text_length: characters below 4": 3, "text_length: characters above 8": 1}
    assert view.manifest.dropped == copy.manifest.dropped == counts
    assert len((tmp_path / "view" / "dropped.jsonl").read_text().splitlines()) == 4
    view.verify_hashes()
    copy.verify_hashes()


def test_a_view_of_a_view_and_its_fingerprint(made, tmp_path):
    made(*(_sample(f"k{i}", "x" * (i % 4)) for i in range(8)))
    for folder, output, low in (("set", "one", 2), ("one", "two", 3), ("set", "other", 3)):
        command = [f"folder={tmp_path / folder}", f"output={tmp_path / output}", "filter=[text_length]"]
        assert filter_command([*command, f"filters.text_length.min_chars={low}"]) == 0
    one, two, other = (ShardSet(tmp_path / name) for name in ("one", "two", "other"))
    assert len(one) == 6 and two.keys() == other.keys() == ["k2", "k3", "k6", "k7"]
    assert two.fingerprint == other.fingerprint != one.fingerprint
    assert {info.name.split("/")[1] for info in two.manifest.shards} == {"set"}


def test_views_of_other_samples_have_other_fingerprints(made, tmp_path):
    shards = made(_sample("a", "x"), _sample("b", "xx"))
    for name in ("one", "two", "same"):
        kept = np.array([1 if name == "two" else 0])
        write_view(shards, tmp_path / name, Verdicts(kept=kept, stats=Stats(), dropped=[]), {}, overwrite=False)
    one, two, same = (ShardSet(tmp_path / name) for name in ("one", "two", "same"))
    assert [info.samples for info in one.manifest.shards] == [info.samples for info in two.manifest.shards] == [1]
    assert one.fingerprint == same.fingerprint != two.fingerprint


def test_filtering_twice_and_again(made, tmp_path, capsys):
    made(*(_sample(f"k{i}", "x" * i) for i in range(5)))
    command = [f"folder={tmp_path / 'set'}", f"output={tmp_path / 'view'}", "filter=[text_length]"]
    assert filter_command([*command, "filters.text_length.min_chars=3"]) == 0
    assert filter_command([*command, "filters.text_length.min_chars=3"]) == 0
    assert "already filtered (3 samples)" in capsys.readouterr().out
    assert filter_command([*command, "filters.text_length.min_chars=4"]) == 2
    assert "filters.text_length.min_chars: 3 there, 4 now" in capsys.readouterr().err
    assert filter_command([*command, "filters.text_length.min_chars=4", "force=true"]) == 0
    assert len(ShardSet(tmp_path / "view")) == 2
    (tmp_path / "set" / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match=r"data_pipelines.filter folder=\S+ 'filter=\[\"text_length\"\]' filters.text"):
        ShardSet(tmp_path / "view")
    assert filter_command([*command, "filters.text_length.min_chars=99", "force=true"]) == 2


def test_the_same_verdicts_for_any_number_of_processes(made, tmp_path):
    made(*(_sample(f"k{i}", FOX.replace("old", "big") if i % 3 else FOX, (_png(shift=i % 5),)) for i in range(150)))
    for workers in (1, 2):
        command = [f"folder={tmp_path / 'set'}", f"output={tmp_path / f'view{workers}'}", f"workers={workers}"]
        assert filter_command([*command, "filter=[duplicates,similar_texts]"]) == 0
    for name in ("index.npz", "dropped.jsonl", "manifest.json"):
        assert (tmp_path / "view1" / name).read_bytes() == (tmp_path / "view2" / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["filter=[nonsense]"], "text_length"),
        (["filter=[]"], "filter: none is given"),
        (["filter=[text_length]", "filters.text_length.min_char=1"], "min_char"),
        (["filter=[text_length]", "+filters.text_length.size=1"], "has no option size"),
        (
            ["filter=[text_length]", "filters.text_length.min_chars=few"],
            "filters.text_length.min_chars: got 'few'; exp",
        ),
        (["filter=[text_length]", "filters.text_length.roles=[1]"], "roles: got [1]; expected Sequence[str]"),
        (["filter=[scores]", "filters.scores.ranges={a: 3}"], "filters.scores.ranges: got {'a': 3}; expected Mapping"),
        (["filter=[]", "+filters.mine._target_=os.system"], "filters.mine._target_: 'os.system' is not trusted"),
        (["filter=[scores]"], "not given: filters.scores.ranges=<value>"),
    ],
)
def test_wrong_arguments_end_in_one_plain_error(made, tmp_path, arguments, message, capsys):
    made(_sample("a"))
    assert filter_command([f"folder={tmp_path / 'set'}", f"output={tmp_path / 'view'}", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and not (tmp_path / "view").exists()


def test_a_view_lies_beside_its_set(made, tmp_path, capsys):
    made(_sample("a", "xx"))
    command = [f"folder={tmp_path / 'set'}", f"output={tmp_path / 'deep' / 'view'}", "filter=[text_length]"]
    assert filter_command(command) == 2 and "copy=true writes the samples anywhere" in capsys.readouterr().err
    assert filter_command([*command, "copy=true"]) == 0


@pytest.mark.parametrize("output", ["set", "link", "view/../set"])
def test_a_set_is_never_replaced_by_a_view_of_it(made, tmp_path, output, capsys):
    made(_sample("a", "xx"))
    command = ["filter=[text_length]", "force=true"]
    assert filter_command([f"folder={tmp_path / 'set'}", f"output={tmp_path / 'view'}", *command]) == 0
    (tmp_path / "link").symlink_to("set")
    for folder in ("set", "view"):
        assert filter_command([f"folder={tmp_path / folder}", f"output={tmp_path / output}", *command]) == 2
        assert "choose another" in capsys.readouterr().err
    assert len(list(ShardSet(tmp_path / "set"))) == len(list(ShardSet(tmp_path / "view"))) == 1


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd", "../../x/shard.tar", "../x/../y.tar", "../x/y/z.tar", "../.hidden/s.tar", "../x/.s.tar", "..",
        "../x/manifest.json", "x/y.tar", "../x/y.tar\n", "../x\\..\\y.tar", "../../shard.tar", "./a.tar", "~/a.tar", "",
        "http://x/y.tar",
    ],
)  # fmt: skip
def test_manifests_reach_shards_of_sets_beside_them_alone(made, tmp_path, name):
    shards = made(_sample("a"))
    data = json.loads((shards.folder / "manifest.json").read_text())
    data["shards"][0]["name"] = name
    (shards.folder / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(DataError, match=r"malformed.*is a path"):
        Manifest.read(shards.folder)
    data["shards"][0]["name"], data["index"]["name"] = "shard-000000.tar", "../set/index.tar"
    (shards.folder / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(DataError, match="is a path"):
        Manifest.read(shards.folder)


@pytest.mark.parametrize("path", sorted((CONF / "filter").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_filter_is_reached_by_name(made, tmp_path, path):
    made(_sample("a", "a sentence", (_png(),), clip=1))
    more = ["filters.scores.ranges={clip:[0,1]}"] if path.stem == "scores" else []
    more += ["filters.image_size.min_side=9"] if path.stem == "image_size" else []
    command = [f"folder={tmp_path / 'set'}", f"output={tmp_path / 'view'}", f"filter=[{path.stem}]", *more]
    assert filter_command(command) == 0 and len(ShardSet(tmp_path / "view")) == 1
    built = dict(Manifest.read(tmp_path / "view").build)
    again = [f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in built.items()]
    assert filter_command([*again, f"output={tmp_path / 'view'}"]) == 0  # the recorded arguments are a command


@pytest.fixture
def parts(tmp_path, tar):
    """`parts(*texts of a shard)`: a set of captions with one index a shard; keys come again in every shard."""

    def make(*shards: list[str], output: str = "set") -> ShardSet:
        for number, texts in enumerate(shards):
            members = [
                (f"k{i}.{name}", data)
                for i, text in enumerate(texts)
                for name, data in (("png", _png(shift=i)), ("txt", text.encode()))
            ]
            tar(tmp_path / "tars" / f"{number}.tar", members)
        assert index_command([f"shards={tmp_path / 'tars'}", f"output={tmp_path / output}", "workers=1"]) == 0
        return ShardSet(tmp_path / output)

    return make


@pytest.mark.parametrize("folder", ["set", "tars"])
def test_a_view_of_a_set_with_one_index_a_shard(parts, tmp_path, capsys, folder):
    shards = parts(["aaaa", "b", "cccc"], ["d"], ["eeee", "aaaa"], output=folder)  # `tars`: indexes beside the tars
    output = tmp_path / "view" if folder == "tars" else tmp_path / "deep" / "view"  # addresses reach from anywhere
    (tmp_path / "deep").mkdir()
    command = [f"folder={tmp_path / folder}", "filter=[text_length,duplicates]", "filters.text_length.min_chars=2"]
    command.append("filters.duplicates.media=false")
    for workers in (1, 2):
        assert filter_command([*command, f"output={output}", f"workers={workers}", "force=true"]) == 0
        out = capsys.readouterr().out
        assert "3 of 6 samples kept" in out and "2  text_length: characters below 2" in out
        view = ShardSet(output)
        assert list(view) == [shards.load_sample(i) for i in (0, 2, 4)] and view.keys() == ["k0", "k2", "k0"]
        assert view.manifest.layout == shards.manifest.layout and isinstance(view.index, IndexParts)
        assert view.shard_starts.tolist() == view.find_runs().tolist() == [0, 2]
        assert [Path(view.shard_path(i)).name for i in range(3)] == ["0.tar", "0.tar", "2.tar"]
        assert [info.samples for info in view.manifest.shards] == [2, 1] and view.fingerprint != shards.fingerprint
        assert view.manifest.stats["media"]["count"] == 3 and sum(view.manifest.dropped.values()) == 3
        rows = [json.loads(line) for line in (output / "dropped.jsonl").read_text().splitlines()]
        assert [(Path(row["shard"]).name, row["key"]) for row in rows] == [
            ("0.tar", "k1"), ("1.tar", "k0"), ("2.tar", "k1"),
        ]  # fmt: skip
        view.verify_hashes()
        assert lint([f"folder={output}", "max_problems=0"]) == 0
    assert filter_command([*command, f"output={output}"]) == 0 and "already filtered (3" in capsys.readouterr().out
    again = [f"folder={output}", f"output={output.with_name('again')}", "filter=[duplicates]"]
    assert filter_command(again) == 0 and list(ShardSet(output.with_name("again"))) == list(view)
    part = output / "index" / "000001.npz"
    part.write_bytes(bytes(part.stat().st_size))
    with pytest.raises(DataError, match=r"000001.npz: not a readable index.*pipelines.filter folder=.* force=true"):
        ShardSet(output).load_sample(2)


def test_such_a_view_holds_the_keys_of_one_shard(parts, tmp_path, monkeypatch):
    parts(*(["x" * n] * 9 for n in range(1, 5)))
    held, inner = [], IndexBuilder.add_index
    monkeypatch.setattr(IndexBuilder, "add_index", lambda self, *more: inner(self, *more) or held.append(len(self)))
    for name in ("keys", "shard"):
        monkeypatch.setattr(IndexParts, name, None)  # of all samples
    command = [f"folder={tmp_path / 'set'}", f"output={tmp_path / 'view'}", "workers=1", "filter=[text_length]"]
    assert filter_command([*command, "filters.text_length.min_chars=2"]) == 0 and held == [9, 9, 9]


def test_such_a_view_that_keeps_nothing_or_fails_leaves_nothing(parts, tmp_path, monkeypatch, capsys):
    parts(["a"], ["b"])
    command = [f"folder={tmp_path / 'set'}", f"output={tmp_path / 'view'}", "workers=1", "filter=[text_length]"]
    assert filter_command([*command, "filters.text_length.min_chars=9"]) == 2
    assert "no sample is left: {'text_length: characters below 9': 2}" in capsys.readouterr().err
    monkeypatch.setattr(IndexBuilder, "write_file", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    assert filter_command(command) == 2 and "disk full" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "tars"]


def test_where_no_view_can_be_is_said_before_the_work(made, tmp_path, monkeypatch, capsys):
    made(_sample("a"))
    monkeypatch.setattr("data_pipelines.filter.judge_samples", None)
    command = [f"folder={tmp_path / 'set'}", f"output={tmp_path / 'deep' / 'view'}", "filter=[text_length]"]
    assert filter_command(command) == 2 and "has to lie beside the set" in capsys.readouterr().err
