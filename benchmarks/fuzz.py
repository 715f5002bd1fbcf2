"""Random networks: what the library makes of each, with one time limit for each.

    python benchmarks/fuzz.py --count 2000 --out results/fuzz.json

A network is *wrong* if what is left of it differs from the original code with zeros on inputs that nobody has shown to
the library; *late* if a layer group is offered and its removal refused; *raw* if an exception is none of the library's;
*touched* if building the graph changed the model; *hanging* if it takes longer than the limit. None of these should be.
*Refused* is a network of which nothing can be pruned, with its reasons.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import sys
import time
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from decay_pruning.lab import results

sys.path.insert(0, str(Path(__file__).parents[1]))
GOOD = ("pruned", "refused")


def _judge(pipe: Connection) -> None:
    """Judge the networks of the numbers that come in."""
    judge = importlib.import_module("tests.random_nets").judge
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    while (number := pipe.recv()) is not None:
        start = time.perf_counter()
        verdict, about = judge(number)
        pipe.send((verdict, about, time.perf_counter() - start))


class Worker:
    """A process of its own, replaced where it hangs."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_judge, args=(other,), daemon=True)
        self._process.start()

    def judge(self, number: int) -> tuple[str, str, float]:
        """Verdict, what it is about, and seconds."""
        self._pipe.send(number)
        if not self._pipe.poll(self._limit):
            self._process.kill()
            self._start()
            return "hanging", f"not done in {self._limit:.0f} s", self._limit
        try:
            verdict, about, seconds = self._pipe.recv()
        except EOFError:
            self._start()
            return "raw", "the process ended", 0.0
        return verdict, about, seconds

    def end(self) -> None:
        self._pipe.send(None)
        self._process.join()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--limit", type=float, default=60, help="seconds for each network")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    network = importlib.import_module("tests.random_nets").network
    worker = Worker(options.limit)
    counts: Counter[str] = Counter()
    stages: Counter[str] = Counter()
    bad: dict[int, Any] = {}
    times = []
    for number in range(options.first, options.first + options.count):
        verdict, about, seconds = worker.judge(number)
        counts[verdict] += 1
        times.append(seconds)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kinds = network(number).kinds
        stages.update(kinds)
        if verdict not in GOOD:
            bad[number] = {"verdict": verdict, "about": about[:600], "stages": kinds}
            print(number, verdict, kinds, about[:300], flush=True)
        if number % 100 == 99:
            print(f"{number + 1}: {dict(counts)}", flush=True)
    worker.end()
    found = {
        "command": " ".join(["python", *sys.argv]),
        "versions": results.versions(),
        "machine": results.machine("cpu"),
        "networks": options.count,
        "verdicts": dict(counts),
        "seconds": {"median": sorted(times)[len(times) // 2], "longest": max(times)},
        "stages": dict(sorted(stages.items())),
        "bad": bad,
    }
    print(json.dumps({key: found[key] for key in ("networks", "verdicts", "seconds")}))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
