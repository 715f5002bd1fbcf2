"""Ranks: what one process finds out, such as a time, all processes that train together go by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def agreed(find: Callable[[], T]) -> T:
    """What the first rank finds, on every rank; called by all of them, or in a process of its own."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return find()
    if torch.distributed.get_world_size() == 1:
        return find()
    found: list[Any] = [find()]  # all are busy alike, so that no rank waits for the clock of another
    torch.distributed.broadcast_object_list(found, src=0)
    value: T = found[0]
    return value
