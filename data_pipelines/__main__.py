"""The commands of the data half."""

from __future__ import annotations

from importlib import import_module

COMMANDS = ("build", "capfilt", "contract", "filter", "index", "inspect", "lint")


def main() -> None:
    """Print what every command does, in the first line of its own words."""
    for name in COMMANDS:
        first = (import_module(f"data_pipelines.{name}").__doc__ or "").splitlines()[0]
        print(f"{name:<10}{first.partition(': `')[0]}")
    print("\npython -m data_pipelines.<command> --help lists its options")


if __name__ == "__main__":
    main()
