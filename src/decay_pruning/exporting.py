"""Export: a pruned model as ONNX or as a program of torch.export, checked and timed before the file appears."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from decay_pruning.budget import batched
from decay_pruning.checks import as_inputs, checked
from decay_pruning.errors import ExportError
from decay_pruning.keeping import contents
from decay_pruning.proof import random_inputs
from decay_pruning.state import unwrapped
from decay_pruning.surgery import call

Format = Literal["onnx", "torch"]
#: What has to be installed for each format.
_NEEDS: Mapping[str, tuple[str, ...]] = {"onnx": ("onnx", "onnxruntime", "onnxscript"), "torch": ()}
#: Batches that the file is checked with, where it takes any; the last ones are timed.
_BATCHES = (1, 3, 32)
_TIMED = (1, 32)
#: The largest difference that is rounding, as a share of the largest value of an output.
_ROUNDING = 1e-3
#: Rounds of timing, each of one pass of either.
_ROUNDS = 15
#: Above this many bytes of weights, ONNX keeps them in a file of their own.
_WHOLE = 1.5e9


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file.
        format: "onnx" or "torch".
        any_batch: whether the file takes batches of any size, or only of that of the example inputs.
        difference: the largest difference from the model, as a share of the largest value, over random inputs.
        seconds: batch → (the model in torch, the file in its runtime): the shortest pass of either, timed in turn.
    """

    path: Path
    format: Format
    any_batch: bool
    difference: float
    seconds: Mapping[int, tuple[float, float]]

    def __str__(self) -> str:
        runtime = "onnxruntime" if self.format == "onnx" else "torch.export"
        batch = "any batch" if self.any_batch else "the batch of the example inputs only"
        lines = [f"{self.path}: {batch}; differs from the model by {self.difference:.1e} at most"]
        for size, (ours, theirs) in self.seconds.items():
            times = f"torch {1000 * ours:.3g} ms, {runtime} {1000 * theirs:.3g} ms"
            lines.append(f"batch {size}: {times} ({ours / theirs:.2f} times as fast)")
        return "\n".join(lines)


def export(
    model: nn.Module, example_inputs: Any, path: str | os.PathLike[str], to: Format = "onnx"
) -> Exported:
    """Write a model in a form that runs without its code.

    It is run on random inputs in batches of several sizes, and compared with the model, before the file appears.

    Args:
        model: the model, pruned or not; it is exported in evaluation mode, and left as it was.
        example_inputs: see `Pruner`.
        path: the file; its folder must exist.
        to: "onnx", checked by onnxruntime on the CPU, or "torch" for `torch.export.save`.

    Raises:
        ConfigError: no model, no inputs or an unknown format.
        ExportError: a package is missing, the model cannot be exported, its export computes something else, or the
            file cannot be written; no file was written then.
    """
    model, inputs = unwrapped(checked(model, nn.Module, "model")), as_inputs(example_inputs)
    to = checked(to, Format, "to")
    _check_installed(to)
    target = Path(path)
    if not target.parent.is_dir():
        raise ExportError(f"cannot write {target}: there is no folder {target.parent}")
    with _evaluating(model), torch.no_grad(), tempfile.TemporaryDirectory(dir=target.parent) as folder:
        scratch = Path(folder) / target.name
        any_batch = _written(model, inputs, scratch, to)
        run = _RUNS[to](scratch)
        sizes = _BATCHES if any_batch else (None,)
        worst = max(_difference(model, run, batched(inputs, size)) for size in sizes)
        timed = _TIMED if any_batch else (None,)
        seconds = {_batch_of(inputs, size): _timed(model, run, batched(inputs, size)) for size in timed}
        for file in Path(folder).iterdir():  # weights beside a large one first
            os.replace(file, target.with_name(file.name))
    return Exported(target, to, any_batch, worst, seconds)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode; what exporters and passes leave on the model is taken back."""
    modes, put_back = [(module, module.training) for module in model.modules()], contents(model.modules())
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        put_back()
        for module, mode in modes:
            module.training = mode


def _check_installed(to: Format) -> None:
    import importlib.util

    missing = [name for name in _NEEDS[to] if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"export to {to} needs {', '.join(missing)}: pip install 'decay-pruning[export]'")


def _written(model: nn.Module, inputs: Any, path: Path, to: Format) -> bool:
    """Write the file, for any batch if the model has it so. Returns whether it has."""
    pair = batched(
        inputs, max(2, _batch_of(inputs, None))
    )  # of one, an export would take it that it is always one
    first: Exception | None = None
    for given, dim in ((pair, torch.export.Dim("batch")), (inputs, None)):
        try:
            with warnings.catch_warnings(), _quiet("torch.onnx"):
                warnings.simplefilter("ignore")
                _WRITERS[to](model, given, path, _shapes(given, dim))
        except Exception as error:  # whatever the exporter meets in the model
            first = first or error
            continue
        return dim is not None
    message = " ".join(str(first).split())[:300]
    raise ExportError(f"the model cannot be exported: {type(first).__name__}: {message}") from first


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Without what an exporter says of packages that nobody needs."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple) else (inputs,)), {}


def _shapes(inputs: Any, dim: Any) -> Any:
    """For every tensor, which of its dimensions is the batch."""
    if dim is None:
        return None
    size = _batch_of(inputs, None)
    args, kwargs = _arguments(inputs)

    def shape(value: Any) -> Any:
        has = isinstance(value, Tensor) and value.ndim and value.shape[0] == size
        return {0: dim} if has else None

    return tree_map(shape, kwargs if kwargs else args)


def _batch_of(inputs: Any, size: int | None) -> int:
    tensors = [t for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.ndim]
    return size if size is not None else int(tensors[0].shape[0]) if tensors else 1


def _write_onnx(model: nn.Module, inputs: Any, path: Path, shapes: Any) -> None:
    args, kwargs = _arguments(inputs)
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values() if isinstance(t, Tensor))
    torch.onnx.export(
        model, args, str(path), kwargs=kwargs or None, dynamo=True, dynamic_shapes=shapes, verbose=False,
        external_data=size > _WHOLE,
    )  # fmt: skip


def _write_torch(model: nn.Module, inputs: Any, path: Path, shapes: Any) -> None:
    args, kwargs = _arguments(inputs)
    program = torch.export.export(model, args, kwargs or None, dynamic_shapes=shapes)
    torch.export.save(program, str(path))


def _run_onnx(path: Path) -> Callable[[Any], list[Tensor]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(inputs: Any) -> list[Tensor]:
        values = [t for t in tree_leaves(inputs) if isinstance(t, Tensor)]
        feed = {name: value.detach().cpu().numpy() for name, value in zip(names, values, strict=True)}
        return [torch.from_numpy(each) for each in session.run(None, feed)]

    return run


def _run_torch(path: Path) -> Callable[[Any], list[Tensor]]:
    program = torch.export.load(str(path)).module()

    def run(inputs: Any) -> list[Tensor]:
        args, kwargs = _arguments(inputs)
        return [t for t in tree_leaves(program(*args, **kwargs)) if isinstance(t, Tensor)]

    return run


_WRITERS: Mapping[str, Callable[[nn.Module, Any, Path, Any], None]] = {
    "onnx": _write_onnx,
    "torch": _write_torch,
}
_RUNS: Mapping[str, Callable[[Path], Callable[[Any], list[Tensor]]]] = {
    "onnx": _run_onnx,
    "torch": _run_torch,
}


def _difference(model: nn.Module, run: Callable[[Any], list[Tensor]], inputs: Any) -> float:
    """The largest difference on random inputs of these shapes, as a share of the largest value.

    Raises:
        ExportError: it is more than rounding.
    """
    inputs = random_inputs(inputs, seed=0)
    wanted = [t for t in tree_leaves(call(model, inputs)) if isinstance(t, Tensor)]
    try:
        found = run(inputs)
    except Exception as error:  # whatever a runtime says
        raise ExportError(f"the exported model does not run: {' '.join(str(error).split())[:300]}") from error
    if len(found) != len(wanted):
        raise ExportError(f"the exported model returns {len(found)} tensors, and the model {len(wanted)}")
    worst = 0.0
    for a, b in zip(wanted, found, strict=True):
        a, b = a.detach().cpu().double(), b.cpu().double()
        if a.shape != b.shape:
            raise ExportError(
                f"the exported model returns shape {tuple(b.shape)}, and the model {tuple(a.shape)}"
            )
        if a.numel():
            worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)))
    if not worst <= _ROUNDING:
        raise ExportError(
            f"the exported model computes something else: it differs from the model by {worst:.1e} of the largest value"
        )
    return worst


def _timed(model: nn.Module, run: Callable[[Any], list[Tensor]], inputs: Any) -> tuple[float, float]:
    """The shortest pass of the model and of the file, in turn, so that both meet the same machine."""
    import time

    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(_ROUNDS):
        for mine, do in zip(times, (lambda: call(model, inputs), lambda: run(inputs)), strict=True):
            start = time.perf_counter()
            do()
            mine.append(time.perf_counter() - start)
    return min(times[0]), min(times[1])
