"""How many processors this process may use."""

import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")  # of Linux, version 2


def count_processors() -> int:
    """Return how many processors this process may use, at least 1: fewer than the machine has where it is restricted.

    A restriction is a processor affinity (`taskset`, Slurm, Docker's `--cpuset-cpus`) or a share of time that a control
    group allows (Docker's `--cpus`, Kubernetes' limits), rounded down.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *_group_limits()]))


def _group_limits() -> list[int]:
    """Return the limits of this process's control group and of all that hold it, in processors."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").split("\n")
        group = CGROUPS / next(line[4:] for line in lines if line.startswith("0::/"))
    except (OSError, StopIteration, UnicodeDecodeError):
        return []
    limits = []
    for folder in (group, *group.parents):
        try:
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
            limits.append(int(quota) // int(period))
        except (OSError, ValueError):  # no such file, or "max": unlimited
            continue
    return limits
