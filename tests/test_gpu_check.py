"""All parts of the GPU check at a tiny size on a CPU, so that they work once a GPU is available."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_every_part_of_the_gpu_check_runs_on_a_cpu(tmp_path):
    environment = os.environ | {
        "SMALL": "1", "OMP_NUM_THREADS": "1", "PY": sys.executable, "TOTAL": "1500", "OUT": str(tmp_path),
        "PARTS": str(tmp_path / "parts"), "WORK": str(tmp_path / "work"),
        "ONLY": "machine train compiled clips runs syncs loading numerics profile deployment",
    }  # fmt: skip
    process = subprocess.run(
        ["bash", "tests/gpu/gpu_check.sh"], capture_output=True, text=True, check=False, timeout=1600, env=environment
    )
    assert process.returncode == 0, process.stderr
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    part_lines = [line for line in process.stdout.splitlines() if line.startswith("-- ")]
    assert [line for line in part_lines if ": exit 0," not in line] == [], process.stdout
    assert report.keys() == {*environment["ONLY"].split()}
    script = Path("tests/gpu/gpu_check.sh").read_text()
    (tested,) = re.findall(r"^part pytest .* -m gpu (.*)$", script, re.MULTILINE)  # skips everything without a GPU
    assert all(Path(path).is_file() for path in tested.split())
    assert not [name for name, part in report.items() if "error" in part], report
    exits = {name: run["exit"] for name, run in report["runs"].items() if isinstance(run, dict) and "exit" in run}
    assert exits.pop("killed") == -9
    assert set(exits.values()) == {0}
    assert len(exits) == 13
    assert len(report["train"]["rows"]) == 9
    assert process.stdout.splitlines()[-1].startswith("GPU_CHECK_JSON {")
