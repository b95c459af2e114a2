"""Resources that this process may use: processors, memory and GPUs."""

import os
import re
import subprocess
from functools import cache
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")  # Linux control groups, version 2
MEMINFO_PATH = Path("/proc/meminfo")


def count_processors() -> int:
    """Return the number of processors that this process may use, at least 1.

    It is limited by processor affinity (`taskset`, Slurm, Docker's `--cpuset-cpus`) and by the processor time that a
    control group allows (Docker's `--cpus`, Kubernetes' limits), rounded down.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *_read_processor_limits()]))


def find_gpus() -> list[str]:
    """Return the NVIDIA GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them, without importing torch."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.replace(" ", "").split(",") if name and name != "-1"]
    return [*_ask_driver()]


@cache
def _ask_driver() -> tuple[str, ...]:
    """Return the indices of the machine's NVIDIA GPUs; cached, since the query takes a second."""
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return (*done.stdout.split(),)


def measure_free_memory() -> int:
    """Return the bytes of memory that this process may still allocate; the machine's total if no file tells."""
    try:
        available = re.search(r"^MemAvailable: *(\d+) kB$", MEMINFO_PATH.read_text(encoding="ascii"), re.MULTILINE)
        free = int(available[1]) * 1024 if available else 0
    except OSError:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for folder in _find_control_groups():
        try:
            limit, used = (int((folder / f"memory.{name}").read_text(encoding="ascii")) for name in ("max", "current"))
            cached = re.search(r"^file (\d+)$", (folder / "memory.stat").read_text(encoding="ascii"), re.MULTILINE)
            free = min(free, limit - used + int(cached[1] if cached else 0))  # the page cache can be reclaimed
        except (OSError, ValueError):  # no such file, or "max": unlimited
            continue
    return free


def _find_control_groups() -> list[Path]:
    """Return the folders of this process's control group and of its parents."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").split("\n")
        group = CGROUP_ROOT / next(line[4:] for line in lines if line.startswith("0::/"))
    except (OSError, StopIteration, UnicodeDecodeError):
        return []
    return [group, *group.parents]


def _read_processor_limits() -> list[int]:
    """Return the processor limits of the control groups, rounded down."""
    limits = []
    for folder in _find_control_groups():
        try:
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
            limits.append(int(quota) // int(period))
        except (OSError, ValueError):  # no such file, or "max": unlimited
            continue
    return limits
