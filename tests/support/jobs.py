"""Several small runs, one after the other, on two gloo ranks: starting processes costs more than the training."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from vlm_train.runs.folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]


def train_on_ranks(
    *jobs: list[str], ranks: int = 2, limit: float = 200.0, check: bool = True, packages: Sequence[Path] = ()
) -> list[int]:
    """Train each job (overrides of one run) on `ranks` processes. Returns their exit codes; a hang raises.

    `packages` are further folders to import from. When one process ends with an error, the others are killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "jobs.json"
        path.write_text(json.dumps(jobs))
        port = free_port()
        processes = [_start(path, rank, ranks, port, packages) for rank in range(ranks)]
        end = time.monotonic() + limit
        try:
            while any(process.poll() is None for process in processes):
                assert time.monotonic() < end, f"still running after {limit} s"
                if any(process.poll() for process in processes):
                    break
                time.sleep(0.1)
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    codes = [process.returncode for process in processes]
    assert not check or not any(codes), f"exit codes {codes}"
    return codes


def _start(path: Path, rank: int, ranks: int, port: int, packages: Sequence[Path]) -> subprocess.Popen[bytes]:
    """A process with the environment that torchrun gives its workers."""
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_WORLD_SIZE": 1}
    given["MASTER_PORT"] = port
    own = {"PYTHONFAULTHANDLER": "1", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "test"}
    own["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, *packages)))
    environment = {**os.environ, **own, **{name: str(value) for name, value in given.items()}}
    return subprocess.Popen([sys.executable, __file__, str(path)], env=environment, cwd=ROOT, start_new_session=True)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def main(path: str) -> int:
    import torch

    from vlm_train.config.compose import compose_config
    from vlm_train.config.run_file import save_config
    from vlm_train.config.run_identity import run_dir
    from vlm_train.errors import Interrupted
    from vlm_train.training.fit import fit_run

    destroy = torch.distributed.destroy_process_group
    torch.distributed.destroy_process_group = lambda: None  # DeepSpeed keeps hold of the first group
    for job in json.loads(Path(path).read_text()):
        cfg = compose_config([*job, "launch=torchrun"])
        if os.environ["RANK"] == "0":
            save_config(cfg, RunFolder(run_dir(cfg)).config)
        with suppress(Interrupted):
            fit_run(cfg)
    destroy()
    return 0


if __name__ == "__main__":
    from vlm_train.runs.torchrun import run_and_exit

    run_and_exit(lambda: main(sys.argv[1]))
