"""Signals that end a command, and what they leave: SIGTERM, SIGINT, SIGHUP of a closed terminal, SLURM's SIGUSR1."""

import os
import signal
import stat

# What SLURM sends before the time limit (#SBATCH --signal=SIGUSR1@90): the job is to be started again.
REQUEUE = signal.SIGUSR1


class Stopped(SystemExit):
    """The end of a command by a signal, with exit code 128 + its number; `cli.exit_code` says how to go on.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number
        self.leads: bool | None = None  # whether this process speaks for the run; None before the run knows


def stop_signals() -> list[signal.Signals]:
    """Return the signals to handle: SIGHUP unless it is ignored (nohup), SIGUSR1 in a job of SLURM alone."""
    numbers = [signal.SIGTERM, signal.SIGINT]
    numbers += [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [*numbers, REQUEUE] if os.environ.get("SLURM_JOB_ID") else numbers


def drop_terminal(number: int) -> None:
    """After SIGHUP send all further output that goes to no file to nowhere: the terminal is gone, and writing fails."""
    if number == signal.SIGHUP:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.dup2(nowhere, descriptor)
        os.close(nowhere)


def ignore_stop_signals(worker: int = 0) -> None:
    """Leave stopping to the process that started this helper: Ctrl-C, a closed terminal and SLURM reach them all."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, REQUEUE):
        signal.signal(number, signal.SIG_IGN)
