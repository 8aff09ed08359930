"""The data module: refused settings, fingerprints, loaders, windows, and samples in another shape than usual."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_pipelines.errors import DataError
from data_pipelines.index import index_folder
from data_pipelines.media.limits import image_item
from data_pipelines.sample import Annotation, Sample
from data_pipelines.shards.columns import ColumnWriter
from data_pipelines.shards.shard_set import ShardSet
from data_pipelines.shards.tar_writer import ShardWriter
from tests.data.text.rendering import assistant, layout, load, user
from tests.support.small_run import command, make_data, picture
from vlm_train.config.schema import BatchSize
from vlm_train.contracts.batch import map_tensors
from vlm_train.data.datamodule import VLMData
from vlm_train.data.images.transform import ImageTransform
from vlm_train.data.order.cost import Cost
from vlm_train.data.order.mixture import SampleRef
from vlm_train.data.processor import Processor
from vlm_train.data.text.tokenizer import byte_level
from vlm_train.data.worker_errors import explain_loader_error
from vlm_train.data.worker_transfer import WorkerMessage
from vlm_train.errors import ConfigError
from vlm_train.runs.process import run_guarded


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data")) / "tiny"


def data(*train: Any, val: list[Any] | None = None, normalize: str = "token", **options: Any) -> VLMData:
    """A data module over `train`, as `fit` makes it, on a pretended device."""
    processor = Processor(
        template=load("qa"),
        tokenizer=byte_level(),
        layout=layout,
        images={"vision": ImageTransform(mode="resize", size=(8, 8))},
    )
    batch = BatchSize(micro=2, normalize=normalize, samples=4)
    entries = [one if isinstance(one, dict) else {"shards": str(one)} for one in train]
    options = {"shuffle": "none", "workers": 0, "cache": "/nonexistent"} | options
    made = VLMData(train=entries, val=val or [], processor=processor, batch=batch, **options)
    made.trainer = trainer("cpu")
    made.plan = made.make_plan(batch=4, tokens=None, epochs=2, most=None, world=1, cost=Cost())
    return made


def trainer(device: str) -> Any:
    root_device = torch.device(device)
    return SimpleNamespace(
        global_step=0, global_rank=0, world_size=1, strategy=SimpleNamespace(root_device=root_device)
    )


def write(folder: Path, *samples: tuple[Any, ...], source: str = "s", pictures: int = 2) -> Path:
    """A shard set of samples, each given as its annotations over the same pictures."""
    with ShardWriter(folder) as writer:
        for number, turns in enumerate(samples):
            blobs = [picture(n) for n in range(pictures)]
            media = tuple(image_item(n, blob) for n, blob in enumerate(blobs))
            annotations = tuple(Annotation(turns=one) for one in turns)
            writer.write_sample(Sample(key=f"k{number}", media=media, annotations=annotations, source=source), blobs)
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, r"data\.limit: 0; allowed: null \(no limit\) or at least 1"),
        ({"val_limit": 0}, r"data\.val_limit: 0; allowed"),
        ({"max_length": 0}, r"data\.max_length: 0; allowed"),
        ({"val_share": 1.0}, r"data\.val_share: 1\.0; allowed: 0 \(none\) to below 1"),
        ({"val_share": -0.1}, r"data\.val_share: -0\.1; allowed"),
        ({"val_share": 0.5, "limit": 1}, r"data\.val_share: 0\.5 of the 1 samples in .*train leaves none to train on"),
        ({"val": [{"samples": 3}]}, r"data\.val\[0\]: got \{'samples': 3\}; it must name a folder as `shards`"),
    ],
)
def test_settings_that_cannot_be(root: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        data(root / "train", **options)


def test_every_wrong_setting_is_named_at_once(root: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        data(limit=0, val_share=2.0)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [
        "data.train",
        "data.val_share",
        "data.limit",
    ]


def test_a_set_without_samples_is_named(root: Path, tmp_path: Path) -> None:
    import tarfile

    (tmp_path / "empty").mkdir()
    tarfile.open(tmp_path / "empty" / "shard-000000.tar", "w").close()
    index_folder(tmp_path / "empty")
    with pytest.raises(DataError, match=r"/empty: a shard set without samples"):
        data(root / "train", tmp_path / "empty")


def test_a_pass_draws_an_annotation(tmp_path: Path) -> None:
    texts = [f"answer {n}" for n in range(3)]
    folder = write(tmp_path / "s", *[[(user("what?", 0), assistant(text)) for text in texts]] * 4)
    drawn = data(folder, annotations="drawn")

    def told(index: int, epoch: int, training: bool = True) -> str:
        stream = drawn.train.load_example(SampleRef(index, epoch), training=training).rendered.llm
        return byte_level().decode(stream.ids[stream.ids >= 0])

    seen = [[told(index, epoch) for epoch in range(30)] for index in range(4)]
    assert seen == [[told(index, epoch) for epoch in range(30)] for index in range(4)]
    assert all(any(text in one for one in row) for text in texts for row in seen)
    assert len({tuple(one[-10:] for one in row) for row in seen}) == 4  # every sample has draws of its own
    assert all("answer 0" in told(index, 5, training=False) for index in range(4))


def test_a_held_out_share_is_the_end_of_train(root: Path) -> None:
    whole, split = data(root / "train"), data(root / "train", val_share=0.25, val_limit=2)
    assert (len(split.train), len(split.val)) == (9, 2)
    keys = [batch.keys for batch in split.val_dataloader()]
    assert keys == [(("sample-09",), ("sample-10",))]
    assert len(whole.train) == 12 and not len(whole.val) and whole.val_dataloader() == []
    assert len(data(root / "train", limit=5).train) == 5


def test_the_fingerprint_follows_the_training_samples(root: Path, tmp_path: Path) -> None:
    one, other = root / "train", root / "val"
    first = data(one, other).hash_samples()
    assert data(one, other, limit=3, val=[{"shards": str(one)}]).hash_samples() == first
    again = make_data(tmp_path) / "tiny"
    assert data(again / "train", again / "val").hash_samples() == first  # built elsewhere
    assert len({first, data(other, one).hash_samples(), data(one).hash_samples(), data(one, one).hash_samples()}) == 4


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_batches_are_pinned_for_a_gpu_only(root: Path, device: str) -> None:
    module = data(root / "train", val=[{"shards": str(root / "val")}])
    module.trainer = trainer(device)
    assert module.train_dataloader().loader.pin_memory is (device == "cuda")
    assert module.val_dataloader().pin_memory is (device == "cuda")
    if device == "cpu":
        batch = next(iter(module.train_dataloader()))
        assert not batch.text["llm"].ids.is_pinned() and not batch.media.inputs["vision"].values.is_pinned()


def test_a_loader_pins_every_batch_of_a_window(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.data._utils.pin_memory import pin_memory

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    module = data(root / "train")
    window = next(iter(module.train_dataloader().loader))
    pinned = pin_memory(window)
    assert [type(one) for one in pinned] == [type(one) for one in window] and len(window) == 2
    for before, after in zip(window, pinned, strict=True):
        assert torch.equal(after.text["llm"].slots.index, before.text["llm"].slots.index + 1)
        assert (
            torch.equal(after.media.inputs["vision"].values, before.media.inputs["vision"].values + 1)
            and after.keys == before.keys
        )


def test_validation_has_workers_and_their_number_changes_nothing(root: Path) -> None:
    module = data(root / "val", val=[{"shards": str(root / "train")}])
    alone = list(module.val_dataloader())
    module.workers = 2
    loader = module.val_dataloader()
    assert loader.num_workers == 2
    for one, other in zip(alone, loader, strict=True):
        assert one.keys == other.keys and torch.equal(one.text["llm"].ids, other.text["llm"].ids)
    module.val.sources = [module.val.sources[0].take_part(0, 2)]  # one batch
    assert module.val_dataloader().num_workers == 1


def test_validation_takes_no_more_than_a_packed_row_holds(root: Path, tmp_path: Path) -> None:
    val = [{"shards": str(root / "train")}]
    for pack, rows in ((None, 2), (64, 2), (128, 4), (200, 6)):  # 2 rows of 200 tokens hold 6 samples of 64
        module = data(root / "val", val=val, pack=pack, max_length=64, cache=str(tmp_path))
        assert len(next(iter(module.val_dataloader())).keys) == rows
    module = data(root / "val", val=val, pack=128, max_length=256, cache=str(tmp_path))
    assert len(next(iter(module.val_dataloader())).keys) == 2, "rows that no sample fills"


def test_a_rank_without_samples_names_the_same_sums(root: Path) -> None:
    """Ranks reduce `Window.sums` by name: a short last step must not leave one of them with fewer."""
    module = data(root / "train", rejected=True)
    module.plan = replace(module.plan, total=1, world=2)
    module.trainer.global_rank = 1
    (batch,) = module.train_dataloader()
    assert batch.window.sums == {"samples": {}, "llm": {}, "rejected": {}} and list(batch.text) == ["llm", "rejected"]


def test_images_that_nothing_shows_and_images_shown_twice(tmp_path: Path) -> None:
    turns = (user("A", 1), assistant("a"), user("B", 1), assistant("b"))
    (batch, *_) = data(write(tmp_path / "set", [turns], [(user("C"), assistant("c"))])).train_dataloader()
    assert batch.media.inputs["vision"].views_total == 1 and batch.media.slot_counts == (4,)
    assert batch.text["llm"].slots.feature_index.tolist() == [0, 1, 2, 3] * 2
    assert batch.text["llm"].plain_causal


def test_bad_held_out_samples_are_named(root: Path, tmp_path: Path) -> None:
    bad = make_data(tmp_path, bad=3) / "tiny" / "train"
    module = data(root / "train", val=[{"shards": str(bad)}])
    batches = list(module.val_dataloader())
    assert [len(batch.problems) for batch in batches] == [0, 1, 0, 0, 0, 0]
    assert "sample-03" in batches[1].problems[0].reason and batches[1].keys == (("sample-02",),)
    assert batches[1].to("cpu").problems == batches[1].problems


def test_validation_weighs_as_training_does(root: Path) -> None:
    val = [{"shards": str(root / "val")}]
    found = {}
    for rule in ("token", "source", "sample"):
        (batch, *_) = data(root / "train", val=val, normalize=rule).val_dataloader()
        found[rule] = batch.text["llm"].weights.sum(1)
    assert torch.equal(found["token"], found["source"]) and not torch.allclose(found["token"], found["sample"])
    assert torch.allclose(found["sample"], torch.ones(2))


def test_workers_send_the_same_batches_in_few_tensors(root: Path) -> None:
    module = data(root / "train")
    alone = list(module.train_dataloader())
    module.workers = 1
    loader = module.train_dataloader()
    message = next(iter(loader.loader))
    assert not any(tensors_of(batch) for batch in message.batches) and isinstance(message.small, bytearray)
    sent = list(loader)
    assert len(sent) == len(alone) > 2
    for one, other in zip(alone, sent, strict=True):
        assert (one.keys, one.window, one.sources) == (other.keys, other.window, other.sources)
        pairs = list(zip(tensors_of(one), tensors_of(other), strict=True))
        assert len(pairs) > 8 and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def test_large_tensors_travel_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    window = next(iter(data(root / "train").train_dataloader().loader))
    monkeypatch.setattr("vlm_train.data.worker_transfer.LARGE", window[0].media.inputs["vision"].values.nbytes - 1)
    packed = WorkerMessage.pack_batches(window)
    assert packed.batches[0].media.inputs["vision"].values is window[0].media.inputs["vision"].values
    assert torch.equal(packed.unpack_batches()[0].text["llm"].ids, window[0].text["llm"].ids)


def test_a_message_is_pinned_whole(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    window = next(iter(data(root / "train").train_dataloader().loader))
    monkeypatch.setattr("vlm_train.data.worker_transfer.LARGE", window[0].media.inputs["vision"].values.nbytes - 1)
    packed = WorkerMessage.pack_batches(window)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    pinned = packed.pin_memory()
    assert torch.equal(pinned.small, torch.frombuffer(packed.small, dtype=torch.uint8) + 1)
    assert torch.equal(pinned.batches[0].media.inputs["vision"].values, window[0].media.inputs["vision"].values + 1)


def tensors_of(batch: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    map_tensors(batch, lambda tensor: found.append(tensor) or tensor)
    return found


def test_a_message_takes_tensors_of_any_length(root: Path) -> None:
    batch = next(iter(data(root / "train").train_dataloader()))
    odd = replace(batch.text["llm"], ids=torch.tensor([1, 2, 3], dtype=torch.int16), labels=torch.tensor([4, 5]))
    odd = replace(odd, weights=torch.ones(1).expand(1, 4), supervised=torch.zeros(1, 5, dtype=torch.int64).expand(0, 5))
    odd = replace(odd, positions=torch.arange(1).as_strided((1,), (0,)))
    (back,) = WorkerMessage.pack_batches([replace(batch, text={"llm": odd})]).unpack_batches()
    for name in ("ids", "labels", "weights", "supervised", "positions"):
        assert torch.equal(getattr(back.text["llm"], name), getattr(odd, name)), name


def test_a_place_is_taken_up_by_the_plan_that_left_it_only(root: Path, tmp_path: Path) -> None:
    def endless(tokens: int, **options: Any) -> VLMData:
        made = data(root / "train", pack=64, max_length=64, cache=str(tmp_path), **options)
        made.plan = made.make_plan(batch=None, tokens=tokens, epochs=None, most=50, world=1, cost=Cost())
        made.trainer.global_step = 20
        return made

    state = endless(128).state_dict()
    assert state["window"] > 0
    for other, taken in ((endless(128), True), (endless(256), False), (endless(128, seed=1), False)):
        other.load_state_dict(state)
        assert (state["window"] in other.plan._cursors) is taken


def write_columns(root: Path, folder: Path, *, without: str = "", factor: float = 1.0) -> Path:
    """`level`, a number a sample, and `words`, a text, beside the training shards; no line for the sample `without`."""
    shards = ShardSet(root / "train")
    writer = ColumnWriter(folder, shards, ["level", "words"], {})
    keys = iter(enumerate(shards.keys()))
    for number, info in enumerate(shards.manifest.shards):
        rows = [{"key": key, "level": factor * i, "words": "x"} for i, key in islice(keys, info.samples)]
        writer.write_rows(number, [row for row in rows if row["key"] != without])
    writer.write_manifest()
    return folder


def test_columns_beside_the_shards_reach_the_batch(root: Path, tmp_path: Path) -> None:
    folder = write_columns(root, tmp_path / "columns", without="sample-05")
    made = data({"shards": str(root / "train"), "columns": str(folder)}, columns=["level"])
    windows = made.train_dataloader().loader.dataset
    first, second = windows.load_window(0), windows.load_window(1)
    assert [batch.columns["level"].tolist() for batch in first] == [[0.0, 1.0], [2.0, 3.0]]
    assert [batch.columns["level"].tolist() for batch in second] == [[4.0], [6.0, 7.0]]
    (problem,) = second[0].window.problems
    assert problem.kind == "column" and problem.key == "sample-05" and "no number in column level" in problem.reason


def test_columns_that_no_objective_reads_change_nothing(root: Path, tmp_path: Path) -> None:
    folder = write_columns(root, tmp_path / "columns", without="sample-05")
    made = data({"shards": str(root / "train"), "columns": str(folder)})
    window = made.train_dataloader().loader.dataset.load_window(1)
    assert window[0].columns == {} and window[0].window.problems == ()
    assert made.hash_samples() == data(root / "train").hash_samples()


def test_a_column_that_holds_no_numbers_is_refused_with_its_key(root: Path, tmp_path: Path) -> None:
    entry = {"shards": str(root / "train"), "columns": str(write_columns(root, tmp_path / "columns"))}
    with pytest.raises(DataError, match=r"key 'sample-00': column 'words' is 'x'; expected a number"):
        data(entry, columns=["words"])
    with pytest.raises(DataError, match=r"an objective reads the columns level beside it"):
        data(root / "train", columns=["level"])


def test_other_columns_are_other_data(root: Path, tmp_path: Path) -> None:
    entries = [{"shards": str(root / "train")}]
    for name, factor in (("one", 1.0), ("same", 1.0), ("two", 2.0)):
        folder = write_columns(root, tmp_path / name, factor=factor)
        entries.append({"shards": str(root / "train"), "columns": str(folder)})
    one, same, two = (data(entry, columns=["level"]).hash_samples() for entry in entries[1:])
    assert one == same and len({data(entries[0]).hash_samples(), one, two}) == 3


ENDLESS = """
import os, sys, time
import torch
from torch.utils.data import DataLoader, IterableDataset
from vlm_train.data.datamodule import _start_worker
class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield torch.zeros(1000).numpy().tobytes()  # more than the pipe between us takes
if __name__ == "__main__":
    options = {"num_workers": 2, "prefetch_factor": 64, "worker_init_fn": _start_worker}
    loader = iter(DataLoader(Endless(), batch_size=None, **options))
    next(loader)
    print(*(worker.pid for worker in loader._workers), flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_workers_end_with_a_killed_trainer(tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text(ENDLESS)
    trainer = subprocess.Popen([sys.executable, str(tmp_path / "endless.py")], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    workers = [int(pid) for pid in trainer.stdout.readline().split()]
    trainer.kill()
    trainer.wait()
    assert len(workers) == 2
    deadline = time.monotonic() + 30
    while left := [pid for pid in workers if _lives(pid)]:
        if time.monotonic() > deadline:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            pytest.fail(f"{len(left)} workers outlived their trainer")
        time.sleep(0.1)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def windows_of(made: VLMData, first: int = 0) -> list[list[tuple[tuple[str, ...], ...]]]:
    """Keys of every micro-batch of every optimizer step from `first` on, as a resumed loader gives them."""
    made.trainer.global_step = first
    loader = made.train_dataloader()
    return [(batch.window.step, batch.window.micro, batch.keys) for batch in loader]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_computed_order_resumes_exactly(root: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr("vlm_train.data.datamodule.STORED_SAMPLES", 15)  # the two sets have 16
    made = data(root / "train", root / "val", shuffle="full", workers=workers)
    assert made.mixture.shuffle == "computed" and data(root / "train", shuffle="full").mixture.shuffle == "full"
    whole = windows_of(made)
    seen = Counter(key for *_, keys in whole for row in keys for key in row)
    assert Counter(seen.values()) == {4: 4, 2: 8}  # two passes; four keys are in both sets
    for first in (1, 4, 7):
        again = data(root / "train", root / "val", shuffle="full", workers=2 - workers)
        assert windows_of(again, first) == [one for one in whole if one[0] >= first]


def test_a_run_that_began_in_a_stored_order_goes_on_in_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began = data(root / "train", root / "val", shuffle="full")
    recorded, whole = began.hash_order(), windows_of(began)
    monkeypatch.setattr("vlm_train.data.datamodule.STORED_SAMPLES", 15)
    now = data(root / "train", root / "val", shuffle="full")
    computed = now.hash_order()
    assert windows_of(now) != whole and computed != recorded
    for stays in (None, computed, "another"):
        now.keep_order({"order": stays})
        assert now.hash_order() == computed
    now.keep_order({"order": recorded})
    now.plan = now.make_plan(batch=4, tokens=None, epochs=2, most=None, world=1, cost=Cost())
    assert now.hash_order() == recorded and windows_of(now, 3) == [one for one in whole if one[0] >= 3]


def test_rows_are_no_part_of_an_order_of_samples(root: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_length": 64, "cache": str(tmp_path)}
    plain, packed = (data(root / "train", root / "val", pack=pack, **options) for pack in (None, 128))
    assert plain.hash_order() == packed.hash_order()
    recorded = packed._hash_order_of(packed.mixture, (128, None))  # as it was once
    assert recorded != packed.hash_order()
    packed.keep_order({"order": recorded})
    assert packed.hash_order() == recorded
    plain.keep_order({"order": recorded})
    assert plain.hash_order() != recorded, "rows of 128 tokens are not those of this run"


@pytest.mark.parametrize("workers", [0, 2])
def test_token_steps_that_are_estimated_resume_exactly(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """A large run packs no more than it needs, ends where it said, and goes on from any step; one that began with
    counted steps keeps their number."""

    def budgeted(workers: int, checkpoint: dict[str, Any] | None = None) -> VLMData:
        options = {"shuffle": "full", "pack": 128, "max_length": 64, "cache": str(tmp_path), "workers": workers}
        made = data(root / "train", root / "val", **options)
        if checkpoint is not None:
            made.keep_order(checkpoint)
        made.plan = made.make_plan(batch=None, tokens=256, epochs=9, most=None, world=1, cost=Cost())
        return made

    counted = budgeted(workers)
    monkeypatch.setattr("vlm_train.data.datamodule.STORED_SAMPLES", 15)
    made = budgeted(workers)
    assert (counted.estimates_steps, made.estimates_steps) == (False, True)
    assert made.plan.total is None and abs(made.plan.steps - counted.plan.steps) <= 2
    whole = windows_of(made)
    assert {step for step, *_ in whole} == set(range(made.plan.steps))
    state = made.state_dict()
    for first in (1, made.plan.steps - 2):
        again = budgeted(2 - workers, {"order": made.hash_order(), "total_steps": "estimated"})
        again.trainer.global_step = first
        again.load_state_dict(state)
        assert again.plan.steps == made.plan.steps
        assert windows_of(again, first) == [one for one in whole if one[0] >= first]
    earlier = budgeted(workers, {"order": counted.hash_order()})
    assert earlier.plan.steps == counted.plan.steps and not earlier.estimates_steps
    assert windows_of(earlier, 4) == [one for one in windows_of(counted) if one[0] >= 4]


def test_steps_of_one_modality_look_media_up(tmp_path: Path) -> None:
    made = data(make_data(tmp_path, text_only=True) / "tiny" / "train", group_by="modality")
    kinds = [{int(key[-2:]) % 2 for row in keys for key in row} for _, _, keys in windows_of(made)]
    assert kinds.count({0}) > 1 and kinds.count({1}) > 1 and {0, 1} not in kinds


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "a worker process .* want of memory"),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "a worker process of the data loader ended"),
        (OSError(errno.EMFILE, "Too many open files"), "the limit on open files is reached: raise it"),
        (RuntimeError("unable to open file: Too many open files (24)"), "the limit on open files is reached"),
        (RuntimeError("shapes differ"), None),
        (OSError(errno.EIO, "Input/output error"), None),
    ],
)
def test_what_ends_a_loader_is_one_error(error, message, capfd):
    found = explain_loader_error(error)
    assert (found is None) == (message is None)

    def work() -> None:
        raise error

    if message is not None:
        assert re.search(message, str(found)) and run_guarded(work) == 1
        out = "".join(capfd.readouterr())
        assert re.search(f"DataError: {message}", out) and "Traceback" not in out


@pytest.mark.slow
def test_a_killed_worker_of_a_run_is_one_error(tmp_path):
    kill = "import os, signal; from vlm_train.data import loader; loader.WindowStream.load_window = "
    kill += "lambda *_: os.kill(os.getpid(), signal.SIGKILL); from vlm_train.cli import main; raise SystemExit(main())"
    make_data(tmp_path / "data")
    arguments = command(tmp_path / "data", tmp_path, "data.workers=1", "data.val=[]")
    done = subprocess.run([sys.executable, "-c", kill, *arguments], capture_output=True, text=True, timeout=120)
    said = done.stdout + done.stderr
    assert "DataError: a worker process of the data loader ended" in said and "Traceback" not in said, said
    assert done.returncode == 1  # the same command may go on
