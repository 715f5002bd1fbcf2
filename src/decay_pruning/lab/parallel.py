"""Several runs side by side, each in a process of its own: many small ones fill a GPU, or the cores of a CPU."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from decay_pruning.errors import DecayPruningError

#: Seconds that a process has to end in when it is told to, before it is killed.
_GRACE = 3.0
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
        call raises, this is the outcome of all that wait for it. Whoever stops early (an interrupt, too) ends the
        processes at once, in the middle of what they do.

    Raises:
        DecayPruningError: a process died.
    """
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=(threads(jobs),))
    processes = pool._processes  # the pool forgets them when it is shut down
    ended = False
    try:
        waiting: dict[Future[Any], Chain | Call] = {_submit(pool, c.first): c for c in chains if c.then}
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
                    waiting |= {_submit(pool, each): each for each in call.then}
        ended = True
    except BrokenExecutor:
        raise DecayPruningError(
            f"one of {jobs} processes died, perhaps for want of memory: finished runs are kept; try fewer jobs"
        ) from None
    finally:
        if not ended:
            _end(list(processes.values()))
        pool.shutdown(wait=True, cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, call: Call) -> Future[Any]:
    with _uninterrupted():  # processes begin here, and are deaf to an interrupt from their first moment on
        return pool.submit(call)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Put an interrupt off to the end. Processes that are started inside never hear of one."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(processes: Sequence[BaseProcess]) -> None:
    """End processes, whatever they are doing. A file that one of them was writing is not there at all."""
    with _uninterrupted():
        for process in processes:
            process.terminate()
        end = time.monotonic() + _GRACE
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
            if process.is_alive():
                with suppress(OSError):  # it ended just now
                    process.kill()


def _begin(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted, too, and ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()  # returns when the parent is gone, be it killed
    os._exit(1)
