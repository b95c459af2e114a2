"""Progress of long steps: a bar on a terminal, otherwise log lines after every epoch and minute."""

import logging
import sys

import pytest
from lightning import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger

from cdc_mmpg import progress
from cdc_mmpg.training.progress import EpochLines, RunBar, choose_progress


class Terminal:
    def __init__(self, is_terminal: bool) -> None:
        self.isatty = lambda: is_terminal


@pytest.mark.parametrize(
    ("terminal", "enabled", "callbacks", "chosen"),
    [
        (True, None, [], [RunBar]),
        (True, True, [], [RunBar]),
        (True, False, [], [EpochLines]),
        (False, True, [], [EpochLines]),
        (True, True, [RichProgressBar()], []),
    ],
)
def test_the_progress_display_depends_on_terminal_option_and_callbacks(
    terminal, enabled, callbacks, chosen, monkeypatch
):
    monkeypatch.setattr(sys, "stderr", Terminal(terminal))
    assert [type(callback) for callback in choose_progress(enabled, callbacks)] == chosen


@pytest.mark.parametrize(("epochs", "shown"), [(2, ["epoch 1 of 2", "epoch 2 of 2"]), (-1, ["epoch 1:", "epoch 3:"])])
def test_bar_and_lines_count_epochs_from_one(epochs, shown, capfd, caplog, tmp_path):
    caplog.set_level(logging.INFO)
    trainer = Trainer(
        accelerator="cpu", max_epochs=epochs, max_steps=3, limit_train_batches=1, limit_val_batches=1,
        logger=CSVLogger(tmp_path), enable_checkpointing=False, enable_model_summary=False,
        callbacks=[RunBar(), EpochLines()],
    )  # fmt: skip
    trainer.fit(BoringModel())
    out, err = capfd.readouterr()
    for text in shown:
        assert text in out + err
        assert text in caplog.text
    assert "v_num" not in out + err


def test_a_long_step_logs_a_line_a_minute_without_a_terminal(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    clock = iter(range(0, 10_000, 25))  # seconds; read twice an item where a line is due
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(sys, "stderr", Terminal(False))
    assert list(progress.track(range(8), "decoding clips")) == list(range(8))
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [f"decoding clips: {text}" for text in
                     ("3 of 8, about 3 min left", "5 of 8, about 2 min left", "7 of 8, about 36 s left")]  # fmt: skip


def test_an_unknown_total_is_left_out(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(sys, "stderr", Terminal(False))
    assert list(progress.track(iter("ab"), "reading")) == ["a", "b"]
    assert [record.getMessage() for record in caplog.records] == ["reading: 1", "reading: 2"]


def test_a_long_epoch_and_a_long_test_log_their_steps(monkeypatch, caplog, tmp_path):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, limit_train_batches=3, limit_val_batches=2, limit_test_batches=2, logger=False,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False, callbacks=[EpochLines()],
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(BoringModel())
    trainer.test(BoringModel(), verbose=False)
    for text in (
        "epoch 1 of 2: step 2 of 3, about",
        "validating: batch 2 of 2",
        "s an epoch, about",
        "testing: batch 1 of 2",
    ):
        assert text in caplog.text
    assert "epoch 2 of 2: step 3 of 3\n" in caplog.text  # nothing is left
