"""Steps: a proof looks through roundings, behind which a small change would not show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_STEPS = frozenset({"round", "floor", "ceil", "trunc", "fix", "sign", "sgn"})
_CAST = torch.ops.aten._to_copy.default


class Steps(TorchDispatchMode):
    """Rounding and quantising leave floating values as they are.

    Attributes:
        found: there was something to look through.
        narrow: dtypes that wider values were cast to on the way (a norm in single precision, whatever comes in).
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.found = False
        self.narrow: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not _is_step(func) or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
            out = func(*args, **(kwargs or {}))
            floating = func is _CAST and isinstance(args[0], Tensor) and out.is_floating_point()
            if floating and out.element_size() < args[0].element_size():
                self.narrow.add(out.dtype)
            return out
        self.found = True
        if func.overloadpacket.__name__.endswith("_"):
            return args[0]
        same = args[0].clone()
        masked = len(func._schema.returns) > 1
        return (same, torch.ones_like(same, dtype=torch.bool)) if masked else same


@cache
def _is_step(function: Any) -> bool:
    name = function.overloadpacket.__name__.rstrip("_") if hasattr(function, "overloadpacket") else ""
    return name in _STEPS or "fake_quantize" in name
