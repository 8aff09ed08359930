"""`python -m vlm_train`, and the script `vlm-train`."""

import os

from vlm_train import cli
from vlm_train.runs import torchrun

QUIET_THREADS = {"OMP_WAIT_POLICY": "PASSIVE"}
"""For OpenMP, read when torch is imported. Threads that have nothing to do sleep: where another program has the core of
one of them, the others would burn theirs until it is back, several times the time of the work itself."""


def main() -> None:
    """Run one command line and end the process with its exit code."""
    for name, value in QUIET_THREADS.items():
        os.environ.setdefault(name, value)  # processes started by this one inherit it
    torchrun.run_and_exit(cli.main)


if __name__ == "__main__":
    main()
