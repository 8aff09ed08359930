"""A sweep in words: one line when a job ends, a table when all have."""

from __future__ import annotations

import sys
from pathlib import Path

from vlm_train.runs.sweep.records import Job, Sweep


def announce_end(job: Job, sweep: Sweep) -> None:
    """Says how a job ended: what failed goes to stderr, with its reason and its folder."""
    label = job.make_label(sweep.keys)
    if job.status == "failed":
        where = "" if job.run in job.error else f" Run: {job.run}"  # also for none: it was refused before it had one
        print(f"Job {job.number} failed ({label}): {job.error}{where}", file=sys.stderr, flush=True)
    elif job.status == "interrupted":
        print(f"Job {job.number} was interrupted ({label}).", file=sys.stderr, flush=True)
    elif job.status == "done":
        # removed import  # plotly is not needed before

        score = sweep.score_of(job)
        metric = f", {sweep.metric} {score:.4g}" if score is not None else ""
        how = "was already done" if job.already else f"is done after {format_duration(job.seconds)}"
        print(f"Job {job.number} {how} ({label}){metric}", flush=True)


def format_table(sweep: Sweep) -> str:
    """All jobs, best first: swept values, metric, status, run."""
    metric = [sweep.metric] if sweep.metric else []
    rows = [["job", *sweep.keys, *metric, "status", "run"]]
    for job in sweep.rank_jobs():
        score = sweep.score_of(job)
        scores = [("" if score is None else f"{score:.4g}")] if metric else []
        values = [shorten_value(job.value_of(key)) for key in sweep.keys]
        rows.append([str(job.number), *values, *scores, job.status, Path(job.run).name])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def shorten_value(text: str) -> str:
    """A value as people read it: numbers with five digits, long texts cut."""
    try:
        return f"{float(text):.5g}" if not text.lstrip("-").isdigit() else text
    except ValueError:
        return text if len(text) <= 40 else f"{text[:39]}…"


def format_duration(seconds: float) -> str:
    """Seconds as a person says them: 42 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = int(seconds) // 60
    return f"{minutes} min {int(seconds) % 60:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
