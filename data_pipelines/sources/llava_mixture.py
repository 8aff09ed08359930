"""A LLaVA-NeXT or OneVision mixture: a YAML that lists LLaVA JSON files and how much to take of each.

Format: `datasets: [{json_path, sampling_strategy: all | first:N | end:N | random:N}]`, N a number of records or a
percentage, rounded up (github.com/LLaVA-VL/LLaVA-NeXT, llava/train/train.py, LazySupervisedDataset; its mixtures are
scripts/train/*.yaml). `<start>{a,b}.json` stands for two files, as there in `data_path`.
"""

from __future__ import annotations

import hashlib
import math
import re
import sys
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_pipelines.errors import DataError
from data_pipelines.inputs.files import MediaFolder, read_yaml
from data_pipelines.inputs.records import describe_record, read_records
from data_pipelines.sample import Sample
from data_pipelines.sources import ListSource
from data_pipelines.sources.common.samples import check_choice
from data_pipelines.sources.llava_json import LlavaFormat

STRATEGY = re.compile(r"(all)|(first|end|random):(\d+)(%?)")
BRACES = re.compile(r"(.*)\{([^{}]*)\}(.*)", re.DOTALL)


class LlavaMixture(ListSource):
    """The chosen records of every dataset of `file`, in its order.

    A JSON path starts from the YAML's folder; with `json_folder`, its file name alone counts, and lies there. `random`
    takes the records whose hashes of (`seed`, dataset, record) are smallest, in that order: the reference shuffles
    without a seed. `missing` skip passes over files that are not there, since the published mixtures name unreleased
    ones; what is passed over is printed. `image_first` and `untagged` as in `llava_json`.
    """

    def __init__(
        self,
        *,
        file: str,
        json_folder: str | None = None,
        images: str | None = None,
        seed: int = 0,
        missing: str = "error",
        name: str = "llava_mixture",
        license: str = "",
        split: str = "train",
        image_first: bool = True,
        untagged: str = "bad",
    ) -> None:
        check_choice("missing", missing, ("error", "skip"))
        self.name, self.license, self.split = name, license, split
        self._format = LlavaFormat(images=MediaFolder(images), image_first=image_first, untagged=untagged)
        self._files: list[Sequence[Any]] = []
        self._of_file, self._of_record = array("l"), array("l")
        for number, (path, strategy) in enumerate(_read_datasets(Path(file), json_folder)):
            skipped = missing == "skip" and not path.is_file()
            records: Sequence[Any] = [] if skipped else read_records(path)
            if skipped:
                print(f"{file}: skipped, not there: {path}", file=sys.stderr)
            chosen = strategy.choose_records(len(records), f"{seed}-{number}")
            if isinstance(records, list):  # the rest would be copied into every process
                taken = set(chosen)
                records = [record if i in taken else None for i, record in enumerate(records)]
            self._files.append(records)
            self._of_file.extend([number] * len(chosen))
            self._of_record.extend(chosen)

    def __len__(self) -> int:
        return len(self._of_record)

    def name_record(self, i: int) -> str:
        """The number of the dataset and the record's own id, where it has one."""
        return f"dataset {self._of_file[i]}, {describe_record(self._files[self._of_file[i]], self._of_record[i])}"

    def read_record(self, i: int) -> tuple[Sample, list[bytes]]:
        """Read record i of those that the mixture takes."""
        number, position = self._of_file[i], self._of_record[i]
        record = self._files[number][position]
        return self._format.parse_record(record, f"{number:03d}-{position:07d}-{record.get('id', '')}", self)


class Strategy(NamedTuple):
    """How much of a dataset is taken, from where."""

    kind: str
    number: int = 0
    percent: bool = False

    def choose_records(self, count: int, salt: str) -> Sequence[int]:
        """The records taken of `count`."""
        number = math.ceil(self.number * count / 100) if self.percent else self.number
        match self.kind:
            case "first":
                return range(min(number, count))
            case "end":
                return range(max(count - number, 0), count)
            case "random":
                hashes = sorted((hashlib.sha256(f"{salt}-{i}".encode()).digest(), i) for i in range(count))
                return [i for _, i in hashes[:number]]
        return range(count)


def _read_datasets(file: Path, json_folder: str | None) -> Iterator[tuple[Path, Strategy]]:
    data = read_yaml(file)
    entries = data.get("datasets") if isinstance(data, dict) else None
    if not isinstance(entries, list) or not entries:
        raise DataError(f"file: {file} has no list `datasets`")
    for number, entry in enumerate(entries):
        path = entry.get("json_path") if isinstance(entry, dict) else None
        if not isinstance(path, str):
            raise DataError(f"{file}: datasets[{number}] has no json_path: {entry!r}")
        found = STRATEGY.fullmatch(text := str(entry.get("sampling_strategy", "all")))
        if not found:
            allowed = "all, first:N, end:N, random:N; N a number or a percentage such as 10%"
            raise DataError(f"{file}: datasets[{number}].sampling_strategy: got {text!r}; allowed: {allowed}")
        strategy = Strategy("all") if found[1] else Strategy(found[2], int(found[3]), bool(found[4]))
        for name in _expand_braces(path):
            yield Path(json_folder, Path(name).name) if json_folder else file.parent / name, strategy


def _expand_braces(path: str) -> list[str]:
    """The paths that a pattern with braces means: `a{b,c}d` gives `abd` and `acd`."""
    found = BRACES.fullmatch(path)
    if not found:
        return [path]
    return [name for middle in found[2].split(",") for name in _expand_braces(found[1] + middle.strip() + found[3])]
