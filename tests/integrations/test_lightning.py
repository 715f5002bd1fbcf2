"""Pruning inside of Lightning's Trainer: real fits of a small network."""

import copy

import pytest
import torch
from torch import nn

from decay_pruning import BudgetError, ConfigError, ManifestError, SelfRectifying, SmoothPruning, Target

lightning = pytest.importorskip("lightning")
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint  # noqa: E402

from decay_pruning.integrations.lightning import DecayPruning  # noqa: E402

DRAW = torch.Generator().manual_seed(1)
DATA = [(torch.randn(1, 8, 8, generator=DRAW), k % 4) for k in range(64)]
LOADER = torch.utils.data.DataLoader(DATA, 8)
EPOCHS = 4  # of four optimizer steps each


class Net(lightning.LightningModule):
    """Batch-norm, dropout, a scheduler; its metric is best at first, as when nothing was pruned yet."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 4),
        )  # fmt: skip

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, number):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, number):
        self.log("worse", float(self.trainer.current_epoch))

    def test_step(self, batch, number):
        self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * 4)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def pruning(**settings):
    given = {"rectify": SelfRectifying(), "smooth": SmoothPruning(steps=6), "start": 1, **settings}
    return DecayPruning(
        torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)), Target(macs=0.5), **given
    )


def fit(*callbacks, module=None, epochs=EPOCHS, ckpt_path=None, **settings):
    torch.manual_seed(3)
    given = {"enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks), "logger": False}
    trainer = lightning.Trainer(
        max_epochs=epochs, accumulate_grad_batches=2, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks), log_every_n_steps=1, num_sanity_val_steps=0,
        **{**given, **settings},
    )  # fmt: skip
    module = Net() if module is None else module
    trainer.fit(module, LOADER, LOADER, ckpt_path=ckpt_path)
    return trainer, module


def every(folder, steps=3):
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=steps, save_top_k=-1)


class Seeded(Callback):
    """Dropout as in a run that was not interrupted: Lightning does not keep the state of random numbers."""

    def on_train_batch_start(self, trainer, pl_module, batch, number):
        torch.manual_seed(trainer.global_step)


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16-mixed"}], ids=["float32", "bf16"])
@pytest.mark.parametrize("part", ["", "net"])
def test_resumes_bit_for_bit_in_mid_decay(tmp_path, part, settings):
    whole = pruning(module=part)
    saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, save_on_train_epoch_end=True)
    _, module = fit(whole, saving, Seeded(), **settings)
    assert whole.report.macs[1] <= 0.5 * whole.report.macs[0]
    want = copy.deepcopy(module.state_dict())
    for step in (4, 8, 12):  # ends of epochs: Lightning begins an epoch anew
        again = pruning(module=part)
        _, resumed = fit(again, Seeded(), ckpt_path=tmp_path / f"step={step}.ckpt", **settings)
        got = resumed.state_dict()
        assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want), step
        assert again.report == whole.report


def test_the_state_in_a_checkpoint_needs_no_pickle(tmp_path):
    fit(pruning(), every(tmp_path))
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    assert saved["callbacks"]["DecayPruning"]["pruner"]["engine"]["step"] == 3


def test_figures_go_to_the_trainers_loggers(tmp_path):
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer, _ = fit(pruning(), logger=TensorBoardLogger(tmp_path))
    events = EventAccumulator(trainer.logger.log_dir)
    events.Reload()
    assert {"pruning/macs", "pruning/decaying", "pruning/released"} <= set(events.Tags()["scalars"])
    decaying = [event.value for event in events.Scalars("pruning/decaying")]
    assert max(decaying) > 0 and decaying[-1] == 0


def test_the_best_model_is_one_that_is_pruned(tmp_path):
    best = ModelCheckpoint(tmp_path, filename="best-{step}", monitor="worse", mode="min")
    events = []
    trainer, module = fit(pruning(on_event=events.append), best, epochs=8)
    done = max(event.step for event in events if event.kind == "picked") + 6
    first = 4 * -(-done // 4)
    assert 8 < first < 32
    assert best.best_model_path.endswith(f"best-step={first}.ckpt"), "of the first epoch after the last decay"
    trainer.test(module, LOADER, ckpt_path="best", verbose=False)
    early = tmp_path / "best-step=4.ckpt"
    with pytest.raises(ManifestError, match="saved before its pruning was done"):
        trainer.test(module, LOADER, ckpt_path=early, verbose=False)


def test_a_pruned_checkpoint_loads_into_a_model_of_the_full_shape(tmp_path):
    trainer, module = fit(pruning())
    trainer.save_checkpoint(tmp_path / "pruned.ckpt")
    (before,) = trainer.test(module, LOADER, verbose=False)
    fresh, settings = Net(), {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
    other = lightning.Trainer(callbacks=[pruning()], **settings)
    (after,) = other.test(fresh, LOADER, ckpt_path=tmp_path / "pruned.ckpt", verbose=False)
    assert after == before and fresh.net[0].out_channels == module.net[0].out_channels < 16


def test_early_stopping_waits_for_the_target(tmp_path):
    callback = pruning()
    trainer, _ = fit(EarlyStopping("worse", patience=1, mode="min"), callback, epochs=30)
    assert callback.report.macs[1] <= 0.5 * callback.report.macs[0]
    assert trainer.current_epoch < 10


class Stop(Callback):
    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step >= 4


def test_stopped_before_the_target(tmp_path):
    module = Net()
    with pytest.raises(BudgetError, match=r"ended before the target was met.*at step \d+.*ckpt_path"):
        fit(pruning(rectify=None), every(tmp_path), Stop(), module=module, min_epochs=1)
    assert module.net[0].out_channels == 16, "the model has its full shape"
    again = pruning(rectify=None)
    fit(again, ckpt_path=tmp_path / "step=3.ckpt")
    assert again.report is not None


def test_stopped_before_the_target_by_force():
    callback = pruning(force=True)
    fit(callback, Stop(), min_epochs=1)
    assert callback.report.macs[1] <= 0.5 * callback.report.macs[0]


def test_at_once_is_for_trainings_without_checkpoints(tmp_path):
    with pytest.raises(ConfigError, match="enable_checkpointing=False"):
        fit(pruning(removal="at once"), every(tmp_path))
    callback = pruning(removal="at once")
    fit(callback)
    assert callback.report.removed


def test_a_checkpoint_without_the_callback_is_refused(tmp_path):
    fit(every(tmp_path))
    with pytest.raises(ConfigError, match="written without DecayPruning"):
        fit(pruning(), ckpt_path=tmp_path / "step=3.ckpt")


def test_a_dry_run_leaves_the_model_as_it_is():
    module = fit(pruning(), fast_dev_run=True)[1]
    assert module.net[0].out_channels == 16


def test_a_part_that_is_not_there():
    with pytest.raises(ConfigError, match="has no part 'nett'"):
        fit(pruning(module="nett"))
