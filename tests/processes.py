"""Commands as real processes, forked from a server that has imported everything: a start takes 0.1 s."""

import contextlib
import multiprocessing
import os
import random
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

# The fork server does not have pytest's import path.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["processes"])

import cdc_mmpg.training.experiment  # noqa: E402, F401  preloaded
import data_modules.msvd_qa  # noqa: E402, F401  preloaded
from cdc_mmpg.training.cli import main  # noqa: E402


class Recorder(Callback):
    """Callback that saves the final weights, before testing loads the best epoch, and counts the steps.

    Args:
        path: file for the final weights; `<path>.steps` grows by one byte per step.
        pause: seconds to wait after every step, which leaves time to kill the process.
    """

    def __init__(self, path: str, pause: float = 0.0) -> None:
        self.path, self.pause = Path(path), pause

    def on_train_batch_end(self, trainer: Trainer, *arguments: object) -> None:
        with self.path.with_name(self.path.name + ".steps").open("ab") as file:
            file.write(b".")
        time.sleep(self.pause)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.save(pl_module.state_dict(), self.path)


class Witness(Callback):
    """Callback that saves what every process of a run computed to `witness.<rank>.pt` in the run's folder.

    The file holds the weights after training, before testing loads the best epoch; the values logged after every
    evaluation; the turns of encoder pretraining; the outcomes by split.
    """

    def __init__(self) -> None:
        self.record: dict[str, Any] = {"weights": {}, "logged": [], "turns": [], "outcomes": {}}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *arguments: object) -> None:
        if (turn := getattr(pl_module, "_turn", None)) is not None:
            self.record["turns"].append((turn.captions, None if turn.frames is None else turn.frames.tolist()))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, pl_module, "test")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.record["weights"] = {name: value.clone() for name, value in pl_module.state_dict().items()}

    def _write(self, trainer: Trainer, pl_module: LightningModule, split: str) -> None:
        # Only the process with the loggers logs learning rates.
        logged = [(name, float(value)) for name, value in trainer.callback_metrics.items() if name[:3] != "lr-"]
        self.record["logged"].append(logged)
        if split in (outcomes := getattr(pl_module, "outcomes", {})):
            self.record["outcomes"][split] = outcomes[split]
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.record, folder / f"witness.{trainer.global_rank}.pt")


def count_steps(path: Path) -> int:
    """Return the number of steps of the runs whose `Recorder` has this path."""
    file = path.with_name(path.name + ".steps")
    return file.stat().st_size if file.exists() else 0


def build_recorder_arguments(path: Path, pause: float = 0.0) -> list[str]:
    """Return arguments that add a `Recorder` to a run."""
    return ["--trainer.callbacks+=processes.Recorder", f"--trainer.callbacks.path={path}",
            f"--trainer.callbacks.pause={pause}"]  # fmt: skip


def _run(function: Callable[..., object], arguments: tuple[object, ...], folder: str, log: str) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for loader processes, as in a program started from a shell
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115
        code = function(*arguments)
    sys.stdout.flush()
    os._exit(code if isinstance(code, int) else 0)


def start(log: Path, function: Callable[..., object], *arguments: object) -> multiprocessing.process.BaseProcess:
    """Start `function(*arguments)` in a new process, with its output in `log`."""
    process = CONTEXT.Process(target=_run, args=(function, arguments, os.getcwd(), str(log)))
    process.start()
    return process


def _run_as_rank(function: Callable[..., object], rank: int, world: int, port: int, *arguments: object) -> object:
    names = {"LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()}
    return function(*arguments)


def find_lasting_port() -> int:
    """Return a free port below those that the system gives to clients, one of which could take it before its use."""
    while True:
        port = random.randrange(15_000, 30_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def start_ranks(
    folder: Path, function: Callable[..., object], *arguments: object, world: int = 2
) -> list[multiprocessing.process.BaseProcess]:
    """Start `function(*arguments)` in `world` connected processes, as a cluster does, so that Lightning starts none.

    The outputs go to `log<rank>` in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = find_lasting_port()
    return [
        start(folder / f"log{rank}", _run_as_rank, function, rank, world, port, *arguments) for rank in range(world)
    ]


def finish(process: multiprocessing.process.BaseProcess, seconds: float = 120) -> int:
    """Wait for the exit code; kill a process that hangs, and raise TimeoutError."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        raise TimeoutError(f"still running after {seconds} s")
    return process.exitcode


def run_separate_test(folder: Path, out: Path) -> dict[str, float]:
    """Run Lightning's test of a run's best weights in one process, and return the printed metrics."""
    command = ["test", f"--config={folder / 'config.yaml'}", f"--ckpt_path={folder / 'best.ckpt'}",
               "--weights_only=true", "--trainer.devices=1", f"--trainer.default_root_dir={out / 'alone'}"]  # fmt: skip
    assert finish(start(out / "log", main, command)) == 0, (out / "log").read_text()
    values = re.findall(r"test/([\w@]+)\s+\S+\s+(\d\S*)", (out / "log").read_text())
    return {name: float(value) for name, value in values}


def wait_until(
    condition: Callable[[], bool], process: multiprocessing.process.BaseProcess, seconds: float = 60
) -> None:
    """Wait until the condition holds or the process has ended."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "never happened"
        if process.exitcode is not None:
            return
        time.sleep(0.005)


def kill(process: multiprocessing.process.BaseProcess, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process, unless it has ended."""
    if process.pid is not None and process.exitcode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
