"""Plans of requests: which runs, in which order, in parallel; what a failure or a signal does to the others."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cdc_mmpg.catalogue import METHODS
from cdc_mmpg.commands.execute import Executor
from cdc_mmpg.commands.plan import PLANS, Plan
from cdc_mmpg.commands.request import Request, find_dataset_name, read_make
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.training.cli import _is_same_value

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "ARGS")
}
SMALL = (
    "--model.init_args.encoder.depth=1 --data.init_args.num_classes=5 --data.init_args.image_size=32 "
    "--data.init_args.num_workers=0 --data.init_args.batch_size=4 --trainer.accelerator=cpu"
)


def plan(command: str, **variables: str) -> Plan:
    return PLANS[command](Request(command, variables, {}))


def format_variables(root: Path, out: Path, **changes: str) -> list[str]:
    """Return the command-line variables of a small training on a folder like MSVD-QA's."""
    variables = {"DATASET": "msvd", "DATA": str(root), "VOCAB": str(root / "vocab.txt"), "OUT": str(out), "EPOCHS": "1",
                 "ARGS": SMALL} | changes  # fmt: skip
    return [f"{name}={value}" for name, value in variables.items()]


def start_training(words: list[str], log: Path, **environment: str) -> subprocess.Popen:
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "cdc_mmpg", "train", *words], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
            env=ENVIRONMENT | {"WANDB_MODE": "disabled"} | environment,
        )  # fmt: skip


# Variables passed by make


@pytest.mark.parametrize(
    ("flags", "variables", "is_dry_run"),
    [
        ("", {}, False),
        (" -- X=1", {"X": "1"}, False),
        (
            'n -- Y= Q=what\'s\\ "five"\\ for\\ $$5\\ or\\ \\\\\\ `d`',
            {"Y": "", "Q": 'what\'s "five" for $5 or \\ `d`'},
            True,
        ),
        ("ns -- Z=1", {"Z": "1"}, True),
        (" -j4 --jobserver-auth=3,4 -- X=2", {"X": "2"}, False),
        ("--no-print-directory -- A:=x=y", {"A": "x=y"}, False),
        ("k -- L=a\nb", {"L": "a\nb"}, False),
    ],
)
def test_the_variables_of_make_are_read_as_they_were_typed(flags, variables, is_dry_run):
    assert read_make(flags) == (variables, is_dry_run)


def test_a_command_ignores_environment_variables_it_does_not_use():
    environment = {"METHOD": "linear", "SEEDS": "x", "DATASET": "msvd"}
    assert Request("table", {}, environment).root == "checkpoints/msvd"
    assert Request("table", {"DATASET": "tgif"}, environment).root == "checkpoints/tgif"
    with pytest.raises(ConfigError, match="SEEDS=x: SEEDS is the number of seeds"):
        Request("train", {}, environment)
    assert Request("predict", {}, environment).served_run == "checkpoints/msvd/linear/seed0"


def test_dataset_aliases_leave_other_names_alone():
    assert find_dataset_name("my_qa") == "my_qa"
    assert find_dataset_name("MSR-VTT QA") == "msrvtt"


# Which runs, in which order


def test_a_run_comes_after_all_that_it_builds_on():
    for command, variables in (
        ("train", {}),
        ("train", {"SEEDS": "2"}),
        ("tables", {}),
        ("train", {"DATASET": "msvd"}),
    ):
        steps = list(plan(command, **variables).steps.values())
        for number, step in enumerate(steps):
            assert {*step.needs, step.after} - {""} <= {earlier.name for earlier in steps[:number]}, step.name
        assert len({step.folder for step in steps if step.folder}) == len([step for step in steps if step.folder])


def test_datasets_with_domains_also_train_the_competing_methods_and_the_ceiling():
    steps = plan("tables", DATASET="msvd", ARGS="--data.init_args.domains=casts").steps
    planned = {name.partition("/")[0] for name, step in steps.items() if step.program != "tables"}
    trained = {method.name for method in METHODS if method.turn and method.program != "privacy"}
    published = {method.name for method in METHODS if method.datasets == "published"}
    assert planned == (trained - published) | {"adr_pretraining"}
    assert {"corrected_true_cast", "cdc_mmpg_session", "in_context_virtual", "on_device", "prompts"} <= planned
    assert all("--data.init_args.domains=casts" in step.arguments for step in steps.values() if step.program == "fit")
    assert list(steps)[-1] == "tables of msvd"
    assert list(plan("tables", DATASET="msvd").steps) == ["tables of msvd"]  # without domains, tables only


def test_a_variant_changes_only_its_own_option():
    usual = plan("train", METHOD="cdc_mmpg_session").steps["cdc_mmpg_session/seed0"].arguments
    for variant, option in (("arc90", "held_out_arc=90"), ("devices24", "most_devices=24")):
        name = f"cdc_mmpg_session.{variant}"
        step = plan("train", METHOD=name).steps[f"{name}/seed0"]
        folder = f"--trainer.default_root_dir=checkpoints/synthetic/{name}/seed0"
        assert set(step.arguments) - set(usual) == {f"--data.init_args.{option}", folder}
    step = plan("train", METHOD="fine_tuning.epochs28").steps["fine_tuning.epochs28/seed0"]
    assert step.arguments[-1] == "--trainer.max_epochs=28"  # overrides the tuned value
    with pytest.raises(ConfigError, match=r"did you mean cdc_mmpg_session\w*\.no_background"):
        plan("train", METHOD="linear.no_background")


def test_a_pretraining_variant_provides_the_encoder_of_the_run_named_after_it():
    steps = plan("train", METHOD="cdc_mmpg_session.no_anchor_loss").steps
    assert [name for name in steps if "pretraining" in name] == ["encoder_pretraining.no_anchor_loss/seed0"]
    folder = "checkpoints/synthetic/encoder_pretraining.no_anchor_loss/seed0"
    fit_arguments = steps["cdc_mmpg_session.no_anchor_loss/seed0"].arguments
    assert f"--model.init_args.encoder.checkpoint={folder}/encoder.safetensors" in fit_arguments
    assert f"--model.init_args.reading={folder}/reading.safetensors" in fit_arguments
    assert "--model.init_args.anchor_weight=0" not in fit_arguments
    assert "--model.init_args.anchor_weight=0" in steps["encoder_pretraining.no_anchor_loss/seed0"].arguments
    deeper = plan("train", METHOD="fine_tuning.depth6").steps
    for name in ("encoder_pretraining.depth6/seed0", "fine_tuning.depth6/seed0"):
        assert "--model.init_args.encoder.depth=6" in deeper[name].arguments
    all_steps = plan("tables").steps
    assert "encoder_pretraining/seed0" in all_steps
    assert "synthetic_memory/cdc_mmpg_session.no_anchor_loss/seed0" in all_steps
    assert len([name for name in all_steps if name.startswith("encoder_pretraining.no_anchor_loss")]) == 1


def test_all_runs_of_the_reasoner_study_share_one_encoder():
    steps = plan("tables").steps
    study = [step for name, step in steps.items() if name.startswith("cdc_mmpg_frozen.")]
    assert len(study) == 30
    for step in study:
        assert any(word.endswith("fine_tuning/seed0/encoder.safetensors") for word in step.arguments)
        assert any("adr_pretraining_frozen." in word for word in step.needs)


def test_parallel_runs_get_one_gpu_each(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    five_seeds = plan("train", DATASET="msvd", METHOD="linear", SEEDS="5")
    assert five_seeds.jobs == 3
    executor = Executor(five_seeds, lambda program, words: 0)
    assert not executor.forks
    step = five_seeds.steps["linear/seed0"]
    assert [executor.environment_of(step, slot)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["4", "5", "6"]
    assert plan("train", DATASET="msvd", METHOD="linear").jobs == 1  # a single run gets all GPUs
    assert plan("train", DATASET="msvd", METHOD="linear", SEEDS="5", DEVICES="3").jobs == 1
    assert plan("train", JOBS="2").jobs == 2
    assert plan("train", ARGS="--trainer.accelerator=cpu").jobs == 2
    with pytest.raises(ConfigError, match="one GPU each"):
        _ = plan("train", DATASET="msvd", SEEDS="5", JOBS="2", DEVICES="2").jobs
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert plan("train").jobs == 1  # no more runs in parallel than GPUs


@pytest.mark.slow
def test_parallel_processes_see_only_their_own_gpu(tmp_path, msvd):
    """The launcher is a script that records CUDA_VISIBLE_DEVICES instead of training."""
    launcher = tmp_path / "launcher"
    launcher.write_text(f"#!/bin/sh\necho $CUDA_VISIBLE_DEVICES >> {tmp_path}/seen\nsleep 2\n")
    launcher.chmod(0o755)
    words = format_variables(
        msvd, tmp_path / "out", METHOD="linear", SEEDS="4", JOBS="2", LAUNCH=str(launcher), ARGS=""
    )
    process = start_training(words, tmp_path / "log", CUDA_VISIBLE_DEVICES="6,7")
    assert process.wait(120) == 2  # the table finds no finished run
    seen = (tmp_path / "seen").read_text().split()
    assert sorted(seen[:2]) == sorted(seen[2:]) == ["6", "7"]


@pytest.mark.slow
def test_wandb_gets_the_console_of_parallel_runs_whose_output_is_a_file(tmp_path, msvd):
    words = format_variables(msvd, tmp_path / "out", METHOD="linear", SEEDS="2", JOBS="2")
    assert start_training(words, tmp_path / "log", WANDB_MODE="offline").wait(300) == 0, (tmp_path / "log").read_text()
    for seed in range(2):
        (path,) = (tmp_path / "out" / "msvd" / "linear" / f"seed{seed}").glob("wandb/offline-run-*/files/output.log")
        assert path.read_text().count(f"linear/seed{seed}: ") == 1, path.read_text()


def test_steps_that_train_nothing_run_in_order(tmp_path):
    programs = []
    executor = Executor(plan("data", OUT=str(tmp_path)), lambda program, words: programs.append(program) or 0)
    assert executor.execute() == 0
    assert programs == ["clips", "data"]
    plan("data", DATASET="msvd", METHOD="linear", EPOCHS="3")  # the variables of `train` are accepted
    failing = Executor(plan("data", OUT=str(tmp_path)), lambda program, words: 4)
    assert failing.execute() == 4


# Refusals before anything is trained


def test_training_outside_a_checkout_says_so(tmp_path):
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}
    process = subprocess.run([sys.executable, "-m", "cdc_mmpg", "fit"], cwd=tmp_path, capture_output=True, text=True,
                          check=False, env=environment)  # fmt: skip
    assert process.returncode == 2
    assert "data_modules is missing: run this command in a checkout of the project" in process.stderr


def test_a_finished_run_with_other_settings_is_refused_at_once(tmp_path, msvd):
    run = tmp_path / "out" / "msvd" / "linear" / "seed0"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(f"trainer:\n  max_epochs: 40\ndata:\n  init_args:\n    root: {msvd}\n")
    (run / "results.json").write_text("{}")
    words = format_variables(msvd, tmp_path / "out", METHOD="linear", EPOCHS="3", ARGS="")
    assert start_training(words, tmp_path / "log", PYTHONPROFILEIMPORTTIME="1").wait(60) == 2
    log = (tmp_path / "log").read_text()
    assert "trainer.max_epochs: 40 there, '3' requested" in log
    assert re.search(r"\| +yaml$", log, re.MULTILINE)
    assert not re.search(r"\| +(torch|lightning)$", log, re.MULTILINE)


@pytest.mark.slow
def test_all_settings_are_checked_before_the_first_run_trains(tmp_path, msvd):
    words = format_variables(msvd, tmp_path / "out", METHOD="all", ARGS_hyper="--model.init_args.initt=printed")
    assert start_training(words, tmp_path / "log").wait(300) == 2
    assert "model.init_args.initt: there is no such key" in (tmp_path / "log").read_text()
    assert not list(tmp_path.rglob("*.ckpt"))


# Failures and signals


@pytest.mark.slow
def test_a_run_that_fails_stops_only_what_builds_on_it(tmp_path, msvd):
    words = format_variables(msvd, tmp_path / "out", METHOD="all", JOBS="2", EPOCHS="3",
                      ARGS_fine_tuning="--model.init_args.learning_rate=1e30")  # fmt: skip
    assert start_training(words, tmp_path / "log").wait(600) == 6
    log = (tmp_path / "log").read_text()
    finished = {path.parents[1].name for path in tmp_path.rglob("results.json")}
    assert finished == {"linear", "adr_pretraining", "cdc_mmpg", "hyper", "hyper_fan_in"}
    assert re.search(r"^linear/seed0: INFO epoch 3 of 3: train/loss [\d.]+, val/accuracy [\d.]+", log, re.MULTILINE)
    assert re.search(r"^\d of 8: linear/seed0 finished with test/accuracy [\d.]+ in \d+ s, about ", log, re.MULTILINE)
    stages = log.partition("seconds by stage:\n")[2]
    assert re.search(
        r"^ +\d+  \d runs, 2 side by side\n +\d+  table\n +\d+  together; the runs, added up: \d+ training, ", stages,
        re.MULTILINE,
    )  # fmt: skip
    assert "fine_tuning/seed0 failed with exit code 6" in log
    summary = log[log.index("These runs have no results:") :]
    assert "fine_tuning/seed0: exit code 6" in summary
    assert "adr_pretraining_frozen/seed0: not run, it builds on fine_tuning/seed0" in summary
    assert "cdc_mmpg_frozen/seed0: not run, it builds on adr_pretraining_frozen/seed0" in summary
    assert "F-linear" in log  # the table of the finished runs
    words = format_variables(msvd, tmp_path / "out", METHOD="linear", JOBS="2", EPOCHS="3")
    assert start_training(words, tmp_path / "log", PYTHONPROFILEIMPORTTIME="1").wait(60) == 0
    log = (tmp_path / "log").read_text()
    assert "linear/seed0: finished on" in log
    assert not re.search(r"\| +(torch|lightning)$", log, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_training_with_a_checkpoint_to_resume_from(tmp_path, msvd, number):
    words = format_variables(msvd, tmp_path / "out", METHOD="cdc_mmpg", EPOCHS="400")
    process = start_training(words, tmp_path / "log")
    run = tmp_path / "out" / "msvd" / "adr_pretraining" / "seed0"
    deadline = time.monotonic() + 200
    while not list(run.glob("resume/*.ckpt")):
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(number)
    assert process.wait(100) == 128 + number
    log = (tmp_path / "log").read_text()
    assert f"stopped by {number.name}; run the same command again (training and decoding resume" in log
    assert "Traceback" not in log
    assert list(run.glob("resume/*.ckpt"))
    assert not (run / "results.json").exists()


# A new method


@pytest.mark.slow
def test_a_new_method_is_three_files(tmp_path, msvd):
    """The three code blocks of experiments/README.md suffice to add a method to a copy of the project."""
    copy, page = tmp_path / "copy", (ROOT / "experiments/README.md").read_text()
    for folder in ("src", "experiments", "data_modules"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    code, settings, entry = (
        re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL)[1] for kind in ("python", "yaml", "text")
    )
    (copy / "src/cdc_mmpg/methods/dropped.py").write_text(code)
    (copy / "experiments/methods/dropped.yaml").write_text(settings)
    catalogue = copy / "src/cdc_mmpg/catalogue.py"
    catalogue.write_text(
        catalogue.read_text().replace("    Method(PRETRAINING, encoder", entry + "    Method(PRETRAINING, encoder")
    )
    words = format_variables(msvd, tmp_path / "out", METHOD="dropped")
    process = subprocess.run(
        [sys.executable, "-m", "cdc_mmpg", "train", *words], cwd=copy, capture_output=True, text=True, check=False,
        env=ENVIRONMENT | {"WANDB_MODE": "disabled", "PYTHONPATH": f"{copy / 'src'}:{copy}"},
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr
    assert "| F-linear, dropout |" in (tmp_path / "out/msvd/table.md").read_text()
    results = json.loads((tmp_path / "out/msvd/dropped/seed0/results.json").read_text())
    assert results["method"] == "dropped"


@pytest.mark.parametrize(
    ("requested", "stored", "is_same"),
    [
        ("1e-4", 0.0001, True), ("1e-4", 0.001, False), ("40", 40, True), ("true", True, True), ("1", True, False),
        ("null", None, True), ("0.5", None, False), ("printed", "printed", True), ("a/../x.pt", "x.pt", False),
        ("32", "32", True),
    ],
)  # fmt: skip
def test_options_are_compared_by_value(requested, stored, is_same):
    assert _is_same_value(requested, stored) == is_same
