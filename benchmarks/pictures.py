"""Draw the pictures of docs/pictures.md from the library itself: python benchmarks/pictures.py

Handwritten digits (examples/digits.py), the small ResNet of `make demo`, one seed. The pictures show how the method
works; they are no measurement of how well. They need the extra `lab`.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from decay_pruning import DepGraph, Event, Pruner, SelfRectifying, SmoothPruning, Target
from decay_pruning.lab import models
from decay_pruning.lab.plot import Frame, style, svg, text, ticks
from decay_pruning.lab.results import write
from decay_pruning.structures import NOT_PARAMETERS, LayerGroup, Role

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))
NAMES = {"single": "one step", "sp": "SP", "sr": "SP + SR"}
STEPS, FIRST, N = 220, 22, 66


@dataclass
class Seen:
    """What one run shows: accuracy after each step, norms by structure, and who was released."""

    accuracy: list[tuple[float, float]] = field(default_factory=list)
    norms: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    released: set[str] = field(default_factory=set)


def trained() -> nn.Module:
    """The dense network: a dozen epochs."""
    from digits import loader

    model = models.build("resnet-digits", classes=10, channels=1, size=8, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(12):
        for inputs, targets in loader():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    return model


def run(dense: nn.Module, arm: str) -> Seen:
    """Prunes a copy of the dense network; all arms see the same batches."""
    from digits import accuracy, example, loader

    model, seen, step = copy.deepcopy(dense), Seen(), 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)

    def note(event: Event) -> None:
        names = [f"{event.group}:{index}" for index in event.indices]
        if event.kind == "released":
            seen.released.update(names)
        elif event.kind == "picked":
            for name, norm in zip(names, event.values["norm"], strict=True):
                seen.norms[name] = [(step, norm)]

    pruner = Pruner(
        model, example, optimizer, Target(macs=0.3), host=DepGraph(min_kept=0.1), start=FIRST,
        smooth=SmoothPruning.one_step() if arm == "single" else SmoothPruning(steps=N),
        rectify=SelfRectifying() if arm == "sr" else None, total_steps=STEPS, on_event=note,
    )  # fmt: skip
    torch.manual_seed(1)
    seen.accuracy.append((0, accuracy(model)))
    while step < STEPS:
        for inputs, targets in loader():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            step += 1
            seen.accuracy.append((step, accuracy(model)))
            for name, left in pruner.norms().items():
                seen.norms[name].append((step, left * seen.norms[name][0][1]))
            if step == STEPS:
                break
    pruner.finish(force=True)
    return seen


def fading(seen: Seen) -> str:
    """The norm of every picked structure over its decay."""
    levels = ticks(0, max(points[0][1] for points in seen.norms.values()))
    frame = Frame(70, 84, 470, 220, (0, STEPS), (0, levels[-1]))
    body = [frame.axes("", y_ticks=levels, x_ticks=range(0, STEPS + 1, 44))]
    body.append(text(305, 340, "optimizer steps", "num mid"))
    for name, points in seen.norms.items():
        if name not in seen.released:
            body.append(frame.line([*points, (points[0][0] + N, 0.0)], "ghost", "sp"))
    for name in sorted(seen.released):
        body.append(
            frame.line(seen.norms[name], "line", "released") + frame.dot(seen.norms[name][-1], "released")
        )
    gone, kept = len(seen.norms) - len(seen.released), len(seen.released)
    body += [text(555, 130, f"{gone} fade", "big", "sp"), text(555, 150, f"{kept} let go", "big", "released")]
    return _page(body, "How picked structures fade", "their norm; one line for each structure", 356)


def cliff(runs: dict[str, Seen]) -> str:
    """Accuracy over the steps, one line for each arm."""
    frame = Frame(70, 84, 470, 220, (0, STEPS), (0, 100))
    body = [frame.axes("", y_ticks=range(0, 101, 20), x_ticks=range(0, STEPS + 1, 44))]
    body.append(text(305, 340, "optimizer steps", "num mid"))
    for k, (arm, seen) in enumerate(runs.items()):
        body.append(frame.line(seen.accuracy, "line", arm))
        body.append(text(555, 130 + 20 * k, NAMES[arm], "big", arm))
    return _page(body, "A cliff, and a slope", "accuracy on digits that were not trained on, percent", 356)


def structure(group: LayerGroup, sizes: dict[str, tuple[int, int]], index: int) -> str:
    """One structure in every tensor that it has a part in: rows, norm, columns."""
    places: dict[str, list[tuple[Role, int, torch.Tensor]]] = {}
    for c in group.couplings:
        if c.role not in NOT_PARAMETERS:
            places.setdefault(c.tensor, []).append((c.role, c.dim, c.position[c.owner == index]))
    x, body = 40.0, []
    for tensor, parts in places.items():
        high, wide = sizes[tensor]
        height, width = min(200.0, 6.0 * high), min(220.0, 6.0 * wide) if wide > 1 else 12.0
        body.append(
            f'<rect x="{x}" y="90" width="{width}" height="{height}" rx="2" style="fill:var(--grid)"/>'
        )
        for role, dim, positions in parts:
            for position in positions.tolist():
                step = height / high if dim == 0 else width / wide
                at = f'x="{x}" y="{90 + step * position:.1f}" width="{width}" height="{max(step, 2):.1f}"'
                if dim == 1:
                    at = f'x="{x + step * position:.1f}" y="90" width="{max(step, 2):.1f}" height="{height}"'
                body.append(f'<rect {at} style="fill:var(--{"sr" if role is Role.COLUMN else "sp"})"/>')
        body.append(text(x, 310, tensor, "num") + text(x, 328, parts[0][0].value, "sub"))
        x += max(width, 62) + 22
    return _page(
        body,
        "One structure",
        "every weight that belongs to one channel: what makes it, and what reads it",
        346,
    )


def _page(body: list[str], title: str, said: str, height: int) -> str:
    head = [
        f"<style>{style('svg')}</style>",
        f'<rect width="680" height="{height}" rx="10" style="fill:var(--bg)"/>',
    ]
    head += [text(24, 34, title, "head big"), text(24, 54, said, "sub")]
    size = f'xmlns="http://www.w3.org/2000/svg" width="680" height="{height}"'
    return svg(680, height, "".join([*head, *body]), f"{title}: {said}", attributes=size) + "\n"


def main() -> None:
    """Writes the three pictures."""
    from digits import accuracy, example, network

    torch.set_num_threads(1)
    torch.manual_seed(0)
    dense = trained()
    print(f"dense: {accuracy(dense):.1f} %")
    runs = {arm: run(dense, arm) for arm in NAMES}
    for arm, seen in runs.items():
        print(f"{arm}: lowest {min(a for _, a in seen.accuracy):.1f} %, end {seen.accuracy[-1][1]:.1f} %")
    small = network()
    group = next(iter(DepGraph().graph(small, example).structures.groups.values()))
    sizes = {name: (len(p), p.shape[1] if p.ndim > 1 else 1) for name, p in small.named_parameters()}
    write(ROOT / "docs" / "method-structure.svg", structure(group, sizes, 5))
    write(ROOT / "docs" / "method-fading.svg", fading(runs["sr"]))
    write(ROOT / "docs" / "method-cliff.svg", cliff(runs))


if __name__ == "__main__":
    main()
