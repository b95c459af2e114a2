"""Progress of a run: a bar on a terminal, otherwise one log line per epoch."""

import logging
import sys

import pytest
from lightning import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger

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
