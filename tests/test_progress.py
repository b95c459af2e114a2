"""How far a run is: a bar on a terminal, else a line an epoch."""

import sys

import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from cdc_mmpg.training.progress import EpochLines, RunBar, choose_progress


class Terminal:
    def __init__(self, is_there: bool) -> None:
        self.isatty = lambda: is_there


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
def test_a_bar_needs_a_terminal_and_a_wish(terminal, enabled, callbacks, chosen, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal(terminal))
    assert [type(callback) for callback in choose_progress(enabled, callbacks)] == chosen


def test_the_bar_leaves_out_the_number_of_the_logs_version(monkeypatch):
    monkeypatch.setattr(TQDMProgressBar, "get_metrics", lambda self, trainer, module: {"v_num": 0, "train/loss": 1.0})
    assert RunBar().get_metrics(None, None) == {"train/loss": 1.0}
