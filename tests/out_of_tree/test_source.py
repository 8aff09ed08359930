"""Field notes, a raw format of the package's own, become shards that are sound and that a run trains from."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipelines import build, inspect, lint
from data_pipelines.shards.shard_set import ShardSet
from tests.out_of_tree.command_line import CONF, assert_resumes_exactly, small_run, start
from tests.support.small_run import picture

TRUSTED = ["--config-dir", str(CONF), "allow_targets=[my_vlm.]", "workers=1"]


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """Twelve pictures with a question each, and one whose text is no note."""
    folder = tmp_path / "notes"
    folder.mkdir()
    for number in range(13):
        (folder / f"bird-{number:02d}.png").write_bytes(picture(number))
        text = f"Q: Which bird is this?\nA: Number {number}.\n" if number < 12 else "seen at dawn\n"
        (folder / f"bird-{number:02d}.txt").write_text(text)
    return folder


def test_a_run_trains_from_what_it_builds(notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = tmp_path / "shards"
    assert build.main([*TRUSTED, "source=my_notes", f"folder={notes}", f"output={shards}"]) == 0
    assert "12 samples" in (printed := capsys.readouterr().out)
    assert "1  bird-….txt: expected a line Q: and a line A:" in printed
    samples = ShardSet(shards)
    assert len(samples) == 12 and samples.manifest.source == "my_notes"
    assert lint.main([f"folder={shards}"]) == 0
    assert inspect.main([f"folder={shards}", "n=1"]) == 0
    assert "Which bird is this?" in capsys.readouterr().out

    trained = [f"data.train=[{{shards: {shards}}}]", "data.val=[]", "data.max_length=512", "data.workers=0"]
    assert_resumes_exactly(lambda name: small_run("connector", tmp_path, tmp_path, *trained, name=name), tmp_path)
    assert start([*small_run("connector", tmp_path, tmp_path, *trained), "dry_run=true"]) == 0


def test_help_and_errors_know_the_folder(notes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main([*TRUSTED, "--help"]) == 0
    printed = capsys.readouterr().out
    assert "--- source/my_notes\n" in printed and "--- source/tiny\n" in printed
    output = f"output={tmp_path / 'shards'}"
    wrong = {
        "source=my_nots": "Available: ",
        "source=my_notes foldr=x": "no option 'foldr' (did you mean folder?); options: allow_targets, engine, folder, ",
        "source=my_notes": "not given: folder=<value>",
        "source=my_notes folder=x allow_targets=[]": "'my_vlm.notes.FieldNotes' is not trusted",
    }
    for line, message in wrong.items():
        assert build.main([*TRUSTED, *line.split(), output]) == 2
        said = capsys.readouterr().err
        assert message in said and "Traceback" not in said
        if "Available" in message:
            assert "my_notes" in said and "tiny" in said
    assert build.main(["--config-dir", str(tmp_path / "none"), "source=my_notes", output]) == 2
    assert f"--config-dir: {tmp_path / 'none'} is not a folder" in capsys.readouterr().err
