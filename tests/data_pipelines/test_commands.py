"""The commands: build, index, inspect."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines.__main__ import main
from data_pipelines.build import main as build
from data_pipelines.cli import CONF, _compose_config
from data_pipelines.index import main as index
from data_pipelines.inspect import main as inspect
from data_pipelines.shards.manifest import Manifest
from data_pipelines.shards.shard_set import ShardSet

ROOT = Path(__file__).parents[2]


@pytest.fixture
def records(tmp_path):
    def make(good: int = 3, bad: int = 0) -> str:
        talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "<b>Hello</b>"}]
        rows = [{"id": i, "conversations": talk} for i in range(good)]
        rows += [{"id": f"bad{i}", "image": "x.jpg", "conversations": talk} for i in range(bad)]
        (tmp_path / "records.json").write_text(json.dumps(rows))
        return f"file={tmp_path / 'records.json'}"

    return make


def test_build_twice_does_nothing_the_second_time(tmp_path, records, capsys):
    arguments = ["source=llava_json", records(), f"output={tmp_path / 'out'}"]
    assert build(arguments) == 0
    before = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    assert build(arguments) == 0 and "already built (3 samples)" in capsys.readouterr().out
    assert build([*arguments, "max_bad=5"]) == 0  # does not change the set
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == before
    assert build([*arguments, "limit=2"]) == 2
    assert "built with other arguments (limit: None there, 2 now)" in capsys.readouterr().err
    assert build([*arguments, "limit=2", "force=true"]) == 0 and len(ShardSet(tmp_path / "out")) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "records.json"]


def test_error_of_a_damaged_set_is_the_command_that_builds_it(tmp_path, records, capsys):
    assert build(["source=llava_json", records(), f"output={tmp_path / 'out'}"]) == 0
    (tmp_path / "out" / "shard-000000.tar").unlink()
    assert inspect([f"folder={tmp_path / 'out'}"]) == 2
    command = capsys.readouterr().err.strip().splitlines()[-1].split("data_pipelines.build ")[1]
    assert build(shlex.split(command)) == 0 and len(ShardSet(tmp_path / "out")) == 3


def test_bad_records_are_quarantined_up_to_the_budget(tmp_path, records, capsys):
    arguments = ["source=llava_json", records(good=2, bad=3), f"output={tmp_path / 'out'}"]
    assert build([*arguments, "max_bad=2"]) == 2
    error = capsys.readouterr().err
    assert "3 bad records among 5, max_bad=2" in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()
    assert len((tmp_path / "out.quarantine.jsonl").read_text().splitlines()) == 3
    assert not (tmp_path / ".out.partial").exists()
    assert build([*arguments, "max_bad=3"]) == 0 and not (tmp_path / "out.quarantine.jsonl").exists()
    out = capsys.readouterr().out
    assert "3 records left out" in out and "3  … <image> tags in its human turns, … images" in out
    assert Manifest.read(tmp_path / "out").bad == {"… <image> tags in its human turns, … images": 3}
    lines = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [line["record"] for line in lines] == [2, 3, 4] and "'bad0'" in lines[0]["reason"]
    assert len(ShardSet(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["source=nonsense", "output=x"], "easy_vqa"),
        (["output=x"], "You must specify 'source'"),
        (["source=easy_vqa"], "not given: output=<value>"),
        (
            ["source=easy_vqa", "output=x", "splitt=val"],
            "no option 'splitt' (did you mean split?); options: allow_targets, captions,",
        ),
        (["source=easy_vqa", "output=x", "num_workers=2"], "no option 'num_workers' (did you mean workers?); options:"),
        (["source=easyvqa", "output=x"], "Could not find 'source/easyvqa' (did you mean easy_vqa?). Available:"),
        (
            ["source=nonsense", "output=x"],
            "Could not find 'source/nonsense'. Available: alpaca, captions, coco_captions",
        ),
        (["source=easy_vqa", "output=x", "--split"], "'--split' is not <option>=<value>"),
        (["source=easy_vqa", "output=x", "captions=2"], "captions: got 2; expected bool"),
        (["source=easy_vqa", "output=x", "workers=two"], "workers: got 'two'; allowed: 1 or more"),
        (["source=easy_vqa", "output=x", "samples_per_shard=1e3"], "samples_per_shard: got 1000.0; expected int"),
        (["source=sharegpt", "file=x", "output=x", "limit=-3"], "limit: got -3; allowed: 0 or more"),
        (["source=sharegpt", "file=x", "output=x", "limit=all"], "limit: got 'all'; expected int | None"),
        (["source=sharegpt", "file=x", "output=x", "name=7"], "name: got 7; expected str; as text: \"name='7'\""),
        (
            ["source=easy_vqa", "output=x", "+splitt=val"],
            "has no option splitt (did you mean split?)",
        ),
        (["source=sharegpt", "file=x", "output=x", "licence=MIT"], "no option 'licence': it is called license now"),
        (
            ["source=sharegpt", "file=x", "output=x", "+licence=MIT"],
            "has no option licence (did you mean license?)",
        ),
        (["source=easy_vqa", "output=x", "split=dev"], "allowed: train, val, trainval, test"),
        (["source=easy_vqa", "output=x", "_target_=os.system"], "'os.system' is not trusted"),
        (["source=llava_json", "output=x", "file=none.json"], "none.json: No such file"),
    ],
)
def test_wrong_arguments_end_in_one_plain_error(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert build(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "value",
    [
        "s3://bucket/laion/{00000..09999}.tar",
        "a photo of a {label}",
        "{a,b}.tar",
        "it's {label}",
        "C:\\data\\{label}\\",
        "it\\'s {x",
    ],
)
def test_values_that_are_no_yaml_are_text(value):
    assert _compose_config("build", ["source=folder", "folder=x", "output=y", f"label={value}"], [CONF]).label == value


def test_values_that_are_yaml_stay_what_they_are():
    given = ["source=folder", "folder=x", "output=y", "workers=2", "label='a b'", "allow_targets=[my.]"]
    config = _compose_config("build", given, [CONF])
    assert (config.workers, config.label, config.allow_targets) == (2, "a b", ["my."])


def test_help_shows_every_source(capsys):
    assert build(["--help"]) == 0
    out = capsys.readouterr().out
    assert "samples_per_shard" in out and all(f"source/{path.stem}" in out for path in (CONF / "source").glob("*.yaml"))


def test_index_command(tmp_path, tar, picture, capsys):
    tar(tmp_path / "0.tar", [("a.png", picture()), ("a.txt", b"x")])
    assert index([f"folder={tmp_path}", "name=mine"]) == 0
    assert index([f"folder={tmp_path}"]) == 0 and "force=true" in capsys.readouterr().out
    assert ShardSet(tmp_path).manifest.source == "mine"
    assert inspect([f"folder={tmp_path}"]) == 0 and "(0.tar; mine, license unknown)" in capsys.readouterr().out
    assert ShardSet(tmp_path).load_sample(0)[0].annotations[0].turns[1].text == "x"
    assert index([f"folder={tmp_path / 'none'}"]) == 2


def test_inspect_prints_and_writes_an_escaped_page(tmp_path, shard_set, records, capsys):
    assert inspect([f"folder={shard_set()}", "n=2", "start=1", f"html={tmp_path / 'page.html'}"]) == 0
    out = capsys.readouterr().out
    assert "sample-001" in out and "[media 0] Which number? é 1" in out and "sample-003" not in out
    assert (tmp_path / "page.html").read_text().count("data:image/") == 3
    build(["source=llava_json", records(), f"output={tmp_path / 'out'}"])
    assert inspect([f"folder={tmp_path / 'out'}", f"html={tmp_path / 'page.html'}"]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "<b>Hello" not in page and "&lt;b&gt;Hello" in page


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("start=-5", "start: got -5; allowed: 0 or more"),
        ("n=few", "n: got 'few'; expected int"),
        ("random=few", "random: got 'few'"),
        ("random=-1", "random: got -1; allowed: 0 or more"),
    ],
)
def test_wrong_numbers_of_samples_to_show(shard_set, argument, message, capsys):
    assert inspect([f"folder={shard_set()}", argument]) == 2 and message in capsys.readouterr().err


def test_the_package_names_its_commands(capsys):
    main()
    out = capsys.readouterr().out
    assert all(f"\n{path.stem} " in f"\n{out}" for path in CONF.glob("*.yaml"))


def test_large_pictures_are_no_warnings():
    code = (
        "import io; from PIL import Image; from data_pipelines.errors import BadSample;"
        "from data_pipelines.media.limits import read_header; file = io.BytesIO();"
        "Image.new('1', (12000, 12000)).save(file, 'PNG')\n"
        "try: read_header(file.getvalue())\nexcept BadSample as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not done.stderr and done.stdout.startswith("image too large")


def test_data_pipelines_needs_neither_torch_nor_the_trainer():
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "data_pipelines").rglob("*.py")
    )
    code = f"import sys, {', '.join(modules)}; print(sorted({{m.split('.')[0] for m in sys.modules}}))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "data_pipelines" in loaded
    assert not {"torch", "vlm_train", "transformers", "lightning"} & set(eval(loaded))
