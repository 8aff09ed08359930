"""`python -m vlm_train.report FOLDER`: write the report of a run, schedule or sweep folder, or print its results."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vlm_train.errors import ConfigError, VLMTrainError
from vlm_train.report import results_table, write_report
from vlm_train.runs.folder import RunFolder


def find_newest(runs: Path) -> Path:
    """The schedule (or else the run) under `runs` that was written to last."""
    folders = [RunFolder(path) for path in runs.glob("*")]
    for files in ([folder.schedule for folder in folders], [folder.record for folder in folders]):
        found = sorted(filter(Path.is_file, files), key=lambda path: path.stat().st_mtime)
        if found:
            return found[-1].parent
    raise ConfigError(f"no run or schedule folder in '{runs}'. Give the folder that `paths.runs` names.")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m vlm_train.report", description=__doc__)
    parser.add_argument(
        "folder", type=Path, help="run, schedule or sweep folder; with --latest, the folder that holds them"
    )
    parser.add_argument("--latest", action="store_true", help="take the newest schedule (or run) in FOLDER")
    parser.add_argument("--table", action="store_true", help="also print the results as a table")
    parser.add_argument("--output", type=Path, help="file of the page, where FOLDER may not be written")
    options = parser.parse_args(arguments)
    folder = options.folder
    try:
        folder = find_newest(options.folder) if options.latest else options.folder
        path = write_report(folder, options.output)
        if options.table:
            print(results_table(folder) or f"no results in '{folder}'")
    except OSError as error:
        where = error.filename or options.output or folder
        said = f"{where}: the page cannot be made there ({error.strerror}); --output FILE writes it elsewhere"
        print(said, file=sys.stderr)
        return 1
    except VLMTrainError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(f"report: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
