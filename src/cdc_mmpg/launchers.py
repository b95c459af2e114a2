"""What started the processes of a command: torchrun, SLURM's srun, a hand that set the environment, or nothing.

Nothing here imports torch: a wrong start is refused at once.
"""

import os
import subprocess
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from cdc_mmpg.errors import ConfigError

NUMBERS = (
    "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE",
    "MASTER_PORT", "SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_STEP_ID",
    "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES", "JSM_NAMESPACE_RANK",
)  # fmt: skip
AUTOMATIC = ("auto", "-1", -1)  # words for as many devices as there are


def check_environment() -> None:
    """Refuse words of the environment on which torch or Lightning fails when it is imported.

    Raises:
        ConfigError: a rank or a port is no number, or a level of debugging is unknown; names the variable.
    """
    level = os.environ.get("TORCH_DISTRIBUTED_DEBUG", "OFF")
    if level.upper() not in ("OFF", "INFO", "DETAIL"):
        raise ConfigError(f"TORCH_DISTRIBUTED_DEBUG={level!r} in the environment: OFF, INFO or DETAIL, or unset it")
    for name in NUMBERS:
        if (value := os.environ.get(name, "0")) and not value.strip().isdigit():
            raise ConfigError(f"{name}={value!r} in the environment is no number: unset it (unset {name})")
        if not value:
            del os.environ[name]


class Launch(NamedTuple):
    """How this process was started, and with how many others."""

    by: Literal["torchrun", "srun", "the environment", ""]  # "": alone, and Lightning starts the others
    rank: int = 0  # of this process
    processes: int = 1  # all together
    here: int = 1  # on this machine, where the launcher says so
    nodes: int = 1  # machines

    def check_arguments(self, given: Mapping[str, str | None]) -> None:
        """Refuse other numbers on the command line than torchrun started.

        Args:
            given: what the command line says for `devices` and `num_nodes`, None where it does not.

        Raises:
            ConfigError: names both numbers.
        """
        started = {"devices": self.here, "num_nodes": self.nodes}
        for name, number in started.items() if self.by == "torchrun" else ():
            if (value := given[name]) is not None and value not in (*AUTOMATIC, str(number)):
                what = "processes on each machine" if name == "devices" else "machines"
                raise ConfigError(
                    f"--trainer.{name}={value}, but torchrun started {number} {what}: leave the argument out, or tell "
                    f"torchrun ({'--nproc-per-node' if name == 'devices' else '--nnodes'}={value})"
                )

    def share(self, devices: Any, num_nodes: int) -> tuple[Any, int]:
        """Return Lightning's `devices` and `num_nodes` for a run.

        torchrun's numbers hold whatever a configuration says; srun's where it leaves the number open.

        Args:
            devices: as configured.
            num_nodes: as configured.

        Raises:
            ConfigError: not as many processes on every machine, or several machines that do not know of each other.
        """
        if self.by == "torchrun" or (self.by == "srun" and devices in AUTOMATIC):
            if self.here * self.nodes != self.processes:
                raise ConfigError(
                    f"{self.by} started {self.processes} processes on {self.nodes} machines, {self.here} on this one: "
                    "a run takes as many on each"
                )
            return self.here, self.nodes
        lacking = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if not os.environ.get(name)]
        if not self.by and num_nodes > 1 and lacking:
            raise ConfigError(
                f"{num_nodes} machines (NODES=), but {' and '.join(lacking)} not set in the environment: set all three "
                "on every machine, or start the run by torchrun or srun"
            )
        return devices, num_nodes

    def check_processes(self, world: int, nodes: int, alone: bool) -> None:
        """Refuse a run on another number of processes than were started: it would wait for ever, or run several times.

        Args:
            world: processes that the run takes.
            nodes: machines that it takes.
            alone: whether srun's tasks may be runs of their own: no command before in this process joined them.

        Raises:
            ConfigError: names both numbers.
        """
        if self.by == "srun" and world == 1 and alone:
            return
        ours, theirs = f"{world} processes on {nodes} machines", f"{self.processes} on {self.nodes}"
        if self.by == "srun" and (world, nodes) != (self.processes, self.nodes):
            raise ConfigError(
                f"the run takes {ours}, srun started {theirs}: DEVICES={self.here} "
                f"NODES={self.nodes} trains one run on all of them"
                + (", DEVICES=1 a run of its own in each" if alone else "; so did the command before")
            )
        if self.by in ("torchrun", "the environment") and world != self.processes:
            raise ConfigError(
                f"the run takes {ours}, but {self.by} started {self.processes} processes: DEVICES={self.processes}, or "
                f"start it without {self.by}"
            )
        if not self.by and world > 1 and "LOCAL_RANK" in os.environ:
            raise ConfigError(
                f"LOCAL_RANK={os.environ['LOCAL_RANK']} in the environment says that something else starts the run's "
                f"{world} processes, but not which they are: unset it, or set WORLD_SIZE={world}, MASTER_ADDR and "
                "MASTER_PORT"
            )


def find_launch() -> Launch:
    """Return how this process was started, by its environment.

    Of SLURM only the variables of a step count: those of a job are in every shell of it, too.
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
    """Ask SLURM to start this job again; return how the run goes on, as the end of a sentence."""
    job = os.environ.get("SLURM_JOB_ID", "")
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    command = ["scontrol", "requeue", job]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60, check=False)
        wrong = " ".join([f"exit code {done.returncode}", *done.stderr.split()]) if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        wrong = str(error)
    if wrong:
        return f"`{' '.join(command)}` failed ({wrong}): submit the job again to go on"
    return f"SLURM starts job {job} again, which goes on"
