"""What this process may use of the machine: processors, memory and GPUs."""

import os
import re
import subprocess
from functools import cache
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")  # of Linux, version 2
MEMORY = Path("/proc/meminfo")


def count_processors() -> int:
    """Return how many processors this process may use, at least 1: fewer than the machine has where it is restricted.

    A restriction is a processor affinity (`taskset`, Slurm, Docker's `--cpuset-cpus`) or a share of time that a control
    group allows (Docker's `--cpus`, Kubernetes' limits), rounded down.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *_group_limits()]))


def find_gpus() -> list[str]:
    """Return the NVIDIA GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; torch is not asked."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.replace(" ", "").split(",") if name and name != "-1"]
    return [*_ask_driver()]


@cache
def _ask_driver() -> tuple[str, ...]:
    """Return the machine's NVIDIA GPUs; the driver is asked once, which takes a second."""
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return (*done.stdout.split(),)


def free_memory() -> int:
    """Return how many bytes of memory this process may still have; the machine's whole where nothing tells."""
    try:
        available = re.search(r"^MemAvailable: *(\d+) kB$", MEMORY.read_text(encoding="ascii"), re.MULTILINE)
        free = int(available[1]) * 1024 if available else 0
    except OSError:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for folder in _groups():
        try:
            limit, used = (int((folder / f"memory.{what}").read_text(encoding="ascii")) for what in ("max", "current"))
            cached = re.search(r"^file (\d+)$", (folder / "memory.stat").read_text(encoding="ascii"), re.MULTILINE)
            free = min(free, limit - used + int(cached[1] if cached else 0))  # what files are cached in can be had
        except (OSError, ValueError):  # no such file, or "max": unlimited
            continue
    return free


def _groups() -> list[Path]:
    """Return the folders of this process's control group and of all that hold it."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").split("\n")
        group = CGROUPS / next(line[4:] for line in lines if line.startswith("0::/"))
    except (OSError, StopIteration, UnicodeDecodeError):
        return []
    return [group, *group.parents]


def _group_limits() -> list[int]:
    """Return the groups' limits in processors."""
    limits = []
    for folder in _groups():
        try:
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
            limits.append(int(quota) // int(period))
        except (OSError, ValueError):  # no such file, or "max": unlimited
            continue
    return limits
