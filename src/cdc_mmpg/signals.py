"""Signals that end a command, and what they leave: SIGTERM, SIGINT, and SIGHUP, which a closed terminal sends."""

import os
import signal
import stat


class Stopped(SystemExit):
    """The end of a command by a signal, with exit code 128 + its number; `cli.exit_code` says how to go on.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


def stop_signals() -> list[signal.Signals]:
    """Return the signals to handle; SIGHUP is left alone where it is ignored (nohup)."""
    numbers = [signal.SIGTERM, signal.SIGINT]
    return numbers if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [*numbers, signal.SIGHUP]


def drop_terminal(number: int) -> None:
    """After SIGHUP send all further output that goes to no file to nowhere: the terminal is gone, and writing fails."""
    if number == signal.SIGHUP:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.dup2(nowhere, descriptor)
        os.close(nowhere)


def ignore_stop_signals(worker: int = 0) -> None:
    """Leave stopping to the process that started this helper: Ctrl-C and a closed terminal reach them all."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
