"""`python -m vlm_train`, and the script `vlm-train`."""

from vlm_train import cli
from vlm_train.runs import torchrun


def main() -> None:
    """Run one command line and end the process with its exit code."""
    torchrun.run_and_exit(cli.main)


if __name__ == "__main__":
    main()
