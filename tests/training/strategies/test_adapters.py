"""Adapters on a quantized base train under every strategy that keeps the base whole, as they do on one rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.jobs import train_on_ranks
from tests.support.small_run import command, make_data, train
from tests.training.strategies.test_parity import ADAMW, STRATEGIES, assert_equal_runs

pytest.importorskip("bitsandbytes")
RULES = r"params.rules=[{match: '(llm.*\.lora_|connector).*', lr: 1e-2}, {match: '.*', lr: null}]"


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("peft, strategies", [("qlora", ["ddp", "zero1", "zero2"]), ("lora", ["zero3", "fsdp2"])])
def test_adapters_learn_the_same_under_every_strategy(peft: str, strategies: list[str], tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    own = [f"peft={peft}", "peft.dropout=0", RULES, *ADAMW, "trainer.max_steps=3", "trainer.export=false"]
    alone = train(command(data, tmp_path, *own, name="alone"))
    jobs = [command(data, tmp_path, *own, *STRATEGIES[one], "batch.micro=1", name=one) for one in strategies]
    train_on_ranks(*jobs, limit=400)
    for one in strategies:
        assert_equal_runs(alone, tmp_path / one)
