"""Lightning: pruning inside of its `Trainer`.

    trainer = Trainer(max_epochs=10, callbacks=[DecayPruning(example_inputs, Target(macs=0.5))])
    trainer.fit(module, loader)

`pip install lightning` (or pytorch-lightning).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from decay_pruning import surgery
from decay_pruning.budget import Target
from decay_pruning.decay import SmoothPruning
from decay_pruning.engine import Event
from decay_pruning.errors import ConfigError, ManifestError
from decay_pruning.hosts import Goal, Host, Scene
from decay_pruning.integrations import _common
from decay_pruning.progress import PruningReport
from decay_pruning.pruner import Pruner, Removal
from decay_pruning.rectify import SelfRectifying
from decay_pruning.structures import Picks

try:
    from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
except ImportError:
    try:
        from pytorch_lightning.callbacks import Callback, EarlyStopping, ModelCheckpoint
    except ImportError as error:
        raise ImportError(
            "decay_pruning.integrations.lightning needs Lightning: pip install lightning"
        ) from error

__all__ = ["DecayPruning"]
logger = logging.getLogger("decay_pruning")

#: A dry run is the beginning of a long training.
_DRY = 10**6
_HOW = (
    "Go on from the last checkpoint (trainer.fit(..., ckpt_path=...)) with more steps, end the decays at once with "
    "callback.pruner.finish(force=True), or do so always with DecayPruning(force=True)"
)


class DecayPruning(Callback):  # type: ignore[misc]
    """Prunes a LightningModule while `fit` trains it.

    The pruner is built when the fit begins and finished when the training ends; shapes stay until then, so that all
    checkpoints of a training have one shape. Its state is in each checkpoint, and `fit(ckpt_path=...)` goes on bit for
    bit, in mid-decay, too.

    `ModelCheckpoint(monitor=...)` and `EarlyStopping` begin anew in each step until the target is met: what was better
    while less was pruned is not the best pruned model. After the fit, `test(ckpt_path="best")` and the like load
    checkpoints of the full shape that were saved from then on, and pruned ones into a model of the full shape.

    Attributes:
        pruner: the `Pruner`, from the beginning of the fit on.
        report: what was done, once the training has ended.

    Args:
        example_inputs: as for `Pruner`; they are moved to the model's device.
        target: what is to be left. A bare float is the fraction of MACs.
        module: name of the part of the LightningModule that is pruned, such as "model"; "" for all of it, which then
            needs a `forward`.
        host: see `Pruner`.
        smooth: see `Pruner`.
        rectify: see `Pruner`.
        start: see `Pruner`.
        removal: "at finish", or "at once" for a training without checkpoints (`enable_checkpointing=False`).
        also: see `Pruner`.
        on_event: see `Pruner`.
        force: where the training ends before the target is met, end the decays at once and prune what is missing in
            one step. Otherwise that is a `BudgetError`, raised by `fit()`; the model is whole, and `pruner` is at work.

    Raises:
        ConfigError: a setting has a wrong type or value.
    """

    def __init__(
        self,
        example_inputs: Any,
        target: Target | float,
        *,
        module: str = "",
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
        self._module = module
        self.pruner: Pruner | None = None
        self.report: PruningReport | None = None
        self._was_done = False
        self._saved: Mapping[str, Any] | None = None

    # -- the trainer's events --------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """See checkpoints before their weights are loaded."""
        self._saved = None
        own = pl_module.on_load_checkpoint

        def load(checkpoint: dict[str, Any]) -> None:
            _fit_together(checkpoint, self._part(pl_module), self._prefix, self.state_key)
            own(checkpoint)

        object.__setattr__(pl_module, "on_load_checkpoint", load)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave no trace on the module."""
        vars(pl_module).pop("on_load_checkpoint", None)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Build the pruner; where the training goes on from a checkpoint, with its state."""
        model = self._part(pl_module)
        if self.report is not None and self.pruner is not None and self.pruner.model is model:
            return  # this model is pruned; more training is fine-tuning
        if self._settings.removal == "at once" and (trainer.checkpoint_callbacks or trainer.ckpt_path):
            raise ConfigError(
                "removal='at once' changes shapes in mid-training, so the trainer could not load its own checkpoints: "
                "leave it out, or train without checkpoints (enable_checkpointing=False)"
            )
        if trainer.ckpt_path and self._saved is None:
            raise ConfigError(
                f"the training goes on from {trainer.ckpt_path}, which was written without DecayPruning: start a new "
                "training from its weights (load_from_checkpoint) in place of resuming"
            )
        if self.pruner is not None and self.report is None:
            self.pruner.cancel()  # of a training that was broken off
        self.report = None
        steps = _DRY if trainer.fast_dev_run else trainer.estimated_stepping_batches
        if steps is None or steps < 1 or math.isinf(steps):
            raise ConfigError(
                "the length of the training is not known: give the Trainer max_steps or max_epochs"
            )
        optimizers = trainer.optimizers
        optimizer = optimizers[0] if len(optimizers) == 1 else optimizers
        self.pruner = self._settings.pruner(model, optimizer, int(steps), self._saved)
        self._was_done = self.pruner.done

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """Log the figures; what was measured before the target was met is no best model."""
        if self.pruner is None or self.report is not None:
            return
        pl_module.log_dict({k: float(v) for k, v in _common.figures(self.pruner).items()})
        if not self._was_done:
            _forget(trainer)
            self._was_done = self.pruner.done

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Finish: cut what has faded."""
        if self.pruner is None or self.report is not None:
            return
        if trainer.fast_dev_run:
            self.pruner.cancel()
            return
        self.report = self._settings.finish(self.pruner, _HOW)
        logger.info("pruned:\n%s", self.report)

    # -- checkpoints -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The pruner's state, whether its target is met, and what is cut already."""
        if self.pruner is None:
            return {}
        cut = surgery.history(self.pruner.model).state_dict()
        state = None if self.report is not None else self.pruner.state_dict()
        return {"pruner": state, "done": self.pruner.done, "cut": cut}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until there is an optimizer."""
        self._saved = state_dict.get("pruner")

    @property
    def _prefix(self) -> str:
        return f"{self._module}." if self._module else ""

    def _part(self, pl_module: nn.Module) -> nn.Module:
        """What is pruned.

        Raises:
            ConfigError: the LightningModule has no such part.
        """
        try:
            return pl_module.get_submodule(self._module)
        except AttributeError:
            raise ConfigError(f"module: {type(pl_module).__name__} has no part {self._module!r}") from None


def _fit_together(checkpoint: dict[str, Any], model: nn.Module, prefix: str, key: str) -> None:
    """Cut the model or what is loaded into it, whichever is wider.

    Raises:
        ManifestError: the model is pruned, and the checkpoint is from before pruning was done.
    """
    state = checkpoint.get("callbacks", {}).get(key) or {}
    theirs, own = surgery.History(), surgery.history(model)
    theirs.load_state_dict(state.get("cut", []))
    if theirs.positions and not own.positions:
        surgery.shrink(model, dict(theirs.positions))
    elif own.positions and not theirs.positions:
        if not state.get("done"):
            raise ManifestError(
                "the model is pruned, and this checkpoint was saved before its pruning was done: load it into a new "
                "module of the full shape"
            )
        weights = checkpoint["state_dict"]
        for (name, dim), kept in own.positions.items():
            tensor = weights.get(prefix + name)
            if isinstance(tensor, torch.Tensor) and tensor.shape[dim] == own.original[name, dim]:
                weights[prefix + name] = tensor.index_select(dim, kept.to(tensor.device))


def _forget(trainer: Any) -> None:
    """Let the trainer's judges begin anew."""
    for callback in trainer.callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            callback.best_k_models, callback.kth_best_model_path, callback.kth_value = {}, "", None
            callback.best_model_path, callback.best_model_score = "", None
        elif isinstance(callback, EarlyStopping):
            callback.wait_count = 0
            callback.best_score = torch.tensor(math.inf if callback.mode == "min" else -math.inf)
