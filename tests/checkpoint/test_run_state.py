"""A checkpoint that earlier code wrote, through Lightning, goes on: `written_by_lightning/` is one, of step 2 of 4.

Its manifest lacks the hashes of data and order: pictures are compressed differently by other versions of Pillow.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.small_run import command, make_data, train
from vlm_train.training.module import VLMModule

WRITTEN = Path(__file__).parent / "written_by_lightning"


def job(folder: Path) -> list[str]:
    more = ["trainer.max_steps=4", "trainer.export=false", "batch.samples=4", "trainer.val_every=2"]
    overrides = command(make_data(folder / "data"), folder, *more, "trainer.log_every=4")
    return ["recipe=easyvqa_stage1", *overrides[1:]]


def test_what_lightning_wrote_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {}
    inner = VLMModule.training_step

    def training_step(self: VLMModule, batch: Any, batch_idx: int) -> None:
        if not found:
            (optimizer,), (schedule,) = self.trainer.optimizers, self.trainer.lr_scheduler_configs
            states = {name: optimizer.state[p] for name, p in self.policy.named.items()}
            found["step"], found["window"], found["rng"] = self.global_step, batch.window.step, torch.get_rng_state()
            found["weights"] = {name: p.detach().clone() for name, p in self.policy.named.items()}
            found["optimizer"] = {f"{n}|{k}|0": t.clone() for n, held in states.items() for k, t in held.items()}
            found["rates"] = [group["lr"] for group in optimizer.param_groups]
            found["last"] = schedule.scheduler.get_last_lr()
            found["sums"] = self.meter.train.read_sums()
            found["best"] = [one.best for one in self.trainer.callbacks if hasattr(one, "best")]  # type: ignore[attr-defined]
        inner(self, batch, batch_idx)

    monkeypatch.setattr(VLMModule, "training_step", training_step)
    shutil.copytree(WRITTEN, tmp_path / "run")
    run = train(job(tmp_path))
    written = WRITTEN / "checkpoints/step-00000002"
    state = torch.load(written / "state.ckpt", weights_only=True)
    assert (found["step"], found["window"]) == (2, 2)
    assert torch.equal(found["rng"], state["rng"][0]["torch"])
    for name, file in (("weights", "weights.safetensors"), ("optimizer", "optimizer-00000-of-00001.safetensors")):
        held = load_file(written / file)
        assert held.keys() == found[name].keys()
        assert all(torch.equal(held[key].view(-1), found[name][key].view(-1)) for key in held), name
    assert found["rates"] == found["last"] == state["lr_schedulers"][0]["_last_lr"] and found["rates"][0] > 0
    assert found["sums"] == pytest.approx(state["since_log"]["totals"]) and found["sums"]
    assert found["best"] == [state["callbacks"]["Checkpoints"]["best"]]
    assert (run / "checkpoints/step-00000004/state.ckpt").is_file()
