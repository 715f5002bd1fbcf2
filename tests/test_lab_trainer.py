"""The trainer: settings are checked early, runs repeat, and a pruner can ride along."""

import copy
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from decay_pruning.errors import BudgetError, ConfigError
from decay_pruning.lab import models, trainer
from decay_pruning.lab.data import Batches, ImageData
from decay_pruning.lab.trainer import Step, Training, TrainSettings, evaluate, train

pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def toy(count: int = 96, tests: int = 30, channels: int = 1) -> ImageData:
    """Images whose brighter half names their class: learnt in a few steps."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(count + tests) % 2
    x = torch.randint(0, 60, (count + tests, channels, 6, 6), generator=generator)
    x[y == 0, :, :3] += 120
    x[y == 1, :, 3:] += 120
    x = x.byte()
    mean, std = torch.full((channels,), 0.35), torch.full((channels,), 0.25)
    return ImageData("toy", x[:count], y[:count], x[count:], y[count:], mean, std, ("top", "bottom"))


def net(seed: int = 0, width: int = 8) -> nn.Sequential:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(36, width), nn.ReLU(), nn.Linear(width, 2))


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


SETTINGS = TrainSettings(epochs=2, batch_size=16, lr=0.05)


class TestSettings:
    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ({"epochs": 0}, "epochs must be above 0"),
            ({"epochs": "ten"}, "epochs must be a number, got 'ten'"),
            ({"batch_size": 12.5}, "batch_size must be a whole number"),
            ({"batch_size": True}, "batch_size must be a whole number"),
            ({"lr": -0.1}, "lr must be above 0"),
            ({"lr": float("nan")}, "lr must be a number"),
            ({"lr": 0.1, "lr_min": 0.2}, "lr_min 0.2 is larger"),
            ({"schedule": "cosin"}, "did you mean 'cosine'"),
            ({"schedule": "multistep"}, "needs milestones"),
            ({"milestones": (3,)}, "no other schedule"),
            ({"schedule": "multistep", "milestones": ("3",)}, r"milestones\[0\] must be a number"),
            ({"optimizer": "sdg"}, "did you mean 'sgd'"),
            ({"momentum": 1.0}, "at least 0 and below 1"),
            ({"nesterov": True, "momentum": 0.0}, "nesterov needs"),
            ({"nesterov": 1}, "nesterov must be true or false"),
            ({"weight_decay": -1}, "weight_decay must be at least 0"),
            ({"label_smoothing": 1}, "label_smoothing"),
            ({"mixup": -0.1}, "mixup must be at least 0"),
            ({"augment": "crop"}, "augment must be a list"),
            ({"augment": ("corp",)}, "did you mean 'crop'"),
            ({"precision": "fp8"}, "precision must be one of"),
            ({"batch_size": 16, "accumulate": 3}, "must divide by accumulate"),
            ({"clip_norm": 0.0}, "clip_norm must be above 0"),
        ],
    )
    def test_mistakes_are_named(self, values: dict[str, Any], words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            TrainSettings(**values)

    def test_lists_become_tuples(self) -> None:
        settings = TrainSettings(schedule="multistep", milestones=[1, 2], augment=["crop"])
        assert settings.milestones == (1, 2) and settings.augment == ("crop",)
        assert hash(settings) == hash(replace(settings))

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            (TrainSettings(lr=1, schedule="constant"), [1, 1, 1, 1, 1]),
            (TrainSettings(lr=1), [1, 0.8535534, 0.5, 0.1464466, 0]),
            (TrainSettings(lr=1, lr_min=0.5), [1, 0.9267767, 0.75, 0.5732233, 0.5]),
            (TrainSettings(lr=1, lr_min=0.1, schedule="triangular"), [0.1, 0.55, 1, 0.55, 0.1]),
            (TrainSettings(lr=1, schedule="multistep", milestones=(2, 3.5)), [1, 1, 0.1, 0.1, 0.01]),
        ],
    )
    def test_learning_rates(self, settings: TrainSettings, expected: list[float]) -> None:
        rates = [settings.learning_rate(step, 10, 40) for step in (0, 10, 20, 30, 40)]
        assert rates == pytest.approx(expected)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
    @pytest.mark.parametrize("values", [{"precision": "fp16"}, {"channels_last": True}])
    def test_what_needs_a_gpu(self, values: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match="needs a GPU"):
            Training(net(), toy(), replace(SETTINGS, **values), seed=0)


class TestTraining:
    def test_learns(self) -> None:
        model = net()
        before = evaluate(model, toy())
        history = train(model, toy(), SETTINGS, seed=0)
        assert before < 90 and history.accuracy == evaluate(model, toy()) == 100
        assert history.steps == 12 and history.seconds > 0
        assert history.rows[-1]["loss"] < 0.3 * history.rows[0]["loss"]

    def test_digits_are_learnt_in_two_epochs(self) -> None:
        from decay_pruning.lab.data import load

        model = models.build("resnet-digits", seed=0)
        settings = TrainSettings(epochs=2, batch_size=64)
        assert train(model, load("digits"), settings, seed=0, eval_every=None).accuracy > 80

    def test_equal_seeds_give_equal_runs(self) -> None:
        def run(seed: int) -> tuple[Tensor, list[dict[str, Any]]]:
            model = nn.Sequential(net(), nn.Dropout(0.2))
            history = train(model, toy(), replace(SETTINGS, augment=("crop", "flip")), seed=seed)
            return flat(model), history.rows

        torch.manual_seed(1)
        first, rows = run(3)
        torch.manual_seed(2)
        again, rows_again = run(3)
        assert torch.equal(first, again) and rows == rows_again
        assert not torch.equal(first, run(4)[0])

    def test_the_global_random_state_is_left_alone(self) -> None:
        state = torch.get_rng_state()
        train(nn.Sequential(net(), nn.Dropout()), toy(), SETTINGS, seed=0)
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("clip", [None, 0.1])
    def test_agrees_with_a_plain_loop(self, clip: float | None) -> None:
        settings = replace(SETTINGS, clip_norm=clip, label_smoothing=0.1, nesterov=True)
        ours, plain = net(), net()
        train(ours, toy(), settings, seed=5)
        optimizer = torch.optim.SGD(plain.parameters(), 1.0, 0.9, nesterov=True, weight_decay=5e-4)
        batches, step = Batches(toy(), 16, 5), 0
        for epoch in range(2):
            for x, y in batches.epoch(epoch):
                optimizer.param_groups[0]["lr"] = settings.learning_rate(step, 6, 12)
                optimizer.zero_grad()
                F.cross_entropy(plain(x), y, label_smoothing=0.1).backward()
                if clip:
                    nn.utils.clip_grad_norm_(plain.parameters(), clip)
                optimizer.step()
                step += 1
        torch.testing.assert_close(flat(ours), flat(plain), rtol=1e-6, atol=1e-7)

    def test_mixup_agrees_with_a_plain_loop(self) -> None:
        settings = replace(SETTINGS, mixup=0.4)
        ours, plain, unmixed = net(), net(), net()
        train(ours, toy(), settings, seed=5)
        train(unmixed, toy(), SETTINGS, seed=5)
        optimizer = torch.optim.SGD(plain.parameters(), 1.0, 0.9, weight_decay=5e-4)
        batches, step = Batches(toy(), 16, 5), 0
        alpha = torch.tensor(0.4)
        torch.manual_seed(5)
        for epoch in range(2):
            for x, y in batches.epoch(epoch):
                optimizer.param_groups[0]["lr"] = settings.learning_rate(step, 6, 12)
                optimizer.zero_grad()
                share = torch.distributions.Beta(alpha, alpha).sample()
                other = torch.randperm(16)
                wanted = share * F.one_hot(y, 2) + (1 - share) * F.one_hot(y[other], 2)
                F.cross_entropy(plain(share * x + (1 - share) * x[other]), wanted).backward()
                optimizer.step()
                step += 1
        torch.testing.assert_close(flat(ours), flat(plain), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(flat(ours), flat(unmixed), atol=1e-3)

    def test_accumulation_is_one_step_on_the_whole_batch(self) -> None:
        whole, parts = net(), net()
        one = train(whole, toy(), SETTINGS, seed=0)
        four = train(parts, toy(), replace(SETTINGS, accumulate=4), seed=0)
        torch.testing.assert_close(flat(whole), flat(parts), rtol=1e-5, atol=1e-6)
        assert one.steps == four.steps == 12
        losses = [[row["loss"] for row in history.rows] for history in (one, four)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-3)

    def test_precisions_can_change_within_a_process(self) -> None:
        kinds: list[torch.dtype] = []
        for precision in ("bf16", "no", "bf16"):
            model = net()
            model[1].register_forward_hook(lambda _m, _i, output: kinds.append(output.dtype))
            history = train(model, toy(), replace(SETTINGS, precision=precision), seed=0)
            assert history.accuracy == 100
        assert kinds[0] == kinds[-1] == torch.bfloat16 and torch.float32 in kinds

    @pytest.mark.parametrize("name", ["adam", "adamw"])
    def test_other_optimizers(self, name: Any) -> None:
        training = Training(net(), toy(), replace(SETTINGS, optimizer=name, lr=0.01), seed=0)
        assert type(training.optimizer).__name__.lower() == name
        assert training.run().accuracy == 100

    def test_parts_of_an_epoch(self) -> None:
        assert train(net(), toy(), replace(SETTINGS, epochs=1.5), seed=0).steps == 9
        assert train(net(), toy(), replace(SETTINGS, epochs=0.01), seed=0).steps == 1

    def test_frozen_parameters_stay(self) -> None:
        model = net()
        model[1].requires_grad_(False)
        before = [p.clone() for p in model.parameters()]
        train(model, toy(), SETTINGS, seed=0)
        moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
        assert moved == [False, False, True, True]
        model.requires_grad_(False)
        with pytest.raises(ConfigError, match="all are frozen"):
            train(model, toy(), SETTINGS, seed=0)

    def test_a_diverging_loss_is_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        settings = replace(SETTINGS, lr=1e30, schedule="constant")
        train(net(), toy(), settings, seed=0)
        assert "the loss is nan" in caplog.text

    def test_models_are_compiled_again_after_a_removal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        compiled: list[nn.Module] = []

        def fake(model: nn.Module) -> nn.Module:
            compiled.append(nn.Sequential(model))
            return compiled[-1]

        monkeypatch.setattr(torch, "compile", fake)
        model = net()
        train(model, toy(), replace(SETTINGS, compile=True), seed=0, pruner_factory=Stub.at(4))
        assert len(compiled) == 2  # at the start, and after the removal in step 4
        assert all(c[0] is model for c in compiled)


class TestEvaluate:
    def test_counts_and_restores_modes(self) -> None:
        class Fixed(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.unused = nn.Linear(1, 1)

            def forward(self, x: Tensor) -> Tensor:
                assert not self.training and not torch.is_grad_enabled()
                return torch.tensor([[0.0, 1.0]]).expand(len(x), 2)

        model, data = Fixed(), replace(toy(), test_y=torch.tensor([1] * 21 + [0] * 9))
        model.unused.eval()
        assert evaluate(model, data) == evaluate(model, data, batch_size=7) == 70
        assert evaluate(model, data, "train") == 50
        assert model.training and not model.unused.training

    def test_in_the_precision_of_the_model(self) -> None:
        assert 0 <= evaluate(net().double(), toy()) <= 100


@dataclass
class Stub:
    """A pruner that takes neurons off `net()` at one step and, if told to, one more in `finish()`."""

    model: nn.Sequential
    optimizer: Optimizer
    at_step: int
    step: int = 0
    removed: int = 0
    fails: bool = False

    def __post_init__(self) -> None:
        self.start = len(flat(self.model))
        self.optimizer.register_step_post_hook(self.after)

    @staticmethod
    def at(step: int, seen: list[Any] | None = None, fails: bool = False) -> Callable[..., Any]:
        def make(model: nn.Module, example: Tensor, optimizer: Optimizer, total: int) -> Stub:
            assert isinstance(model, nn.Sequential)
            if seen is not None:
                seen.extend([model, example, optimizer, total])
            return Stub(model, optimizer, step, fails=fails)

        return make

    def after(self, *_: object) -> None:
        self.step += 1
        if self.step == self.at_step:
            self.cut(3)

    def cut(self, count: int) -> None:
        first, last = self.model[1], self.model[3]
        for parameter, dim in ((first.weight, 0), (first.bias, 0), (last.weight, 1)):
            state = self.optimizer.state[parameter]
            kept = parameter.shape[dim] - count
            grad = parameter.grad.narrow(dim, 0, kept).clone()
            parameter.grad = None
            new = parameter.data.narrow(dim, 0, kept).clone()
            parameter.data = torch.empty(0, dtype=torch.float64)  # forgets the old shape in the graph
            parameter.data, parameter.grad = new, grad
            if "momentum_buffer" in state:
                state["momentum_buffer"] = state["momentum_buffer"].narrow(dim, 0, kept).clone()
        self.removed += count

    @property
    def done(self) -> bool:
        return self.removed > 0

    def progress(self) -> SimpleNamespace:
        params = len(flat(self.model))
        decaying = 0 if self.removed else 60
        return SimpleNamespace(
            macs=2 * params, params=params, decaying=decaying, held=0, released=1, removed=self.removed
        )

    def phase(self) -> None:
        return None

    def norms(self) -> dict[str, float]:
        assert not self.removed, "norms are asked for although nothing decays"
        return {f"layer:{i}": 1 - self.step / self.at_step for i in range(60)}

    def finish(self) -> str:
        if self.fails:
            raise BudgetError("half way")
        if self.removed:
            self.optimizer.zero_grad(set_to_none=False)
            for parameter in self.model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            self.cut(1)
        return "report"


class TestWithAPruner:
    def test_the_factory_gets_the_plain_model_and_real_images(self) -> None:
        seen: list[Any] = []
        model, data = net(), toy()
        train(model, data, SETTINGS, seed=0, pruner_factory=Stub.at(4, seen))
        assert seen[0] is model and isinstance(seen[2], torch.optim.SGD) and seen[3] == 12
        torch.testing.assert_close(seen[1], (data.test_x[:2] / 255 - 0.35) / 0.25)

    def test_the_history_tells_the_story(self) -> None:
        model = net()
        history = train(model, toy(), SETTINGS, seed=0, pruner_factory=Stub.at(4))
        full, after = 36 * 8 + 8 + 8 * 2 + 2, 36 * 5 + 5 + 5 * 2 + 2
        assert [row["step"] for row in history.rows] == [*range(1, 13)]
        assert [row["params"] for row in history.rows[:4]] == [full] * 3 + [after]
        assert history.rows[0]["macs"] == 2 * full and history.rows[4]["removed"] == 3
        assert history.report == "report" and len(model[1].weight) == 4
        assert history.rows[-1]["removed"] == 4, "what finish() removed is missing"
        whys = {row["step"]: row["why"] for row in history.rows if "accuracy" in row}
        assert whys == {4: "removal", 6: "epoch", 12: "end"}
        assert history.accuracy_after_removal == next(
            row["accuracy"] for row in history.rows if row.get("why") == "removal"
        )
        json.dumps(history.to_dict(), allow_nan=False)
        assert "report" not in history.to_dict()

    def test_norms_are_a_steady_sample(self) -> None:
        rows = train(net(), toy(), SETTINGS, seed=0, pruner_factory=Stub.at(4)).rows
        samples = [row["norms"] for row in rows if "norms" in row]
        assert len(samples) == 3 and all(len(s) == trainer.NORMS for s in samples)
        assert samples[0].keys() == samples[1].keys() == samples[2].keys()
        assert set(samples[1].values()) == {0.5}

    def test_without_a_pruner_nothing_is_said_about_pruning(self) -> None:
        history = train(net(), toy(), SETTINGS, seed=0)
        assert history.accuracy_after_removal is None and history.report is None
        assert set(history.rows[0]) == {"step", "epoch", "lr", "loss"}

    def test_a_missed_target_is_raised(self) -> None:
        with pytest.raises(BudgetError, match="half way"):
            train(net(), toy(), SETTINGS, seed=0, pruner_factory=Stub.at(4, fails=True))

    def test_every_step_is_announced(self) -> None:
        steps: list[Step] = []
        train(net(), toy(), SETTINGS, seed=0, on_step=steps.append, pruner_factory=Stub.at(4), eval_every=1)
        assert [s.step for s in steps] == [*range(1, 13)] and steps[0].total == 12
        assert steps[0].loss is None and steps[6].loss is not None and steps[6].accuracy is not None
        assert steps[2].progress is not None and steps[2].progress.decaying == 60
        assert steps[5].epoch == 1 and steps[0].lr == 0.05

    @pytest.mark.parametrize(("every", "points"), [(None, [12]), (0.5, [3, 6, 9, 12]), (2, [12])])
    def test_evaluations(self, every: float | None, points: list[int]) -> None:
        rows = train(net(), toy(), SETTINGS, seed=0, eval_every=every).rows
        assert [row["step"] for row in rows if "accuracy" in row] == points
        with pytest.raises(ConfigError, match="eval_every"):
            train(net(), toy(), SETTINGS, seed=0, eval_every=0)

    def test_long_runs_keep_some_two_hundred_rows(self) -> None:
        settings = replace(SETTINGS, epochs=100)
        history = train(net(), toy(), settings, seed=0, eval_every=None)
        assert [row["step"] for row in history.rows] == [*range(3, 601, 3)]
        every = train(net(), toy(), replace(settings, epochs=1), seed=0, eval_every=None)
        assert every.rows[0]["step"] == 1


WORKER = """
import sys, torch
sys.path[:0] = {paths!r}
torch.set_num_threads(1)
from tests.test_lab_trainer import SETTINGS, Stub, flat, net, toy
from decay_pruning.lab.trainer import Training
from dataclasses import replace
model = net()
training = Training(model, toy(), replace(SETTINGS, accumulate=2), seed=0, cpu=True)
assert training.accelerator.num_processes == 2
history = training.run(Stub.at(4))
if training.accelerator.is_main_process:
    torch.save((flat(model), history.accuracy, history.steps), {out!r})
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_train_and_prune_as_one_does(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    paths = [str(root), str(root / "src")]
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(paths=paths, out=str(tmp_path / "result.pt")))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env={**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    weights, accuracy, steps = torch.load(tmp_path / "result.pt", weights_only=True)
    alone = copy.deepcopy(net())
    history = train(alone, toy(), SETTINGS, seed=0, pruner_factory=Stub.at(4))
    torch.testing.assert_close(weights, flat(alone), rtol=1e-4, atol=1e-6)
    assert (accuracy, steps) == (history.accuracy, 12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGpu:
    @pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
    def test_learns_and_prunes(self, precision: Any) -> None:
        settings = replace(SETTINGS, precision=precision, epochs=4, clip_norm=5.0, augment=("crop",))
        model = net()
        history = train(model, toy(), settings, seed=0, pruner_factory=Stub.at(6))
        assert history.accuracy == 100 and history.accuracy == evaluate(model, toy())
        assert all(p.is_cuda for p in model.parameters())

    @pytest.mark.filterwarnings("ignore:Synchronization debug mode")
    def test_no_step_waits_for_the_device(self) -> None:
        data = toy(channels=3)
        model = models.build("resnet20", classes=2)
        training = Training(model, data, replace(SETTINGS, channels_last=True, clip_norm=1.0), seed=0)
        batches = training.batches.epoch(0)
        training._step(next(batches), 0.1)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in batches:
                training._step(batch, 0.1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
