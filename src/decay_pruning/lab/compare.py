"""Paired comparison of arms: same seed, same dense start, same data order, same number of steps.

| arm | what it does from the dense start on |
|---|---|
| dense | trains on, unpruned |
| single | prunes as the host alone would: N = 1, never releases |
| sp | Smooth Pruning: N steps, never releases |
| sr | Smooth Pruning with Self-Rectifying |

These arms differ by two settings, `smooth` and `rectify`, and by nothing else. `lab.peers` has further ones.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import os
import statistics
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from decay_pruning import archive, manifest
from decay_pruning.budget import latency, measure
from decay_pruning.decay import SmoothPruning
from decay_pruning.engine import Event
from decay_pruning.errors import ConfigError, DecayPruningError, ManifestError
from decay_pruning.hosts import DepGraph
from decay_pruning.lab import models, parallel, results, settings
from decay_pruning.lab.data import Data
from decay_pruning.lab.parallel import Chain
from decay_pruning.lab.peers import PEERS, TorchPruning, checked
from decay_pruning.lab.recipe import Prune, Recipe
from decay_pruning.lab.results import ARMS, Line, Result, Run
from decay_pruning.lab.task import TOP1, blank
from decay_pruning.lab.trainer import (
    NORMS,
    History,
    PrunerFactory,
    PrunerLike,
    Step,
    TrainSettings,
    evaluate,
    train,
)
from decay_pruning.progress import Progress
from decay_pruning.pruner import Pruner
from decay_pruning.rectify import SelfRectifying

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What is being trained: a seed's "dense" start, its "sparse" learning, or one of its arms."""

    phase: str
    seed: int
    is_start: bool = False


#: Called after every optimizer step.
Watch = Callable[[Job, Step], None]


def settings_of(
    arm: str, prune: Prune, others: Iterable[str] = ()
) -> tuple[SmoothPruning, SelfRectifying | None] | None:
    """How an arm fades and rectifies; None for `dense`, which does not prune.

    Args:
        others: arms that there are, too, for the message.

    Raises:
        ConfigError: no such arm.
    """
    if arm == "dense":
        return None
    if arm == "single":
        return replace(prune.smooth, steps=1), None
    if arm == "sp":
        return prune.smooth, None
    if arm == "sr":
        return prune.smooth, prune.rectify or SelfRectifying()
    known = (*ARMS, *others)
    near = settings.nearest(arm, known)
    hint = f"; did you mean {near!r}?" if near else ""
    raise ConfigError(f"no arm is called {arm!r}; choose from {', '.join(known)}{hint}")


def arm_of(prune: Prune) -> str:
    """The arm that a recipe's own settings amount to."""
    if prune.smooth.steps == 1:
        return "single"
    return "sr" if prune.rectify is not None else "sp"


def compare(
    recipe: Recipe,
    arms: Sequence[str],
    seeds: Sequence[int],
    out: str | Path,
    *,
    command: str = "",
    starts: str | Path | None = None,
    jobs: int = 1,
    watch: Watch | None = None,
    on_begin: Callable[[Result], None] | None = None,
    on_run: Callable[[Run], None] | None = None,
) -> Result:
    """Run every arm with every seed that the result file in `out` does not hold yet.

    Args:
        recipe: what to do.
        arms: of `results.ARMS`, and of the recipe's own.
        seeds: each gives one dense start, and one run of each arm from it.
        out: folder for the result file (written after each run), dense starts, and models if the recipe keeps
            them.
        command: noted in the result.
        starts: folder for dense starts, so that comparisons can share them; `out`/starts if not given.
        jobs: runs side by side, each in a process of its own with its part of the threads.
        watch: called after every optimizer step, for progress bars; not with several jobs.
        on_begin: called before the first run with what there is: an earlier call's result, or one without runs.
        on_run: called when a run is done.

    Raises:
        ConfigError: unknown arms, or a result in `out` that belongs to another recipe.
        WriteError: another process works on `out`, or it cannot be written.
        Whatever a run raises, with arm and seed in front.
    """
    if not arms or not seeds:
        raise ConfigError("a comparison needs at least one arm and one seed")
    for arm in arms:
        if arm in PEERS:
            checked(recipe.prune.host)
        elif arm not in recipe.arms:
            settings_of(arm, recipe.prune, recipe.arms)
    if jobs < 1:
        raise ConfigError(f"jobs must be at least 1, not {jobs}")
    if jobs > 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("several jobs are for one process; under torchrun a run takes all processes")
    with results.alone(Path(out)) if _is_main() else nullcontext():
        return _go_on(recipe, arms, seeds, Path(out), command, starts, jobs, watch, on_begin, on_run)


def _go_on(
    recipe: Recipe,
    arms: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    command: str,
    starts: str | Path | None,
    jobs: int,
    watch: Watch | None,
    on_begin: Callable[[Result], None] | None,
    on_run: Callable[[Run], None] | None,
) -> Result:
    """`compare`, where no other process works on `out`."""
    folder = out / "starts" if starts is None else Path(starts)
    file = out / results.FILE
    data = recipe.data.load()
    result = _result(file, recipe, data, command, jobs)
    if on_begin is not None:
        on_begin(result)
    arms = sorted(set(arms), key=results.order)
    _mind_models(recipe, result, arms, seeds, out)
    runs: dict[int, list[partial[Run]]] = {}
    for seed in dict.fromkeys(seeds):
        for arm in arms:
            if result.find(arm, seed) is None:
                keep = _model_file(out, arm, seed) if recipe.report.save_models else None
                runs.setdefault(seed, []).append(partial(run_from, recipe, arm, seed, folder, save_to=keep))
    if jobs == 1:

        def in_turn() -> Generator[Run, None, None]:
            for seed, each in runs.items():
                start = dense_start(
                    recipe, data, seed, folder, watch
                )  # once: other ranks may not see the file
                for run in each:
                    yield run(data=data, start=start, watch=watch)

        outcomes: Generator[Any, None, None] = in_turn()
    else:
        first = {seed: partial(make_start, recipe, seed, folder) for seed in runs}
        outcomes = (o for _, o in parallel.run([Chain(first[s], runs[s]) for s in runs], jobs))
    with closing(outcomes) as done:
        for run in done:
            if isinstance(run, BaseException):
                raise run
            result = result.with_run(run)
            if _is_main():
                result.save(file)
            if on_run is not None:
                on_run(run)
    return result


def _mind_models(
    recipe: Recipe, result: Result, arms: Sequence[str], seeds: Sequence[int], out: Path
) -> None:
    """Say which models an earlier call did not keep, where they are asked for now."""
    if not recipe.report.save_models or not _is_main():
        return
    made = [
        (a, s)
        for s in dict.fromkeys(seeds)
        for a in arms
        if a in ARMS and a not in PEERS and result.find(a, s)
    ]
    if missing := [f"{arm}-{seed}" for arm, seed in made if not _model_file(out, arm, seed).is_file()]:
        logger.warning(
            "no models of %s: these runs are from an earlier call that did not keep them; "
            "choose another --out to have them made",
            ", ".join(missing),
        )


def _model_file(out: Path, arm: str, seed: int) -> Path:
    return out / "models" / f"{arm}-{seed}.safetensors"


def make_start(recipe: Recipe, seed: int, folder: Path) -> None:
    """Train the dense start of a seed, if `folder` does not hold it."""
    dense_start(recipe, recipe.data.load(), seed, folder)


def run_from(
    recipe: Recipe,
    arm: str,
    seed: int,
    folder: Path,
    *,
    data: Data | None = None,
    start: nn.Module | None = None,
    watch: Watch | None = None,
    save_to: Path | None = None,
) -> Run:
    """`run_arm` from the dense start that `folder` holds, or that is trained first; what is given is not loaded.

    Raises:
        Whatever the run raises, with arm and seed in front.
    """
    data = recipe.data.load() if data is None else data
    start = dense_start(recipe, data, seed, folder, watch) if start is None else start
    try:
        return run_arm(recipe, arm, seed, data, start, watch=watch, save_to=save_to)
    except DecayPruningError as error:
        raise type(error)(f"arm {arm}, seed {seed}: {error}") from error


def dense_start(recipe: Recipe, data: Data, seed: int, folder: Path, watch: Watch | None = None) -> nn.Module:
    """The model that all arms of a seed start from, on the device.

    It is kept in `folder`, under a hash of its settings, and says in the file what these were.

    Raises:
        ManifestError: the weights that the recipe names are missing or do not fit, or the kept start is damaged or
            that of another recipe.
    """
    model = recipe.model.build(data, seed)
    given = recipe.dense.weights
    if given is not None and recipe.sparse is None:
        models.load_weights(model, given)
        return model.to(_device(recipe))
    if not recipe.dense.epochs and recipe.sparse is None:  # it came with its weights
        return model.to(_device(recipe))
    file = folder / f"seed{seed}-{recipe.key_of_start(data, seed)}.safetensors"
    if file.is_file():
        logger.info("dense start of seed %d from %s", seed, file)
        _load_start(model, file, recipe.facts_of_start(data, seed))
        return model.to(_device(recipe))
    if recipe.sparse is not None:  # the same dense start as without it, once for both
        model = dense_start(replace(recipe, sparse=None), data, seed, folder, watch)
        _learn_sparsity(recipe, model, data, seed, watch)
    else:
        _train(recipe, recipe.dense, model, data, seed, Job("dense", seed, True), watch)
    if _is_main():
        _save_start(model, file, recipe.facts_of_start(data, seed))
    return model.to(_device(recipe))


def run_arm(
    recipe: Recipe,
    arm: str,
    seed: int,
    data: Data,
    start: nn.Module,
    *,
    watch: Watch | None = None,
    save_to: Path | None = None,
) -> Run:
    """One arm from the dense start to the last step of the phase `prune`.

    Args:
        start: the dense start; it is not touched.
        save_to: where to save the model, as `decay_pruning.save` does.

    Raises:
        GraphError, SurgeryError, BudgetError: see `Pruner`.
    """
    model = copy.deepcopy(start)
    recorder = _Recorder()
    accuracy_start = evaluate(start, data)
    job = Job(arm, seed)
    history = _train(recipe, recipe.prune, model, data, seed, job, watch, _pruner_of(arm, recipe, recorder))
    if not (math.isfinite(accuracy_start) and math.isfinite(history.accuracy)):
        raise DecayPruningError(
            f"the metric went from {accuracy_start} to {history.accuracy}: the training has diverged, so there is "
            "nothing to compare; try a lower learning rate"
        )
    one = blank(data, 1, _device(recipe))
    before, after = measure(start, one), measure(model, one)
    if (
        save_to is not None and _is_main() and arm not in {*PEERS, *recipe.arms}
    ):  # a manifest needs our own surgery
        with results.told(save_to):
            save_to.parent.mkdir(parents=True, exist_ok=True)
        manifest.save(model, save_to)
    batch = blank(data, recipe.report.latency_batch, _device(recipe))
    return Run(
        arm=arm,
        seed=seed,
        accuracy=history.accuracy,
        accuracy_start=accuracy_start,
        accuracy_removed=history.accuracy_after_removal,
        macs=(before.macs, after.macs),
        params=(before.params, after.params),
        latency=_latencies(start, model, batch),
        steps=history.steps,
        seconds=round(history.seconds, 3),
        rows=_rows(history.rows),
        events=recorder.counts(),
        lines=recorder.lines(history.rows),
        report=history.report.to_dict() if hasattr(history.report, "to_dict") else None,
    )


def _pruner_of(arm: str, recipe: Recipe, on_event: Callable[[Event], None]) -> PrunerFactory | None:
    """What makes an arm's pruner; None for `dense`."""
    if arm == "dense":
        return None
    prune = recipe.prune

    def attach(model: nn.Module, example: Tensor, optimizer: Optimizer, total: int) -> PrunerLike:
        shared: dict[str, Any] = {
            "host": prune.host,
            "total_steps": total,
            "start": round(prune.start * total / prune.epochs),
            "on_event": on_event,
        }
        if arm in PEERS:
            return TorchPruning(PEERS[arm], model, example[:1], optimizer, prune.target, **shared)
        if arm in recipe.arms:
            shared |= {"smooth": prune.smooth, "rectify": prune.rectify}
            return recipe.arms[arm].attach(model, example[:1], optimizer, prune.target, **shared)
        chosen = settings_of(arm, prune)
        assert chosen is not None
        smooth, rectify = chosen
        return Pruner(model, example[:1], optimizer, prune.target, smooth=smooth, rectify=rectify, **shared)

    return attach


def _latencies(before: nn.Module, after: nn.Module, batch: Tensor, rounds: int = 5) -> tuple[float, float]:
    """Median latency of two models, in turns, so that a busy moment of the machine meets both."""
    pairs = [(latency(before, batch, repeats=5), latency(after, batch, repeats=5)) for _ in range(rounds)]
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


# -- inside --------------------------------------------------------------------------


def _train(
    recipe: Recipe,
    how: TrainSettings,
    model: nn.Module,
    data: Data,
    seed: int,
    job: Job,
    watch: Watch | None,
    attach: Callable[[nn.Module, Tensor, Optimizer, int], Any] | None = None,
) -> History:
    return train(
        model,
        data,
        how,
        seed=seed,
        pruner_factory=attach,
        on_step=(lambda step: watch(job, step)) if watch is not None else None,
        eval_every=recipe.report.eval_every,
        cpu=recipe.device == "cpu",
        workers=recipe.data.workers,
        distill=how.distill if isinstance(how, Prune) else None,
    )


def _learn_sparsity(recipe: Recipe, model: nn.Module, data: Data, seed: int, watch: Watch | None) -> None:
    sparse = recipe.sparse
    assert sparse is not None
    host = recipe.prune.host
    if not isinstance(host, DepGraph):
        raise ConfigError("[sparse] belongs to the host 'depgraph'; leave the section out for other hosts")

    def attach(model: nn.Module, example: Tensor, optimizer: Optimizer, total: int) -> _Preparation:
        regularised = replace(host, sparse=sparse.learning)
        never = SmoothPruning.one_step()
        target = recipe.prune.target
        return _Preparation(
            Pruner(model, example[:1], optimizer, target, host=regularised, smooth=never, start=total + 1)
        )

    _train(recipe, sparse, model, data, seed, Job("sparse", seed, True), watch, attach)


@dataclass
class _Preparation:
    """A pruner that adds its host's regulariser to the gradients, and leaves before its first pick."""

    pruner: Pruner
    done: bool = False

    def progress(self) -> Progress:
        return self.pruner.progress()

    def norms(self) -> Mapping[str, float]:
        return {}

    def phase(self) -> None:
        return None

    def finish(self) -> None:
        self.pruner.engine.detach()


@dataclass
class _Recorder:
    """Takes down events, and puts the norms of a run together from them and the trainer's samples."""

    events: list[Event] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def counts(self) -> list[dict[str, Any]]:
        """How many structures of which layer group were picked, released, removed at which step."""
        total: Counter[tuple[int, str, str]] = Counter()
        for event in self.events:
            total[event.step, event.kind, event.group] += len(event.indices)
        return [{"step": s, "kind": k, "group": g, "count": n} for (s, k, g), n in total.items()]

    def lines(self, rows: Iterable[Mapping[str, Any]], most: int = NORMS) -> tuple[Line, ...]:
        """From each pick of a followed structure to its end."""
        lives: dict[str, list[tuple[int, str]]] = {}
        for event in self.events:
            for index in event.indices:
                lives.setdefault(f"{event.group}:{index}", []).append((event.step, event.kind))
        samples: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            for name, value in row.get("norms", {}).items():
                if math.isfinite(value):  # a training that diverges has others
                    samples.setdefault(name, []).append((int(row["step"]), round(float(value), 4)))
        names = [name for name in samples if name in lives]
        if not names:  # nothing was caught in mid-decay: one-step pruning
            every = max(1, -(-len(lives) // most))
            names = list(lives)[::every]
        return tuple(line for name in names for line in _lines(name, lives[name], samples.get(name, [])))


def _lines(name: str, life: list[tuple[int, str]], samples: list[tuple[int, float]]) -> list[Line]:
    lines = []
    for i, (step, kind) in enumerate(life):
        if kind != "picked":
            continue
        end, how = life[i + 1] if i + 1 < len(life) else (None, "")
        points = [(step, 1.0), *((s, v) for s, v in samples if s > step and (end is None or s < end))]
        if end is not None:
            points.append((end, 0.0 if how == "removed" else points[-1][1]))
        lines.append(Line(name, how, tuple(points)))
    return lines


def _rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the history that say something new: an accuracy, or another size.

    Without norms, which are kept as lines, and with no more digits than mean something.
    """
    kept: list[dict[str, Any]] = []
    macs = None
    for row in rows:
        if "accuracy" in row or row.get("macs") != macs:
            kept.append(
                {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items() if k != "norms"}
            )
        macs = row.get("macs")
    return kept


def _result(file: Path, recipe: Recipe, data: Data, command: str, jobs: int) -> Result:
    """The result in `file` to go on with, or a new one.

    Raises:
        ConfigError: it was made with other settings.
    """
    values = recipe.to_dict()
    labels = data.labels("test").detach().cpu().contiguous()
    labels = labels.float() if labels.is_floating_point() else labels
    facts: dict[str, Any] = {
        "name": data.name,
        "note": data.note,
        "train": len(data.labels("train")),
        "test": len(labels),
        "labels": hashlib.sha256(labels.numpy().tobytes()).hexdigest()[:12],
    }
    if data.metric != TOP1:
        facts["metric"] = data.metric.to_dict()
    new = Result.new(values, facts, command, str(_device(recipe)), jobs)
    if not file.is_file():
        return new
    old = results.load(file)
    rectified = any(run.arm == "sr" for run in old.runs)
    changed = results.differences(
        {**_decisive(old.recipe, rectified), "images": old.data},
        {**_decisive(new.recipe, rectified), "images": facts},
    )
    if changed:
        raise ConfigError(
            f"{file} holds results of another recipe ({'; '.join(changed[:3])}): "
            "choose another --out, or move it away"
        )
    if rectified:
        return old
    prune = {**old.recipe["prune"], "rectify": new.recipe["prune"]["rectify"]}
    return replace(old, recipe={**old.recipe, "prune": prune})


def _decisive(recipe: Mapping[str, Any], rectified: bool) -> dict[str, Any]:
    """A recipe without what does not change a figure; how it rectifies does only where there are such runs."""
    values = {k: v for k, v in recipe.items() if k not in ("name", "title")}
    left_out = {"data": ("root", "workers", "beside"), "model": ("beside",), "report": ("save_models",)}
    if not rectified:
        left_out["prune"] = ("rectify",)
    for section, keys in left_out.items():
        values[section] = {k: v for k, v in (values.get(section) or {}).items() if k not in keys}
    values["data"] = {k: v for k, v in values["data"].items() if v != {}}
    return values


def _save_start(model: nn.Module, file: Path, facts: Mapping[str, Any]) -> None:
    about = {"kind": "start", "facts": facts, "versions": results.versions()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        archive.write(file, model.state_dict(), about)
    except OSError as error:
        raise ManifestError(f"cannot save the dense start to {file}: {error.strerror or error}") from error


def _load_start(model: nn.Module, file: Path, facts: Mapping[str, Any]) -> None:
    """Fill the model with a dense start, if that is the one that these facts describe.

    Raises:
        ManifestError: it is not, or is damaged.
    """
    way_out = "move it away, and the start is trained anew"
    try:
        about, _ = archive.read(file)
        changed = ["it does not say what it is"]
        if about.get("kind") == "start" and isinstance(about.get("facts"), dict):
            changed = results.differences(about["facts"], json.loads(json.dumps(facts)))
        if not changed:
            models.load_weights(model, file)
    except ManifestError as error:
        raise ManifestError(f"{error}; {way_out}") from error
    if changed:
        shown = "; ".join(archive.short(each) for each in changed[:3])
        raise ManifestError(f"{file} is not the dense start of this recipe ({shown}): {way_out}")


def _device(recipe: Recipe) -> torch.device:
    if recipe.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"
