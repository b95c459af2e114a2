"""Counts of processors and free memory: those available to this process, not those of the machine."""

import os
import re
from pathlib import Path

import pytest

from cdc_mmpg import processors
from cdc_mmpg.processors import count_processors, measure_free_memory
from data_modules.msvd_qa import MSVDQA

ROOT = Path(__file__).parents[1]


@pytest.fixture
def one_processor():
    """Restrict this process to one processor during the test."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


def test_only_allowed_processors_are_counted(one_processor, msvd, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert count_processors() == 1
    data = MSVDQA(str(msvd), str(tmp_path), num_classes=5, vocab=str(msvd / "vocab.txt"), image_size=32)
    assert data.count_loading_processes() == 1
    worker_counts = []
    monkeypatch.setattr(data.cache, "fill", lambda clips, workers, **options: worker_counts.append(workers) or {})
    data.check()
    data.prepare_data()
    assert worker_counts == [1, 1]


@pytest.mark.skipif(not Path("/proc/self/cgroup").is_file(), reason="control groups are Linux's")
@pytest.mark.parametrize(("limit", "expected"), [("200000 100000", 2), ("50000 100000", 1), ("max 100000", 64)])
def test_a_cgroup_limit_bounds_the_processor_count(limit, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(processors, "CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    (tmp_path / "cpu.max").write_text(limit + "\n")
    assert count_processors() == expected


@pytest.mark.skipif(not Path("/proc/self/cgroup").is_file(), reason="control groups are Linux's")
def test_free_memory_is_limited_by_the_machine_and_the_cgroup(tmp_path, monkeypatch):
    monkeypatch.setattr(processors, "CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(processors, "MEMINFO_PATH", tmp_path / "meminfo")
    assert 0 < measure_free_memory() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "as on a Mac"
    (tmp_path / "meminfo").write_text("MemTotal:       9000 kB\nMemFree:         100 kB\nMemAvailable:    2000 kB\n")
    assert measure_free_memory() == 2_048_000
    for name, content in {"max": "1000000", "current": "900000", "stat": "anon 300000\nfile 500000\n"}.items():
        (tmp_path / f"memory.{name}").write_text(content + ("" if name == "stat" else "\n"))
    assert measure_free_memory() == 600_000
    (tmp_path / "memory.max").write_text("max\n")
    assert measure_free_memory() == 2_048_000


def test_no_other_source_file_counts_processors():
    sources = [*ROOT.glob("src/**/*.py"), *ROOT.glob("data_modules/*.py")]
    counting = [path.name for path in sources if re.search(r"\bcpu_count\(", path.read_text())]
    assert counting == ["processors.py"]
