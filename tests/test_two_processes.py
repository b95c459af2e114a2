"""Every method on two processes as Lightning starts them: new interpreters with different hash seeds."""

import os
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cdc_mmpg.results import read_results
from communities import write_msrvtt_choice, write_msrvtt_retrieval
from processes import Witness, find_lasting_port

pytestmark = pytest.mark.slow

TIMEOUT_SECONDS = 1200  # time limit of the processes
# Methods on the synthetic dataset, in order of dependency; those that differ only in settings are left out.
METHODS = (
    "encoder_pretraining", "adr_pretraining", "cdc_mmpg", "fine_tuning", "adr_pretraining_frozen", "cdc_mmpg_frozen",
    "linear", "hyper", "hyper_fan_in", "cdc_mmpg_session", "cdc_mmpg_session_basis", "cdc_mmpg_session_full",
    "cdc_mmpg_session_plain", "session_concatenated", "session_oracle", "in_context", "corrected_hue_mode",
)  # fmt: skip
# Methods on the other tasks: those whose steps depend on the task.
OTHER_TASK_METHODS = (
    "adr_pretraining", "cdc_mmpg", "fine_tuning", "linear", "hyper", "cdc_mmpg_session", "session_concatenated",
)  # fmt: skip
BUILDS_ON = {
    "adr_pretraining": (("encoder.checkpoint", "encoder_pretraining/seed0/encoder.safetensors"),),
    "cdc_mmpg": (("encoder.checkpoint", "encoder_pretraining/seed0/encoder.safetensors"),
                 ("adr", "adr_pretraining/seed0/adr.safetensors")),
    "cdc_mmpg_session": (("reading", "encoder_pretraining/seed0/reading.safetensors"),),
    "adr_pretraining_frozen": (("encoder.checkpoint", "fine_tuning/seed0/encoder.safetensors"),),
    "cdc_mmpg_frozen": (("encoder.checkpoint", "fine_tuning/seed0/encoder.safetensors"),
                        ("adr", "adr_pretraining_frozen/seed0/adr.safetensors")),
}  # fmt: skip


def build_arguments(root: Path, out: Path, dataset: str, method: str) -> list[str]:
    """Return the arguments of a tiny run on two processes, which builds on runs below `out`."""
    is_other_task = dataset != "synthetic"
    options = []
    if method == "encoder_pretraining":  # caption and question steps, on whole clips and single frames
        options += [
            f"--model.init_args.{name}" for name in ("caption_epochs=0", "question_share=0.5", "whole_epochs=1")
        ]
    if method == "adr_pretraining":
        options += ["--model.init_args.axis=batch"]
    if not is_other_task and method in ("cdc_mmpg_session", "in_context", "linear", "fine_tuning"):
        options += ["--model.init_args.virtual=1"]
    if is_other_task and "session" in method:
        options += ["--data.init_args.domains=casts", "--data.init_args.held_out=[camera04]",
                    "--model.init_args.axes=null"]  # fmt: skip
    folder = out / dataset / method / "seed0"
    return [
        "fit", f"--config=experiments/methods/{method}.yaml", f"--config=experiments/datasets/{dataset}.yaml",
        f"--trainer.default_root_dir={folder}", f"--data.init_args.root={root}",
        f"--data.init_args.cache_dir={out / dataset / 'data'}", f"--data.init_args.vocab={root / 'vocab.txt'}",
        "--data.init_args.image_size=32", "--data.init_args.num_workers=0", "--data.init_args.batch_size=6",
        *([] if is_other_task else ["--data.init_args.resize=32"]),
        "--model.init_args.encoder.depth=1", "--model.init_args.learning_rate=0.003",
        "--trainer.max_epochs=2", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu",
        "--trainer.devices=2", f"--trainer.callbacks+={Witness.__module__}.{Witness.__name__}",
        *(f"--model.init_args.{name}={out / dataset / path}" for name, path in BUILDS_ON.get(method, ())
          if not is_other_task or name == "adr"),
        *options,
    ]  # fmt: skip


def start_interpreter(commands: list[list[str]], log: Path, **environment: object) -> subprocess.Popen[bytes]:
    """Start a new interpreter that runs the commands one after another, with its output in `log`."""
    joined = [*commands[0], *chain.from_iterable(["--", *command] for command in commands[1:])]
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "cdc_mmpg", *joined], stdout=file, stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in environment.items()},
        )  # fmt: skip


def wait_for_success(process: subprocess.Popen[bytes], log: Path) -> None:
    try:
        assert process.wait(TIMEOUT_SECONDS) == 0, log.read_text()[-5000:]
    finally:
        process.kill()


@pytest.fixture(scope="module")
def records(synthetic, tmp_path_factory) -> dict[str, tuple[Path, list[Any], Any]]:
    """By run: its folder, the records of two processes, and the record of one process that tested the best epoch."""
    os.chdir(Path(__file__).parents[1])
    base = tmp_path_factory.mktemp("two")
    roots = {"synthetic": synthetic, "msrvtt_choice": write_msrvtt_choice(base / "choice"),
             "msrvtt_retrieval": write_msrvtt_retrieval(base / "retrieval")}  # fmt: skip
    runs = [
        (dataset, method) for dataset in roots for method in (METHODS if dataset == "synthetic" else OTHER_TASK_METHODS)
    ]
    commands = [build_arguments(roots[dataset], base, dataset, method) for dataset, method in runs]
    port = find_lasting_port()
    processes = [
        start_interpreter(
            commands, base / f"log{rank}", LOCAL_RANK=rank, NODE_RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port, PYTHONHASHSEED=rank + 1,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for rank, process in enumerate(processes):
            wait_for_success(process, base / f"log{rank}")
    finally:
        for process in processes:
            process.kill()
    folders = {f"{dataset}/{method}": base / dataset / method / "seed0" for dataset, method in runs}
    tests = [
        ["test", f"--config={folder / 'config.yaml'}", f"--ckpt_path={folder / 'best.ckpt'}", "--weights_only=true",
         "--trainer.devices=1", f"--trainer.default_root_dir={base / 'alone' / run}"]
        for run, folder in folders.items()
    ]  # fmt: skip
    wait_for_success(start_interpreter(tests, base / "alone.log"), base / "alone.log")
    return {
        run: (
            folder,
            [torch.load(folder / f"witness.{rank}.pt", weights_only=False) for rank in range(2)],
            torch.load(base / "alone" / run / "witness.0.pt", weights_only=False),
        )
        for run, folder in folders.items()
    }


def test_every_method_finishes_on_two_processes(records):
    assert len(records) == len(METHODS) + 2 * len(OTHER_TASK_METHODS)
    for run, (folder, _, _) in records.items():
        results = read_results(folder)
        assert results is not None, run
        assert results["devices"] == "2 x cpu", run


def test_processes_agree_on_weights_and_logged_values(records):
    for run, (_, (first, second), _) in records.items():
        assert first["weights"].keys() == second["weights"].keys()
        for name, value in first["weights"].items():  # includes buffers
            assert torch.equal(value, second["weights"][name]), f"{run}: {name}"
        assert first["logged"] == second["logged"], run
        assert first["turns"] == second["turns"], run
        for split, cases in first["outcomes"].items():
            assert list(cases) == list(second["outcomes"][split]), run
    turns = [turn for turn, _ in records["synthetic/encoder_pretraining"][1][0]["turns"]]
    assert {True, False} == set(turns)


def test_two_processes_give_the_test_results_of_one(records):
    for run, (_, (first_rank, _), single) in records.items():
        logged, expected = dict(first_rank["logged"][-1]), dict(single["logged"][-1])
        assert logged.keys() == expected.keys(), run
        for name, value in expected.items():
            # Tiny differences change how values are rounded to int8 or float16.
            rel = 0.05 if name.endswith("_error") else 1e-3
            assert logged[name] == pytest.approx(value, rel=rel, abs=1e-5), f"{run}: {name}"
        cases = first_rank["outcomes"].get("test", {})
        assert list(cases) == list(single["outcomes"].get("test", {})), run
        for case, (indices, rows) in cases.items():
            np.testing.assert_array_equal(indices, single["outcomes"]["test"][case][0], run)
            np.testing.assert_allclose(rows, single["outcomes"]["test"][case][1], atol=1e-3, err_msg=f"{run}: {case}")


def test_rounding_errors_are_logged_for_every_precision(records):
    for run, (_, (first_rank, _), _) in records.items():
        logged = dict(first_rank["logged"][-1])
        errors = [name for name in logged if name.endswith("_error")]
        if "hyper" in run or ("cdc_mmpg" in run and "adr" not in run):
            assert errors == [f"test/{precision}_error" for precision in ("float32", "float16", "int8")], run
            assert 0 == logged[errors[0]] < logged[errors[1]] < logged[errors[2]], run
            agreements = [name for name in logged if name.endswith("_agreement")]
            assert len(agreements) == (0 if "retrieval" in run else 3), run
        else:
            assert not errors, run
