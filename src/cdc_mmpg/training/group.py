"""The processes of a run: how they find each other, end together, and part before the next command of a chain."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed
from lightning import Trainer
from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment, SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy, Strategy

from cdc_mmpg.errors import ConfigError
from cdc_mmpg.launchers import Launch
from cdc_mmpg.program import Stopped

GROUPS = "CDC_MMPG_GROUPS"  # in the environment, for processes that Lightning starts: how many groups a chain has had
# What Lightning puts into the environment for one run.
OF_A_RUN = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
SECONDS = 60  # for processes to end by themselves

_stores: dict[tuple[str, str], Any] = {}  # of this process, by address and port: kept over a chain of commands


class Tasks(SLURMEnvironment):
    """srun's tasks as one run, without Lightning's requeue, whose save can lose the good file."""

    def __init__(self) -> None:
        super().__init__(auto_requeue=False)

    @property
    def main_address(self) -> str:
        """Of the step's first machine, which need not be the job's."""
        if nodes := os.environ.get("SLURM_STEP_NODELIST"):
            os.environ.setdefault("MASTER_ADDR", self.resolve_root_node_address(nodes))
        return super().main_address

    @property
    def main_port(self) -> int:
        """Another one for every step, so that runs side by side in one job do not meet."""
        numbers = (int(os.environ.get(name) or 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        os.environ.setdefault("MASTER_PORT", str(15000 + sum(numbers) % 10000))
        return super().main_port

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Accept all: `Launch.check_processes` has looked at the step, where Lightning looks at the job."""


def cluster_environment(launch: Launch, several: bool) -> ClusterEnvironment | None:
    """Return what Lightning is to take in place of SLURM's environment, None where it would not take that.

    Lightning asks the variables of the job: it takes a shell of it, or a task that is a run of its own, for a task of
    one run.
    """
    if launch.by == "torchrun" or "SLURM_NTASKS" not in os.environ:
        return None
    return Tasks() if launch.by == "srun" and several else LightningEnvironment()


class GroupStrategy(DDPStrategy):
    """Lightning's DDP in a chain of commands: every run has a group of its own.

    The groups of processes that live through the chain meet in one store, each under its number: a new store on the
    port of the old one would be found before the old one is gone.
    """

    def setup_distributed(self) -> None:
        """Form the group, unless there is one; Lightning then finds it.

        Raises:
            ConfigError: the processes do not find each other.
        """
        if not torch.distributed.is_initialized():
            self.set_world_ranks()
            found: Any = self.cluster_environment
            distributed: Any = torch.distributed
            rank, world, device = found.global_rank(), found.world_size(), self.root_device
            place = found.main_address, str(found.main_port)
            os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = place
            try:
                if place not in _stores:
                    _stores.clear()
                    _stores[place], _, _ = next(distributed.rendezvous("env://", rank, world, timeout=self._timeout))
                distributed.init_process_group(
                    self._get_process_group_backend(),
                    store=distributed.PrefixStore(f"group {os.environ.get(GROUPS, '0')}", _stores[place]),
                    rank=rank,
                    world_size=world,
                    timeout=self._timeout,
                    device_id=None if device.type == "cpu" else device,
                )
            except (RuntimeError, ValueError) as error:
                raise ConfigError(
                    f"process {rank} of {world} does not find the others at {':'.join(place)} (MASTER_ADDR, "
                    f"MASTER_PORT): {str(error).strip().partition(chr(10))[0]}"
                ) from error
        super().setup_distributed()

    def on_exception(self, exception: BaseException) -> None:
        """End the processes that Lightning started: they may wait for this one."""
        end_started(self, 10, terminate=True)
        super().on_exception(exception)


def end_started(strategy: Strategy, seconds: float, terminate: bool = False) -> None:
    """Wait for the processes that Lightning started for a run, and kill those that take longer.

    Args:
        strategy: of the run.
        seconds: to wait.
        terminate: send SIGTERM first.
    """
    launcher: Any = getattr(strategy, "launcher", None)
    started = list(getattr(launcher, "procs", ()))
    if started:
        launcher.procs.clear()  # Lightning's observer goes by this list, and kills this process if one of them fails
    for process in started if terminate else ():
        process.terminate()
    for process in started:
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        if process.poll() is None:
            process.kill()
            process.wait()


@contextmanager
def leave_group(trainer: Trainer) -> Iterator[None]:
    """After a run, leave its group, end what Lightning started for it, and take back what it set for it.

    While it runs, signals are ours alone: Lightning's handler of SIGTERM waits for the other processes, and before each
    batch its loop waits to hear whether the first one had it. `StepCheck` asks all of them, without waiting.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    before, threads = {name: os.environ.get(name) for name in OF_A_RUN}, torch.get_num_threads()
    try:
        yield
        if torch.distributed.is_initialized():
            trainer.strategy.barrier("parting")
            torch.distributed.destroy_process_group()
            os.environ[GROUPS] = str(int(os.environ.get(GROUPS, "0")) + 1)
        end_started(trainer.strategy, SECONDS)
    except BaseException as error:
        if isinstance(error, Stopped):
            error.leads = trainer.is_global_zero
        end_started(trainer.strategy, 10, terminate=True)
        raise
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        torch.set_num_threads(threads)
