"""Stop at any step, go on in a new process: the same weights bit for bit."""

import copy
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from decay_pruning import ConfigError, SelfRectifying

from .registry import HOSTS, Run, build_model, start

STEPS = 16
#: Every moment of a decay with the plainest optimizer, some with the other.
STOPS = {"sgd": [0, 1, 2, 3, 4, 5, 7, 9, 11, 14], "adamw": [0, 2, 5, 9]}

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def begin(host_name: str, optimizer: str, arm: str) -> Run:
    if arm != "worth":
        return start("residual", host_name, arm, optimizer=OPTIMIZERS[optimizer])
    worth = replace(
        SelfRectifying.exchange(margin=1.0), warmup=0.0, judge_from=0.5, retries=1
    )  # stopped between the offer and the verdict, too
    return start("residual", host_name, optimizer=OPTIMIZERS[optimizer], rectify=worth)


def go_on(folder: Path, host_name: str, optimizer: str, arm: str) -> None:
    """Runs in the new process: finish every run that was stopped."""
    for stop in STOPS[optimizer]:
        run = begin(host_name, optimizer, arm)
        saved = torch.load(folder / f"stop{stop}.pt", weights_only=True)
        run.pruner.load_state_dict(saved["pruner"])
        run.model.load_state_dict(saved["model"])
        run.optimizer.load_state_dict(saved["optimizer"])
        for _ in range(stop):
            next(run.batches)
        for _ in range(stop, STEPS):
            run.step()
        torch.save(run.model.state_dict(), folder / f"end{stop}.pt")


@pytest.fixture(scope="module")
def other_process():
    """A process that has seen none of the runs before they were stopped: it is told what to go on with."""
    code = "import sys; from pathlib import Path; from tests.test_resume import go_on\n"
    code += "for line in sys.stdin:\n  folder, *which = line.split()\n  go_on(Path(folder), *which)\n"
    code += "  print('done', flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        yield process
        process.stdin.close()
    assert process.returncode == 0


@pytest.mark.parametrize("host_name", list(HOSTS))
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("arm", ["sr", "paper"])
def test_resume_in_a_new_process(tmp_path, other_process, host_name, optimizer, arm):
    resumed(tmp_path, other_process, host_name, optimizer, arm)


@pytest.mark.parametrize("host_name", ["depgraph", "depgraph-rounds"])
def test_resume_of_an_exchange(tmp_path, other_process, host_name):
    resumed(tmp_path, other_process, host_name, "sgd", "worth")


def resumed(tmp_path, other_process, host_name, optimizer, arm):
    run = begin(host_name, optimizer, arm)
    for step in range(STEPS):
        if step in STOPS[optimizer]:
            state = {"model": run.model, "optimizer": run.optimizer, "pruner": run.pruner}
            torch.save({name: part.state_dict() for name, part in state.items()}, tmp_path / f"stop{step}.pt")
        run.step()
    assert run.pruner.progress().released > 0, "nothing was released, so this would prove little"
    print(tmp_path, host_name, optimizer, arm, file=other_process.stdin, flush=True)
    assert other_process.stdout.readline() == "done\n"
    expected = run.model.state_dict()
    for stop in STOPS[optimizer]:
        end = torch.load(tmp_path / f"end{stop}.pt", weights_only=True)
        assert end.keys() == expected.keys()
        for name, value in end.items():
            assert torch.equal(value, expected[name]), f"{name} differs after a stop at step {stop}"


def test_a_state_of_another_model_is_refused():
    state = start("plain", "depgraph").pruner.state_dict()
    with pytest.raises(ConfigError, match="another model"):
        start("residual", "depgraph").pruner.load_state_dict(state)


def damaged(state, dice):
    """The same nested containers with one value in them replaced by something else."""
    nonsense = [None, -1, "x", 2.5, float("nan"), [], {}, 10**30, torch.full((3,), torch.nan)]
    places = []

    def collect(box):
        for key in list(box) if isinstance(box, dict) else range(len(box)):
            places.append((box, key))
            if isinstance(box[key], dict | list):
                collect(box[key])

    state = copy.deepcopy(state)
    collect(state)
    box, key = dice.choice(places)
    box[key] = dice.choice(nonsense)
    return state


@pytest.mark.parametrize("host_name", ["depgraph", "otov2", "gates"])
def test_a_damaged_state_is_one_error_and_nothing_is_touched(host_name):
    run = start("residual", host_name, "paper")
    for _ in range(6):
        run.step()
    good = run.pruner.state_dict()
    dice, refused = random.Random(host_name), 0
    fresh = start("residual", host_name, "paper")
    before = copy.deepcopy(fresh.model.state_dict())
    for _ in range(60):
        try:
            fresh.pruner.load_state_dict(damaged(good, dice))
        except ConfigError:
            refused += 1
            assert fresh.pruner.structures is fresh.pruner.original and fresh.pruner.engine.step == 0
            now = fresh.model.state_dict()
            assert all(torch.equal(value, now[name]) for name, value in before.items())
        else:  # a value that could have been
            fresh = start("residual", host_name, "paper")
    assert refused > 20
    fresh.pruner.load_state_dict(good)


def test_a_state_of_another_host_is_refused():
    state = start("residual", "otov2").pruner.state_dict()
    with pytest.raises(ConfigError, match="saved with the host 'OTOv2', and this pruner has DepGraph"):
        start("residual", "depgraph").pruner.load_state_dict(state)


def test_fixed_weights():
    """The registry's models start the same every time, on which every test here relies."""
    a, b = build_model("residual"), build_model("residual")
    assert all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_averages_of_one_criterion_are_not_read_as_those_of_another():
    run = start("residual", "depgraph", rectify=SelfRectifying.paper())
    while not run.pruner.progress().decaying:
        run.step()
    other = start("residual", "depgraph", rectify=SelfRectifying())
    with pytest.raises(
        ConfigError, match=r"SR had measured \['c_rate', 'c_len'\] there, and measures \['worth'"
    ):
        other.pruner.load_state_dict(run.pruner.state_dict())
