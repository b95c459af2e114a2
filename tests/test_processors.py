"""The count of processors: of those that this process may use, not of those that the machine has."""

import os
import re
from pathlib import Path

import pytest

from cdc_mmpg import processors
from cdc_mmpg.processors import count_processors, free_memory
from data_modules.msvd_qa import MSVDQA

ROOT = Path(__file__).parents[1]


@pytest.fixture
def one_processor():
    """Only one processor for this process, while the test runs."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


def test_only_allowed_processors_are_counted(one_processor, msvd, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert count_processors() == 1
    data = MSVDQA(str(msvd), str(tmp_path), num_classes=5, vocab=str(msvd / "vocab.txt"), image_size=32)
    assert data.loading_processes() == 1
    started = []
    monkeypatch.setattr(data.cache, "fill", lambda clips, workers, **options: started.append(workers) or {})
    data.check()
    data.prepare_data()
    assert started == [1, 1]


@pytest.mark.skipif(not Path("/proc/self/cgroup").is_file(), reason="control groups are Linux's")
@pytest.mark.parametrize(("limit", "expected"), [("200000 100000", 2), ("50000 100000", 1), ("max 100000", 64)])
def test_the_limit_of_a_control_group_counts(limit, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(processors, "CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    (tmp_path / "cpu.max").write_text(limit + "\n")
    assert count_processors() == expected


@pytest.mark.skipif(not Path("/proc/self/cgroup").is_file(), reason="control groups are Linux's")
def test_the_memory_that_is_left_is_the_machines_or_the_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(processors, "CGROUPS", tmp_path)
    monkeypatch.setattr(processors, "MEMORY", tmp_path / "meminfo")
    assert 0 < free_memory() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "as on a Mac"
    (tmp_path / "meminfo").write_text("MemTotal:       9000 kB\nMemFree:         100 kB\nMemAvailable:    2000 kB\n")
    assert free_memory() == 2_048_000
    for name, content in {"max": "1000000", "current": "900000", "stat": "anon 300000\nfile 500000\n"}.items():
        (tmp_path / f"memory.{name}").write_text(content + ("" if name == "stat" else "\n"))
    assert free_memory() == 600_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory() == 2_048_000


def test_nothing_counts_the_machines_processors():
    sources = [*ROOT.glob("src/**/*.py"), *ROOT.glob("data_modules/*.py")]
    counting = [path.name for path in sources if re.search(r"\bcpu_count\(", path.read_text())]
    assert counting == ["processors.py"]
