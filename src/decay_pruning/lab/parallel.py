"""Several runs side by side, each in a process of its own: many small ones fill a GPU, or the cores of a CPU."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import torch

from decay_pruning.errors import DecayPruningError

#: What a process can be handed: a function of a module, or a `functools.partial` of one, whose values can be pickled.
Call = Callable[[], Any]


@dataclass(frozen=True)
class Chain:
    """A call, and those that need what it leaves behind (a dense start, and the arms from it)."""

    first: Call
    then: Sequence[Call] = field(default_factory=tuple)


def threads(jobs: int) -> int:
    """Threads of each of so many processes."""
    return max(1, torch.get_num_threads() // jobs)


def run(chains: Sequence[Chain], jobs: int) -> Iterator[tuple[Call, Any]]:
    """Run chains in `jobs` processes.

    Yields:
        each call that came second, with what it returned or the exception that it raised, as they come. Where a first
        call raises, this is the outcome of all that wait for it. Whoever stops early leaves the rest undone.

    Raises:
        DecayPruningError: a process died.
    """
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=(threads(jobs),))
    try:
        waiting: dict[Future[Any], Chain | Call] = {pool.submit(c.first): c for c in chains if c.then}
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                call = waiting.pop(future)
                outcome = future.exception() or future.result()
                if isinstance(outcome, BrokenExecutor):
                    raise outcome
                if not isinstance(call, Chain):
                    yield call, outcome
                elif isinstance(outcome, BaseException):
                    yield from ((each, outcome) for each in call.then)
                else:
                    waiting |= {pool.submit(each): each for each in call.then}
    except BrokenExecutor:
        raise DecayPruningError(
            f"one of {jobs} processes died, perhaps for want of memory: finished runs are kept; try fewer jobs"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted, too, and ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()  # returns when the parent is gone, be it killed
    os._exit(1)
