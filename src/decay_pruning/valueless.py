"""Models without values: parameters on the meta device have shapes only, and a forward pass costs next to nothing.

What a model decides (`if mask.all()`, `range(int(n))`) often has nothing to do with weights. So whatever is made of the
inputs, of constants and of sizes alone is worked out beside the run, on the CPU, and can be asked for its value.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from decay_pruning.keeping import written

#: Values of larger tensors are not worked out.
_LARGEST = 2**22


class NoValueError(RuntimeError):
    """A model without values has asked for one."""


def is_valueless(model: nn.Module) -> bool:
    """Whether a parameter or buffer of the model is on the meta device."""
    return any(
        tensor is not None and tensor.is_meta
        for module in model.modules()
        for tensor in (*module._parameters.values(), *module._buffers.values())
    )


@contextmanager
def beside(model: nn.Module, shapes: Shapes | None = None) -> Iterator[Callable[[Tensor], Tensor] | None]:
    """Inside, a model without values runs; others run as ever.

    Args:
        model: the model.
        shapes: what is known of its values already.

    Yields:
        what makes a tensor an input of a model without values; None for others.
    """
    if shapes is None and not is_valueless(model):
        yield None
        return
    with shapes or Shapes() as mode:
        yield mode.stand_in


class Shapes(TorchDispatchMode):
    """Runs every operation on shapes, and on values where all that goes in has some."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}
        #: Identity of a parameter or buffer → what stands for it, also where the code finds it elsewhere.
        self.known: Mapping[int, Tensor] = {}

    def weight(self, tensor: Tensor) -> Tensor:
        """What stands for a parameter or buffer. Positions, masks and counters keep their values."""
        if tensor.is_floating_point() or tensor.is_complex():
            return torch.empty_like(tensor, device="meta")
        return self.stand_in(tensor)

    def stand_in(self, tensor: Tensor) -> Tensor:
        """The same without values, which are remembered."""
        if tensor.is_meta:
            return tensor
        with _disable_current_modes():
            return self._note(tensor.detach().clone())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs) if kwargs else {}
        tensors = list(_tensors((*args, *given.values())))
        if not tensors and _makes_tensors(func) and given.get("device") is None:
            given["device"] = torch.device("meta")  # where the weights are
        if not any(t.is_meta for t in tensors) and not _is_meta(given.get("device")):
            return func(*args, **given)
        values = self._run_beside(func, args, given, tensors)
        if values is not None and torch.Tag.dynamic_output_shape in func.tags:
            return self._noted(values, given)
        try:
            args = self._positions(func, args)
            if any(not t.is_meta for t in tensors):
                args, given = _replaced((args, given), self._shape)
            below = torch._C._len_torch_dispatch_stack()  # modes that have to see the operation
            out = func(*args, **given) if below else on_shapes(func, args, given)
        except Exception as error:
            if values is not None:
                return self._noted(values, given)
            if isinstance(error, NotImplementedError) or "meta tensor" in str(error):
                raise _no_value(func) from error
            raise
        if values is not None:
            for mine, value in zip(_tensors([out]), _tensors([values]), strict=False):
                if mine.numel() <= _LARGEST:
                    self._values[id(mine)] = weakref.ref(mine), value
        return out

    def _run_beside(
        self, func: Any, args: Sequence[Any], given: dict[str, Any], tensors: Sequence[Tensor]
    ) -> Any:
        """What an operation makes of values; None where one of them is not known."""
        if not hasattr(func, "_schema"):
            return None
        if all(not t.is_meta or self._value(t) is not None for t in tensors) and _small(args, tensors):
            args, given = _replaced((args, given), self._value)
            if _is_meta(given.get("device")):
                given["device"] = "cpu"
            with suppress(Exception), _disable_current_modes(), torch.no_grad():
                return func(*args, **given)
        for k, name in written(func):
            for target in _tensors([args[k] if k < len(args) else given.get(name)]):
                self._forget(func, target)
        return None

    def _value(self, tensor: Tensor) -> Tensor | None:
        if not tensor.is_meta:
            return tensor
        found = self._values.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def _shape(self, tensor: Tensor) -> Tensor:
        return (
            tensor
            if tensor.is_meta
            else self.known[id(tensor)]
            if id(tensor) in self.known
            else tensor.to("meta")
        )

    def _note(self, value: Tensor) -> Tensor:
        new = value.to("meta")
        self._values[id(new)] = weakref.ref(new), value
        return new

    def _noted(self, out: Any, given: Mapping[str, Any]) -> Any:
        if given.get("device") is not None and not _is_meta(given["device"]):
            return out  # `x.cpu()`
        with _disable_current_modes():
            return _replaced(out, self._note)

    def _forget(self, func: Any, target: Tensor) -> None:
        """What was written to by what has no value has none any more, and neither has what shares its memory."""
        if not target.is_meta:
            raise _no_value(func)
        value = self._value(target)
        if value is not None:
            where = value.untyped_storage().data_ptr()
            for key in [k for k, (_, v) in self._values.items() if v.untyped_storage().data_ptr() == where]:
                del self._values[key]

    def _positions(self, func: Any, args: Sequence[Any]) -> Sequence[Any]:
        """Masks that are known, as lists of positions: how many they are is then known, too."""
        if func not in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default):
            return args
        indices: list[Any] = []
        for each in args[1]:
            mask = self._value(each) if isinstance(each, Tensor) and each.dtype == torch.bool else None
            indices += [each] if mask is None else [k.to("meta") for k in mask.nonzero().unbind(1)]
        return [args[0], indices, *args[2:]]


def _batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    """torch's own takes the statistics apart in Python, a hundred times as slowly."""
    width = x.shape[1]
    for tensor in (weight, bias, *rest):
        if isinstance(tensor, Tensor) and tensor.shape != (width,):
            raise RuntimeError(f"a batch-norm of {tuple(tensor.shape)} got {width} channels")
    kept = width if any(each is True for each in rest) else 0  # in training mode
    return torch.empty_like(x), x.new_empty(kept), x.new_empty(kept)


#: Shapes of operators for which torch's own way is slow.
_QUICK: dict[Any, Callable[..., Any]] = {torch.ops.aten.native_batch_norm.default: _batch_norm}


def on_shapes(func: Any, args: Sequence[Any], given: Mapping[str, Any]) -> Any:
    """Run an operation, on the meta device in the quickest way."""
    quick = _QUICK.get(func)
    return func(*args, **given) if quick is None or not args[0].is_meta else quick(*args, **given)


def _no_value(func: Any) -> NoValueError:
    return NoValueError(
        f"{func} needs a value that depends on weights, and they are on the meta device; trace a model with weights, "
        "such as a small one of the same kind"
    )


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for each in values:
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, list | tuple):
            yield from _tensors(each)


def _replaced(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Arguments or results of an operation with other tensors."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(_replaced(each, change) for each in value)
    return {k: _replaced(v, change) for k, v in value.items()} if isinstance(value, dict) else value


@cache
def _makes_tensors(function: Any) -> bool:
    return any(a.name == "device" for a in getattr(getattr(function, "_schema", None), "arguments", ()))


def _is_meta(device: Any) -> bool:
    return device is not None and torch.device(device).type == "meta"


def _small(args: Sequence[Any], tensors: Sequence[Tensor]) -> bool:
    """Whether what goes in, or the size that is asked for, is small."""
    sizes = [t.numel() for t in tensors]
    for each in args if not tensors else ():
        if isinstance(each, list | tuple) and all(isinstance(n, int) for n in each):
            sizes.append(torch.Size(each).numel())
    return max(sizes, default=0) <= _LARGEST
