"""Several processes at the price of one start: all scenarios of a file run in the same ones, one after the other."""

from __future__ import annotations

import datetime
import multiprocessing
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.fsdp
import torch.distributed.tensor.parallel
import torch.multiprocessing as mp

import decay_pruning  # noqa: F401


def _work(
    rank: int, world: int, folder: str, scenarios: Mapping[str, Callable[..., Any]], backend: str
) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    wait = datetime.timedelta(seconds=120)
    dist.init_process_group(
        backend, init_method=f"file://{folder}/meet", rank=rank, world_size=world, timeout=wait
    )
    for name, scenario in scenarios.items():
        home = Path(folder) / name
        home.mkdir(exist_ok=True)
        try:
            outcome = {"found": scenario(rank, world, home)}
        except Exception:
            outcome = {"error": traceback.format_exc()}
        torch.save(outcome, home / f"rank{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()


def together(
    world: int, folder: Path, scenarios: Mapping[str, Callable[..., Any]], *, backend: str = "gloo"
) -> Callable[[str], list[Any]]:
    """Run scenarios (rank, world, folder of its own) → anything that `torch.save` takes, in `world` processes.

    Returns:
        name of a scenario → what it has found in each process; the first error is raised there.
    """
    multiprocessing.set_forkserver_preload([__name__])  # torch is imported once for all
    args = (world, str(folder), dict(scenarios), backend)
    mp.start_processes(_work, args=args, nprocs=world, start_method="forkserver")

    def found(name: str) -> list[Any]:
        ranks = [torch.load(folder / name / f"rank{r}.pt", weights_only=True) for r in range(world)]
        for outcome in ranks:
            assert "error" not in outcome, outcome["error"]
        return [outcome["found"] for outcome in ranks]

    return found
