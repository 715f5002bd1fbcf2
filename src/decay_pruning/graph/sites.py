"""Sites: where in the user's code an operation comes from."""

from __future__ import annotations

import os
import sys

import torch

from decay_pruning import proof

_TORCH = os.path.dirname(torch.__file__)
_HERE = os.path.dirname(__file__)


def site() -> str | None:
    """File and line of the user's code that is running, if any of the model's is."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not proof.call.__code__:
        name = frame.f_code.co_filename
        if not name.startswith((_TORCH, _HERE, "<")) and not name.endswith("keeping.py"):
            return f"{os.path.basename(name)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return None


def of(error: BaseException) -> str | None:
    """File and line of the user's code that an error comes from."""
    found, trace = None, error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if not name.startswith((_TORCH, os.path.dirname(_HERE), "<")):
            found = f"{os.path.basename(name)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


def by_hand() -> bool:
    """Whether the user's own code asked for the operation that is running, not a layer or function of torch."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_HERE):
        frame = frame.f_back
    return not frame.f_code.co_filename.startswith(_TORCH)


def at(where: str | None) -> str:
    return f" ({where})" if where else ""
