"""Keeping: what a forward pass writes on a model while it is looked at is taken back."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

#: What torch keeps on every module itself.
_OF_TORCH = frozenset(vars(nn.Module()))
#: Among it, the tables of hooks.
_HOOKS = tuple(
    sorted(name for name, value in vars(nn.Module()).items() if isinstance(value, dict) and "hook" in name)
)
_PLAIN = frozenset({int, float, str, bool, complex, type(None), torch.dtype, torch.device, torch.Size})
_NO_STATE = Tensor | nn.Module | type | FunctionType | MethodType | ModuleType
_DEPTH = 3
_MANY = 1000


def contents(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Note what is in the lists, dictionaries, objects and generators that hang on modules. Returns a way back."""
    tables: list[tuple[Any, dict[str, Any]]] = []
    empty: list[Any] = []
    undo: list[Callable[[], None]] = []
    seen: set[int] = set()

    def note(value: Any, depth: int) -> None:
        if isinstance(value, _NO_STATE) or depth > _DEPTH or id(value) in seen:
            return
        inside: Iterable[Any] = ()
        if isinstance(value, torch.Generator):
            undo.append(partial(_set_state, value, value.get_state()))
        elif isinstance(value, tuple):
            inside = value
        elif isinstance(value, list) and len(value) > _MANY:  # a data set, not what a forward pass keeps
            undo.append(partial(_shorten, value, len(value)))
        elif isinstance(value, list | deque | set):
            inside = list(value)
            undo.append(partial(_refill, value, inside))
        elif isinstance(value, dict) or (depth < _DEPTH and hasattr(value, "__dict__")):
            mine = value if isinstance(value, dict) else vars(value)
            inside = mine.values()
            undo.append(partial(_fill, mine, dict(mine)))
        seen.add(id(value))
        for each in inside:
            if type(each) not in _PLAIN:
                note(each, depth + 1)

    for module in modules:
        for table in (module._parameters, module._buffers, module._modules):
            tables.append((table, dict(table)))
        for name in _HOOKS:  # a model can hook itself when it first runs, and remember that in an attribute
            if hooks := module.__dict__.get(name):
                tables.append((hooks, dict(hooks)))
            elif hooks is not None:
                empty.append(hooks)
        for name, value in vars(module).items():
            if type(value) not in _PLAIN and name not in _OF_TORCH:
                note(value, 1)

    def put_back() -> None:
        for table, old in tables:
            _fill(table, old)
        for table in empty:
            table.clear()
        for take in undo:
            take()

    return put_back


def _fill(value: dict[Any, Any], old: Mapping[Any, Any]) -> None:
    if value.keys() != old.keys() or any(value[key] is not old[key] for key in old):
        value.clear()
        value.update(old)


def _refill(value: Any, old: Sequence[Any]) -> None:
    if len(value) != len(old) or any(a is not b for a, b in zip(value, old, strict=True)):
        value.clear()
        (value.update if isinstance(value, set) else value.extend)(old)


def _shorten(value: list[Any], length: int) -> None:
    del value[length:]


def _set_state(generator: torch.Generator, state: Tensor) -> None:
    generator.set_state(state)


class Written(TorchDispatchMode):
    """Saves a parameter before the model writes to it: by a copy in place, through `.data`, through a view.

    Another mode that sees all operations can say so itself, by `before`, which is quicker than one mode more.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._parameters = {_storage(p): p for p in model.parameters() if not p.is_meta}
        self.saved: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.before(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def before(self, func: Any, args: Sequence[Any], given: Mapping[str, Any]) -> None:
        """An operation is about to run."""
        for k, name in written(func):
            self._save(args[k] if k < len(args) else given.get(name))

    def _save(self, target: Any) -> None:
        for each in target if isinstance(target, list | tuple) else [target]:
            parameter = self._parameters.get(_storage(each)) if isinstance(each, Tensor) else None
            if parameter is not None and id(parameter) not in self.saved:
                self.saved[id(parameter)] = parameter, parameter.detach().clone()


@cache
def written(function: Any) -> tuple[tuple[int, str], ...]:
    """The arguments that an operator writes to."""
    arguments = enumerate(function._schema.arguments) if hasattr(function, "_schema") else ()
    return tuple((k, a.name) for k, a in arguments if a.alias_info is not None and a.alias_info.is_write)


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # it has none: sparse, functional
        return -1


@contextmanager
def unwritten(model: nn.Module, *, watch: bool = True) -> Iterator[Written]:
    """Parameters that the model writes to inside (clipped, merged, with gradients) are as they were afterwards.

    Args:
        watch: see what is written; otherwise what this yields has to be told.
    """
    written = Written(model)
    before = [(p, p.data, p.grad, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _, _, _ in before:
            parameter.grad = None  # what is inside must not add to it
        with written if watch else nullcontext():
            yield written
    finally:
        for parameter, data, grad, wanted in before:
            if parameter.data.data_ptr() != data.data_ptr():
                parameter.data = data
            parameter.requires_grad_(wanted)
            parameter.grad = grad
        for tensor, value in written.saved.values():
            tensor.data.copy_(value)


def eager() -> AbstractContextManager[Any]:
    """Inside, compiled functions run as they were written."""
    compiled = {"torch._dynamo", "torch.nn.attention.flex_attention"} & sys.modules.keys()  # a costly import
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
