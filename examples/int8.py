"""Prune, then quantise to int8: two savings that multiply. Needs the extra `export`.

    python examples/int8.py
    python examples/int8.py results/int8-example.json

Static quantisation of onnxruntime, calibrated on training digits: the pruned network with float weights and with int8
weights and activations; accuracy, size of the file, and time of a batch of 256.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from digits import accuracy, example, loader, trained, x, y
from onnxruntime import quantization
from torch import nn

from decay_pruning import DepGraph, Pruner, Target, export


class Digits(quantization.CalibrationDataReader):  # type: ignore[misc]
    """Batches of training digits, for the ranges of the activations."""

    def __init__(self, name: str) -> None:
        self._batches = iter([{name: part.numpy()} for part in x[:512].split(64)])

    def get_next(self) -> Any:
        """The next one, or None."""
        return next(self._batches, None)


def pruned(model: nn.Module, epochs: int = 8) -> nn.Module:
    """To a third of its MACs, in widths that int8 kernels like."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    host = DepGraph(round_to=8)
    pruner = Pruner(
        model, example, optimizer, Target(macs=0.33), host=host, total_steps=epochs * len(loader())
    )
    for _ in range(epochs):
        for inputs, targets in loader():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    pruner.finish()
    return model


def figures(path: Path, rounds: int = 50) -> dict[str, float]:
    """Accuracy in percent, KiB, and the shortest time of a batch of 256 in ms, on one core."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    right = session.run(None, {name: x[1400:].numpy()})[0].argmax(1) == y[1400:].numpy()
    batch, times = {name: x[:256].numpy()}, []
    for _ in range(rounds):
        start = time.perf_counter()
        session.run(None, batch)
        times.append(time.perf_counter() - start)
    return {"accuracy": 100 * float(right.mean()), "KiB": path.stat().st_size / 1024, "ms": 1000 * min(times)}


def main() -> None:
    """Three files, one line each."""
    torch.manual_seed(0)
    model = trained()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        dense, small, int8 = (Path(folder) / f"{name}.onnx" for name in ("dense", "pruned", "int8"))
        export(model, example, dense)
        print(f"dense in torch: {accuracy(model):.1f} %")
        print(export(pruned(model), example, small))
        name = onnxruntime.InferenceSession(str(small)).get_inputs()[0].name
        quantization.quant_pre_process(str(small), str(int8), skip_symbolic_shape=True)
        quantization.quantize_static(str(int8), str(int8), Digits(name), per_channel=True)
        for kind, path in (("dense", dense), ("pruned", small), ("pruned, int8", int8)):
            found[kind] = figures(path)
            print(
                f"{kind:<13} {found[kind]['accuracy']:.1f} %, {found[kind]['KiB']:.0f} KiB, {found[kind]['ms']:.3f} ms"
            )
    if len(sys.argv) > 1:
        versions = {each.__name__: each.__version__ for each in (torch, onnxruntime)}
        made = {"command": "python examples/int8.py", "versions": versions, "machine": platform.machine()}
        Path(sys.argv[1]).write_text(json.dumps({**made, "figures": found}, indent=1))


if __name__ == "__main__":
    main()
