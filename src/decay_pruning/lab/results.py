"""Result files: one JSON for all runs of a comparison, and what can be read off it.

A result is written anew, atomically, after each run, so that a comparison can be stopped at any time and goes
on where it was.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from decay_pruning import __version__
from decay_pruning.errors import ConfigError, WriteError
from decay_pruning.lab import parallel, settings, soundness
from decay_pruning.lab.stats import Difference, Spread, paired, spread
from decay_pruning.lab.task import Scale

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FORMAT = 1
#: Name of the result file in an output folder.
FILE = "result.json"
#: Bytes that a result file has at most.
_LARGEST = 1 << 30
#: Arms in the order of tables; see DESIGN: one column of a comparison.
ARMS = ("dense", "single", "sp", "sr", "tp-one-shot", "tp-iterative", "tp-growing-reg")
#: What the arms are called where there is room.
TITLES = {
    "dense": "Not pruned",
    "single": "One step",
    "sp": "Smooth Pruning",
    "sr": "SP + Self-Rectifying",
    "tp-one-shot": "torch-pruning, once",
    "tp-iterative": "torch-pruning, iterative",
    "tp-growing-reg": "torch-pruning, growing reg.",
}


@dataclass(frozen=True)
class Line:
    """The norm of one structure from a pick to its end.

    Attributes:
        name: "layer group:index".
        end: "removed", "released", or "" where it was still decaying at the end.
        points: (optimizer step, norm over norm at the pick).
    """

    name: str
    end: str
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Run:
    """One arm with one seed.

    Attributes:
        accuracy: top-1 on the test images after the last step, in percent; or the metric of a data set of your own.
        accuracy_start: of the dense start.
        accuracy_removed: just after the last removal, before any further step; None for `dense`.
        macs, params, structures: before and after, for one image.
        latency: median seconds of a forward pass, before and after.
        steps, seconds: optimizer steps from the dense start, and the time that they took.
        rows: what the trainer recorded, see `trainer.History`.
        events: counts of picked, released and removed structures by step and layer group.
        lines: norms of some structures, where kept.
        report: `PruningReport.to_dict()`, or None for `dense`.
    """

    arm: str
    seed: int
    accuracy: float
    accuracy_start: float
    accuracy_removed: float | None
    macs: tuple[int, int]
    params: tuple[int, int]
    latency: tuple[float, float]
    steps: int
    seconds: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    lines: tuple[Line, ...] = ()
    report: dict[str, Any] | None = None

    def figures(self) -> dict[str, Any]:
        """What is one value a run, pairs as `…_before` and `…_after`, with the counts of its report."""
        found: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("macs", "params", "latency"):
                found |= {f"{f.name}_before": value[0], f"{f.name}_after": value[1]}
            elif isinstance(value, str | int | float) or f.name == "accuracy_removed":
                found[f.name] = value
        for name, value in (self.report or {}).items():
            if isinstance(value, int | float):
                found.setdefault(name, value)
        return found


@dataclass(frozen=True)
class Result:
    """All runs of a comparison, and what is needed to repeat them.

    Attributes:
        recipe: `Recipe.to_dict()`, paths shortened to their last part.
        data: name, note, and how many images of each part; how to read the metric, if it is not top-1.
        versions, machine: what it ran with and on.
    """

    recipe: dict[str, Any]
    data: dict[str, Any]
    command: str = ""
    created: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    runs: tuple[Run, ...] = ()
    format: int = FORMAT

    @classmethod
    def new(
        cls, recipe: Mapping[str, Any], data: Mapping[str, Any], command: str, device: str, jobs: int = 1
    ) -> Result:
        """Without runs yet; notes time, versions and machine."""
        return cls(
            recipe=anonymous(recipe),
            data=dict(data),
            command=without_paths(command),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions=versions(),
            machine=machine(device, jobs),
        )

    def find(self, arm: str, seed: int) -> Run | None:
        """The run of this arm and seed, if it is there."""
        return next((run for run in self.runs if (run.arm, run.seed) == (arm, seed)), None)

    def of(self, arm: str) -> list[Run]:
        """All runs of an arm, by seed."""
        return sorted((run for run in self.runs if run.arm == arm), key=lambda run: run.seed)

    @property
    def metric(self) -> Scale:
        """How to read the accuracies of its runs."""
        return Scale(**self.data.get("metric", {}))

    @property
    def arms(self) -> list[str]:
        """Arms that have a run, in the order of tables."""
        present = {run.arm for run in self.runs}
        return [arm for arm in ARMS if arm in present] + sorted(present - set(ARMS))

    @property
    def seeds(self) -> list[int]:
        """Seeds that have a run."""
        return sorted({run.seed for run in self.runs})

    def frame(self) -> Any:
        """A pandas DataFrame with a row for each run: figures and counts, before and after where there are both.

        Raises:
            ConfigError: pandas is not installed.
        """
        try:
            pandas: Any = importlib.import_module("pandas")
        except ImportError as error:
            raise ConfigError("a DataFrame needs pandas: pip install pandas") from error
        return pandas.DataFrame([run.figures() for run in self.runs])

    def with_run(self, run: Run) -> Result:
        """This result and one more run, in place of an earlier one of the same arm and seed."""
        others = [r for r in self.runs if (r.arm, r.seed) != (run.arm, run.seed)]
        return replace(self, runs=tuple(sorted([*others, run], key=lambda r: (r.seed, order(r.arm)))))

    def save(self, path: str | Path) -> None:
        """Write to `path`, atomically: a reader sees the old file or the new one."""
        values = settings.plain(self)
        runs = values.pop("runs")
        head = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False)
        lines = ",\n".join(
            json.dumps(_finite(run), ensure_ascii=False, separators=(",", ":")) for run in runs
        )
        write(path, f'{head[:-2]},\n "runs": [\n{lines}\n]\n}}\n')


def load(path: str | Path) -> Result:
    """Read a result file.

    Raises:
        ConfigError: no such file, not a result, or one of another format.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _LARGEST:
            raise ConfigError(f"{path} is no result file: it is larger than {_LARGEST >> 20} MiB")
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except FileNotFoundError:
        near = sorted(str(p) for p in path.parent.glob("**/result*.json")) if path.parent.is_dir() else []
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"there is no result file {path}{hint}") from None
    except RecursionError:
        raise ConfigError(f"{path} is not a readable result file: it is nested too deeply") from None
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is not a readable result file: {error}") from None
    if not isinstance(values, dict) or "runs" not in values or "recipe" not in values:
        raise ConfigError(f"{path} is JSON, but not a result of `decay-pruning compare` or `run`")
    if values.get("format") != FORMAT:
        raise ConfigError(f"{path} has format {values.get('format')}; this version reads format {FORMAT}")
    try:
        result = settings.build(Result, values)
        soundness.check(result)
    except (ConfigError, OverflowError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from None
    return result


@dataclass(frozen=True)
class Summary:
    """One arm over its seeds. Accuracies in percent, shares in percent of the dense start, latencies in ms.

    Attributes:
        difference: of accuracy to `single`, paired by seed; None for `single` itself and where there is none.
        speedup: median over seeds of latency before over latency after.
        picked, released: structures per run, mean.
    """

    arm: str
    accuracy: Spread
    removed: Spread | None
    difference: Difference | None
    macs: Spread
    params: Spread
    latency: Spread
    speedup: float
    picked: float
    released: float


def summarise(result: Result) -> list[Summary]:
    """Every arm over its seeds, in the order of tables."""
    return [_summary(result, arm) for arm in result.arms]


def _summary(result: Result, arm: str) -> Summary:
    runs = result.of(arm)
    removed = [run.accuracy_removed for run in runs if run.accuracy_removed is not None]
    pairs = [(single, run) for run in runs if (single := result.find("single", run.seed)) is not None]
    difference = None
    if arm != "single" and pairs:
        difference = paired([a.accuracy for a, _ in pairs], [b.accuracy for _, b in pairs])
    ratios = sorted(run.latency[0] / run.latency[1] for run in runs if run.latency[1] > 0)
    reports = [run.report or {} for run in runs]
    return Summary(
        arm=arm,
        accuracy=spread([run.accuracy for run in runs]),
        removed=spread(removed) if removed else None,
        difference=difference,
        macs=spread([100 * run.macs[1] / run.macs[0] for run in runs]),
        params=spread([100 * run.params[1] / run.params[0] for run in runs]),
        latency=spread([1000 * run.latency[1] for run in runs]),
        speedup=ratios[len(ratios) // 2] if ratios else 1.0,
        picked=spread([float(report.get("picked", 0)) for report in reports]).mean,
        released=spread([float(report.get("released", 0)) for report in reports]).mean,
    )


def differences(first: Mapping[str, Any], second: Mapping[str, Any], at: str = "") -> list[str]:
    """Dotted keys in which two trees of plain values differ."""
    found = []
    for key in dict.fromkeys([*first, *second]):
        a, b = first.get(key), second.get(key)
        here = f"{at}.{key}" if at else str(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, here)
        elif a != b:
            found.append(f"{here}: {a!r} there, {b!r} now")
    return found


def anonymous(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's values with the paths of data, code and weights cut to their last part: they name a machine."""
    values = {k: dict(v) if isinstance(v, Mapping) else v for k, v in recipe.items()}
    for section, key in (("data", "root"), ("data", "beside"), ("model", "beside"), ("dense", "weights")):
        if values.get(section, {}).get(key):
            values[section][key] = Path(values[section][key]).name
    return values


def without_paths(command: str) -> str:
    """A command line with absolute paths cut to their last part.

    >>> without_paths("decay-pruning run x.toml --set data.root=/home/me/cifar10 --out ~/y")
    'decay-pruning run x.toml --set data.root=cifar10 --out y'
    """
    return re.sub(r"(?<![^\s='\"])[~/](?:[^\s'\"/]*/)*", "", command)


def write(path: str | Path, text: str) -> None:
    """Write a text file atomically; its folder is made if need be.

    Raises:
        WriteError: it cannot be written; what was there is as it was.
    """
    path = Path(path)
    with told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Say in one sentence what kept a file or folder from being written.

    Raises:
        WriteError: in place of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes that ask for it in this way. It is free again when this process ends.

    Where the file system knows no locks (or Windows), nothing is held.

    Raises:
        WriteError: another process holds it, or it cannot be made.
    """
    with told(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # better known now than after hours of training
    if fcntl is None:
        yield
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        yield
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WriteError(
                f"another process works on {folder}: wait until it is done, or choose another --out"
            ) from None
        except OSError:
            pass
        yield
    finally:
        os.close(handle)


def versions() -> dict[str, str]:
    """Versions of Python and of what the figures depend on."""
    found = {"python": platform.python_version(), "decay-pruning": __version__, "torch": torch.__version__}
    for name in ("torch-pruning", "accelerate", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine(device: str, jobs: int = 1) -> dict[str, Any]:
    """What a latency depends on, and nothing that names the machine's owner.

    Args:
        device: where models are.
        jobs: processes side by side, among which threads are divided.
    """
    cuda = device.startswith("cuda")
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": parallel.threads(jobs),
        "jobs": jobs,
        "device": torch.cuda.get_device_name(device) if cuda else "CPU",
    }


def _processor() -> str:
    if sys.platform == "linux":
        try:
            lines: Iterable[str] = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        except (OSError, StopIteration):
            pass
    return platform.processor() or "unknown"


def _no_number(constant: str) -> float:
    raise ValueError(f"{constant} is not a number")


def order(arm: str) -> tuple[int, str]:
    """What arms are sorted by; one's own come last."""
    return (ARMS.index(arm) if arm in ARMS else len(ARMS), arm)


def _finite(value: Any) -> Any:
    """Numbers that JSON knows: what is not finite becomes null."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
