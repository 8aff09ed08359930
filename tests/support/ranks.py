"""Several real ranks, quickly: processes forked from one that has imported everything, as torchrun would start them."""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from vlm_train.config.compose import compose_config
from vlm_train.config.run_file import save_config
from vlm_train.config.run_identity import run_dir
from vlm_train.runs import process as runs_process
from vlm_train.runs import torchrun
from vlm_train.runs.folder import RunFolder

LIMIT = 100.0
"""Seconds after which ranks that have not ended are killed: a hang is a failure."""

PRELOADED = [
    "vlm_train.training.fit",
    "vlm_train.training.trainer",
    "vlm_train.training.callbacks.loop",
    "vlm_train.evaluation.run",
    "vlm_train.data.datamodule",
    "vlm_train.report",
    "transformers",
    "peft",
    "tests.support.faults",
]

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(PRELOADED)


@dataclass(frozen=True)
class Ended:
    """How the ranks ended: exit codes by rank, negative for signals; None where it had to be killed."""

    codes: list[int | None]
    output: str


def run(overrides: Sequence[str], out: Path, *, fault: str = "none 0 0", ranks: int = 2) -> Ended:
    """One command on several ranks, which break as `fault` says (see tests/support/faults.py)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_WORLD_SIZE": "1", "GROUP_RANK": "0"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "FAULT": fault}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("")
    cfg = _composed("launch=torchrun", f"launch.devices={ranks}", *overrides)
    path = RunFolder(run_dir(cfg)).config
    save_config(cfg, path)
    processes = [
        _server.Process(target=_rank, args=(path, {**common, "RANK": str(n), "LOCAL_RANK": str(n)}, out))
        for n in range(ranks)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + LIMIT
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0.1))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return Ended(codes, out.read_text())


@functools.cache
def _composed(*overrides: str) -> DictConfig:
    return compose_config(list(overrides))


def _rank(path: Path, environment: dict[str, str], out: Path) -> None:
    os.setsid()  # signals to the process group stay here
    os.environ |= environment
    multiprocessing.set_start_method("fork", force=True)  # of loader processes, as in any other process of Linux
    file = os.open(out, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torchrun.run_and_exit(lambda: runs_process.main([str(path)]))
