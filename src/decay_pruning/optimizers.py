"""Optimizers as users have them: inside wrappers, with state that can be cut or cannot, with a closure or without."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from decay_pruning import surgery
from decay_pruning.errors import ConfigError, SurgeryError


def chain(optimizer: Any) -> list[Optimizer]:
    """An optimizer and those inside it, the innermost last: the one of which `step` moves the weights.

    Wrappers such as Accelerate's, Lookahead or SAM keep the optimizer that they drive in an attribute.

    Raises:
        ConfigError: there is no `torch.optim.Optimizer` anywhere in it.
    """
    found: list[Optimizer] = []
    while optimizer is not None and all(optimizer is not each for each in found):
        if isinstance(optimizer, Optimizer) and hasattr(optimizer, "_optimizer_step_pre_hooks"):
            found.append(optimizer)
        inside = [each for each in getattr(optimizer, "__dict__", {}).values() if isinstance(each, Optimizer)]
        optimizer = inside[0] if inside else None
    if not found:
        raise ConfigError(
            f"optimizer must be a torch.optim.Optimizer, or have one inside, not {type(optimizer).__name__}"
        )
    return found


def given(optimizer: Any) -> list[Any]:
    """The optimizers as the user gave them: one, or several.

    Raises:
        ConfigError: an empty list, or one optimizer twice.
    """
    several = list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
    if not several:
        raise ConfigError("optimizer is an empty list: the pruner rides on the steps of at least one")
    if len({id(each) for each in several}) < len(several):
        raise ConfigError("the same optimizer is given twice")
    return several


def check_kept(wrappers: Iterable[Any], parameters: Mapping[str, Tensor]) -> None:
    """Nothing beside an optimizer's state has the shape of a parameter that is about to be cut.

    Raises:
        ConfigError: a wrapper keeps such tensors in an attribute of its own (slow weights), where they cannot be cut.
    """
    shapes = {p.shape for p in parameters.values() if p.ndim > 1}
    own = {id(p) for p in parameters.values()}
    for wrapper in wrappers:
        for name, value in getattr(wrapper, "__dict__", {}).items():
            if name in ("state", "param_groups", "defaults") or isinstance(value, Optimizer | nn.Module):
                continue
            leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
            if any(leaf.shape in shapes and id(leaf) not in own for leaf in leaves):
                raise ConfigError(
                    f"{type(wrapper).__name__} keeps tensors of the parameters' shapes in {name!r}, which cannot be "
                    "cut while training goes on: removal='at finish' leaves all shapes as they are until then"
                )


#: Parameter → the pruner that will cut it.
_CLAIMED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def check_free(parameters: Iterable[Tensor]) -> None:
    """No pruner that is still at work has these parameters.

    Raises:
        ConfigError: one has.
    """
    parameters = list(parameters)
    if _claimed(parameters):
        gc.collect()  # it may hang on an optimizer that nobody has any more
    if _claimed(parameters):
        raise ConfigError(
            "another pruner is at work on this model: call its finish() or cancel() first (cancel() leaves the model "
            "as it is)"
        )


def _claimed(parameters: Iterable[Tensor]) -> bool:
    return any(p in _CLAIMED and _CLAIMED[p]() is not None for p in parameters)


def claim(parameters: Iterable[Tensor], pruner: Any) -> None:
    """From now on, this pruner will cut these parameters."""
    for p in parameters:
        _CLAIMED[p] = weakref.ref(pruner)


def let_go(pruner: Any) -> None:
    """This pruner cuts nothing any more."""
    for p in [p for p, owner in _CLAIMED.items() if owner() is pruner]:
        del _CLAIMED[p]


def links(model: nn.Module, names: Iterable[str]) -> list[tuple[Mapping[str, Any], str, Any, str]]:
    """How these parameters hang on the model: where to look, by which name, for what, and its dotted name."""
    found: dict[str, tuple[Mapping[str, Any], str, Any, str]] = {}
    for name in names:
        module, *path = model, *name.split(".")
        for k, leaf in enumerate(path):
            where = module._parameters if k == len(path) - 1 else module._modules
            dotted = ".".join(path[: k + 1])
            found.setdefault(dotted, (where, leaf, where[leaf], dotted))
            module = where[leaf]  # type: ignore[assignment]
    return list(found.values())


class Others:
    """Optimizers beside the one whose steps are counted: those that were given, and those that nobody spoke of.

    Args:
        known: all that were given.
        counted: the one whose steps are counted.
        parameters: what a removal cuts, by name.
        after: called after a step of another one that was given.
    """

    def __init__(
        self,
        known: Iterable[Optimizer],
        counted: Optimizer,
        parameters: Mapping[str, Tensor],
        after: Callable[[], None],
    ) -> None:
        known = list(known)
        self._seen = weakref.WeakSet(known)
        self._names = {id(p): name for name, p in parameters.items()}
        others = [each for each in known if each is not counted]
        self._handles = [each.register_step_post_hook(lambda *_: after()) for each in others]
        me = weakref.ref(self)  # torch keeps this hook for ever: it must not keep the model

        def look(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if (alive := me()) is not None:
                alive._look(optimizer)

        self._handles.append(register_optimizer_step_pre_hook(look))
        weakref.finalize(self, self._handles[-1].remove)

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _look(self, optimizer: Optimizer) -> None:
        """Before the first step of any optimizer there is."""
        if optimizer in self._seen:
            return
        if any(each in self._seen for each in chain(optimizer)):  # a wrapper around one that was given
            self._seen.add(optimizer)
            return
        names = [
            self._names[id(p)] for g in optimizer.param_groups for p in g["params"] if id(p) in self._names
        ]
        if names:
            raise ConfigError(
                f"a {type(optimizer).__name__} that the pruner does not know trains {names[0]!r} of its model, and its "
                "state would not be cut: give all optimizers, Pruner(model, inputs, [first, second], …), or call "
                "pruner.cancel() before another one takes over"
            )
        self._seen.add(optimizer)


def check(optimizers: Iterable[Optimizer], model: nn.Module) -> None:
    """Refuse, before anything is touched, what could not be cut in the end.

    Raises:
        ConfigError: a part of the model is wrapped, the optimizer trains none of them, or it is of a kind of
            which the state cannot be cut.
    """
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind == "FullyShardedDataParallel":
            raise ConfigError(
                "FullyShardedDataParallel flattens its parameters, which cannot be cut: shard the model by fully_shard "
                "(FSDP2) before the pruner is built"
            )
        if kind in ("DistributedDataParallel", "DataParallel", "OptimizedModule"):
            where = "the model" if not name else f"{name!r}"
            raise ConfigError(
                f"{where} is wrapped in {kind}, inside of the model: build the pruner from the plain model, and wrap "
                "the whole of it"
            )
    optimizers = list(optimizers)
    for optimizer in optimizers:
        if isinstance(optimizer, LBFGS):
            raise ConfigError(
                "LBFGS keeps one flat history of all parameters, which cannot be cut; use a first-order optimizer"
            )
        if type(optimizer).__name__ == "ZeroRedundancyOptimizer":
            raise ConfigError(
                "ZeroRedundancyOptimizer keeps the state of other ranks, which cannot be cut here; use the optimizer "
                "that it wraps, under DistributedDataParallel"
            )
    trained = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    if not any(id(p) in trained for p in model.parameters()):
        raise ConfigError("the optimizer trains none of the model's parameters: build it from this model")


def check_state(optimizers: Iterable[Optimizer], parameters: Mapping[str, Tensor]) -> None:
    """Whether what the optimizers keep of these parameters by now could be cut.

    Raises:
        ConfigError: it could not; the message names the parameter.
    """
    try:
        for optimizer in optimizers:
            surgery.check_state(optimizer, parameters)
    except SurgeryError as error:
        raise ConfigError(f"{error}") from None


class Closure:
    """`optimizer.step(closure)`: gradients are there when the closure returns, not before.

    Args:
        closure: the user's.
        ready: called once, when gradients are there.
    """

    def __init__(self, closure: Callable[[], Any], ready: Callable[[], None]) -> None:
        self._closure = closure
        self._ready = ready
        self.calls = 0

    def __call__(self) -> Any:
        self.calls += 1
        if self.calls > 1:
            raise ConfigError(
                "this optimizer calls its closure more than once in a step, so that it is not known which gradients it "
                "goes by; use one that calls it once"
            )
        with torch.enable_grad():
            loss = self._closure()
        self._ready()
        return loss


def with_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], ready: Callable[[], None]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of `step` with the closure among them wrapped; None where there is none."""
    if callable(closure := kwargs.get("closure")):
        return args, {**kwargs, "closure": Closure(closure, ready)}
    if len(args) > 1 and callable(args[1]) and not isinstance(args[1], Tensor | nn.Module):
        return (args[0], Closure(args[1], ready), *args[2:]), kwargs
    return None
