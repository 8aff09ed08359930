"""`mode=caption` and `mode=score` of a trained tiny BLIP, and the set that is made of what they write."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from data_pipelines.capfilt import main as capfilt
from data_pipelines.media.limits import image_item
from data_pipelines.sample import Annotation, Media, Sample, Text, Turn
from data_pipelines.shards.columns import COLUMNS, Columns
from data_pipelines.shards.shard_set import ShardSet
from data_pipelines.shards.tar_writer import ShardWriter
from tests.support.small_run import picture
from vlm_train import cli
from vlm_train.build import build_assembly
from vlm_train.checkpoint.weights import save_weights
from vlm_train.config.compose import compose_config
from vlm_train.config.run_file import save_config
from vlm_train.models.families.blip import Blip
from vlm_train.runs.folder import RunFolder

FAST = ["columns.max_new_tokens=6", "columns.min_new_tokens=2", "columns.batch=2"]


def captioned(number: int, captions: int = 1, images: int = 1) -> tuple[Sample, list[bytes]]:
    """Sample `k<number>` whose captions are "a shape <number>", each one "x" longer than the one before."""
    blobs = [picture(number + i) for i in range(images)]
    show = Turn(role="user", parts=tuple(Media(item=i) for i in range(images)))
    answers = [Turn(role="assistant", parts=(Text(text=f"a shape {number}{'x' * n}"),)) for n in range(captions)]
    media = tuple(image_item(i, blob) for i, blob in enumerate(blobs))
    annotations = tuple(Annotation(turns=(show, answer)) for answer in answers)
    return Sample(key=f"k{number}", media=media, annotations=annotations, source="web"), blobs


def make_set(folder: Path, count: int = 7) -> Path:
    """Shards of 3; sample 2 has three captions, sample 4 two images."""
    with ShardWriter(folder, source="web", license="CC0", samples_per_shard=3) as writer:
        for number in range(count):
            captions, images = (3 if number == 2 else 1), (2 if number == 4 else 1)
            writer.write_sample(*captioned(number, captions, images))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has not learned anything yet."""
    folder = tmp_path_factory.mktemp("runs") / "blip"
    cfg = compose_config(["recipe=blip_base", "size=tiny", "run_name=blip", f"paths.runs={folder.parent}"])
    save_config(cfg, RunFolder(folder).config)
    model = build_assembly(cfg).model
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    save_weights(folder / "checkpoints", weights, run_id="blip", step=0)
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return make_set(tmp_path / "web")


def rows(folder: Path, shards: Path, name: str) -> dict:
    columns, found = Columns(folder, ShardSet(shards), option="columns"), {}
    for i in range(len(ShardSet(shards))):
        if row := columns.read_row(i):
            found[row["key"]] = row[name]
    return found


def test_captions_and_their_scores_become_a_set(run: Path, shards: Path, tmp_path: Path, capsys) -> None:
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    base = [f"run={run}", f"columns.shards={shards}", *FAST]
    assert cli.main(["mode=caption", *base]) == 0
    said = capsys.readouterr().out
    assert "caption of 7 samples" in said and "2 media items; a caption is about one image" in said
    made = tmp_path / "web.columns/caption"
    captions = rows(made, shards, "caption")
    assert set(captions) == {"k0", "k1", "k2", "k3", "k5", "k6"} and len(set(captions.values())) > 1

    assert cli.main(["mode=score", *base]) == 0
    own = rows(tmp_path / "web.columns/score", shards, "match")
    assert [len(own[key]) for key in ("k0", "k2")] == [1, 3]
    cosines = rows(tmp_path / "web.columns/score", shards, "similarity")
    assert all(0 < p < 1 for one in own.values() for p in one) and all(
        -1 <= c <= 1 for one in cosines.values() for c in one
    )

    assert cli.main(["mode=score", *base, f"columns.captions={made}"]) == 0
    scored = tmp_path / "web.columns/score-caption"
    new = rows(scored, shards, "match")
    assert all(len(one) == 1 for one in new.values()) and any(new[key] != own[key] for key in new)
    assert {path.name: path.read_bytes() for path in shards.iterdir()} == before, "the shards are not touched"

    median = sorted(one[0] for one in new.values())[3]
    options = [f"folder={shards}", f"captions={made}", f"scores={scored}", f"ranges.match=[{median!r},null]"]
    assert capfilt([*options, f"output={tmp_path / 'new'}"]) == 0
    kept = {sample.key: sample.annotations[0].turns[-1].text for sample, _ in ShardSet(tmp_path / "new")}
    assert kept == {key: captions[key] for key in captions if captions[key] and new[key][0] >= median}
    about = ShardSet(tmp_path / "new").manifest.origin["columns"]["scores"]["about"]
    assert about["run"] == "blip" and about["mode"] == "score" and len(about["weights"]) == 64


def test_scores_are_those_of_the_model(run: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every caption is judged with its own image, whatever the batches are."""

    def match(self, context, ids, real):
        lengths = real.sum(dim=1).float()
        return torch.stack([-lengths, lengths], dim=1) / 50

    monkeypatch.setattr(Blip, "match", match)
    for batch in (1, 2, 64):
        more = [f"columns.batch={batch}", f"columns.output={shards.parent / str(batch)}"]
        assert cli.main(["mode=score", f"run={run}", f"columns.shards={shards}", *more]) == 0
    found = [rows(shards.parent / str(batch), shards, "match") for batch in (1, 2, 64)]
    assert found[0] == found[1] == found[2]
    lengths = torch.tensor([len(f"a shape 2{'x' * n}") + 2.0 for n in range(3)])  # with <bos> and <eos>
    assert found[0]["k2"] == pytest.approx(torch.sigmoid(lengths / 25).tolist())
    near = [rows(shards.parent / str(batch), shards, "similarity") for batch in (1, 2, 64)]
    for key, values in near[0].items():
        assert near[1][key] == pytest.approx(values, abs=1e-5) and near[2][key] == pytest.approx(values, abs=1e-5)


@pytest.mark.parametrize("recipe", ["instructblip_vicuna7b", "blip2_stage2_flant5"])
def test_other_models_write_captions(recipe: str, shards: Path, tmp_path: Path) -> None:
    """Those that read several streams, and whose language model is one of transformers."""
    folder = tmp_path / "runs/other"
    cfg = compose_config(
        [f"recipe={recipe}", "size=tiny", "init_from=[]", "run_name=other", f"paths.runs={folder.parent}"]
    )
    save_config(cfg, RunFolder(folder).config)
    weights = {name: parameter.detach() for name, parameter in build_assembly(cfg).model.named_parameters()}
    save_weights(folder / "checkpoints", weights, run_id="other", step=0)
    assert cli.main(["mode=caption", f"run={folder}", f"columns.shards={shards}", *FAST]) == 0
    assert len(rows(tmp_path / "web.columns/caption", shards, "caption")) == 6


def test_a_kill_costs_a_shard(run: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = ["mode=caption", f"run={run}", f"columns.shards={shards}", *FAST]
    whole, broken = shards.parent / "whole", shards.parent / "broken"
    assert cli.main([*base, f"columns.output={whole}"]) == 0
    calls, generate = [], Blip.generate

    def killed(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(Blip, "generate", killed)
    assert cli.main([*base, f"columns.output={broken}"]) == 130
    assert not (broken / COLUMNS).exists() and (broken / "shard-000000.jsonl").is_file()
    first = (broken / "shard-000000.jsonl").stat().st_mtime_ns
    assert cli.main([*base, f"columns.output={broken}"]) == 0
    assert (broken / "shard-000000.jsonl").stat().st_mtime_ns == first
    for name in (COLUMNS, *(f"shard-{n:06d}.jsonl" for n in range(3))):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name


def test_processes_share_the_work(run: Path, shards: Path, capsys) -> None:
    base = ["mode=score", f"run={run}", f"columns.shards={shards}", "columns.parts=2", f"columns.output={shards}-s"]
    assert cli.main([*base, "columns.part=1"]) == 0
    assert "2 shards are left to other parts" in capsys.readouterr().out
    assert cli.main([*base, "columns.part=0"]) == 0
    assert json.loads((Path(f"{shards}-s") / COLUMNS).read_text())["names"] == ["match", "similarity"]


def test_wrong_settings_are_refused(run: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code, message in (
        (["mode=score", f"columns.shards={shards}"], 2, "run is missing: mode=score needs run=<run folder>"),
        ([f"run={run}", "mode=caption"], 2, "columns.shards is missing"),
        ([f"run={run}", "mode=caption", f"columns.shards={shards}", "columns.part=1"], 2, "allowed: 0 to parts - 1"),
        ([f"run={run}", "mode=score", f"columns.shards={shards}-x"], 2, "columns.shards: .*does not exist"),
        ([f"run={run}", "mode=score", f"columns.shards={shards}", f"columns.captions={run}"], 1, "has no columns.json"),
    ):
        found = cli.main(arguments)
        said = capsys.readouterr().err
        assert found == code and re.search(message, said), said
    assert cli.main([f"run={run}", "mode=caption", f"columns.shards={shards}", *FAST]) == 0
    assert cli.main([f"run={run}", "mode=caption", f"columns.shards={shards}", *FAST, "columns.top_p=0.5"]) == 1
    assert "about.top_p: 0.9 there, 0.5 now" in capsys.readouterr().err


def test_a_model_without_matching_is_refused(
    run: Path, shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(Blip, "match")
    assert cli.main([f"run={run}", "mode=score", f"columns.shards={shards}"]) == 2
    assert "mode=score: needs model.match, which Blip does not have" in capsys.readouterr().err
