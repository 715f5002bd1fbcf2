"""Pruning inside of the `Trainer` of Transformers; used through `integrations.huggingface`."""

from __future__ import annotations

import gc
import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

from decay_pruning.budget import Target
from decay_pruning.decay import SmoothPruning
from decay_pruning.engine import Event
from decay_pruning.errors import ConfigError
from decay_pruning.hosts import Goal, Host, Scene
from decay_pruning.integrations import _common
from decay_pruning.progress import PruningReport
from decay_pruning.pruner import Pruner, Removal
from decay_pruning.rectify import SelfRectifying
from decay_pruning.structures import Picks

logger = logging.getLogger("decay_pruning")

#: The pruner's part of a checkpoint, beside the trainer's own files.
FILE = "decay_pruning.pt"
#: Its entry among the callbacks' states in `trainer_state.json`.
KEY = "decay_pruning"
_HOW = (
    "Go on from the last checkpoint (trainer.train(resume_from_checkpoint=...)) with more steps, end the decays "
    "at once with callback.pruner.finish(force=True), or do so always with DecayPruningCallback(force=True)"
)


class DecayPruningCallback(TrainerCallback):  # type: ignore[misc]
    """Prunes the model of a `transformers.Trainer` while it trains.

    The pruner is built when the training begins and finished when it ends; shapes stay until then, so that all
    checkpoints of a training have one shape. Each checkpoint gets a file `decay_pruning.pt`, with which
    `trainer.train(resume_from_checkpoint=...)` goes on bit for bit, in mid-decay, too.

    `load_best_model_at_end`, `save_strategy="best"` and `EarlyStoppingCallback` see only evaluations from the moment on
    in which the target is met: a metric that was better while less was pruned is not the best pruned model.

    Attributes:
        pruner: the `Pruner`, from the beginning of the training on.
        report: what was done, once the training has ended.

    Args:
        example_inputs: as for `Pruner`; they are moved to the model's device. A dict of a batch without labels.
        target: what is to be left. A bare float is the fraction of MACs.
        host: see `Pruner`.
        smooth: see `Pruner`.
        rectify: see `Pruner`.
        start: see `Pruner`.
        removal: "at finish", or "at once" for a training without checkpoints (`save_strategy="no"`).
        also: see `Pruner`.
        on_event: see `Pruner`.
        force: where the training ends before the target is met, end the decays at once and prune what is missing in
            one step. Otherwise that is a `BudgetError`, raised by `train()`; the model is whole, `pruner` at work.

    Raises:
        ConfigError: a setting has a wrong type or value.
    """

    def __init__(
        self,
        example_inputs: Any,
        target: Target | float,
        *,
        host: Host | Callable[[Scene, Goal], Picks] | None = None,
        smooth: SmoothPruning | None = None,
        rectify: SelfRectifying | None = None,
        start: int = 0,
        removal: Removal = "at finish",
        also: Sequence[Any] = (),
        on_event: Callable[[Event], None] | None = None,
        force: bool = False,
    ) -> None:
        self._settings = _common.Settings(
            example_inputs, target, host, smooth, rectify, start, removal, also, on_event, force
        )
        self.pruner: Pruner | None = None
        self.report: PruningReport | None = None
        self._was_done = False
        self._run = ""

    # -- the trainer's events --------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Build the pruner; where the training goes on from a checkpoint, with its state."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        if self.report is not None and self.pruner is not None and self.pruner.model is model:
            return  # this model is pruned; more training is fine-tuning
        if self._settings.removal == "at once" and args.save_strategy != "no":
            raise ConfigError(
                "removal='at once' changes shapes in mid-training, so the trainer could not load its own checkpoints: "
                "leave it out, or train without checkpoints (save_strategy='no')"
            )
        if self.pruner is not None and self.report is None:
            self.pruner.cancel()  # of a training that was broken off
        self.report = None
        saved = _saved(args, state) if state.global_step else None
        with _plain_forward(model):
            self.pruner = self._settings.pruner(model, optimizer, state.max_steps, saved)
        self._was_done = self.pruner.done
        self._run = state.stateful_callbacks[KEY] = uuid.uuid4().hex

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What was measured before the target was met is no best model."""
        if self.pruner is None or self.report is not None:
            return
        if not self._was_done:
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None
            self._was_done = self.pruner.done

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the pruner's state beside what the trainer has saved."""
        folder = _folder(args, state)
        if self.pruner is None or self.report is not None or not args.should_save or args.save_only_model:
            return
        if not folder.is_dir():  # of a search over hyper-parameters, which is not resumed
            return
        _common.write(
            folder / FILE,
            {"run": self._run, "global_step": state.global_step, "pruner": self.pruner.state_dict()},
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the figures to what the trainer logs, for loggers before and after this callback."""
        if self.pruner is None or self.report is not None or not logs or "loss" not in logs:
            return
        mine = _common.figures(self.pruner)
        logs.update(mine)
        if state.log_history:
            state.log_history[-1].update(mine)
        for other in _before(self):
            other.on_log(args, state, control, logs=dict(mine), **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finish: cut what has faded."""
        if self.pruner is None or self.report is not None:
            return
        with _plain_forward(self.pruner.model):
            self.report = self._settings.finish(self.pruner, _HOW)
        logger.info("pruned:\n%s", self.report)


def _folder(args: Any, state: Any) -> Path:
    """Where the trainer saves its checkpoint of this step."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _saved(args: Any, state: Any) -> dict[str, Any]:
    """The state of the pruner that belongs to the checkpoint from which the trainer goes on.

    The trainer does not tell where that is; it is known by what both files say about the run that wrote them.

    Raises:
        ConfigError: there is none.
    """
    run, given = state.stateful_callbacks.get(KEY), args.resume_from_checkpoint
    for folder in [Path(given)] if isinstance(given, str) else []:
        if found := _belongs(folder, run, state):
            return found
    if run is not None and (found := _belongs(_folder(args, state), run, state)):
        return found
    raise ConfigError(
        f"the training goes on from step {state.global_step}, but "
        + (
            "that checkpoint was written without DecayPruningCallback: start a new training from its weights "
            "(from_pretrained) in place of resuming"
            if run is None
            else f"its {FILE} is not in {_folder(args, state)}: it is missing, damaged, or lies elsewhere; say where "
            "with TrainingArguments(resume_from_checkpoint=folder)"
        )
    )


def _belongs(folder: Path, run: str | None, state: Any) -> dict[str, Any] | None:
    found = _common.read(folder / FILE)
    if (
        found is None
        or run is None
        or (found.get("run"), found.get("global_step")) != (run, state.global_step)
    ):
        return None
    return found.get("pruner")


def _before(callback: TrainerCallback) -> list[TrainerCallback]:
    """Callbacks that are called before this one: the trainer's own reporters (TensorBoard, W&B) always are."""
    for each in gc.get_objects():
        if type(each) is CallbackHandler and any(c is callback for c in each.callbacks):
            place = next(k for k, c in enumerate(each.callbacks) if c is callback)
            return list(each.callbacks[:place])
    return []


@contextmanager
def _plain_forward(model: nn.Module) -> Iterator[None]:
    """The model without the autocast that Accelerate wraps around its forward: it is proven in its own dtype."""
    wrapped = vars(model).get("forward")
    original = vars(model).get("_original_forward")
    if wrapped is None or original is None:
        yield
        return
    model.forward = original
    try:
        yield
    finally:
        model.forward = wrapped
