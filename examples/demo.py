"""`make demo`: compare the arms on handwritten digits, write the report, save a pruned model and load it back."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from decay_pruning import load, measure
from decay_pruning.cli import main as command
from decay_pruning.lab import data, models, results
from decay_pruning.lab.trainer import evaluate

OUT = Path("runs/demo")

LINES = """\
What you would add to your own training loop:

    + from decay_pruning import Pruner, Target
    + pruner = Pruner(model, example_inputs, optimizer, Target(macs=0.5), total_steps=len(loader) * epochs)
      for epoch in range(epochs):
          for x, y in loader:
              loss = loss_function(model(x), y)
              optimizer.zero_grad()
              loss.backward()
              optimizer.step()                   # drives the pruner, too
    + print(pruner.finish())                     # the model is smaller now, and its optimizer still runs
"""


def verdict(result: results.Result) -> str:
    """What the table says, in words."""
    found = {s.arm: s.difference for s in results.summarise(result) if s.difference is not None}
    said = []
    for arm, name in (("sp", "SP"), ("sr", "SP + SR")):
        d = found[arm]
        what = f"ends {d.mean:+.1f} points from one step" if d.clear else "cannot be told from one step"
        said.append(f"{name} {what}")
    return (
        f"One step costs {found['dense'].mean:.1f} points here. {' and '.join(said)} on these "
        f"{len(result.seeds)} seeds. "
        "A pretrained network with little training left tells them apart: README.md, results/crepe-250.json."
    )


def main() -> None:
    """Three seeds of dense, single, sp and sr at the same share of MACs."""
    begin = time.monotonic()
    torch.set_num_threads(1)
    sys.argv = [
        "decay-pruning",
        "compare",
        "recipes/digits-short.toml",
        "--seeds",
        "3",
        "--save-models",
        "--out",
        str(OUT),
    ]
    command(sys.argv[1:])

    file = OUT / "models" / "sr-0.safetensors"
    digits = data.load("digits")
    fresh = models.build("resnet-digits", classes=10, channels=1, size=8)
    whole = measure(fresh, torch.zeros(1, 1, 8, 8))
    load(fresh, file)
    small = measure(fresh, torch.zeros(1, 1, 8, 8))
    print(
        f"\n{file} loaded into a fresh model: {evaluate(fresh, digits):.2f} % of the test digits, "
        f"{100 * small.macs / whole.macs:.1f} % of the MACs, {100 * small.params / whole.params:.1f} % of the "
        f"parameters\n\n{verdict(results.load(OUT / 'result.json'))}\n\n{LINES}\n"
        "With more training left the arms come closer, and in the end all alike: "
        "decay-pruning compare recipes/digits.toml\n"
        f"Open {OUT / 'report.html'} in a browser. ({time.monotonic() - begin:.0f} s)"
    )


if __name__ == "__main__":
    main()
