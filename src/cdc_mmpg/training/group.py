"""Process group of a run: how its processes connect, end together, and separate before the next command of a chain."""

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

# Environment variable for the processes that Lightning starts: number of earlier groups.
GROUPS_VARIABLE = "CDC_MMPG_GROUPS"
# Variables that Lightning sets in the environment for a run.
LIGHTNING_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
EXIT_SECONDS = 60  # that processes have to exit before they are killed

_stores: dict[tuple[str, str], Any] = {}  # by address and port; reused by all commands of a chain


class SlurmTasks(SLURMEnvironment):
    """srun's tasks as one run, without Lightning's requeue, whose save can destroy the last good file."""

    def __init__(self) -> None:
        super().__init__(auto_requeue=False)

    @property
    def main_address(self) -> str:
        """Address of the step's first machine, which may differ from that of the job."""
        if nodes := os.environ.get("SLURM_STEP_NODELIST"):
            os.environ.setdefault("MASTER_ADDR", self.resolve_root_node_address(nodes))
        return super().main_address

    @property
    def main_port(self) -> int:
        """Port, different for every step, so that parallel runs in one job do not collide."""
        numbers = (int(os.environ.get(name) or 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        os.environ.setdefault("MASTER_PORT", str(15000 + sum(numbers) % 10000))
        return super().main_port

    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Accept all settings: `Launch.check_processes` checks the step, while Lightning would check the job."""


def choose_cluster_environment(launch: Launch, several: bool) -> ClusterEnvironment | None:
    """Return the environment that replaces Lightning's SLURM environment, None if Lightning would not choose that.

    Lightning reads the variables of the job: it would treat a shell of the job, or a task that is a separate run, as a
    task of one run.
    """
    if launch.launcher == "torchrun" or "SLURM_NTASKS" not in os.environ:
        return None
    return SlurmTasks() if launch.launcher == "srun" and several else LightningEnvironment()


class GroupStrategy(DDPStrategy):
    """Lightning's DDP for a chain of commands: every run has a separate process group.

    All groups of a chain use one store, with the group's number as a prefix: processes could connect to the old store
    if a new one were opened on the same port.
    """

    def setup_distributed(self) -> None:
        """Create the process group, unless it exists; Lightning then uses it.

        Raises:
            ConfigError: the processes cannot connect to each other.
        """
        if not torch.distributed.is_initialized():
            self.set_world_ranks()
            cluster: Any = self.cluster_environment
            distributed: Any = torch.distributed
            rank, world, device = cluster.global_rank(), cluster.world_size(), self.root_device
            address = cluster.main_address, str(cluster.main_port)
            os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address
            try:
                if address not in _stores:
                    _stores.clear()
                    _stores[address], _, _ = next(distributed.rendezvous("env://", rank, world, timeout=self._timeout))
                distributed.init_process_group(
                    self._get_process_group_backend(),
                    store=distributed.PrefixStore(f"group {os.environ.get(GROUPS_VARIABLE, '0')}", _stores[address]),
                    rank=rank,
                    world_size=world,
                    timeout=self._timeout,
                    device_id=None if device.type == "cpu" else device,
                )
            except (RuntimeError, ValueError) as error:
                raise ConfigError(
                    f"process {rank} of {world} cannot reach the others at {':'.join(address)} (MASTER_ADDR, "
                    f"MASTER_PORT): {str(error).strip().partition(chr(10))[0]}"
                ) from error
        super().setup_distributed()

    def on_exception(self, exception: BaseException) -> None:
        """End the processes that Lightning started, since they may wait for this one."""
        end_child_processes(self, 10, terminate=True)
        super().on_exception(exception)


def end_child_processes(strategy: Strategy, seconds: float, terminate: bool = False) -> None:
    """Wait for the processes that Lightning started for a run, and kill those that take longer.

    Args:
        strategy: strategy of the run.
        seconds: time to wait for each process.
        terminate: whether to send SIGTERM first.
    """
    launcher: Any = getattr(strategy, "launcher", None)
    started = list(getattr(launcher, "procs", ()))
    if started:
        launcher.procs.clear()  # else Lightning's observer kills this process if one in the list fails
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
    """Leave a run's process group after the block, end its child processes, and restore the environment.

    During the run Lightning handles no signals: its SIGTERM handler waits for the other processes, and its loop waits
    before each batch to learn whether the first process got SIGTERM. `StepCheck` does that without waiting.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    before, threads = {name: os.environ.get(name) for name in LIGHTNING_VARIABLES}, torch.get_num_threads()
    try:
        yield
        if torch.distributed.is_initialized():
            trainer.strategy.barrier("parting")
            torch.distributed.destroy_process_group()
            os.environ[GROUPS_VARIABLE] = str(int(os.environ.get(GROUPS_VARIABLE, "0")) + 1)
        end_child_processes(trainer.strategy, EXIT_SECONDS)
    except BaseException as error:
        if isinstance(error, Stopped):
            error.leads = trainer.is_global_zero
        end_child_processes(trainer.strategy, 10, terminate=True)
        raise
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        torch.set_num_threads(threads)
