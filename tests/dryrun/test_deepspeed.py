"""Predicted model states against the bytes that DeepSpeed holds on two ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_train.dryrun.memory import Hardware, MemoryNeeds, predict_peak

SCRIPT = Path(__file__).with_name("count_states.py")
LEARNED, FROZEN = 64 * 128 + 128 * 64, 64 * 64


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_deepspeed_holds_what_is_predicted() -> None:
    pytest.importorskip("deepspeed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"DS_ACCELERATOR": "cpu", "WORLD_SIZE": "2", "LOCAL_SIZE": "2", "OMP_NUM_THREADS": "1"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    (line,) = (line for line in printed[0].splitlines() if line.startswith("counted: "))
    for case, counted in json.loads(line.removeprefix("counted: ")).items():
        strategy, precision = case.split()
        needs = MemoryNeeds(
            parameters=LEARNED + FROZEN,
            trainable=LEARNED,
            largest_layer=0,
            states=2,
            precision=precision,
            activations=0,
            logits=0,
        )
        found = predict_peak(strategy, needs, Hardware(gpus=2, memory=0))
        assert {name: getattr(found, name) for name in counted} == counted, case
