"""A pruner in checkpoints of `torch.distributed.checkpoint` (DCP)."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch

from decay_pruning.checks import checked
from decay_pruning.errors import ConfigError
from decay_pruning.pruner import Pruner


class Stateful:
    """A pruner as `torch.distributed.checkpoint` saves and loads it.

    What a pruner keeps changes while it works, and that loader asks for the same keys and shapes that were saved: here
    all of it is one value, the same in all processes. Load it first, since it makes the model as narrow as it was.

    >>> dcp.save({"pruner": Stateful(pruner), "model": …, "optimizer": …}, checkpoint_id=path)  # doctest: +SKIP
    >>> dcp.load({"pruner": Stateful(pruner)}, checkpoint_id=path)  # doctest: +SKIP
    >>> dcp.load({"model": …, "optimizer": …}, checkpoint_id=path)  # doctest: +SKIP

    Args:
        pruner: the pruner; on loading, a fresh one on the original model.
    """

    def __init__(self, pruner: Pruner) -> None:
        self.pruner: Pruner = checked(pruner, Pruner, "pruner")

    def state_dict(self) -> dict[str, Any]:
        """The pruner's state as one value."""
        written = io.BytesIO()
        torch.save(self.pruner.state_dict(), written)
        return {"state": written.getvalue()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the pruner go on from it.

        Raises:
            ConfigError: this is no state of a pruner, or not one of this pruner.
        """
        try:
            found = torch.load(io.BytesIO(state["state"]), weights_only=True)
        except Exception as error:
            raise ConfigError(f"this is no state of a pruner ({type(error).__name__})") from error
        self.pruner.load_state_dict(found)
