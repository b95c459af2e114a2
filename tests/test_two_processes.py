"""Every method on two processes as Lightning starts them: new interpreters, each with a hash seed of its own."""

import os
import socket
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
from processes import Witness

pytestmark = pytest.mark.slow

SECONDS = 1200  # after which the processes are said to hang
# In the order in which they build on each other; of the embedded dataset, all that differ in more than settings.
METHODS = (
    "encoder_pretraining", "adr_pretraining", "cdc_mmpg", "fine_tuning", "adr_pretraining_frozen", "cdc_mmpg_frozen",
    "linear", "hyper", "hyper_fan_in", "cdc_mmpg_session", "cdc_mmpg_session_basis", "cdc_mmpg_session_full",
    "cdc_mmpg_session_plain", "session_concatenated", "session_oracle", "in_context", "corrected_hue_mode",
)  # fmt: skip
# Of the other tasks, those whose steps differ by task.
OTHERS = (
    "adr_pretraining", "cdc_mmpg", "fine_tuning", "linear", "hyper", "cdc_mmpg_session", "cdc_mmpg_session_basis",
    "session_concatenated", "session_oracle",
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


def command(root: Path, out: Path, dataset: str, method: str) -> list[str]:
    """The arguments of a tiny run on two processes; every run builds on runs below `out`."""
    others = dataset != "synthetic"
    more = []
    if method == "encoder_pretraining":  # both turns, and clips whole and frame by frame
        more += [f"--model.init_args.{name}" for name in ("caption_epochs=0", "question_share=0.5", "whole_epochs=1")]
    if method == "adr_pretraining":
        more += ["--model.init_args.axis=batch"]
    if not others and method in ("cdc_mmpg_session", "in_context", "linear", "fine_tuning"):
        more += ["--model.init_args.virtual=1"]
    if others and "session" in method:
        more += ["--data.init_args.domains=casts", "--data.init_args.held_out=[camera04]"]
        more += [] if method == "session_oracle" else ["--model.init_args.axes=null"]
    folder = out / dataset / method / "seed0"
    return [
        "fit", f"--config=experiments/methods/{method}.yaml", f"--config=experiments/datasets/{dataset}.yaml",
        f"--trainer.default_root_dir={folder}", f"--data.init_args.root={root}",
        f"--data.init_args.cache_dir={out / dataset / 'data'}", f"--data.init_args.vocab={root / 'vocab.txt'}",
        "--data.init_args.image_size=32", "--data.init_args.num_workers=0", "--data.init_args.batch_size=6",
        *([] if others else ["--data.init_args.resize=32"]),
        "--model.init_args.encoder.depth=1", "--model.init_args.learning_rate=0.003",
        "--trainer.max_epochs=2", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu",
        "--trainer.devices=2", f"--trainer.callbacks+={Witness.__module__}.{Witness.__name__}",
        *(f"--model.init_args.{name}={out / dataset / path}" for name, path in BUILDS_ON.get(method, ())
          if not others or name == "adr"),
        *more,
    ]  # fmt: skip


def start_interpreter(commands: list[list[str]], log: Path, **environment: object) -> subprocess.Popen[bytes]:
    """Begin commands one after another in a new interpreter; its output goes to `log`."""
    joined = [*commands[0], *chain.from_iterable(["--", *own] for own in commands[1:])]
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "cdc_mmpg", *joined], stdout=file, stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | {name: str(value) for name, value in environment.items()},
        )  # fmt: skip


def wait(process: subprocess.Popen[bytes], log: Path) -> None:
    try:
        assert process.wait(SECONDS) == 0, log.read_text()[-5000:]
    finally:
        process.kill()


@pytest.fixture(scope="module")
def witnessed(synthetic, tmp_path_factory) -> dict[str, tuple[Path, list[Any], Any]]:
    """By run: its folder, what each of two processes wrote down, and what one wrote down that tested its best epoch."""
    os.chdir(Path(__file__).parents[1])
    base = tmp_path_factory.mktemp("two")
    roots = {"synthetic": synthetic, "msrvtt_choice": write_msrvtt_choice(base / "choice"),
             "msrvtt_retrieval": write_msrvtt_retrieval(base / "retrieval")}  # fmt: skip
    runs = [(dataset, method) for dataset in roots for method in (METHODS if dataset == "synthetic" else OTHERS)]
    commands = [command(roots[dataset], base, dataset, method) for dataset, method in runs]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    pair = [
        start_interpreter(
            commands, base / f"log{rank}", LOCAL_RANK=rank, NODE_RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port, PYTHONHASHSEED=rank + 1,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for rank, process in enumerate(pair):
            wait(process, base / f"log{rank}")
    finally:
        for process in pair:
            process.kill()
    folders = {f"{dataset}/{method}": base / dataset / method / "seed0" for dataset, method in runs}
    tests = [
        ["test", f"--config={folder / 'config.yaml'}", f"--ckpt_path={folder / 'best.ckpt'}", "--weights_only=true",
         "--trainer.devices=1", f"--trainer.default_root_dir={base / 'alone' / run}"]
        for run, folder in folders.items()
    ]  # fmt: skip
    wait(start_interpreter(tests, base / "alone.log"), base / "alone.log")
    return {
        run: (
            folder,
            [torch.load(folder / f"witness.{rank}.pt", weights_only=False) for rank in range(2)],
            torch.load(base / "alone" / run / "witness.0.pt", weights_only=False),
        )
        for run, folder in folders.items()
    }


def test_every_method_finishes_on_two_processes(witnessed):
    assert len(witnessed) == len(METHODS) + 2 * len(OTHERS)
    for run, (folder, _, _) in witnessed.items():
        results = read_results(folder)
        assert results is not None, run
        assert results["devices"] == "2 x cpu", run


def test_the_processes_agree_on_weights_and_on_all_that_is_logged(witnessed):
    for run, (_, (first, second), _) in witnessed.items():
        assert first["weights"].keys() == second["weights"].keys()
        for name, value in first["weights"].items():  # buffers, too: what training keeps beside the weights
            assert torch.equal(value, second["weights"][name]), f"{run}: {name}"
        assert first["logged"] == second["logged"], run
        assert first["turns"] == second["turns"], run
        for split, cases in first["outcomes"].items():
            assert list(cases) == list(second["outcomes"][split]), run
    turns = [turn for turn, _ in witnessed["synthetic/encoder_pretraining"][1][0]["turns"]]
    assert {True, False} == set(turns)


def test_two_processes_test_as_one_does(witnessed):
    for run, (_, (both, _), alone) in witnessed.items():
        ours, expected = dict(both["logged"][-1]), dict(alone["logged"][-1])
        assert ours.keys() == expected.keys(), run
        for name, value in expected.items():
            # A value between two that int8 or float16 has goes to either of them, by its last digit.
            rel = 0.05 if name.endswith("_error") else 1e-3
            assert ours[name] == pytest.approx(value, rel=rel, abs=1e-5), f"{run}: {name}"
        cases = both["outcomes"].get("test", {})
        assert list(cases) == list(alone["outcomes"].get("test", {})), run
        for case, (where, rows) in cases.items():
            np.testing.assert_array_equal(where, alone["outcomes"]["test"][case][0], run)
            np.testing.assert_allclose(rows, alone["outcomes"]["test"][case][1], atol=1e-3, err_msg=f"{run}: {case}")


def test_every_precision_is_compared_with_the_unrounded_layers(witnessed):
    for run, (_, (both, _), _) in witnessed.items():
        logged = dict(both["logged"][-1])
        errors = [name for name in logged if name.endswith("_error")]
        if "hyper" in run or ("cdc_mmpg" in run and "adr" not in run):
            assert errors == [f"test/{precision}_error" for precision in ("float32", "float16", "int8")], run
            assert 0 == logged[errors[0]] < logged[errors[1]] < logged[errors[2]], run
            agreements = [name for name in logged if name.endswith("_agreement")]
            assert len(agreements) == (0 if "retrieval" in run else 3), run
        else:
            assert not errors, run
