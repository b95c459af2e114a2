"""What is asked of a GPU runs, in small, on a CPU: so that it is true when a GPU is at hand."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_every_part_runs_in_small(tmp_path):
    environment = os.environ | {
        "SMALL": "1", "OMP_NUM_THREADS": "1", "PY": sys.executable, "TOTAL": "1500", "OUT": str(tmp_path),
        "PARTS": str(tmp_path / "parts"), "WORK": str(tmp_path / "work"),
    }  # fmt: skip
    process = subprocess.run(
        ["bash", "tests/gpu/gpu_check.sh"], capture_output=True, text=True, check=False, timeout=1600, env=environment
    )
    assert process.returncode == 0, process.stderr
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    said = [line for line in process.stdout.splitlines() if line.startswith("-- ")]
    assert [line for line in said if ": exit 0," not in line] == [], process.stdout
    assert found.keys() == {"machine", "pytest", "train", "compiled", "clips", "runs", "syncs", "loading", "numerics",
                            "profile", "deployment"}  # fmt: skip
    assert not [name for name, part in found.items() if "error" in part], found
    exits = {name: run["exit"] for name, run in found["runs"].items() if isinstance(run, dict) and "exit" in run}
    assert exits.pop("killed") == -9
    assert set(exits.values()) == {0}
    assert len(exits) == 13
    assert len(found["train"]["rows"]) == 9
    assert process.stdout.splitlines()[-1].startswith("GPU_CHECK_JSON {")
