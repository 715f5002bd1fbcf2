"""Pruning inside of Transformers' Trainer: real trainings on a tiny BERT."""

import copy
import logging

import pytest
import torch

from decay_pruning import BudgetError, ConfigError, DepGraph, SelfRectifying, SmoothPruning, Target

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from decay_pruning.integrations.huggingface import DecayPruningCallback  # noqa: E402

IDS = torch.randint(0, 50, (96, 8), generator=torch.Generator().manual_seed(1))
DATA = [{"input_ids": row, "labels": int(row[0] > 25)} for row in IDS]
STEPS = 16


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=16, num_labels=2,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def pruning(**settings):
    given = {"rectify": SelfRectifying(), "smooth": SmoothPruning(steps=8), "start": 2, **settings}
    return DecayPruningCallback({"input_ids": IDS[:1]}, Target(macs=0.6), **given)


def trainer(folder, callback, *more, steps=STEPS, **settings):
    """Gradient accumulation, a scheduler and dropout are always on."""
    given = {
        "max_steps": steps, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "save_steps": 4,
        "logging_steps": 4, "report_to": "none", "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine", "seed": 3, **settings,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(str(folder), **given)
    return transformers.Trainer(
        bert(), arguments, train_dataset=DATA, eval_dataset=DATA[:16], callbacks=[callback, *more]
    )


@pytest.mark.parametrize("settings", [{}, {"bf16": True}], ids=["float32", "bf16"])
def test_resumes_bit_for_bit_in_mid_decay(tmp_path, settings):
    whole = pruning()
    run = trainer(tmp_path, whole, **settings)
    run.train()
    assert whole.report.macs[1] <= 0.6 * whole.report.macs[0]
    want = copy.deepcopy(run.model.state_dict())
    for step in (4, 8, 12):  # while all decay, after releases, while some are held
        again = pruning()
        resumed = trainer(tmp_path, again, **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        got = resumed.model.state_dict()
        assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want), step
        assert again.report == whole.report


def test_a_checkpoint_that_was_moved_is_found_where_the_arguments_say(tmp_path):
    run = trainer(tmp_path / "first", pruning(), steps=STEPS, save_steps=8)
    run.train()
    moved = tmp_path / "elsewhere"
    (tmp_path / "first" / "checkpoint-8").rename(moved)
    with pytest.raises(ConfigError, match=r"decay_pruning\.pt is not in .*resume_from_checkpoint"):
        trainer(tmp_path / "second", pruning()).train(resume_from_checkpoint=str(moved))
    again = pruning()
    resumed = trainer(tmp_path / "third", again, resume_from_checkpoint=str(moved))
    resumed.train(resume_from_checkpoint=str(moved))
    assert again.report.steps == STEPS


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    """Same folder, same step: the state that lies there is not the one of these weights."""
    run = trainer(tmp_path, pruning(), save_steps=8)
    run.train()
    file = tmp_path / "checkpoint-8" / "decay_pruning.pt"
    saved = torch.load(file, weights_only=True)
    torch.save({**saved, "run": "another"}, file)
    with pytest.raises(ConfigError, match="missing, damaged, or lies elsewhere"):
        trainer(tmp_path, pruning()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_a_checkpoint_without_the_callback_is_refused(tmp_path):
    plain = trainer(tmp_path, transformers.TrainerCallback(), steps=4)
    plain.train()
    with pytest.raises(ConfigError, match="written without DecayPruningCallback"):
        trainer(tmp_path, pruning()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_figures_are_in_the_trainers_own_logs(tmp_path):
    """Also for reporters that are called before the callback, as TensorBoard's and W&B's are."""
    seen = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    callback = pruning()
    run = trainer(tmp_path, callback, save_strategy="no")
    run.callback_handler.callbacks.insert(0, Reporter())
    run.train()
    rows = [row for row in run.state.log_history if "loss" in row]
    assert len(rows) == STEPS // 4
    assert all({"pruning/macs", "pruning/decaying", "pruning/released"} <= row.keys() for row in rows)
    assert rows[0]["pruning/decaying"] > 0 and rows[-1]["pruning/macs_share"] <= 0.6
    assert [row for row in seen if "pruning/macs" in row and "loss" not in row]


class Worse:
    """A metric that is best at first, as when nothing was pruned yet."""

    def __init__(self):
        self.calls = 0

    def __call__(self, prediction):
        self.calls += 1
        return {"score": -self.calls}


#: Judged by that metric.
JUDGED = {
    "eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True, "metric_for_best_model": "score",
    "greater_is_better": True,
}  # fmt: skip


def test_the_best_model_is_one_that_is_pruned(tmp_path):
    run = trainer(tmp_path, callback := pruning(), steps=28, **JUDGED)
    run.compute_metrics = Worse()
    run.train()
    assert callback.report.macs[1] <= 0.6 * callback.report.macs[0]
    best = run.state.best_global_step
    assert callback.report.rounds == 2 and best == 20, "the first evaluation after the last decay"
    losses = {row["step"]: row["eval_loss"] for row in run.state.log_history if "eval_loss" in row}
    assert run.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-5)
    assert losses[28] != pytest.approx(losses[best], rel=1e-5)


def test_early_stopping_waits_for_the_target(tmp_path):
    stopping = transformers.EarlyStoppingCallback(early_stopping_patience=1)
    run = trainer(tmp_path, stopping, callback := pruning(), steps=60, save_total_limit=2, **JUDGED)
    run.compute_metrics = Worse()
    run.train()
    assert run.state.global_step == 24, "four steps after the first evaluation that counts"
    assert callback.report.macs[1] <= 0.6 * callback.report.macs[0]


class Stop(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 5


def test_stopped_before_the_target(tmp_path):
    callback = pruning(rectify=None)
    run = trainer(tmp_path, callback, Stop())
    with pytest.raises(
        BudgetError, match=r"ended before the target was met.*decaying at step 5.*resume_from"
    ):
        run.train()
    assert run.model.bert.pooler.dense.out_features == 32, "the model has its full shape"
    run.model(input_ids=IDS[:2])
    again = pruning(rectify=None)  # and the training can go on
    trainer(tmp_path, again).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.report is not None


def test_stopped_before_the_target_by_force(tmp_path):
    callback = pruning(force=True)
    trainer(tmp_path, callback, Stop(), save_strategy="no").train()
    assert callback.report.macs[1] <= 0.6 * callback.report.macs[0]


def test_at_once_is_for_trainings_without_checkpoints(tmp_path):
    with pytest.raises(ConfigError, match="save_strategy='no'"):
        trainer(tmp_path, pruning(removal="at once")).train()
    callback = pruning(removal="at once")
    trainer(tmp_path, callback, save_strategy="no", bf16=True).train()
    assert callback.report.removed


def test_more_training_is_fine_tuning(tmp_path):
    callback = pruning()
    run = trainer(tmp_path, callback, save_strategy="no")
    run.train()
    report, shapes = callback.report, [p.shape for p in run.model.parameters()]
    run.train()
    assert callback.report is report and [p.shape for p in run.model.parameters()] == shapes


def test_settings_are_checked_where_they_are_made():
    with pytest.raises(ConfigError, match="removal"):
        pruning(removal="never")
    with pytest.raises(ConfigError, match="between 0 and 1"):
        DecayPruningCallback({"input_ids": IDS[:1]}, 1.5)
    with pytest.raises(TypeError, match="smoth"):
        DecayPruningCallback({"input_ids": IDS[:1]}, 0.5, smoth=SmoothPruning())


def test_hosts_of_all_kinds_of_state_resume(tmp_path):
    host = DepGraph(importance="activation", rounds=2, uniform=True)
    whole = pruning(host=host, smooth=SmoothPruning(steps=4))
    run = trainer(tmp_path, whole)
    run.train()
    again = pruning(host=host, smooth=SmoothPruning(steps=4))
    resumed = trainer(tmp_path, again)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert all(
        torch.equal(a, b) for a, b in zip(run.model.parameters(), resumed.model.parameters(), strict=True)
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_half_precision_with_a_scaler(tmp_path):
    callback = pruning()
    run = trainer(tmp_path, callback, use_cpu=False, fp16=True, steps=40)
    run.train()
    assert callback.report.macs[1] <= 0.6 * callback.report.macs[0]


logging.getLogger("transformers").setLevel(logging.ERROR)
