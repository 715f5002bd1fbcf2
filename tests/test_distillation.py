"""The dense start as a teacher: what its part of the loss is, and that all arms have the same one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from decay_pruning.errors import ConfigError
from decay_pruning.lab import compare, recipe, trainer
from decay_pruning.lab.distillation import Distillation, Teacher
from decay_pruning.lab.task import Metric, TensorData

from .test_compare import _one_thread as _one_thread
from .test_compare import small

ON = ["prune.distill.weight=1", "prune.distill.temperature=3"]


def test_the_loss_is_the_softened_divergence() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(5, 4).double(), torch.randn(7, 5, dtype=torch.float64)
    teacher = Teacher(model, Distillation(weight=0.25, temperature=3.0), None)
    with torch.no_grad():
        theirs = F.softmax(model(x) / 3, 1)
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    out = model(x)
    mine = F.softmax(out / 3, 1)
    expected = 0.75 * 2.0 + 0.25 * 9 * (theirs * (theirs / mine).log()).sum(1).mean()
    torch.testing.assert_close(teacher.blend(torch.tensor(2.0).double(), out, x), expected)


def test_who_is_still_like_the_teacher_learns_nothing_from_it() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(6, 5)
    teacher, out = Teacher(model, Distillation(weight=1.0), None), model(x)
    teacher.blend(torch.zeros(()), out, x).backward()
    assert all(bool((p.grad.abs() < 1e-6).all()) for p in model.parameters() if p.grad is not None)
    assert model[0].weight.grad is not None


def data(**fields: Any) -> TensorData:
    x, y = torch.randn(64, 3), torch.randn(64, 2)
    metric = Metric("distance", unit="", score=lambda out, y: (out - y).abs().mean(1))
    return TensorData("pairs", (x, y), (x, y), loss=F.mse_loss, metric=metric, **fields)


def test_a_task_with_a_loss_of_its_own_says_what_imitation_is() -> None:
    settings = trainer.TrainSettings(epochs=1, batch_size=16, lr=0.1)
    with pytest.raises(ConfigError, match="must also name `imitation`"):
        trainer.Training(nn.Linear(3, 2), data(), settings, seed=0, cpu=True, distill=Distillation())
    calls = []

    def imitation(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        calls.append(float((mine - theirs).detach().abs().max()))
        return F.mse_loss(mine, theirs)

    model = nn.Linear(3, 2)
    trainer.train(
        model, data(imitation=imitation), settings, seed=0, cpu=True, eval_every=None, distill=Distillation(weight=0.5)
    )  # fmt: skip
    assert calls[0] == 0.0 < calls[-1], "the teacher stays as it was, and the student moves"


@pytest.mark.parametrize("arm", ["single", "sr"])
def test_an_arm_has_the_dense_start_as_its_teacher(tmp_path, arm: str) -> None:
    settings = small(*ON)
    assert settings.prune.distill == Distillation(1.0, 3.0)
    samples = settings.data.load()
    start = compare.dense_start(settings, samples, 0, tmp_path)
    before = copy.deepcopy(start.state_dict())
    taught, alone = (compare.run_arm(each, arm, 0, samples, start) for each in (settings, small()))
    assert taught.rows != alone.rows and taught.macs == alone.macs
    assert all(torch.equal(value, before[name]) for name, value in start.state_dict().items())


@pytest.mark.parametrize(("name", "value"), [("weight", "1.5"), ("weight", "0"), ("temperature", "-1")])
def test_nonsense_is_refused(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name):
        small(f"prune.distill.{name}={value}")


def test_it_is_off_unless_asked_for() -> None:
    assert recipe.Recipe().prune.distill is None
