"""`python -m vlm_train`, and the script `vlm-train`."""

from vlm_train import cli
from vlm_train.runs import torchrun


def main() -> None:
    """Run one command line and end the process with its exit code."""
    torchrun.leave(cli.main)


if __name__ == "__main__":
    main()
