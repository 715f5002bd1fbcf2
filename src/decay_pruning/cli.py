"""The command `decay-pruning`: arguments → calls.

decay-pruning inspect resnet56
decay-pruning run recipes/digits.toml --set prune.epochs=20
decay-pruning compare recipes/digits.toml --seeds 5
decay-pruning report runs/digits/result.json
decay-pruning --version
decay-pruning export runs/digits/models/sr-0.safetensors --model resnet-digits --to onnx
"""

from __future__ import annotations

import logging
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import tyro
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from tyro.conf import Positional, UseAppendAction, arg

from decay_pruning import __version__
from decay_pruning.errors import ConfigError, DecayPruningError

if TYPE_CHECKING:  # the lab is imported when a command needs it: `--help` and errors stay quick
    from decay_pruning.lab.compare import Job
    from decay_pruning.lab.recipe import Recipe
    from decay_pruning.lab.results import Result, Run
    from decay_pruning.lab.trainer import Step

Assignments = Annotated[
    UseAppendAction[tuple[tuple[str, ...], ...]],
    arg(
        name="set",
        metavar="KEY=VALUE",
        help="Settings that overrule the recipe's, such as prune.smooth.steps=50.",
    ),
]


@dataclass
class Inspect:
    """Show what could be pruned in a model, layer by layer, and what cannot be and why."""

    model: Positional[str]
    """A model of the zoo, such as resnet56, or module:function for your own."""
    size: int | None = None
    """Height and width of its images."""
    channels: int | None = None
    """Channels of its images."""
    classes: int | None = None
    """Outputs."""
    host: Literal["depgraph", "otov2", "gate-decorator"] = "depgraph"
    """Whose structures."""
    allow_inexact: bool = False
    """Count structures whose removal changes the function by its nature (a width under LayerNorm)."""
    meta: bool = False
    """Build it on the meta device, without weights: a model that does not fit this machine."""

    def main(self, console: Console) -> None:
        from decay_pruning import inspect
        from decay_pruning.hosts import HOSTS
        from decay_pruning.lab import models

        own = ":" in self.model
        channels, size, _ = (3, 224, 224) if own else models.example_shape(self.model)
        channels, size = self.channels or channels, self.size or size
        with torch.device("meta") if self.meta else nullcontext():
            model = models.build(self.model, classes=self.classes, channels=channels, size=size, seed=0)
        plan = inspect(
            model, torch.zeros(1, channels, size, size), HOSTS[self.host](allow_inexact=self.allow_inexact)
        )
        table = Table(title=f"{self.model}, one image of {channels}×{size}×{size}", title_justify="left")
        table.add_column("Layer group", overflow="fold")
        table.add_column("Structures", justify="right")
        for name, (width, _) in plan.widths.items():
            table.add_row(name, f"{width:,}")
        console.print(table)
        if plan.unprunable:
            table = Table(title="Not prunable", title_justify="left")
            table.add_column("Layer", overflow="fold")
            table.add_column("Reason", overflow="fold")
            for name, reason in plan.unprunable.items():
                table.add_row(name, reason)
            console.print(table)
        now = plan.now
        console.print(
            f"{now.structures:,} structures in {len(plan.widths)} layer groups · {now.macs:,} MACs · "
            f"{now.params:,} parameters\n{plan.verified}"
        )


@dataclass
class Run_:
    """Train or load a dense model, prune it by the recipe's own settings, save it, and report."""

    recipe: Positional[Path]
    """A TOML file, see recipes/."""
    assignments: Assignments = ()
    seed: int = 0
    """Of weights, data order and augmentation."""
    out: Path | None = None
    """Folder for model, result and report; runs/<recipe> if not given."""

    def main(self, console: Console) -> None:
        from decay_pruning.lab import compare, results

        recipe, out = _recipe(self.recipe, self.assignments, self.out)
        recipe = replace(recipe, report=replace(recipe.report, save_models=True))
        arm = compare.arm_of(recipe.prune)
        with _bars(console, 1) as bars:
            result = compare.compare(
                recipe,
                [arm],
                [self.seed],
                out,
                command=_command(),
                watch=bars.watch,
                on_begin=bars.on_begin,
                on_run=bars.on_run,
            )
        run = result.find(arm, self.seed)
        assert run is not None
        model = out / "models" / f"{arm}-{self.seed}.safetensors"
        console.print(_table(result))
        if run.report is not None:
            counts = run.report
            console.print(
                f"picked {counts['picked']:,}, released {counts['released']:,}, picked again "
                f"{counts['picked_again']:,}, removed {counts['removed']:,} structures"
            )
        _report(console, result, out / "report.html")
        console.print(
            f"model   {model}" if model.is_file() else "model   not saved (the run is from an earlier call)"
        )
        console.print(f"result  {out / results.FILE}")


@dataclass
class Compare:
    """Compare arms over seeds: paired runs from the same dense starts. Goes on where it was stopped."""

    recipe: Positional[Path]
    """A TOML file, see recipes/."""
    arms: str = "dense,single,sp,sr"
    """Of dense, single (the host's own one-step pruning), sp (Smooth Pruning), sr (SP + Self-Rectifying), and, beside
    DepGraph, torch-pruning's own tp-one-shot, tp-iterative, tp-growing-reg."""
    seeds: str = "3"
    """How many (5 means 0 to 4), or which (7,8,9)."""
    assignments: Assignments = ()
    out: Path | None = None
    """Folder for result and report; runs/<recipe> if not given."""
    starts: Path | None = None
    """Folder for dense starts, which several comparisons can share; <out>/starts if not given."""
    jobs: int = 1
    """Runs side by side, each in a process of its own: many small ones fill a GPU, or the cores of a CPU."""
    save_models: bool = False
    """Keep the pruned model of every run, but for those of torch-pruning's arms."""

    def main(self, console: Console) -> None:
        from decay_pruning.lab import compare, results

        recipe, out = _recipe(self.recipe, self.assignments, self.out)
        if self.save_models:
            recipe = replace(recipe, report=replace(recipe.report, save_models=True))
        arms = [arm.strip() for arm in self.arms.split(",") if arm.strip()]
        seeds = _seeds(self.seeds)
        with _bars(console, len(arms) * len(seeds)) as bars:
            result = compare.compare(
                recipe,
                arms,
                seeds,
                out,
                command=_command(),
                starts=self.starts,
                jobs=self.jobs,
                watch=bars.watch,
                on_begin=bars.on_begin,
                on_run=bars.on_run,
            )
        console.print(_table(result))
        _report(console, result, out / "report.html")
        console.print(f"result  {out / results.FILE}")


@dataclass
class Report:
    """Write the HTML page of a result file."""

    result: Positional[Path]
    """What `compare` or `run` wrote: result.json."""
    out: Path | None = None
    """The page; report.html beside the result if not given."""
    figure: Path | None = None
    """Also write the main figure by itself, as SVG."""

    def main(self, console: Console) -> None:
        from decay_pruning.lab import report, results

        result = results.load(self.result)
        _report(console, result, self.out or self.result.with_name("report.html"))
        if self.figure is not None:
            results.write(self.figure, report.figure(result))
            console.print(f"figure  {self.figure}")


@dataclass
class Export:
    """Write a pruned model in a form that runs without its code, checked against it and timed."""

    file: Positional[Path]
    """What `save` or `run` wrote: model.safetensors."""
    model: str
    """What it was pruned from: a model of the zoo, such as resnet56, or module:function for your own."""
    to: Literal["onnx", "torch"] = "onnx"
    """ONNX, checked by onnxruntime, or a program of torch.export."""
    out: Path | None = None
    """The new file; beside the other one if not given."""
    inputs: str | None = None
    """module:function that returns example inputs; one image if not given."""
    size: int | None = None
    """Height and width of its images."""
    channels: int | None = None
    """Channels of its images."""
    classes: int | None = None
    """Outputs."""

    def main(self, console: Console) -> None:
        from decay_pruning import export, load
        from decay_pruning.lab import models, own

        mine = ":" in self.model
        channels, size, _ = (3, 224, 224) if mine else models.example_shape(self.model)
        channels, size = self.channels or channels, self.size or size
        model = models.build(self.model, classes=self.classes, channels=channels, size=size, seed=0)
        load(model, self.file)
        inputs = torch.randn(1, channels, size, size)
        if self.inputs is not None:
            inputs = own.call(own.find(self.inputs, "inputs"), f"inputs {self.inputs!r}", {}, {})
        out = self.out or self.file.with_suffix({"onnx": ".onnx", "torch": ".pt2"}[self.to])
        console.print(str(export(model, inputs, out, self.to)), soft_wrap=True)


Command = (
    Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Run_, tyro.conf.subcommand("run")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Report, tyro.conf.subcommand("report")]
)


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point. Errors in settings, data and models end in one line on stderr and exit code 2."""
    if list(sys.argv[1:] if arguments is None else arguments) == ["--version"]:
        print(f"decay-pruning {__version__} (Python {platform.python_version()}, torch {torch.__version__})")
        return
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    command = tyro.cli(
        Command,
        prog="decay-pruning",
        description="Structured pruning without the accuracy cliff (the Decay Pruning Method). "
        "--version says which version this is.",
        args=arguments,
    )
    try:
        command.main(Console())
    except DecayPruningError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename or 'input/output'}: {error.strerror or error}")
    except ModuleNotFoundError as error:
        ours = str(error.name).partition(".")[0] in (
            "accelerate",
            "sklearn",
            "pyarrow",
            "PIL",
            "torch_pruning",
            "decay_pruning",
        )
        needs = ": this command needs the extra `lab`: pip install 'decay-pruning[lab]'" if ours else ""
        _fail(f"{error.name} is not installed{needs}")
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; finished runs are kept, the same command goes on from there")
        raise SystemExit(130) from None


def _fail(message: str) -> None:
    print(f"decay-pruning: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2) from None


def _recipe(path: Path, assignments: tuple[tuple[str, ...], ...], out: Path | None) -> tuple[Recipe, Path]:
    from decay_pruning.lab import recipe

    loaded = recipe.load(path, [assignment for several in assignments for assignment in several])
    return loaded, out or Path("runs") / loaded.name


def _seeds(words: str) -> list[int]:
    """ "3" → 0, 1, 2; "3,5" → 3, 5."""
    try:
        numbers = [int(word) for word in words.split(",") if word.strip()]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0 or ("," not in words and numbers[0] < 1):
        raise ConfigError(f"--seeds takes how many (5) or which (0,3,4), not {words!r}")
    return numbers if "," in words else list(range(numbers[0]))


def _command() -> str:
    return shlex.join(["decay-pruning", *sys.argv[1:]])


def _report(console: Console, result: Result, path: Path) -> None:
    from decay_pruning.lab import report, results

    results.write(path, report.render(result))
    console.print(f"report  {path}")


def _table(result: Result) -> Table:
    """Arms over seeds, for the terminal."""
    from decay_pruning.lab.results import summarise

    seeds = len(result.seeds)
    title = str(result.recipe.get("title") or result.recipe.get("name"))
    title = f"{title} ({seeds} seed{'s' * (seeds > 1)})"
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    table.add_column("Arm", no_wrap=True)
    metric = result.metric
    for head in (
        f"{metric.title} {metric.unit}".rstrip(),
        "vs single [95 %]",
        "After\ncut",
        "MACs\n%",
        "Params\n%",
        "ms",
        "Let\ngo",
    ):
        table.add_column(head, justify="right", no_wrap=True)
    for s in summarise(result):
        table.add_row(
            s.arm,
            s.accuracy.show(),
            "" if s.difference is None else s.difference.show(),
            "" if s.removed is None else f"{s.removed.mean:.1f}",
            f"{s.macs.mean:.1f}",
            f"{s.params.mean:.1f}",
            f"{s.latency.mean:.3g}",
            "" if s.arm == "dense" else f"{s.released:.0f}",
        )
    return table


@dataclass
class _Bars:
    """Progress bars: all runs, and the one that is on."""

    console: Console
    bars: Progress
    all_runs: TaskID
    current: tuple[object, TaskID] | None = None
    result: Result | None = None

    def on_begin(self, result: Result) -> None:
        """Before the first run."""
        self.result = result

    def measured(self, value: float, digits: int) -> str:
        """ "top-1 98.5 %", or what the data's metric is called."""
        assert self.result is not None
        return f"{self.result.metric.name} {self.result.metric.show(value, digits)}"

    def watch(self, job: Job, step: Step) -> None:
        """After every optimizer step."""
        if self.current is None or self.current[0] != job:
            if self.current is not None:
                self.bars.remove_task(self.current[1])
            what = f"{job.phase} start" if job.is_start else job.phase
            self.current = job, self.bars.add_task(f"{what}, seed {job.seed}", total=step.total, now="")
        self.bars.update(self.current[1], completed=step.step, now=self.now(step))

    def on_run(self, run: Run) -> None:
        """When a run is done."""
        kept = f"{100 * run.macs[1] / run.macs[0]:.1f} % MACs"
        self.bars.advance(self.all_runs)
        self.console.print(
            f"{run.arm:<6} seed {run.seed}: {self.measured(run.accuracy, 2)}, {kept}, {run.seconds:.0f} s"
        )

    def now(self, step: Step) -> str:
        """What is known after a step."""
        words = []
        if step.progress is not None:
            p = step.progress
            start = getattr(p, "macs_start", 0)
            words.append(f"MACs {100 * p.macs / start:.0f} %" if start else f"{p.macs:,} MACs")
            words += [f"{p.decaying} decaying", f"{p.released} released"]
        if step.accuracy is not None:
            words.append(self.measured(step.accuracy, 1))
        return ", ".join(words)


@contextmanager
def _bars(console: Console, runs: int) -> Iterator[_Bars]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[now]}"),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        yield _Bars(console, bars, bars.add_task("runs", total=runs, now=""))


if __name__ == "__main__":
    main()
