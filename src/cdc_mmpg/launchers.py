"""Launchers of a command's processes: torchrun, SLURM's srun, variables set by hand, or none.

Nothing here imports torch, so that a wrong launch is refused at once.
"""

import os
import subprocess
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from cdc_mmpg.errors import ConfigError

NUMERIC_VARIABLES = (
    "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE",
    "MASTER_PORT", "SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_STEP_ID",
    "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "JSM_NAMESPACE_RANK",
)  # fmt: skip
AUTOMATIC_COUNTS = ("auto", "-1", -1)  # values of `devices` and `num_nodes` that Lightning resolves


def check_environment() -> None:
    """Refuse environment variables that make the import of torch or Lightning fail; delete empty numeric ones.

    Raises:
        ConfigError: a rank or a port is not a number, or the debug level is unknown; names the variable.
    """
    level = os.environ.get("TORCH_DISTRIBUTED_DEBUG", "OFF")
    if level.upper() not in ("OFF", "INFO", "DETAIL"):
        raise ConfigError(f"TORCH_DISTRIBUTED_DEBUG={level!r} in the environment: OFF, INFO or DETAIL, or unset it")
    for name in NUMERIC_VARIABLES:
        if (value := os.environ.get(name, "0")) and not value.strip().isdigit():
            raise ConfigError(f"{name}={value!r} in the environment is not a number: unset it (unset {name})")
        if not value:
            del os.environ[name]


class Launch(NamedTuple):
    """Launch of this process: the launcher, and the numbers of processes and machines."""

    launcher: Literal["torchrun", "srun", "the environment", ""]  # "": no launcher; Lightning starts further processes
    rank: int = 0  # of this process
    processes: int = 1  # on all machines
    local_processes: int = 1  # processes on this machine, if the launcher tells
    nodes: int = 1  # number of machines

    def check_arguments(self, given: Mapping[str, str | None]) -> None:
        """Refuse a command line whose numbers differ from those that torchrun started.

        Args:
            given: `devices` and `num_nodes` of the command line, None where it gives no value.

        Raises:
            ConfigError: the numbers differ; names both.
        """
        started = {"devices": self.local_processes, "num_nodes": self.nodes}
        for name, number in started.items() if self.launcher == "torchrun" else ():
            if (value := given[name]) is not None and value not in (*AUTOMATIC_COUNTS, str(number)):
                unit = "processes on each machine" if name == "devices" else "machines"
                raise ConfigError(
                    f"--trainer.{name}={value}, but torchrun started {number} {unit}: omit the argument, or pass it to "
                    f"torchrun ({'--nproc-per-node' if name == 'devices' else '--nnodes'}={value})"
                )

    def resolve_devices(self, devices: Any, num_nodes: int) -> tuple[Any, int]:
        """Return Lightning's `devices` and `num_nodes` for a run.

        torchrun's numbers override the configuration; srun's apply if `devices` is "auto" or -1.

        Args:
            devices: the configured value.
            num_nodes: the configured value.

        Raises:
            ConfigError: the number of processes differs by machine, or several machines lack MASTER_ADDR and the like.
        """
        if self.launcher == "torchrun" or (self.launcher == "srun" and devices in AUTOMATIC_COUNTS):
            if self.local_processes * self.nodes != self.processes:
                raise ConfigError(
                    f"{self.launcher} started {self.processes} processes on {self.nodes} machines, "
                    f"{self.local_processes} on this one: a run needs the same number on each"
                )
            return self.local_processes, self.nodes
        lacking = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if not os.environ.get(name)]
        if not self.launcher and num_nodes > 1 and lacking:
            raise ConfigError(
                f"{num_nodes} machines (NODES=), but {' and '.join(lacking)} not set in the environment: set "
                "MASTER_ADDR, MASTER_PORT and NODE_RANK on every machine, or start the run with torchrun or srun"
            )
        return devices, num_nodes

    def check_processes(self, world: int, nodes: int, alone: bool) -> None:
        """Refuse a run whose number of processes differs from that started: it would hang or run several times.

        Args:
            world: number of processes that the run uses.
            nodes: number of machines that the run uses.
            alone: whether srun's tasks may be separate runs: no earlier command in this process joined them.

        Raises:
            ConfigError: the numbers differ; names both.
        """
        if self.launcher == "srun" and world == 1 and alone:
            return
        needed, started = f"{world} processes on {nodes} machines", f"{self.processes} on {self.nodes}"
        if self.launcher == "srun" and (world, nodes) != (self.processes, self.nodes):
            raise ConfigError(
                f"the run takes {needed}, srun started {started}: DEVICES={self.local_processes} "
                f"NODES={self.nodes} trains one run on all of them"
                + (", DEVICES=1 a separate run in each" if alone else "; so did the command before")
            )
        if self.launcher in ("torchrun", "the environment") and world != self.processes:
            raise ConfigError(
                f"the run takes {needed}, but {self.launcher} started {self.processes} processes: "
                f"DEVICES={self.processes}, or start it without {self.launcher}"
            )
        if not self.launcher and world > 1 and "LOCAL_RANK" in os.environ:
            raise ConfigError(
                f"LOCAL_RANK={os.environ['LOCAL_RANK']} in the environment: a launcher seems to start the {world} "
                f"processes of the run, but WORLD_SIZE={world}, MASTER_ADDR or MASTER_PORT is missing: unset "
                "LOCAL_RANK, or set all three"
            )


def find_launch() -> Launch:
    """Return how this process was launched, according to its environment.

    Of SLURM's variables only those of a step count: those of a job are also set in its interactive shells.
    """

    def number(name: str, default: int) -> int:
        return int(os.environ.get(name) or default)

    world = number("WORLD_SIZE", 1)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        here = number("LOCAL_WORLD_SIZE", 1)
        return Launch("torchrun", number("RANK", 0), world, here, number("GROUP_WORLD_SIZE", 1))
    if (tasks := number("SLURM_STEP_NUM_TASKS", 1)) > 1:
        nodes = number("SLURM_STEP_NUM_NODES", 1)
        return Launch("srun", number("SLURM_PROCID", 0), tasks, tasks // nodes, nodes)
    if world > 1 and {"LOCAL_RANK", "MASTER_PORT"} <= os.environ.keys():
        return Launch("the environment", number("NODE_RANK", 0) + number("LOCAL_RANK", 0), world)
    return Launch("")


def requeue() -> str:
    """Ask SLURM to start this job again; return how the run resumes, as the end of a sentence."""
    job = os.environ.get("SLURM_JOB_ID", "")
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    command = ["scontrol", "requeue", job]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60, check=False)
        failure = " ".join([f"exit code {done.returncode}", *done.stderr.split()]) if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        failure = str(error)
    if failure:
        return f"`{' '.join(command)}` failed ({failure}): submit the job again to resume"
    return f"SLURM starts job {job} again, which resumes the run"
