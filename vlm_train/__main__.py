"""`python -m vlm_train`, and the script `vlm-train`."""

from vlm_train import agent, cli


def main() -> None:
    """Run one command line and end the process with its exit code."""
    agent.leave(cli.main)


if __name__ == "__main__":
    main()
