"""Ultralytics: pruning by the callbacks of its trainer: python examples/with_ultralytics.py [data.yaml]

Without a data set, four made-up images.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel

import decay_pruning
from decay_pruning import DepGraph, Pruner, Target

SIDE, EPOCHS = 64, 3


def made_up() -> str:
    """Four images with a box each."""
    folder = Path(tempfile.mkdtemp())
    for part in ("images", "labels"):
        (folder / part).mkdir()
    for k in range(4):
        Image.new("RGB", (SIDE, SIDE), (60 * k, 80, 200)).save(folder / "images" / f"{k}.png")
        (folder / "labels" / f"{k}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    file = folder / "data.yaml"
    file.write_text(f"path: {folder}\ntrain: images\nval: images\nnames: {{0: thing}}\n")
    return str(file)


class Pruning:
    """Three callbacks. The trainer's checkpoints hold the average (EMA), of the full shape until the end."""

    def __init__(self, target: Target | float, **settings: Any) -> None:
        self.target, self.settings = target, settings
        self.pruner: Pruner | None = None

    def start(self, trainer: Any) -> None:
        """Model, optimizer and average are there."""
        steps = trainer.epochs * (len(trainer.train_loader) // max(1, trainer.accumulate) or 1)
        example = torch.zeros(1, 3, trainer.args.imgsz, trainer.args.imgsz, device=trainer.device)
        self.pruner = Pruner(
            trainer.model, example, trainer.optimizer, self.target, total_steps=steps, removal="at finish",
            also=[trainer.ema], **self.settings,
        )  # fmt: skip

    def epoch(self, trainer: Any) -> None:
        """A figure for the trainer's own loggers; the best model is one that is pruned."""
        assert self.pruner is not None
        trainer.metrics["pruning/macs_left"] = self.pruner.progress().macs_left
        if not self.pruner.done:
            trainer.best_fitness = None
            trainer.stopper.best_fitness, trainer.stopper.best_epoch = 0.0, trainer.epoch

    def end(self, trainer: Any) -> None:
        """The trainer is done: cut, and keep the average."""
        assert self.pruner is not None
        print(self.pruner.finish(force=True))
        decay_pruning.save(trainer.ema.ema, Path(trainer.save_dir) / "pruned.safetensors")


pruning = Pruning(0.7, host=DepGraph(round_to=8))
yolo = YOLO("yolov8n.yaml")
yolo.add_callback("on_train_start", pruning.start)
yolo.add_callback("on_fit_epoch_end", pruning.epoch)
yolo.add_callback("on_train_end", pruning.end)
yolo.train(
    data=sys.argv[1] if len(sys.argv) > 1 else made_up(), imgsz=SIDE, epochs=EPOCHS, batch=2, device="cpu", workers=0,
    project=tempfile.mkdtemp(), plots=False, amp=False, verbose=False, warmup_epochs=0, nbs=2,
)  # fmt: skip
folder = Path(yolo.trainer.save_dir)
fresh = DetectionModel(yolo.trainer.model.yaml, verbose=False)
again = decay_pruning.load(fresh, folder / "pruned.safetensors").eval()
image, pruned = torch.rand(1, 3, SIDE, SIDE), yolo.trainer.ema.ema.eval()
print(f"difference {(again(image)[0] - pruned(image)[0]).abs().max().item()}")
