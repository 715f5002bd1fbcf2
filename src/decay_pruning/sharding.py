"""Sharding: which sharded models are taken, and the plain model that one was before.

Only torch's `fully_shard` (FSDP2) is known. What is done with the shards is in `shards`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from decay_pruning.errors import ConfigError

#: What `fully_shard` notes on each module, beside hooks and its state.
_MARKS = frozenset({"_is_fsdp_managed_module", "_fsdp_use_orig_params"})


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is spread over processes (a DTensor)."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered where it is spread: all processes have to ask for it."""
    return cast(Any, tensor.detach()).full_tensor() if is_distributed(tensor) else tensor.detach()


def sharded_modules(model: nn.Module) -> dict[str, Any]:
    """The modules that `fully_shard` was called on."""
    if not dist.is_available() or not dist.is_initialized():
        return {}
    from torch.distributed.fsdp import FSDPModule

    return {name: module for name, module in model.named_modules() if isinstance(module, FSDPModule)}


def check_sharding(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """The parameters are sharded by `fully_shard`, and by nothing else.

    Raises:
        ConfigError: they are split in another way.
    """
    from torch.distributed.tensor import Replicate, Shard

    sharded = sharded_modules(model)
    spread = {name: cast(Any, p) for name, p in parameters.items() if is_distributed(p)}
    for name, p in spread.items():
        if p.is_meta:
            raise ConfigError(
                f"{name!r} is on the meta device, and has no values yet: give it some (model.to_empty(device=…), then "
                "load or initialise its weights) before the pruner is built"
            )
        under = any(not path or name.startswith(f"{path}.") for path in sharded)
        cuts = [kind for kind in p.placements if type(kind) is Shard]
        plain = all(type(kind) in (Shard, Replicate) for kind in p.placements) and len(cuts) <= 1
        if not under or not plain:
            raise ConfigError(
                f"{name!r} is a distributed tensor, split by {', '.join(map(str, p.placements))}: tensor parallelism "
                "(parallelize_module, distribute_tensor) is not supported, only fully_shard; prune before the model "
                "is made parallel"
            )
        if p.device_mesh != next(iter(spread.values())).device_mesh:
            raise ConfigError(
                f"{name!r} is sharded over other processes than {next(iter(spread))!r}: shard all on one device mesh"
            )


def check_use(removal: str, host: Any, also: Sequence[Any]) -> None:
    """The settings are ones that shards allow.

    Raises:
        ConfigError: they are not.
    """
    if removal == "at once":
        raise ConfigError(
            "the model is sharded, and shards keep their shapes: leave removal='at once' out, so that finish() cuts"
        )
    if also:
        raise ConfigError(
            "also: copies of a sharded model are not cut along; copy pruner.model after finish()"
        )
    name = type(host).__name__
    if not getattr(host, "rounds", 1):
        raise ConfigError(
            f"{name} takes part in every step of the training, and cannot do that on a sharded model: use "
            "DepGraph, or a function of yours that picks"
        )
    if getattr(host, "sparse", None) is not None or getattr(host, "importance", None) == "activation":
        what = "sparse learning" if getattr(host, "sparse", None) is not None else "importance 'activation'"
        raise ConfigError(f"{what} ({name}) takes part in every step, and cannot do that on a sharded model")


def plain(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a sharded model in one piece, as it was before `fully_shard`. All processes have to ask for it."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(whole(p).to(device, copy=True), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    memo |= {id(b): whole(b).to(device, copy=True) for b in model.buffers()}
    with _as_it_was(model):
        return copy.deepcopy(model, memo)


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """The model without what `fully_shard` has put on its modules, none of which can be copied."""
    from torch.distributed.fsdp import FSDPModule

    before = [(module, type(module), dict(vars(module))) for module in model.modules()]
    try:
        for module, kind, own in before:
            if isinstance(module, FSDPModule):
                own_kind = next(k for k in kind.__mro__[1:] if not issubclass(k, FSDPModule))
                module.__class__ = cast(Any, own_kind)
            for leaf, value in own.items():
                if leaf in _MARKS or "composable_api" in leaf:
                    del module.__dict__[leaf]
                elif "hooks" in leaf and isinstance(value, dict):
                    left = {number: hook for number, hook in value.items() if not _of_sharding(hook)}
                    module.__dict__[leaf] = type(value)(left)
        yield
    finally:
        for module, kind, own in before:
            module.__class__ = kind
            module.__dict__.update(own)


def _of_sharding(hook: Any) -> bool:
    owner = type(hook.__self__) if hasattr(hook, "__self__") else hook
    module = str(getattr(owner, "__module__", ""))
    return module.startswith(("torch.distributed.fsdp.", "torch.distributed._composable."))
