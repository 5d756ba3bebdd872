from types import SimpleNamespace

import pytest

from kvc.callbacks.progress import LineProgress


def trainer_of(**values):
    return SimpleNamespace(is_global_zero=True, global_step=0, callback_metrics={}, **values)


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(time=100.0)
    monkeypatch.setattr("kvc.callbacks.progress.time.monotonic", lambda: now.time)
    return now


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_an_evaluation_says_how_far_it_is_and_how_long_it_takes(stage, clock, capsys):
    trainer = trainer_of(**{f"num_{stage}_batches": [40]})
    progress = LineProgress(every=20)
    getattr(progress, f"on_{stage}_start")(trainer, None)
    for batch in range(10):
        clock.time += 3
        getattr(progress, f"on_{stage}_batch_end")(trainer, None, None, None, batch)
    assert capsys.readouterr().out == "batch 7/40  0:01:39 left\n"


def test_training_says_the_same_of_steps(clock, capsys):
    trainer, module = trainer_of(), SimpleNamespace(total_steps=lambda: 100)
    progress = LineProgress(every=20)
    progress.on_train_start(trainer, module)
    for step in range(1, 11):
        clock.time += 4
        trainer.global_step = step
        trainer.callback_metrics["train/loss"] = 0.5
        progress.on_train_batch_end(trainer, module, None, None, step)
    assert capsys.readouterr().out == (
        "step 5/100  loss 0.5000  0.2 steps/s  0:06:20 left\nstep 10/100  loss 0.5000  0.2 steps/s  0:06:00 left\n"
    )
