"""The training loop of the lab: Accelerate, a learning-rate curve, and a pruner that may be riding along.

The loop calls `optimizer.step()` and knows nothing else about pruning: it asks the pruner how far it is, for
the records, and to wrap the model anew when its shapes have changed.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from decay_pruning.checks import NotNegative, OneOf, Positive, Share, Whole, check, checked
from decay_pruning.errors import ConfigError
from decay_pruning.hosts import Phase
from decay_pruning.lab.data import AUGMENTATIONS, Batches, Data
from decay_pruning.lab.distillation import Distillation, Teacher
from decay_pruning.lab.task import Split, is_floating

try:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "the lab trains by accelerate: pip install 'decay-pruning[lab]'", name=error.name
    ) from error

logger = logging.getLogger(__name__)

ScheduleName = Literal["cosine", "multistep", "constant", "triangular"]
OptimizerName = Literal["sgd", "adam", "adamw"]
Precision = Literal["no", "bf16", "fp16"]
Batch = tuple[Tensor, Tensor]


class Progress(Protocol):
    """What the trainer reads of `decay_pruning.Progress`: counts of structures, MACs and parameters."""

    @property
    def macs(self) -> int: ...
    @property
    def params(self) -> int: ...
    @property
    def decaying(self) -> int: ...
    @property
    def held(self) -> int: ...
    @property
    def released(self) -> int: ...
    @property
    def removed(self) -> int: ...


class PrunerLike(Protocol):
    """What the trainer uses of `decay_pruning.Pruner`."""

    @property
    def done(self) -> bool: ...
    def progress(self) -> Progress: ...
    def norms(self) -> Mapping[str, float]: ...
    def phase(self) -> Phase | None: ...
    def finish(self) -> Any: ...


#: (model, example inputs, optimizer, total steps) → a pruner attached to that optimizer.
PrunerFactory = Callable[[nn.Module, Tensor, Optimizer, int], PrunerLike]


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
        epochs: passes over the data, above 0; parts of one are fine (2.5).
        batch_size: images per optimizer step, over all processes and accumulated parts.
        lr: the highest learning rate.
        lr_min: the lowest; cosine ends there, triangular starts and ends there.
        schedule: "cosine", "multistep" (times `gamma` at each of `milestones`, in epochs), "constant", or
            "triangular" (up to the middle, then down).
        optimizer: "sgd", "adam" or "adamw"; `momentum` and `nesterov` are for sgd.
        label_smoothing: of the cross-entropy, in [0, 1).
        augment: of "crop" and "flip".
        mixup: α of mixup (Zhang et al. 2018): images and losses are mixed in pairs, by a share from Beta(α, α)
            that each batch draws anew. 0 for none.
        precision: of the forward pass: "no" (float32), "bf16", or "fp16" with loss scaling (GPU only).
        accumulate: parts that a batch is cut into to save memory; one optimizer step all the same.
        clip_norm: largest norm of the gradient, or None.
        channels_last: memory format of model and images (faster convolutions; GPU only).
        compile: run the model through `torch.compile`; it is compiled again after each removal.
    """

    at_least_one_step: ClassVar[bool] = True

    epochs: NotNegative = 10
    batch_size: Whole = 128
    lr: Positive = 0.1
    lr_min: NotNegative = 0.0
    schedule: ScheduleName = "cosine"
    milestones: tuple[Positive, ...] = ()
    gamma: Positive = 0.1
    optimizer: OptimizerName = "sgd"
    momentum: Share = 0.9
    nesterov: bool = False
    weight_decay: NotNegative = 5e-4
    label_smoothing: Share = 0.0
    augment: tuple[Annotated[str, OneOf(AUGMENTATIONS)], ...] = ()
    mixup: NotNegative = 0.0
    precision: Precision = "no"
    accumulate: Whole = 1
    clip_norm: Positive | None = None
    channels_last: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        check(self)
        if self.at_least_one_step and not self.epochs:
            raise ConfigError("epochs must be above 0, not 0")
        if self.lr_min > self.lr:
            raise ConfigError(f"lr_min {self.lr_min} is larger than lr {self.lr}")
        if self.batch_size % self.accumulate:
            raise ConfigError(f"batch_size {self.batch_size} must divide by accumulate, {self.accumulate}")
        if bool(self.milestones) != (self.schedule == "multistep"):
            raise ConfigError(
                f"schedule is {self.schedule!r} and milestones are {list(self.milestones)}: the schedule "
                "'multistep' needs milestones (in epochs), and no other schedule takes any"
            )
        if self.nesterov and (self.optimizer != "sgd" or not self.momentum):
            raise ConfigError("nesterov needs optimizer 'sgd' with momentum above 0")

    def learning_rate(self, step: int, steps_per_epoch: int, total: int) -> float:
        """The learning rate of optimizer step `step` (from 0) of `total`."""
        if self.schedule == "multistep":
            return self.lr * self.gamma ** sum(m * steps_per_epoch <= step for m in self.milestones)
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "triangular":
            share = 1 - abs(2 * step / total - 1)
        else:
            share = (1 + math.cos(math.pi * step / total)) / 2
        return self.lr_min + (self.lr - self.lr_min) * share


@dataclass(frozen=True)
class Step:
    """What a progress bar can show after an optimizer step.

    `loss` and `accuracy` (percent) are the latest known: the loss is read from the device once per epoch.
    """

    step: int
    total: int
    epoch: float
    lr: float
    loss: float | None
    accuracy: float | None
    progress: Progress | None


@dataclass
class History:
    """The records of one training.

    Attributes:
        rows: a dict for each of some two hundred steps and for every evaluation, in order. Always: step
            (optimizer steps taken), epoch, lr, loss (mean since the last row). At evaluations: accuracy (of
            the test images, percent, or the data's own metric) and why ("epoch", "end", or "removal": the
            pruner has just met its target). With a pruner: macs, params, decaying, held, released, removed;
            and norms (structure → share of its norm that is left) of at most `NORMS` structures while any
            decays.
        steps: optimizer steps taken.
        seconds: spent training, evaluations not counted.
        report: what the pruner's `finish()` returned, or None.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    report: Any = None

    @property
    def accuracy(self) -> float:
        """Test accuracy at the end, in percent; never the best of several."""
        return next(float(row["accuracy"]) for row in reversed(self.rows) if "accuracy" in row)

    @property
    def accuracy_after_removal(self) -> float | None:
        """Test accuracy just after the last removal that met the target, before any further step."""
        found = [float(row["accuracy"]) for row in self.rows if row.get("why") == "removal"]
        return found[-1] if found else None

    def to_dict(self) -> dict[str, Any]:
        """Everything but `report`, ready for JSON."""
        values = asdict(self)
        del values["report"]
        return values


_COUNTS = ("macs", "params", "decaying", "held", "released", "removed")
#: Structures whose norms a row of the history holds at most.
NORMS = 48


def train(
    model: nn.Module,
    data: Data,
    settings: TrainSettings,
    *,
    seed: int,
    pruner_factory: PrunerFactory | None = None,
    on_step: Callable[[Step], None] | None = None,
    eval_every: float | None = 1,
    cpu: bool = False,
    workers: int = 0,
    distill: Distillation | None = None,
) -> History:
    """Train `model` in place; see `Training` for the arguments and `Training.run` for the errors."""
    training = Training(model, data, settings, seed=seed, cpu=cpu, workers=workers, distill=distill)
    return training.run(pruner_factory, on_step=on_step, eval_every=eval_every)


def evaluate(model: nn.Module, data: Data, split: Split = "test", *, batch_size: int = 500) -> float:
    """The metric of the data (top-1 accuracy in percent), where the model is and in its own precision.

    The model's training flags are restored.
    """
    parameter = next(model.parameters())
    batches = Batches(data, batch_size, device=parameter.device, train=False, split=split)
    total = _total(model, batches, nullcontext, parameter.dtype)
    return data.metric.mean(total.item(), len(batches.labels))


def _total(
    model: nn.Module, batches: Batches, context: Callable[[], AbstractContextManager[Any]], dtype: torch.dtype
) -> Tensor:
    """The sum of the metric's scores over all batches: a 0-d tensor on the device."""
    modes = {module: module.training for module in model.modules()}
    total = torch.zeros((), dtype=torch.float64, device=batches.device)
    model.eval()
    try:
        with torch.no_grad(), context():
            for x, y in batches:
                total += batches.data.metric.total(model(x.to(dtype) if x.is_floating_point() else x), y)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return total


class Training:
    """A model, its optimizer and its data, placed where Accelerate says (so `torchrun` works).

    Args:
        model: trained in place.
        seed: of data order, augmentation and dropout. Equal seeds give equal runs on a CPU.
        cpu: stay on the CPU even if there is a GPU.
        workers: processes that decode images (image folders only).
        distill: how the model learns from what it is now, or None.

    Raises:
        ConfigError: settings that do not fit the data, the device or the number of processes.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        settings: TrainSettings,
        *,
        seed: int,
        cpu: bool = False,
        workers: int = 0,
        distill: Distillation | None = None,
    ) -> None:
        if cpu or not torch.cuda.is_available():
            if settings.precision == "fp16":
                raise ConfigError("precision 'fp16' needs a GPU; 'bf16' works on a CPU too")
            # oneDNN issue 6035: with few input channels, as after pruning, the weight gradient of a strided
            # 1×1 convolution in this format writes past its memory.
            if settings.channels_last:
                raise ConfigError("channels_last needs a GPU: on a CPU, oneDNN can crash after pruning")
        if data.loss is not None and settings.label_smoothing:
            raise ConfigError(f"label_smoothing is for cross-entropy, and {data.name} has a loss of its own")
        if settings.mixup and not is_floating(data):
            raise ConfigError(f"mixup mixes inputs, and those of {data.name} are whole numbers")
        if distill is not None and data.loss is not None and data.imitation is None:
            raise ConfigError(
                f"{data.name} has a loss of its own: to distill, it must also name `imitation`, a function of the "
                "outputs and the teacher's outputs"
            )
        self.settings, self.seed, self.model = settings, seed, model
        self._own_loss = data.loss
        self.accelerator = _accelerator(settings, cpu)
        self.device: torch.device = self.accelerator.device
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        if settings.batch_size % (world * settings.accumulate):
            raise ConfigError(
                f"batch_size {settings.batch_size} cannot be dealt out to {world} processes in "
                f"{settings.accumulate} equal parts"
            )
        shared: dict[str, Any] = {
            "device": self.device,
            "channels_last": settings.channels_last,
            "rank": rank,
            "world": world,
            "workers": workers,
        }
        self.batches = Batches(data, settings.batch_size, seed, augment=settings.augment, **shared)
        self.test = Batches(data, max(500, settings.batch_size), train=False, **shared)
        self.total_steps = max(1, round(settings.epochs * len(self.batches)))
        model.to(self.device)
        if settings.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._teacher = None if distill is None else Teacher(model, distill, data.imitation)
        self.optimizer = _optimizer(model, settings)
        self._stepper = self.accelerator.prepare_optimizer(self.optimizer, device_placement=False)
        self._forward: nn.Module = model

    def example(self) -> Tensor:
        """Two normalised test images on the device: example inputs for tracing and for proofs."""
        return next(iter(Batches(self.batches.data, 2, device=self.device, train=False)))[0]

    def run(
        self,
        pruner_factory: PrunerFactory | None = None,
        *,
        on_step: Callable[[Step], None] | None = None,
        eval_every: float | None = 1,
    ) -> History:
        """Train to the end.

        Args:
            pruner_factory: makes the pruner that rides on the optimizer.
            on_step: called after every optimizer step.
            eval_every: epochs from one evaluation to the next; None for one at the end only.

        Returns:
            the records; the model is left in training mode, on the device.

        Raises:
            ConfigError: `eval_every` is not above 0.
            Whatever the pruner raises: GraphError, SurgeryError, BudgetError.
        """
        if eval_every is not None:
            checked(eval_every, Positive, "eval_every")
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(self.seed)
            self.model.train()
            pruner = None
            if pruner_factory is not None:
                pruner = pruner_factory(self.model, self.example(), self.optimizer, self.total_steps)
            try:
                return self._loop(pruner, on_step or (lambda _: None), eval_every)
            finally:
                self._forward = self.model

    def evaluate(self) -> float:
        """The metric on the test samples, in the precision of the training, over all processes.

        Raises:
            ConfigError: it is not a finite number.
        """
        total = self.accelerator.reduce(
            _total(self.model, self.test, self.accelerator.autocast, torch.float32), "sum"
        )
        return self.test.data.metric.mean(float(total), len(self.test.labels))

    def _loop(
        self, pruner: PrunerLike | None, on_step: Callable[[Step], None], eval_every: float | None
    ) -> History:
        per_epoch, total = len(self.batches), self.total_steps
        every = None if eval_every is None else max(1, round(eval_every * per_epoch))
        book = _Book(pruner, max(1, total // 200))
        progress = pruner.progress() if pruner else None
        done = pruner is not None and pruner.done
        self._wrap()
        for step in range(1, total + 1):
            epoch, index = divmod(step - 1, per_epoch)
            if index == 0:
                batches = self.batches.epoch(epoch)
            phase = pruner.phase() if pruner else None
            lr = phase.lr if phase is not None else None
            if lr is None:
                lr = self.settings.learning_rate(step - 1, per_epoch, total)
            loss = self._step(next(batches), lr)
            why = "end" if step == total else "epoch" if every and step % every == 0 else None
            if pruner and progress:
                removed, progress = progress.removed, pruner.progress()
                if progress.removed != removed:
                    self._wrap()
                done, before = pruner.done, done
                if done and not before:
                    why = "removal"
            book.step(step, step / per_epoch, lr, loss)
            if why in ("epoch", "removal"):
                book.evaluation(self.evaluate, why)
            if step % per_epoch == 0:
                book.read_losses()
            on_step(Step(step, total, step / per_epoch, lr, book.loss, book.accuracy, progress))
        if pruner:
            book.history.report = pruner.finish()
        book.evaluation(self.evaluate, "end")
        return book.close()

    def _step(self, batch: Batch, lr: float) -> Tensor:
        """One optimizer step; the mean loss of the batch as a 0-d tensor on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        settings, parts = self.settings, self.settings.accumulate
        loss = torch.zeros((), device=self.device)
        for x, y in zip(batch[0].chunk(parts), batch[1].chunk(parts), strict=True):
            with self.accelerator.accumulate(self._forward):
                with self.accelerator.autocast():
                    part = self._loss(x, y)
                if part.dim():
                    raise ConfigError(f"the loss must be one number, and has the shape {tuple(part.shape)}")
                self.accelerator.backward(part)
                loss += part.detach() / parts
                if settings.clip_norm is not None and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), settings.clip_norm)
                self._stepper.step()
                self._stepper.zero_grad()
        return loss

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean loss of a batch, mixed with its own permutation and with the teacher's where the settings say so."""
        loss = self._own_loss or partial(F.cross_entropy, label_smoothing=self.settings.label_smoothing)
        if not self.settings.mixup:
            out = self._forward(x)
            mean = loss(out, y)
        else:
            alpha = torch.tensor(self.settings.mixup)
            share = float(torch.distributions.Beta(alpha, alpha).sample())
            other = torch.randperm(len(x)).to(x.device)
            x = share * x + (1 - share) * x[other]
            out = self._forward(x)
            mean = share * loss(out, y) + (1 - share) * loss(out, y[other])
        return mean if self._teacher is None else self._teacher.blend(mean, out, x)

    def _wrap(self) -> None:
        """Wrap the model for compilation and for several processes, again after shapes have changed."""
        self._forward = self.model  # drops the old wrapper, whose hooks must be gone before the new ones come
        if self.settings.compile:
            torch.compiler.reset()
            self._forward = torch.compile(self.model)  # type: ignore[assignment]
        if self.accelerator.num_processes > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self._forward = nn.parallel.DistributedDataParallel(self._forward, device_ids=ids)


class _Book:
    """Keeps the history without waiting for the device in every step."""

    def __init__(self, pruner: PrunerLike | None, every: int) -> None:
        self.history = History()
        self.loss: float | None = None
        self.accuracy: float | None = None
        self._pruner, self._every = pruner, every
        self._pending: list[Tensor] = []
        self._losses: list[float] = []
        self._tracked: list[str] = []
        self._now: dict[str, Any] = {}
        self._start = time.perf_counter()
        self._aside = 0.0

    def step(self, step: int, epoch: float, lr: float, loss: Tensor) -> None:
        self._pending.append(loss)
        self._now = {"step": step, "epoch": round(epoch, 4), "lr": lr}
        if step % self._every == 0:
            self._row()

    def evaluation(self, evaluate: Callable[[], float], why: str) -> None:
        self.read_losses()  # waits for the device, so that training time is not charged to the evaluation
        start = time.perf_counter()
        self.accuracy = evaluate()
        self._aside += time.perf_counter() - start
        rows = self.history.rows
        if not rows or rows[-1]["step"] != self._now["step"] or "accuracy" in rows[-1]:
            self._row()
        rows[-1] |= {**self._counts(), "accuracy": self.accuracy, "why": why}

    def read_losses(self) -> None:
        if self._pending:
            self._losses += torch.stack(self._pending).tolist()
            self._pending.clear()
            self.loss = self._losses[-1]
            if not math.isfinite(self.loss):
                logger.warning("the loss is %s after %d steps", self.loss, len(self._losses))

    def close(self) -> History:
        history = self.history
        start = 0
        for row in history.rows:
            part = self._losses[start : row["step"]] or self._losses[row["step"] - 1 : row["step"]]
            row["loss"] = sum(part) / len(part)
            start = row["step"]
        history.steps = len(self._losses)
        history.seconds = time.perf_counter() - self._start - self._aside
        return history

    def _row(self) -> None:
        row = self._now | self._counts()
        if self._pruner and row["decaying"] and (norms := self._sample(self._pruner.norms())):
            row["norms"] = norms
        self.history.rows.append(row)

    def _counts(self) -> dict[str, int]:
        if not self._pruner:
            return {}
        now = self._pruner.progress()
        return {name: getattr(now, name) for name in _COUNTS}

    def _sample(self, norms: Mapping[str, float]) -> dict[str, float]:
        """Some of the norms: those followed so far, and evenly chosen others while there is room."""
        followed = [name for name in self._tracked if name in norms]
        others = [name for name in norms if name not in set(followed)]
        room = min(NORMS - len(followed), len(others))
        followed += [others[i * len(others) // room] for i in range(room)]
        self._tracked = followed
        return {name: norms[name] for name in followed}


def _accelerator(settings: TrainSettings, cpu: bool) -> Accelerator:
    # Accelerate keeps its state once per process and refuses another precision; a comparison may need both.
    # The process group, if there is one, stays.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    return Accelerator(
        cpu=cpu, mixed_precision=settings.precision, gradient_accumulation_steps=settings.accumulate
    )


def _optimizer(model: nn.Module, settings: TrainSettings) -> Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ConfigError("the model has no parameters that train: all are frozen")
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            settings.lr,
            settings.momentum,
            nesterov=settings.nesterov,
            weight_decay=settings.weight_decay,
        )
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, settings.lr, weight_decay=settings.weight_decay)
