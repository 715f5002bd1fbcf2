"""One forward pass under a mode that sees every product."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils._pytree import tree_leaves

from decay_pruning.counting._makers import CONSTANT, VIEWS, Axes, aligned
from decay_pruning.counting._products import RULES, Ledger, Product, attention
from decay_pruning.errors import GraphError
from decay_pruning.keeping import eager, unwritten
from decay_pruning.proof import copied
from decay_pruning.surgery import call, untouched

#: What is told of every operator: the ledger, its name, its arguments by position and by name, and its result.
See = Callable[[Ledger, str, Sequence[Any], dict[str, Any], Any], None]


def count(model: nn.Module, example_inputs: Any, see: See | None = None) -> list[Product]:
    """All products of a forward pass in evaluation mode; the model is left as it was.

    Args:
        model: the model.
        example_inputs: see `Pruner`.
        see: called after every operator.

    Raises:
        GraphError: the model does not run on these inputs.
    """
    ledger = Ledger(model)
    counter = _Counter(ledger, see or _unseen)
    with untouched(model), unwritten(model), torch.no_grad(), eager(), _module_paths(model, ledger.path):
        try:
            with _Attention(counter), counter:
                call(model, copied(example_inputs))
        except GraphError:
            raise
        except Exception as error:
            raise GraphError(
                f"the model does not run on its example inputs: {type(error).__name__}: {error}"
            ) from error
    return ledger.products


def _unseen(*_: Any) -> None:
    """Nobody wants to know."""


@contextlib.contextmanager
def _module_paths(model: nn.Module, running: list[str]) -> Iterator[None]:
    """Keep note of the modules that are running, innermost last."""
    paths = {id(module): name for name, module in model.named_modules()}

    def enter(module: nn.Module, args: Any) -> None:
        running.append(paths.get(id(module), running[-1]))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Counter(TorchDispatchMode):
    """Counts every product, and carries what made each dimension along."""

    supports_higher_order_operators = True

    def __init__(self, ledger: Ledger, see: See) -> None:
        super().__init__()
        self.ledger = ledger
        self.see = see
        self.paused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if any(is_traceable_wrapper_subclass_type(t) for t in types):
            return NotImplemented  # the tensors inside of it come by
        name = func._schema.name if hasattr(func, "_schema") else func.name()
        if any(isinstance(t, Tensor) and t.is_nested for t in tree_leaves((args, kwargs))):
            raise GraphError(f"products of nested tensors cannot be counted ({name}): pad them to one length")
        rule = RULES.get(name)
        if rule is None and hasattr(func, "decompose"):  # what inference mode leaves whole
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = func(*args, **kwargs)
        first = out[0] if isinstance(out, tuple) and rule is not None else out
        if rule is not None:
            self.ledger.note(first, rule(self.ledger, first, *args, **kwargs))
        elif name in VIEWS:
            self._follow(name, args, kwargs, out)
        else:
            self._spread([*args, *kwargs.values()], out)
        self.see(self.ledger, name, args, kwargs, out)
        return out

    def _follow(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """The makers of a view."""
        source = args[0]
        axes = VIEWS[name](self.ledger.axes(source), source, out, *args[1:], **kwargs)
        for each in out if isinstance(out, list | tuple) else [out]:
            self.ledger.note(each, axes)

    def _spread(self, inputs: Sequence[Any], out: Any) -> None:
        """The makers of what an operator on elements returns: those of its inputs of as many dimensions."""
        tensors = [t for t in tree_leaves(inputs) if isinstance(t, Tensor)]
        for each in tree_leaves(out):
            if not isinstance(each, Tensor):
                continue
            axes: Axes = [CONSTANT] * each.ndim
            for t in tensors:
                if t.ndim == each.ndim:
                    axes = aligned(axes, each.shape, self.ledger.axes(t), t.shape)
            self.ledger.note(each, axes)


class _Attention(TorchFunctionMode):
    """Counts attention where it is asked for: kernels see padded heads, and some are products of their own.

    `nn.MultiheadAttention` and `nn.TransformerEncoder` take no fast path, which would hide their products, in a mode.
    """

    def __init__(self, counter: _Counter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not all(map(_is_plain, (*args, *kwargs.values()))):
            return func(*args, **kwargs)
        self._counter.paused = True
        try:
            out = func(*args, **kwargs)
        finally:
            self._counter.paused = False
        self._counter.ledger.note(out, attention(self._counter.ledger, out, *args, **kwargs))
        self._counter.see(self._counter.ledger, "attention", args, kwargs, out)
        return out


def _is_plain(value: Any) -> bool:
    """Whether the shape that we see is the whole: not one of a batch that `vmap` hides, nor nested."""
    return not isinstance(value, Tensor) or not (is_functorch_wrapped_tensor(value) or value.is_nested)
