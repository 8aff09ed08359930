"""Where jobs run: in this process, in processes of this machine, or on a Ray cluster. Results come as they finish."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pickle import PicklingError
from typing import Any, TypeAlias, TypeVar

from data_pipelines.errors import DataError

ENGINES = ("local", "ray")
S = TypeVar("S")
J = TypeVar("J")
R = TypeVar("R")
Results: TypeAlias = Generator[tuple[J, R], None, None]


def count_cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(
    work: Callable[[S, J], R], shared: S, jobs: Sequence[J], *, workers: int | None = None, engine: str = "local"
) -> Results[J, R]:
    """`(job, work(shared, job))` for every job, in the order in which they finish.

    `shared` goes to each worker once. `workers` is the number of jobs at a time: by default one per core, and with one
    there is no other process. An error ends everything that still runs. Close the iterator if you leave it early.
    """
    if engine not in ENGINES:
        raise DataError(f"engine: got {engine!r}; allowed: {', '.join(ENGINES)}")
    if workers is not None and (not isinstance(workers, int) or workers < 1):
        raise DataError(f"workers: got {workers!r}; allowed: 1 or more, or null for one per core")
    if engine == "ray":
        return _run_in_ray(work, shared, jobs, workers)
    workers = min(workers or count_cores(), len(jobs))
    return _run_in_processes(work, shared, jobs, workers) if workers > 1 else ((job, work(shared, job)) for job in jobs)


def in_order(results: Iterable[tuple[int, R]]) -> Iterator[R]:
    """Results numbered from 0, put into the order of their numbers."""
    waiting: dict[int, R] = {}
    number = 0
    for i, result in results:
        waiting[i] = result
        while number in waiting:
            yield waiting.pop(number)
            number += 1


def _run_in_processes(work: Callable[[S, J], R], shared: S, jobs: Sequence[J], workers: int) -> Results[J, R]:
    # Spawned: a fork copies threads' locks, and every open file with its locks, which a worker left over would hold.
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(work, shared))
    left, running = iter(jobs), dict[Future[Any], J]()
    try:
        for job in islice(left, 2 * workers):
            running[_submit_job(pool, job)] = job
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
                for job in islice(left, 1):
                    running[_submit_job(pool, job)] = job
        pool.shutdown()
    except BrokenProcessPool as error:
        raise DataError("a worker process died, perhaps for want of memory; fewer workers= need less") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()
            child.join()


def _submit_job(pool: ProcessPoolExecutor, job: Any) -> Future[Any]:
    try:
        return pool.submit(_work_on, job)
    except (PicklingError, TypeError, AttributeError) as error:
        raise DataError(f"cannot be sent to a worker process ({error}); workers=1 needs none") from error


_worker: tuple[Callable[[Any, Any], Any], Any]  # of a worker process


def _start_worker(work: Callable[[Any, Any], Any], shared: Any) -> None:
    global _worker
    _worker = (work, shared)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent ends the others
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A killed parent ends nobody: without this, workers would go on writing for nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _work_on(job: Any) -> Any:
    work, shared = _worker
    return work(shared, job)


def _run_in_ray(work: Callable[[S, J], R], shared: S, jobs: Sequence[J], workers: int | None) -> Results[J, R]:
    try:
        import ray
    except ImportError as error:
        raise DataError("engine=ray needs ray: pip install 'vlm-train[ray]'") from error
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False)  # RAY_ADDRESS names a cluster; without it a local one is started
    task, place = ray.remote(work), ray.put(shared)
    left, running = iter(jobs), dict[Any, J]()
    try:
        for job in islice(left, workers or int(ray.cluster_resources()["CPU"])):
            running[task.remote(place, job)] = job
        while running:
            for reference in ray.wait(list(running))[0]:
                yield running.pop(reference), ray.get(reference)
                for job in islice(left, 1):
                    running[task.remote(place, job)] = job
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
        if started:
            ray.shutdown()
