"""A training step happens in the order in which `VLMModule.training_step` tells it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.plugins.precision import MixedPrecision

from tests.support.small_run import command, make_data, train
from tests.support.tiny_models import IMAGE, batch_of, text_stream
from vlm_train.training import trainer
from vlm_train.training.callbacks.loop import AfterStep, Checkpoints
from vlm_train.training.guard import SCALE
from vlm_train.training.metrics import Meter
from vlm_train.training.module import VLMModule


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def test_a_step_happens_in_the_order_in_which_it_is_told(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def tell(owner: Any, method: str, name: str) -> None:
        inner: Callable[..., Any] = getattr(owner, method)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            told.append(name)
            return inner(*args, **kwargs)

        monkeypatch.setattr(owner, method, wrapped)

    tell(Meter, "add_batch", "batch")
    tell(VLMModule, "_open_step", "open")
    tell(VLMModule, "forward", "forward")
    tell(VLMModule, "manual_backward", "backward")
    tell(VLMModule, "objects_to", "guard")
    tell(torch.nn.utils, "clip_grads_with_norm_", "clip")
    tell(torch.optim.AdamW, "step", "update")
    tell(torch.optim.lr_scheduler.LambdaLR, "step", "schedule")
    tell(VLMModule, "log_training", "log")
    tell(VLMModule, "validation_step", "validate")
    tell(Checkpoints, "save", "save")
    train(command(data, tmp_path, "trainer.max_steps=1", "trainer.max_grad_norm=0.1", "trainer.val_every=1"))
    told = told[told.index("schedule") + 1 :]  # a schedule makes a step when it is built
    step = [
        "batch",
        "open",
        "forward",
        "backward",
        "batch",
        "forward",
        "backward",
        "guard",
        "clip",
        "update",
        "schedule",
    ]
    assert told[: len(step)] == step
    assert list(dict.fromkeys(told[len(step) :])) == ["log", "validate", "save"]


def test_lightning_leaves_it_to_a_batch_how_it_moves() -> None:
    """Else it would rebuild it field by field."""
    batch = batch_of(text_stream([[5, *IMAGE, 6]]), [0])
    assert move_data_to_device(batch, torch.device("cpu")) is batch
    moved = move_data_to_device(batch, torch.device("meta"))
    assert moved.text["llm"].ids.is_meta and moved.media.inputs["vision"].values.is_meta and moved.media.row.is_meta


def test_fp16_skips_the_update_whose_gradients_overflow(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scaled gradients are made true ones before the guard looks, once; a scale too large is halved."""
    norms: list[float] = []
    reasons: list[str | None] = []
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**40))  # type: ignore[attr-defined]
    monkeypatch.setattr(trainer, "_precision_plugin", lambda cfg, strategy: {"plugins": [plugin]})
    judge, after = VLMModule.objects_to, AfterStep.on_train_batch_end

    def objects_to(self: VLMModule, norm: Any, of_parts: Any = None) -> bool:
        norms.append(float(norm))
        return judge(self, norm, of_parts)

    def on_train_batch_end(self: AfterStep, trainer: Any, module: Any, outputs: Any, batch: Any, number: int) -> None:
        reasons.append(module.left_out)
        after(self, trainer, module, outputs, batch, number)

    monkeypatch.setattr(VLMModule, "objects_to", objects_to)
    monkeypatch.setattr(AfterStep, "on_train_batch_end", on_train_batch_end)
    monkeypatch.setattr("vlm_train.training.fit._make_guard", lambda cfg, folder: _scaled_guard(folder))
    train(command(data, tmp_path, "batch.micro=4", "trainer.max_steps=40", "trainer.save_every=null"))
    skipped = [reason for reason in reasons if reason is not None]
    assert skipped and set(skipped) == {SCALE} and reasons[: len(skipped)] == skipped
    assert plugin.scaler is not None and plugin.scaler.get_scale() == 2.0 ** (40 - len(skipped))
    assert all(0.01 < norm < 100 for norm in norms[len(skipped) :])  # true norms, not scaled ones


def _scaled_guard(folder: Path) -> Any:
    from vlm_train.training.guard import Guard

    return Guard(folder, scaled=True)
