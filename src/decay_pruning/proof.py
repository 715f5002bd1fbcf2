"""Proof: are two runs of a model, before a cut and after it, the same function?

Outputs are compared tensor by tensor and element by element, on several inputs, in evaluation and in training mode, in
single precision and, where that leaves a doubt, in double. The model itself is never touched: it runs on stand-ins for
its parameters and buffers, and whatever a forward pass writes on a module is taken back.

This room knows models and tensors; it does not know structures, graphs or surgery.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode

from decay_pruning import outputs
from decay_pruning.errors import SurgeryError
from decay_pruning.keeping import contents, eager
from decay_pruning.steps import Steps
from decay_pruning.valueless import Shapes, beside

log = logging.getLogger(__name__)

#: Largest relative change of any element of the output that a removal may cause, by the coarsest dtype in the model.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}
WAY_OUT = (
    "where a selection (NMS, top-k, argmax) makes the output, prune the part before it (backbone and head), "
    "or return what it selects from as well"
)


# --------------------------------------------------------------------------------------- inputs and outputs


def call(model: nn.Module, example_inputs: Any, shapes: Shapes | None = None) -> Any:
    """`model(x)` for a tensor, `model(*x)` for a tuple or list, `model(**x)` for a mapping."""
    with beside(model, shapes) as as_input, _alone():
        given = example_inputs if as_input is None else mapped(example_inputs, as_input)
        if isinstance(given, Mapping):
            return model(**given)
        if isinstance(given, tuple | list):
            return model(*given)
        return model(given)


@contextmanager
def _alone() -> Iterator[None]:
    """Synchronised batch-norms normalise over the batch at hand: other processes may be elsewhere."""
    synchronised: Any = nn.SyncBatchNorm
    before = synchronised.forward
    synchronised.forward = _BatchNorm.forward
    try:
        yield
    finally:
        synchronised.forward = before


def leaves(output: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists, mappings and dataclasses; where there are none, those in attributes."""
    found = list(_plain_leaves(output))
    yield from found or _attributes(output, set())


def _plain_leaves(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _plain_leaves(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _plain_leaves(value)
    elif is_dataclass(output) and not isinstance(output, type):
        for each in fields(output):
            yield from _plain_leaves(getattr(output, each.name))


def _attributes(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    """Tensors that hang on an object of some class (a distribution, a result of the user's own)."""
    if isinstance(thing, Tensor):
        yield thing
    if isinstance(thing, Tensor | nn.Module | type) or id(thing) in seen:
        return
    seen.add(id(thing))
    inside: list[Any] = []
    if isinstance(thing, Mapping):
        inside = list(thing.values())
    elif isinstance(thing, list | tuple):
        inside = list(thing)
    else:
        slots = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
        inside = [*getattr(thing, "__dict__", {}).values()]
        inside += [getattr(thing, name) for name in slots if hasattr(thing, name)]
    for value in inside:
        yield from _attributes(value, seen)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Inputs with every tensor changed; what is no tensor or plain container stays."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: mapped(each, change) for key, each in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(each, change) for each in value))
    if isinstance(value, list | tuple):
        return type(value)(mapped(each, change) for each in value)
    return value


#: Device and dtype of a model's floating parameters; None where it has none.
Where = tuple[torch.device, torch.dtype] | None


def place_of(model: nn.Module) -> Where:
    """Where the first floating parameter of a model is, and its dtype."""
    return next(((p.device, p.dtype) for p in model.parameters() if p.is_floating_point()), None)


def device_of(example_inputs: Any) -> torch.device:
    """Where the first tensor of inputs is."""
    return next((leaf.device for leaf in leaves(example_inputs)), torch.device("cpu"))


def follow(example_inputs: Any, before: Where, now: Where) -> Any:
    """The inputs of a model that was moved, or cast to another dtype, since they were made."""
    if before is None or now is None or before == now:
        return example_inputs

    def moved(tensor: Tensor) -> Tensor:
        tensor = tensor.to(now[0]) if tensor.device == before[0] else tensor
        return tensor.to(now[1]) if tensor.dtype == before[1] else tensor

    return mapped(example_inputs, moved)


def copied(example_inputs: Any) -> Any:
    """Inputs that a forward pass may write to."""
    return mapped(example_inputs, lambda tensor: tensor.detach().clone())


def random_inputs(example_inputs: Any, seed: int) -> Any:
    """Inputs of the examples' shapes, dtypes and ranges. A constant tensor says nothing of its range: normal values."""
    generator = torch.Generator().manual_seed(seed)

    def draw(example: Tensor) -> Tensor:
        if example.numel() == 0:
            return example
        if example.is_complex():
            return torch.complex(draw(example.real), draw(example.imag))
        flat = example.detach().cpu()
        if example.is_floating_point():
            wide = flat.double()
            wide = wide[wide.isfinite()]
            noise = torch.randn(flat.shape, generator=generator, dtype=torch.float64)
            if wide.numel() and float(wide.min()) < float(wide.max()):
                noise = (wide.mean() + wide.std() * noise).clamp(wide.min(), wide.max())
            return torch.where(flat.isfinite(), noise, flat.double()).to(example.device, example.dtype)
        if example.dtype == torch.bool:
            order = torch.randperm(flat.numel(), generator=generator)
            return flat.flatten()[order].reshape(flat.shape).to(example.device)
        low, high = int(flat.min()), int(flat.max())
        drawn = torch.randint(low, high + 1, flat.shape, generator=generator)
        return drawn.to(example.device, example.dtype)

    return mapped(example_inputs, draw)


def doubled(first: Any, second: Any) -> Any:
    """A batch of twice the size, for layers that cannot train on one example."""
    parts = iter([leaf for leaf in _plain_leaves(second)])

    def join(tensor: Tensor) -> Tensor:
        other = next(parts)
        return torch.cat([tensor, other]) if tensor.ndim else tensor

    return mapped(first, join)


# ---------------------------------------------------------------------------------------------- running it


@contextmanager
def untouched(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Run the model inside in evaluation mode, seeded, in full precision, and leave no trace of it.

    Training flags, buffers, whatever a forward pass keeps on a module, random number generators and TF32 settings are
    as before afterwards.
    """
    states = [(module, dict(module.__dict__)) for module in model.modules() if not _scripted(module)]
    put_back = contents(module for module, _ in states)
    flags = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    with seeded(model, seed):
        try:
            for module, _ in flags:
                module.training = False
            yield
        finally:
            for module, state in states:
                module.__dict__.clear()
                module.__dict__.update(state)
            put_back()
            for module, training in flags:
                module.training = training
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                if buffer is not None and value is not None and not _same(buffer, value):
                    buffer.data.copy_(value)


def _scripted(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule)


@contextmanager
def seeded(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """All generators seeded, and as they were afterwards; no TF32."""
    python, array = random.getstate(), np.random.get_state()
    fast = torch.backends.mha.get_fastpath_enabled()
    with torch.random.fork_rng(devices=_devices(model)), _no_tf32():
        try:
            torch.backends.mha.set_fastpath_enabled(False)  # it passes by the modules inside
            _seed(seed)
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            random.setstate(python)
            np.random.set_state(array)


def _seed(seed: int = 0) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def _devices(model: nn.Module) -> list[int]:
    if not torch.cuda.is_initialized():
        return []
    tensors = [*model.parameters(), *model.buffers()]
    return sorted({t.device.index for t in tensors if t.device.type == "cuda" and t.device.index is not None})


@contextmanager
def _no_tf32() -> Iterator[None]:
    """Full float32 products on a GPU inside. Where torch has the newer switches, reading the old ones may raise."""
    switches: list[tuple[Any, str, object]]
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    if hasattr(matmul, "fp32_precision"):
        switches = [(each, "fp32_precision", "ieee") for each in (matmul, cudnn.conv, cudnn.rnn)]
    else:
        switches = [(each, "allow_tf32", False) for each in (matmul, cudnn)]
    before = [getattr(owner, name) for owner, name, _ in switches]
    try:
        for owner, name, exact in switches:
            setattr(owner, name, exact)
        yield
    finally:
        for (owner, name, _), value in zip(switches, before, strict=True):
            setattr(owner, name, value)


def _same(a: Tensor, b: Tensor) -> bool:
    if a.is_meta:
        return a.shape == b.shape
    if a.layout != torch.strided:
        a, b = a.to_dense(), b.to_dense()
    return a.shape == b.shape and bool((a.eq(b) | (a.ne(a) & b.ne(b))).all())


@contextmanager
def stand_ins(
    model: nn.Module,
    dtype: torch.dtype | None,
    training: bool,
    *,
    grad: bool = False,
    noise: torch.Generator | None = None,
    make: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[dict[int, Tensor]]:
    """Copies in place of all parameters and buffers, in another dtype; afterwards every module is as it was.

    Args:
        grad: record gradients for the parameters.
        noise: scale every parameter by a factor of its own, 1 ± 0.2.
        make: what makes them, if they are no copies.

    Yields:
        identity of a parameter or buffer → its copy.
    """
    copies: dict[int, Tensor] = {}
    modules = [m for m in model.modules() if not _scripted(m)]
    saved = [(m, dict(m.__dict__), dict(m._parameters), dict(m._buffers)) for m in modules]
    put_back = contents(modules)

    def copy(tensor: Tensor, parameter: bool) -> Tensor:
        if id(tensor) not in copies:
            new = make(tensor) if make is not None else cast(tensor.detach(), dtype, copy=True)
            if noise is not None and parameter and new.is_floating_point():
                new.mul_(float(torch.empty(1).uniform_(0.8, 1.2, generator=noise)))
            wants = (grad or tensor.requires_grad) and (new.is_floating_point() or new.is_complex())
            copies[id(tensor)] = nn.Parameter(new, requires_grad=wants) if parameter else new
        return copies[id(tensor)]

    try:
        for module in modules:
            for table, parameter in ((module._parameters, True), (module._buffers, False)):
                tensors: dict[str, Any] = table
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = copy(tensor, parameter)
            module.__dict__["training"] = training
            if isinstance(module, nn.RNNBase):
                module.__dict__["_flat_weights"] = [
                    getattr(module, each) for each in module._flat_weights_names
                ]
        yield copies
    finally:
        for module, state, parameters, buffers in saved:
            module.__dict__.clear()
            module.__dict__.update(state)
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)
        put_back()


def cast(tensor: Tensor, dtype: torch.dtype | None, copy: bool = False) -> Tensor:
    """A floating (or complex) tensor in this dtype; others, and all for None, as they are."""
    if dtype is not None and tensor.is_complex():
        dtype = _COMPLEX.get(dtype)
    elif not tensor.is_floating_point():
        dtype = None
    new = tensor if dtype is None else tensor.to(dtype)
    return new.clone() if copy and new is tensor else new


class _Still(TorchDispatchMode):
    """Takes chance out: narrower tensors would draw other numbers. Noise is constant, dropout drops nothing."""

    supports_higher_order_operators = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if not hasattr(func, "_schema"):
            return func(*args, **given)
        values = list(args)
        for k, argument in enumerate(func._schema.arguments):
            if argument.name in ("dropout_p", "dropout"):
                if k < len(values):
                    values[k] = 0.0
                elif argument.name in given:
                    given[argument.name] = 0.0
        name = func.overloadpacket.__name__.rstrip("_")
        if name == "native_dropout":
            return values[0].clone(), torch.ones_like(values[0], dtype=torch.bool)
        if torch.Tag.nondeterministic_seeded in func.tags:
            torch.manual_seed(0)
        out = func(*values, **given)
        if name == "bernoulli":
            written = func.overloadpacket.__name__.endswith(
                "_"
            )  # its own values are no chances, and 0.5 is left out
            chance = values[1] if len(values) > 1 else given.get("p", 0.5 if written else values[0])
            return out.copy_(chance >= 0.5) if isinstance(chance, Tensor) else out.fill_(1)
        if name in ("rand", "rand_like"):
            return out.fill_(0.5)
        if name in ("randn", "randn_like"):
            return out.fill_(0.6)
        if name in ("uniform", "normal"):
            low, high = ([*values[1:3], 0.0, 1.0][:2]) if len(values) > 2 else (0.0, 1.0)
            if isinstance(low, Tensor) or isinstance(high, Tensor):
                return out
            return out.fill_(0.5 * (low + high) if name == "uniform" else low + 0.6 * high)
        return out


# ------------------------------------------------------------------------------------------------ comparing


@dataclass(frozen=True)
class Output:
    """What a model returned: its tensors, the coarsest floating dtype that any of its layers produced, and names."""

    leaves: tuple[Tensor, ...]
    coarsest: torch.dtype
    names: tuple[str, ...] = ()

    def narrowed(self, kept: Mapping[outputs.Spot, Tensor]) -> Output:
        """Without the positions that outputs may lose."""
        return replace(self, leaves=tuple(outputs.narrowed(self.names, self.leaves, kept)))


def observe(model: nn.Module, example_inputs: Any) -> Output:
    """Run the model once in evaluation mode, in its own dtype; it is left as it was."""
    return _run(model, Setting(example_inputs, False, "on the example inputs"), None)


def change_of(before: Output, after: Output, moves: Sequence[Tensor] | None = None) -> float:
    """Largest change of any element, relative to the element and to the typical size of those that move.

    Args:
        before, after: outputs of two runs.
        moves: for each tensor, which of its elements depend on the weights: only they set its scale.

    Raises:
        SurgeryError: outputs of different shapes, values that are not finite any more, or nothing to compare.
    """
    if [t.shape for t in before.leaves] != [t.shape for t in after.leaves]:
        raise SurgeryError(
            f"the output had shapes {[tuple(t.shape) for t in before.leaves]} "
            f"and has {[tuple(t.shape) for t in after.leaves]}"
        )
    floating = [k for k, t in enumerate(before.leaves) if t.is_floating_point() or t.is_complex()]
    if not floating:
        raise SurgeryError(f"the model returns no floating tensor, so a removal cannot be proven; {WAY_OUT}")
    if not any(bool(before.leaves[k].isfinite().any()) or not before.leaves[k].numel() for k in floating):
        raise SurgeryError("the output was not finite before anything was cut")
    share = 1e-3 if before.coarsest == torch.float64 else 1.0
    worst = 0.0
    for k in floating:
        a, b = (cast(t.leaves[k], torch.float64) for t in (before, after))
        finite = a.isfinite()
        if not bool((finite == b.isfinite()).all()) or not _same(a[~finite], b[~finite]):
            raise SurgeryError("the output is not finite after the cut")
        a, b = a[finite], b[finite]
        gap = (a - b).abs()
        if not gap.numel() or float(gap.max()) == 0:
            continue
        size = a.abs()
        typical = size[moves[k][finite]] if moves is not None else size
        typical = typical[typical > 0]
        scale = float(typical.median()) if typical.numel() else 0.0
        worst = max(worst, float((gap / (size + share * scale)).nan_to_num(nan=0.0, posinf=torch.inf).max()))
    return worst


def moving(first: Output, second: Output) -> list[Tensor]:
    """For each tensor, which elements differ between two runs with different weights."""
    found = []
    for a, b in zip(first.leaves, second.leaves, strict=True):
        if a.shape != b.shape:
            return [torch.ones_like(t, dtype=torch.bool) for t in first.leaves]
        a, b = cast(a, torch.float64), cast(b, torch.float64)
        moved = (a - b).abs() > 1e-6 * (a.abs() + b.abs())
        found.append(moved if bool(moved.any()) else torch.ones_like(moved))
    return found


# ------------------------------------------------------------------------------------------------- settings


@dataclass
class Setting:
    """One way to run the model."""

    inputs: Any
    training: bool
    where: str  # in words: "on the example inputs"
    still: bool = False  # it draws random numbers, which are taken out
    steps: bool = False  # it rounds, which is looked through
    narrow: frozenset[torch.dtype] = frozenset()  # what values of the widest dtype are cast to on the way


@torch.no_grad()
def _run(
    model: nn.Module, setting: Setting, dtype: torch.dtype | None, noise: torch.Generator | None = None
) -> Output:
    """Run the model once; it is left as it was."""
    dtypes: set[torch.dtype] = set()

    def note(module: nn.Module, args: Any, output: Any) -> None:
        dtypes.update(leaf.dtype for leaf in _plain_leaves(output))

    inputs = mapped(setting.inputs, lambda t: cast(t, dtype, copy=True))
    with seeded(model), ExitStack() as stack:
        stack.enter_context(eager())
        stack.enter_context(stand_ins(model, dtype, setting.training, noise=noise))
        handle = register_module_forward_hook(note)
        stack.callback(handle.remove)
        if setting.still:
            stack.enter_context(_Still())
        if setting.steps:
            stack.enter_context(Steps())
        state = _draws(model)
        output = call(model, inputs)
        found = tuple(leaf.detach().clone() for leaf in leaves(output))
        random = not setting.still and not all(map(torch.equal, state, _draws(model)))
    if random:
        setting.still = True
        try:
            return _run(model, setting, dtype, noise)
        except Exception:  # chance cannot be taken out of it: what was drawn has to do
            log.debug("the model does not run without chance", exc_info=True)
            setting.still = False
    coarsest = max(
        (d for d in dtypes | setting.narrow if d in TOLERANCE),
        key=TOLERANCE.__getitem__,
        default=torch.float32,
    )
    return Output(found, coarsest, tuple(name for name, _ in outputs.named(output)))


def _draws(model: nn.Module) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(each) for each in _devices(model))]


@dataclass
class Settings:
    """The settings in which a removal is proven, all of which run.

    Attributes:
        settings: example inputs in evaluation mode, random ones in training mode, more where it is `thorough`.
        dtypes: tried in turn until one proves the removal; None is the model's own.
        moves: per setting and tensor, which elements depend on the weights.
        first: the output in the first setting.
    """

    example_inputs: Any
    settings: list[Setting]
    dtypes: list[torch.dtype | None]
    moves: list[list[Tensor]] = field(default_factory=list)
    first: Output | None = None

    @classmethod
    def of(
        cls, model: nn.Module, example_inputs: Any, *, thorough: bool = False, other: Output | None = None
    ) -> Settings:
        """Find out in which settings the model runs.

        Args:
            model: the model.
            example_inputs: for it.
            thorough: more settings.
            other: what the model returned on the example inputs with other weights, if that is known.

        Raises:
            Exception: what the model raises on the example inputs, in its own dtype.
        """
        first = Setting(example_inputs, False, "on the example inputs")
        native = _native(model)
        dtypes: list[torch.dtype | None] = [torch.float64]
        if native != torch.float64:
            dtypes.insert(0, torch.float32)
        trial = cls(example_inputs, [], dtypes)
        if not trial._add(model, first, other):
            trial.dtypes = [None]
            trial._add(model, first)
        drawn = Setting(random_inputs(example_inputs, 1), True, "on random inputs in training mode")
        given = Setting(example_inputs, True, "on the example inputs in training mode")
        larger = Setting(doubled(example_inputs, drawn.inputs), True, "in training mode")
        for each in (drawn, larger, given):
            if trial._add(model, each):
                break
        if thorough or len(trial.settings) == 1:
            trial._add(model, Setting(random_inputs(example_inputs, 2), False, "on random inputs"))
        return trial

    def _add(self, model: nn.Module, setting: Setting, other: Output | None = None) -> bool:
        """Take the setting on if the model runs there and says something."""
        try:
            output = self._first(model, setting)
        except Exception as error:
            if setting.inputs is self.example_inputs and not setting.training and self.dtypes == [None]:
                raise
            log.debug("the proof leaves out %s: %s", setting.where, first_line(error))
            return False
        if self.settings and not any(bool(leaf.isfinite().any()) for leaf in output.leaves):
            return False
        self.settings.append(setting)
        self.first = self.first or output
        try:
            if other is None or setting.steps or {other.coarsest, output.coarsest} != {self.dtypes[0]}:
                other = _run(model, setting, self.dtypes[0], torch.Generator().manual_seed(0))
        except Exception:  # other weights lead elsewhere; then every element counts
            other = output
        self.moves.append(moving(output, other))
        return True

    def _first(self, model: nn.Module, setting: Setting) -> Output:
        """The output in a setting, which learns whether there are roundings that can be looked through."""
        try:
            with Steps() as steps:
                output = _run(model, setting, self.dtypes[0])
            setting.steps = steps.found
            if self.dtypes[0] == torch.float64:
                setting.narrow = frozenset(steps.narrow)
            return output
        except Exception:  # not what this is about, or the model needs whole numbers
            return _run(model, setting, self.dtypes[0])

    def observe(
        self, model: nn.Module, dtype: torch.dtype | None, only: Sequence[int] | None = None
    ) -> list[Output]:
        """Run the model in every setting (or those of these numbers).

        Raises:
            SurgeryError: it does not run in one of them; the message says in which.
        """
        found = []
        for k, setting in enumerate(self.settings):
            if only is not None and k not in only:
                continue
            try:
                found.append(_run(model, setting, dtype))
            except Exception as error:
                mode = " in training mode" if setting.training else ""
                raise SurgeryError(f"the smaller model does not run{mode} ({first_line(error)})") from error
        return found

    def change(
        self, before: Sequence[Output], after: Sequence[Output], only: Sequence[int] | None = None
    ) -> tuple[float, float, str]:
        """The worst change relative to its limit: (change, limit, where it was).

        Raises:
            SurgeryError: outputs that cannot be compared.
        """
        numbers = [k for k in range(len(self.settings)) if only is None or k in only]
        worst = 0.0, TOLERANCE[before[0].coarsest], ""
        for k, a, b in zip(numbers, before, after, strict=True):
            moves = self.moves[k]
            same = [t.shape for t in moves] == [t.shape for t in a.leaves]
            change = change_of(a, b, moves if same else None)
            limit = TOLERANCE[a.coarsest]
            if change / limit > worst[0] / worst[1]:
                worst = change, limit, self.settings[k].where
        return worst

    def gradients(self, model: nn.Module) -> Iterator[tuple[bool, dict[str, Tensor]]]:
        """Per setting, training mode last: whether it is that, and parameter → |gradient · value| of a random mix of
        the output."""
        names = {id(p): name for name, p in model.named_parameters()}
        pairs = zip(self.settings, self.moves, strict=True)
        for setting, moves in sorted(pairs, key=lambda pair: pair[0].training):
            try:
                found = _gradients(model, setting, self.dtypes[0], moves)
            except Exception as error:
                log.debug("no gradients %s: %s", setting.where, first_line(error))
                continue
            yield setting.training, {names[key]: value for key, value in found.items() if key in names}


def _gradients(
    model: nn.Module, setting: Setting, dtype: torch.dtype | None, moves: Sequence[Tensor]
) -> dict[int, Tensor]:
    inputs = mapped(setting.inputs, lambda t: cast(t, dtype, copy=True))
    generator = torch.Generator().manual_seed(0)
    with seeded(model), torch.enable_grad(), ExitStack() as stack:
        copies = stack.enter_context(stand_ins(model, dtype, setting.training, grad=True))
        if setting.still:
            stack.enter_context(_Still())
        if setting.steps:
            stack.enter_context(Steps())
        total: Any = 0.0
        for leaf, mask in zip(leaves(call(model, inputs)), moves, strict=False):
            if not leaf.is_floating_point() or leaf.grad_fn is None or mask.shape != leaf.shape:
                continue
            picked = leaf[mask & leaf.isfinite()]
            if picked.numel():
                weight = torch.randn(picked.shape, generator=generator).to(picked.device, picked.dtype)
                scale = picked.detach().abs().mean() * picked.numel() ** 0.5
                total = total + (picked * weight).sum() / scale if float(scale) else total
        wanted = {key: t for key, t in copies.items() if t.requires_grad}
        if not isinstance(total, Tensor) or not wanted:
            return {}
        found = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
    return {
        key: (g.detach() * wanted[key].detach()).abs()
        for key, g in zip(wanted, found, strict=True)
        if g is not None and not g.is_sparse
    }


def _native(model: nn.Module) -> torch.dtype:
    kinds = {t.dtype for t in model.parameters() if t.is_floating_point()}
    return torch.float64 if kinds == {torch.float64} else torch.float32


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
