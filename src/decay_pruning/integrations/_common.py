"""What the integrations share: a pruner's settings before there is a model, its figures, its place in checkpoints."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from decay_pruning.budget import Target, as_target
from decay_pruning.checks import as_inputs, checked
from decay_pruning.decay import SmoothPruning
from decay_pruning.engine import Event
from decay_pruning.errors import BudgetError, ConfigError, WriteError
from decay_pruning.hosts import Goal, Host, Scene, as_host
from decay_pruning.progress import PruningReport
from decay_pruning.pruner import Pruner, Removal
from decay_pruning.rectify import SelfRectifying
from decay_pruning.structures import Picks


@dataclass
class Settings:
    """All that a `Pruner` takes beside the model, its optimizer and the length of the training; and `force`."""

    example_inputs: Any
    target: Target | float
    host: Host | Callable[[Scene, Goal], Picks] | None = None
    smooth: SmoothPruning | None = None
    rectify: SelfRectifying | None = None
    start: int = 0
    removal: Removal = "at finish"
    also: Sequence[Any] = ()
    on_event: Callable[[Event], None] | None = None
    force: bool = False

    def __post_init__(self) -> None:
        self.example_inputs, self.target = as_inputs(self.example_inputs), as_target(self.target)
        self.host = as_host(self.host)
        self.removal = checked(self.removal, Removal, "removal")
        self.force = checked(self.force, bool, "force")

    def pruner(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        total_steps: int,
        state: Mapping[str, Any] | None = None,
    ) -> Pruner:
        """The pruner; with a state, the one that goes on from there in a model that has its weights already.

        Raises:
            ConfigError: beside what `Pruner` and its `load_state_dict` raise: the host changes the model itself, whose
                weights were loaded before.
        """
        before = set(model.state_dict())
        with filled(model) if state is not None else no_change():
            pruner = Pruner(
                model,
                to_device(self.example_inputs, next(model.parameters()).device),
                optimizer,
                self.target,
                host=self.host,
                smooth=self.smooth,
                rectify=self.rectify,
                total_steps=total_steps,
                start=self.start,
                removal=self.removal,
                also=self.also,
                on_event=self.on_event,
            )
        if state is None:
            return pruner
        try:
            if set(model.state_dict()) != before:
                raise ConfigError(
                    f"{type(self.host).__name__} puts layers of its own into the model while it prunes, for which a "
                    "trainer's checkpoint has no place: resume in a loop of your own (docs/your-loop.md)"
                )
            pruner.load_state_dict(state)
        except BaseException:
            pruner.cancel()
            raise
        return pruner

    def finish(self, pruner: Pruner, how: str) -> PruningReport:
        """The end of the training is the end of pruning.

        Raises:
            BudgetError: the target is not met; `how` to go on is said beside how far it got.
        """
        try:
            return pruner.finish(force=self.force)
        except BudgetError as error:
            raise BudgetError(
                f"the training ended before the target was met, and the model has its full shape. {error}. {how}"
            ) from None


def figures(pruner: Pruner) -> dict[str, float]:
    """What is logged: names as loggers sort them, plain numbers."""
    now = pruner.progress()
    return {
        "pruning/macs": now.macs_left,
        "pruning/macs_share": now.macs_left / now.macs_start,
        "pruning/decaying": now.decaying,
        "pruning/held": now.held,
        "pruning/released": now.released,
        "pruning/removed": now.removed,
    }


@contextmanager
def no_change() -> Iterator[None]:
    """Nothing."""
    yield


@contextmanager
def filled(model: nn.Module) -> Iterator[None]:
    """No weight is zero inside, so that the model can be traced and proven as when nothing was held at zero yet."""
    generator = torch.Generator().manual_seed(0)
    before = [(p, p.detach().clone()) for p in model.parameters() if bool((p == 0).any())]
    try:
        with torch.no_grad():
            for p, value in before:
                size = value.float().abs().mean().item() or 0.02
                noise = torch.randn(p.shape, generator=generator).mul_(size).to(p.device, p.dtype)
                p.copy_(torch.where(p == 0, noise, p))
        yield
    finally:
        with torch.no_grad():
            for p, value in before:
                p.copy_(value)


def to_device(value: Any, device: torch.device) -> Any:
    """The same inputs on a device."""
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), value)


def write(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Save plain containers and tensors; the file appears whole or not at all.

    Raises:
        WriteError: it cannot be written.
    """
    target = Path(path)
    try:
        handle, scratch = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        os.close(handle)
        try:
            torch.save(dict(content), scratch)
            os.replace(scratch, target)
        except BaseException:
            Path(scratch).unlink(missing_ok=True)
            raise
    except (OSError, RuntimeError) as error:
        raise WriteError(f"cannot write {target}: {error}") from error


def read(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What `write` wrote; None where there is no such file or it is damaged."""
    try:
        found = torch.load(path, weights_only=True, map_location="cpu")
    except Exception:
        return None
    return found if isinstance(found, dict) else None
