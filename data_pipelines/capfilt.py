"""Filter captions by a model's scores, or exchange them: `python -m data_pipelines.capfilt folder=<set> output=<new set> scores=<columns> [captions=<columns>] [option=value ...]`

CapFilt (BLIP, arXiv 2201.12086, section 3.3): what `mode=caption` and `mode=score` of vlm_train wrote beside a set
becomes a new set. `captions=` puts a generated caption in place of a sample's own; `scores=` drops every caption whose
score is outside `ranges`, and samples without any left. The manifest says from what the set was made, and how many
captions of each source were kept; `dropped.jsonl` holds the others.
"""  # noqa: E501

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from data_pipelines.building.merge import write_lines
from data_pipelines.building.progress import Progress
from data_pipelines.cli import check_same, run_command
from data_pipelines.errors import BadSample, DataError, common_reason
from data_pipelines.filters import check_range, drop_outside
from data_pipelines.sample import Sample, Text, Turn
from data_pipelines.shards.columns import Columns
from data_pipelines.shards.manifest import MANIFEST
from data_pipelines.shards.shard_set import ShardSet
from data_pipelines.shards.tar_writer import ShardWriter

DROPPED = "dropped.jsonl"
RUNNING = ("output", "force")
"""Options that do not change what a finished set holds."""

Ranges = Mapping[str, tuple[float | None, float | None]]


@dataclass
class Tally:
    """Captions kept and dropped: by source, by whether they are right, and the dropped ones by reason."""

    sources: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    truth: Counter[tuple[bool, bool]] = field(default_factory=Counter)  # (kept, right)
    reasons: Counter[str] = field(default_factory=Counter)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def count_caption(self, sample: Sample, annotation: int, reason: str | None, truth: str | None) -> None:
        """Count a caption that is dropped for `reason`, or kept; `truth` names the meta that says if it is right."""
        self.sources[sample.source]["kept" if reason is None else "dropped"] += 1
        if truth is not None:
            right = sample.meta.get(truth)
            if not isinstance(right, bool):
                raise DataError(f"truth: sample {sample.key!r} has {truth} = {right!r}; expected true or false")
            self.truth[reason is None, right] += 1
        if reason is not None:
            self.reasons[reason] += 1
            self.rows.append({"key": sample.key, "annotation": annotation, "reason": reason})

    def count_unusable(self, key: str, source: str, reason: str) -> None:
        """Count a sample that has no caption to judge."""
        self.sources[source]["dropped"] += 1
        self.reasons[common_reason(reason)] += 1
        self.rows.append({"key": key, "annotation": 0, "reason": reason})

    def compute_precision_recall(self) -> dict[str, float | None]:
        """Precision and recall of both verdicts; null where there is nothing to divide by."""
        n = self.truth
        pairs = {
            "precision of kept": (n[True, True], n[True, False]),
            "recall of kept": (n[True, True], n[False, True]),
            "precision of dropped": (n[False, False], n[False, True]),
            "recall of dropped": (n[False, False], n[True, False]),
        }
        return {name: hits / (hits + others) if hits + others else None for name, (hits, others) in pairs.items()}


def filter_captions(config: DictConfig) -> int:
    """Make the set that the composed `config` describes; returns the exit code."""
    output, shards = Path(config.output), ShardSet(config.folder)
    ranges = _read_ranges(config)
    scores, captions = _open_columns(config, shards, ranges)
    arguments: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    arguments = {name: value for name, value in arguments.items() if name not in RUNNING}
    if output.resolve() == shards.folder.resolve():
        raise DataError(f"output: {output} is the set itself; choose another folder")
    if (output / MANIFEST).is_file() and not config.force:
        check_same(output, arguments)
        print(f"{output}: already made ({len(ShardSet(output))} samples); force=true makes it again")
        return 0
    tally = Tally()
    limits = {"samples_per_shard": config.samples_per_shard, "max_bytes": config.max_shard_bytes}
    with ShardWriter(output, overwrite=config.force, **limits) as writer, ExitStack() as stack:
        progress = stack.enter_context(Progress(str(output), len(shards), "samples"))
        for i in range(len(shards)):
            if kept := _keep_captions(shards, i, scores, captions, ranges, tally, config.truth):
                writer.write_sample(*kept)
            progress.add_records(1)
        if not any(counts["kept"] for counts in tally.sources.values()):
            raise DataError(f"{config.folder}: no caption is left: {dict(tally.reasons)}")
        writer.about |= _manifest_fields(shards, arguments, scores, captions, tally)
        write_lines(writer.partial / DROPPED, tally.rows)
    _print_result(output, tally, bool(config.truth))
    return 0


def _read_ranges(config: DictConfig) -> dict[str, tuple[float | None, float | None]]:
    if config.scores is None and config.captions is None:
        raise DataError(
            "scores, captions: neither is given; name the columns of mode=score or mode=caption, see --help"
        )
    if config.scores is None:
        return {}
    given: dict[str, Any] = OmegaConf.to_container(config.ranges)  # type: ignore[assignment]
    ranges = {name: bounds for name, bounds in given.items() if bounds is not None}
    for name, bounds in ranges.items():
        if not isinstance(bounds, list) or len(bounds) != 2:
            raise DataError(f"ranges.{name}: got {bounds!r}; expected [low, high], either null")
        check_range(f"ranges.{name}", *bounds)
    return {name: (low, high) for name, (low, high) in ranges.items()}


def _open_columns(config: DictConfig, shards: ShardSet, ranges: Ranges) -> tuple[Columns | None, Columns | None]:
    """Scores and captions, and that the scores are those of the captions."""
    given = {"scores": list(ranges), "captions": ["caption"]}
    scores, captions = (
        Columns(config[option], shards, names, option=option) if config[option] is not None else None
        for option, names in given.items()
    )
    if scores is not None:
        scored = scores.manifest.about.get("captions")
        wanted = captions.sha256 if captions is not None else None
        if scored != wanted:
            of = "the samples' own captions" if scored is None else f"the captions with sha256 {scored[:12]}"
            raise DataError(f"scores: {config.scores} are those of {of}, but captions is {config.captions}")
    return scores, captions


def _keep_captions(
    shards: ShardSet,
    i: int,
    scores: Columns | None,
    captions: Columns | None,
    ranges: Ranges,
    tally: Tally,
    truth: str | None,
) -> tuple[Sample, list[bytes]] | None:
    """Sample i with the captions that are kept; None without any."""
    source = ""
    try:
        sample, blobs = shards.load_sample(i)
        source = sample.source
        if captions is not None:
            sample = with_caption(sample, str(captions.read_row(i).get("caption") or ""))
    except BadSample as error:
        tally.count_unusable(shards.key(i), source, str(error))
        return None
    row = {} if scores is None else scores.read_row(i)
    kept = []
    for number, annotation in enumerate(sample.annotations):
        reason = _reason_to_drop(row, number, len(sample.annotations), ranges)
        tally.count_caption(sample, number, reason, truth)
        if reason is None:
            kept.append(annotation)
    return (replace(sample, annotations=tuple(kept)), blobs) if kept else None


def _reason_to_drop(row: Mapping[str, Any], number: int, count: int, ranges: Ranges) -> str | None:
    """Why the caption `number` of `count` is dropped."""
    for name, (low, high) in ranges.items():
        values = row.get(name)
        values = values if isinstance(values, list) else [values]
        value = values[number] if len(values) == count else None
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            return f"no {name}"
        if drop := drop_outside(name, value, low, high):
            return str(drop)
    return None


def with_caption(sample: Sample, caption: str) -> Sample:
    """The sample with `caption` as the answer of its first annotation, and no other. Raises `BadSample` without one."""
    turns = sample.annotations[0].turns
    if not caption.strip():
        raise BadSample(f"sample {sample.key!r}: no caption")
    if turns[-1].role != "assistant":
        raise BadSample(f"sample {sample.key!r}: its first annotation has no answer that a caption could replace")
    answer = Turn(role="assistant", parts=(Text(text=caption),), weight=turns[-1].weight)
    annotation = replace(sample.annotations[0], turns=(*turns[:-1], answer), rejected=None)
    return replace(sample, annotations=(annotation,))


def _manifest_fields(
    shards: ShardSet, arguments: Mapping[str, Any], scores: Columns | None, captions: Columns | None, tally: Tally
) -> dict[str, Any]:
    """Fields of the new manifest."""
    origin = shards.manifest
    used = {"scores": scores, "captions": captions}
    made_from: dict[str, Any] = {
        "set": origin.fingerprint,
        "columns": {
            name: {"sha256": one.sha256, "about": dict(one.manifest.about)}
            for name, one in used.items()
            if one is not None
        },
        "captions": {name: dict(counts) for name, counts in sorted(tally.sources.items())},
    }
    if tally.truth:
        made_from["truth"] = tally.compute_precision_recall()
    about = {name: getattr(origin, name) for name in ("source", "license", "split", "bad")}
    return about | {
        "command": "capfilt",
        "build": dict(arguments),
        "dropped": dict(tally.reasons.most_common()),
        "origin": made_from,
    }


def _print_result(output: Path, tally: Tally, truth: bool) -> None:
    kept, dropped = (sum(counts[name] for counts in tally.sources.values()) for name in ("kept", "dropped"))
    print(f"{output}: {kept} of {kept + dropped} captions kept; the others, in {output / DROPPED}:")
    for reason, count in tally.reasons.most_common():
        print(f"  {count:>8}  {reason}")
    for name, counts in sorted(tally.sources.items()):
        print(f"  {name or 'unknown source'}: {counts['kept']} kept, {counts['dropped']} dropped")
    for name, share in tally.compute_precision_recall().items() if truth else ():
        print(f"  {name}: {'none' if share is None else format(share, '.3f')}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(filter_captions, "capfilt", __doc__ or "", None if argv is None else list(argv))


if __name__ == "__main__":
    sys.exit(main())
