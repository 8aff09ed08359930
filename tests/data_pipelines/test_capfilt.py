"""CapFilt's data half: columns beside a set, and the set that is made of them."""

from __future__ import annotations

import json

import pytest

from data_pipelines.capfilt import main, with_caption
from data_pipelines.errors import BadSample, DataError
from data_pipelines.media.limits import image_item
from data_pipelines.sample import Annotation, Media, Sample, Text, Turn
from data_pipelines.shards.columns import COLUMNS, Columns, ColumnWriter, file_name
from data_pipelines.shards.manifest import Manifest
from data_pipelines.shards.shard_set import ShardSet
from data_pipelines.shards.tar_writer import ShardWriter


def captioned(key: str, *captions: str, blob: bytes, source: str = "web", **meta) -> tuple[Sample, list[bytes]]:
    annotations = tuple(
        Annotation(
            turns=(
                Turn(role="user", parts=(Media(item=0),)),
                Turn(role="assistant", parts=(Text(text=caption),)),
            )
        )
        for caption in captions
    )
    return Sample(key=key, media=(image_item(0, blob),), annotations=annotations, source=source, meta=meta), [blob]


@pytest.fixture
def made(tmp_path, picture):
    """Ten pairs in three shards, of which those with odd numbers have another one's caption."""

    def make(name: str = "set", count: int = 10) -> ShardSet:
        with ShardWriter(tmp_path / name, source="web", license="CC0", samples_per_shard=4) as writer:
            for i in range(count):
                source = "web" if i < 6 else "alt"
                right = i % 2 == 0
                text = f"picture {i if right else i + 1}"
                writer.write_sample(*captioned(f"k{i}", text, blob=picture(i), source=source, right=right))
        return ShardSet(tmp_path / name)

    return make


def columns(shards: ShardSet, folder, rows, names, **about):
    """Write `rows`, one per sample, as columns of `shards`."""
    writer = ColumnWriter(folder, shards, names, about)
    for shard in writer.missing_shards:
        writer.write_rows(shard, [row for i, row in enumerate(rows) if shards.index.shard[i] == shard])
    writer.write_manifest()
    return folder


def scores(shards: ShardSet, folder, values, **about):
    return columns(
        shards, folder, [{"key": shards.key(i), "match": v} for i, v in enumerate(values)], ["match"], **about
    )


def texts(folder) -> dict[str, list[str]]:
    return {sample.key: [a.turns[-1].text for a in sample.annotations] for sample, _ in ShardSet(folder)}


# Two of the five wrong ones are missed (k3, k9), one of the five right ones is lost (k4).
VALUES = [0.9, 0.1, 0.8, 0.7, 0.2, 0.3, 0.5, 0.1, 0.9, 0.6]


def test_noise_is_filtered_and_the_verdicts_are_told(made, tmp_path, capsys):
    shards = made()
    folder = scores(shards, tmp_path / "scores", [[v] for v in VALUES])
    arguments = [f"folder={shards.folder}", f"output={tmp_path / 'out'}", f"scores={folder}", "truth=right"]
    assert main(arguments) == 0
    assert set(texts(tmp_path / "out")) == {"k0", "k2", "k3", "k6", "k8", "k9"}
    said = capsys.readouterr().out
    for line in ("6 of 10 captions kept", "4  match below 0.5", "web: 3 kept, 3 dropped", "alt: 3 kept, 1 dropped"):
        assert line in said
    for line in ("precision of kept: 0.667", "recall of kept: 0.800"):
        assert line in said
    for line in ("precision of dropped: 0.750", "recall of dropped: 0.600"):
        assert line in said
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.origin["set"] == shards.fingerprint and manifest.build["ranges"] == {"match": [0.5, None]}
    assert manifest.origin["captions"] == {"alt": {"kept": 3, "dropped": 1}, "web": {"kept": 3, "dropped": 3}}
    assert manifest.origin["columns"]["scores"]["sha256"] == Columns(folder, shards, option="scores").sha256
    assert manifest.dropped == {"match below 0.5": 4}
    rows = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows] == ["k1", "k4", "k5", "k7"]

    assert main(arguments) == 0 and "already made" in capsys.readouterr().out
    assert main([*arguments, "ranges.match=[0.6,null]"]) == 2
    assert "built with other arguments (ranges" in capsys.readouterr().err


def test_captions_are_exchanged_and_filtered_by_their_own_scores(made, tmp_path, capsys):
    shards = made()
    rows = [{"key": f"k{i}", "caption": "" if i == 5 else f"new {i}"} for i in range(10)]
    captions = columns(shards, tmp_path / "captions", rows, ["caption"])
    sha = Columns(captions, shards, option="captions").sha256
    of_new = scores(shards, tmp_path / "of-new", [[v] for v in VALUES], captions=sha)
    of_old = scores(shards, tmp_path / "of-old", [[v] for v in VALUES])

    base = [f"folder={shards.folder}", f"captions={captions}"]
    assert main([*base, f"output={tmp_path / 'all'}"]) == 0
    assert texts(tmp_path / "all") == {f"k{i}": [f"new {i}"] for i in range(10) if i != 5}
    said = capsys.readouterr().out
    assert "9 of 10 captions kept" in said and "1  no caption" in said and "web: 5 kept, 1 dropped" in said
    assert main([*base, f"output={tmp_path / 'some'}", f"scores={of_new}"]) == 0
    assert texts(tmp_path / "some") == {f"k{i}": [f"new {i}"] for i in (0, 2, 3, 6, 8, 9)}

    capsys.readouterr()
    assert main([*base, f"output={tmp_path / 'no'}", f"scores={of_old}"]) == 2
    assert "those of the samples' own captions, but captions is" in capsys.readouterr().err
    assert main([f"folder={shards.folder}", f"output={tmp_path / 'no'}", f"scores={of_new}"]) == 2
    assert "those of the captions with sha256" in capsys.readouterr().err


def test_every_caption_of_a_sample_is_judged_alone(tmp_path, picture):
    with ShardWriter(tmp_path / "set") as writer:
        writer.write_sample(*captioned("a", "one", "two", "three", blob=picture(1)))
        writer.write_sample(*captioned("b", "four", blob=picture(2)))
        writer.write_sample(*captioned("c", "five", "six", blob=picture(3)))
    shards = ShardSet(tmp_path / "set")
    folder = scores(shards, tmp_path / "scores", [[0.9, 0.2, 0.6], 0.8, [0.9]])
    assert main([f"folder={shards.folder}", f"output={tmp_path / 'out'}", f"scores={folder}"]) == 0
    assert texts(tmp_path / "out") == {"a": ["one", "three"], "b": ["four"]}
    assert Manifest.read(tmp_path / "out").dropped == {"no match": 2, "match below 0.5": 1}


def test_columns_go_on_after_a_kill(made, tmp_path, capsys):
    shards, folder = made(), tmp_path / "columns"
    writer = ColumnWriter(folder, shards, ["match"], {"run": "a"})
    assert writer.missing_shards == [0, 1, 2]
    writer.write_rows(1, [{"key": "k4", "match": [0.1]}])
    (folder / f".{file_name(2)}.1.partial").write_text("{half")  # killed while it wrote
    with pytest.raises(DataError, match="it is unfinished"):
        Columns(folder, shards, option="scores")

    again = ColumnWriter(folder, shards, ["match"], {"run": "a"})
    assert again.missing_shards == [0, 2] and not again.complete
    for shard in again.missing_shards:
        again.write_rows(shard, [])
    again.write_manifest()
    assert Columns(folder, shards, ["match"], option="scores").read_row(4) == {"key": "k4", "match": [0.1]}
    assert ColumnWriter(folder, shards, ["match"], {"run": "a"}).complete
    with pytest.raises(DataError, match="made with other arguments .about.run: 'a' there, 'b' now"):
        ColumnWriter(folder, shards, ["match"], {"run": "b"})

    ColumnWriter(tmp_path / "other", shards, ["match"], {"run": "a"}).write_rows(0, [])
    assert ColumnWriter(tmp_path / "other", shards, ["match"], {"run": "b"}).missing_shards == [0, 1, 2]
    assert "with other arguments are deleted" in capsys.readouterr().err
    with pytest.raises(DataError, match="holds no columns"):
        ColumnWriter(shards.folder, shards, ["match"], {})


def test_columns_that_do_not_fit_are_named(made, tmp_path):
    shards = made()
    folder = scores(shards, tmp_path / "scores", [[v] for v in VALUES])
    with pytest.raises(DataError, match="scores: .*has no column clip; its columns: match"):
        Columns(folder, shards, ["clip"], option="scores")
    with pytest.raises(DataError, match="of another shard set"):
        Columns(folder, made("other", 9), option="scores")  # of as many shards
    with pytest.raises(DataError, match="has no columns.json"):
        Columns(shards.folder, shards, option="scores")
    with pytest.raises(DataError, match=r"a row has \['key'\]; expected \['key', 'match'\]"):
        ColumnWriter(tmp_path / "new", shards, ["match"], {}).write_rows(0, [{"key": "k0"}])
    with pytest.raises(DataError, match="not JSON"):
        ColumnWriter(tmp_path / "new", shards, ["match"], {}).write_rows(0, [{"key": "k0", "match": [float("nan")]}])
    (folder / file_name(0)).write_text("{}\n")
    with pytest.raises(DataError, match="shard-000000.jsonl: sha256"):
        Columns(folder, shards, option="scores").read_row(0)
    data = json.loads((folder / COLUMNS).read_text())
    data["files"][0]["name"] = "../set/shard-000000.tar"
    (folder / COLUMNS).write_text(json.dumps(data))
    with pytest.raises(DataError, match="malformed"):
        Columns(folder, shards, option="scores")


def test_options_are_checked(made, tmp_path, capsys):
    shards = made()
    base = [f"folder={shards.folder}", f"output={tmp_path / 'out'}"]
    folder = scores(shards, tmp_path / "scores", [[v] for v in VALUES])
    for more, message in (
        ([], "neither is given"),
        ([f"scores={folder}", "ranges.match=0.5"], "ranges.match: got 0.5"),
        ([f"scores={folder}", "truth=sure"], "truth: sample 'k0' has sure = None"),
        ([f"scores={folder}", "ranges.match=[2,null]"], "no caption is left: {'match below 2': 10}"),
        ([f"scores={folder}", "ranges.match=null", "+ranges.clip=[0,1]"], "has no column clip; its columns: match"),
    ):
        assert main([*base, *more]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_caption_needs_an_answer_to_replace(picture):
    sample, _ = captioned("a", "one", "two", blob=picture(1))
    assert [a.turns[-1].text for a in with_caption(sample, "new").annotations] == ["new"]
    asks = Sample(key="a", annotations=(Annotation(turns=(Turn(role="user", parts=(Text(text="?"),)),)),))
    with pytest.raises(BadSample, match="no answer"):
        with_caption(asks, "new")
