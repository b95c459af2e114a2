"""Runs started by launchers: torchrun, a simulated SLURM (its variables, `scontrol`, `srun`), and chained commands."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from cdc_mmpg.errors import ConfigError
from cdc_mmpg.launchers import Launch, find_launch, requeue
from cdc_mmpg.program import Stopped, exit_on_signals, ignore_stop_signals, run_to_exit_code, stop_signals
from cdc_mmpg.results import RESUME
from cdc_mmpg.training.cli import main
from cdc_mmpg.training.group import SlurmTasks
from processes import (
    Witness,
    build_recorder_arguments,
    count_steps,
    find_lasting_port,
    finish,
    run_separate_test,
    start,
    wait_until,
)

STEP_PAUSE = 0.07  # seconds after each step: time to interrupt it, even on a busy machine
ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
# The tests may run under make, which sets variables.
CLEAN_ENV = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "ARGS")}


def task_variables(rank: int, tasks: int, port: int, tools: Path) -> dict[str, str]:
    """Return the environment that srun gives a task, with the programs of `tools` first on the path."""
    return {
        "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": str(tasks), "SLURM_NNODES": "1",
        "SLURM_NTASKS_PER_NODE": str(tasks), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(tasks),
        "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0", "MASTER_PORT": str(port), "SLURM_CPUS_PER_TASK": "1",
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip


def write_program(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script)
    path.chmod(0o755)


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """Write a `scontrol` that records its arguments in the file `requests`; return its folder."""
    folder = tmp_path / "tools"
    write_program(folder / "scontrol", f'#!/bin/sh\necho "$@" >> "{folder}/requests"\n')
    return folder


def read_requests(tools: Path) -> list[str]:
    file = tools / "requests"
    return file.read_text().splitlines() if file.exists() else []


def run_as_task(command: list[str], environment: Mapping[str, str]) -> int:
    """Run a command in a new process group, like a task of a SLURM step."""
    os.setpgid(0, 0)
    os.environ.update(environment)
    return main(command)


def start_tasks(folder: Path, tools: Path, *commands: list[str]) -> list:
    """Start a SLURM step with one task per command; their outputs go to `log<rank>` in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    port = find_lasting_port()
    return [start(folder / f"log{rank}", run_as_task, command, task_variables(rank, len(commands), port, tools))
            for rank, command in enumerate(commands)]  # fmt: skip


def read_logs(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("log*")))


@pytest.mark.slow
def test_slurm_tasks_train_one_run_and_resume_it_after_a_requeue(fit, tools, tmp_path):
    """The reference is the first command of a chain: the second gets a new process group, the third is refused."""
    options = ["--trainer.devices=2", "--trainer.max_epochs=3", "--data.init_args.batch_size=2",
            f"--trainer.callbacks+={Witness.__module__}.{Witness.__name__}"]  # fmt: skip
    plain, stopped = tmp_path / "calm", tmp_path / "stopped"
    chain = [*fit("fine_tuning", *options, out=plain), "--", *fit("linear", "--trainer.devices=auto", out=plain), "--",
             *fit("hyper", "--trainer.devices=1", out=plain)]  # fmt: skip
    expected, folder = (out / "msvd" / "fine_tuning" / "seed0" for out in (plain, stopped))
    for run in (expected, folder):
        run.mkdir(parents=True)
        (run / "hpc_ckpt_1.ckpt").write_text("of Lightning's own requeue, half written")
    ranks = start_tasks(plain, tools, chain, chain)
    assert [finish(process) for process in ranks] == [2, 2], read_logs(plain)
    assert "the run takes 1 processes on 1 machines, srun started 2 on 1: DEVICES=2" in read_logs(plain)
    for method in ("fine_tuning", "linear"):
        assert json.loads((plain / "msvd" / method / "seed0" / "results.json").read_text())["devices"] == "2 x cpu"

    command = [*fit("fine_tuning", *options, out=stopped), *build_recorder_arguments(tmp_path / "last", STEP_PAUSE),
               "--data.init_args.num_workers=1"]  # fmt: skip
    ranks = start_tasks(stopped, tools, command, command)
    wait_until(lambda: count_steps(tmp_path / "last") >= 14, ranks[1])  # of both: in the second epoch of six steps
    os.killpg(ranks[1].pid, signal.SIGUSR1)  # one task is enough; its loader processes get it, too
    assert [finish(process) for process in ranks] == [138, 138], read_logs(stopped)
    assert read_requests(tools) == ["requeue 4711"]
    assert "stopped by SIGUSR1; SLURM starts job 4711 again, which resumes the run" in (stopped / "log0").read_text()
    assert list((folder / RESUME).glob("stopped-step=*.ckpt"))
    assert not (folder / "results.json").exists()
    ranks = start_tasks(stopped, tools, command, command)
    assert [finish(process) for process in ranks] == [0, 0], read_logs(stopped)
    assert count_steps(tmp_path / "last") == 2 * 3 * 6, "a step was lost or taken twice"
    for rank in range(2):
        ours, theirs = (torch.load(run / f"witness.{rank}.pt", weights_only=False) for run in (folder, expected))
        assert ours["weights"].keys() == theirs["weights"].keys()
        for name, value in theirs["weights"].items():
            assert torch.equal(ours["weights"][name], value), name
        assert ours["logged"][-1] == theirs["logged"][-1]


@pytest.mark.slow
def test_independent_slurm_tasks_log_and_request_the_requeue_separately(fit, tools, tmp_path):
    """The second task is stopped while the first runs to its end."""
    commands = [[*fit("linear", "--trainer.devices=1", "--trainer.max_epochs=3", out=tmp_path / str(task)),
                 *build_recorder_arguments(tmp_path / f"last{task}", STEP_PAUSE)] for task in range(2)]  # fmt: skip
    ranks = start_tasks(tmp_path, tools, *commands)
    wait_until(lambda: count_steps(tmp_path / "last1") >= 1, ranks[1])
    os.killpg(ranks[1].pid, signal.SIGUSR1)
    assert [finish(process) for process in ranks] == [0, 138], read_logs(tmp_path)
    assert read_requests(tools) == ["requeue 4711"]
    assert (
        finish(start(tmp_path / "log1", run_as_task, commands[1], task_variables(1, 2, find_lasting_port(), tools)))
        == 0
    )
    for task in range(2):
        folder = tmp_path / str(task) / "msvd" / "linear" / "seed0"
        assert json.loads((folder / "results.json").read_text())["devices"] == "1 x cpu"
        assert "parameters on the device" in (tmp_path / f"log{task}").read_text()
        assert "test/accuracy" in "".join(path.read_text() for path in folder.glob("logs/*/metrics.csv"))


@pytest.mark.slow
def test_a_signal_before_training_requests_the_requeue_and_exits(fit, tools, tmp_path):
    environment = task_variables(0, 1, find_lasting_port(), tools) | {
        "SLURM_ARRAY_JOB_ID": "4700",
        "SLURM_ARRAY_TASK_ID": "3",
    }
    process = start(tmp_path / "log", run_as_task, fit("linear"), environment)
    wait_until((tmp_path / "msvd" / "linear" / "seed0" / "config.yaml").exists, process)
    os.killpg(process.pid, signal.SIGUSR1)
    assert finish(process) == 138, (tmp_path / "log").read_text()
    assert read_requests(tools) == ["requeue 4700_3"]


def test_sigusr1_is_handled_only_in_a_slurm_job(handlers, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    exit_on_signals()
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert signal.SIGUSR1 in stop_signals()
    exit_on_signals()
    with pytest.raises(Stopped) as stop:
        signal.raise_signal(signal.SIGUSR1)
    assert stop.value.code == 138
    signal.raise_signal(signal.SIGTERM)  # srun sends it once another task has left: the requeue is still requested
    ignore_stop_signals()
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN


def test_a_failed_requeue_is_reported(tools, monkeypatch, caplog):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.setenv("PATH", str(tools))
    assert requeue() == "SLURM starts job 4711 again, which resumes the run"
    write_program(tools / "scontrol", "#!/bin/sh\necho 'Requeue is disabled\n for the job' >&2\nexit 3\n")

    def leave() -> None:
        raise Stopped(signal.SIGUSR1)

    assert run_to_exit_code(leave) == 138
    assert "`scontrol requeue 4711` failed (exit code 3 Requeue is disabled for the job): submit the job again" in (
        caplog.text
    )
    (tools / "scontrol").unlink()
    caplog.clear()
    assert run_to_exit_code(leave) == 138
    assert "No such file or directory: 'scontrol'): submit the job again to resume" in caplog.text
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    caplog.clear()
    assert run_to_exit_code(leave) == 138
    assert "the first process asks SLURM" in caplog.text


TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1",
            "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2"}  # fmt: skip


def test_the_launcher_is_detected_from_environment_variables(monkeypatch):
    def detect(**variables: str) -> Launch:
        with monkeypatch.context() as patch:
            for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "SLURM_STEP_NUM_TASKS"):
                patch.delenv(name, raising=False)
            for name, value in variables.items():
                patch.setenv(name, value)
            return find_launch()

    assert detect() == Launch("", 0, 1, 1, 1)
    assert detect(**TORCHRUN) == Launch("torchrun", 3, 4, 2, 2)
    assert detect(**TORCHRUN, SLURM_STEP_NUM_TASKS="2").launcher == "torchrun"
    step = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "5"}
    assert detect(**step) == Launch("srun", 5, 8, 4, 2)
    assert detect(SLURM_NTASKS="8", SLURM_PROCID="0") == Launch(""), "a shell of the job"
    manual = {"LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}
    assert (detect(**manual).launcher, detect(**manual).rank, detect(**manual).processes) == ("the environment", 1, 2)
    assert detect(LOCAL_RANK="1") == detect(WORLD_SIZE="2") == Launch("")


def test_the_launcher_determines_devices_and_nodes(monkeypatch):
    for devices in (1, 3, "auto"):  # as a dataset's configuration may say
        assert Launch("torchrun", 0, 4, 2, 2).resolve_devices(devices, 1) == (2, 2)
    assert Launch("srun", 0, 8, 4, 2).resolve_devices("auto", 1) == (4, 2)
    assert Launch("srun", 0, 8, 4, 2).resolve_devices(8, 1) == (8, 1)
    assert Launch("").resolve_devices("auto", 1) == ("auto", 1)
    with pytest.raises(ConfigError, match="srun started 7 processes on 2 machines, 3 on this one"):
        Launch("srun", 0, 7, 3, 2).resolve_devices("auto", 1)
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"2 machines .* MASTER_ADDR and MASTER_PORT and NODE_RANK not set"):
        Launch("").resolve_devices(8, 2)


@pytest.mark.parametrize(
    ("launch", "run", "message"),
    [
        (Launch("srun", 0, 4, 4, 1), (3, 1, True), "3 processes on 1 machines, srun started 4 on 1: DEVICES=4 NODES=1"),
        (Launch("srun", 0, 4, 2, 2), (4, 1, True), "4 processes on 1 machines, srun started 4 on 2: DEVICES=2 NODES=2"),
        (Launch("srun", 0, 4, 4, 1), (1, 1, False), "so did the command before"),
        (Launch("torchrun", 0, 2, 2, 1), (1, 1, True), "torchrun started 2 processes: DEVICES=2"),
        (Launch("the environment", 0, 2), (1, 1, True), "the environment started 2 processes: DEVICES=2"),
        (Launch(""), (2, 1, True), "LOCAL_RANK=0 in the environment: a launcher seems to start"),
    ],
)
def test_a_run_that_does_not_match_the_started_processes_is_refused(launch, run, message, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match=message):
        launch.check_processes(*run)
    launch.check_processes(launch.processes, launch.nodes, alone=True)
    Launch("srun", 0, 4, 4, 1).check_processes(1, 1, alone=True)


def test_arguments_that_contradict_torchrun_are_refused(fit, monkeypatch, capsys):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value if name != "LOCAL_RANK" else "0")  # other ranks print nothing
    for wrong, number in (("--trainer.devices=3", 2), ("--trainer.devices=1", 2), ("--trainer.num_nodes=1", 2)):
        assert main(fit("linear", wrong)) == 2
        assert f"{wrong}, but torchrun started {number} " in capsys.readouterr().err
    find_launch().check_arguments({"devices": "2", "num_nodes": None})
    find_launch().check_arguments({"devices": "auto", "num_nodes": "2"})


def test_steps_of_a_slurm_job_use_different_ports(monkeypatch):
    addresses = set()
    for step in ("0", "1"):
        with monkeypatch.context() as patch:
            for name, value in {**task_variables(0, 2, 0, Path()), "SLURM_JOB_ID": "98765", "SLURM_STEP_ID": step,
                                "SLURM_NODELIST": "gpu[1-2]", "SLURM_STEP_NODELIST": "gpu2",
                                "MASTER_ADDR": "set, so that what the step sets is taken back"}.items():  # fmt: skip
                patch.setenv(name, value)
            for name in ("MASTER_ADDR", "MASTER_PORT"):
                patch.delenv(name)
            tasks = SlurmTasks()
            assert not tasks.auto_requeue
            addresses.add((tasks.main_address, tasks.main_port))
    assert addresses == {("gpu2", 23765), ("gpu2", 23766)}


def test_launch_only_adds_a_prefix_to_the_command():
    def plan(*arguments: str) -> list[list[str]]:
        done = subprocess.run(["make", "-n", "train", "DATASET=msvd", "DEVICES=8", *arguments], cwd=ROOT, text=True,
                              capture_output=True, check=True, env=CLEAN_ENV)  # fmt: skip
        return [
            shlex.split(line) for line in done.stdout.replace("\\\n", " ").splitlines() if "-m cdc_mmpg fit" in line
        ]

    plain, launched = plan(), plan("LAUNCH=srun --kill-on-bad-exit=1")
    assert len(plain) == 2  # both phases
    assert [line[0] for line in plain] == [".venv/bin/python"] * 2
    assert [["srun", "--kill-on-bad-exit=1", *line] for line in plain] == launched


# Tests that start new interpreters.


def run_program(log: Path, command: list[str], seconds: float = 300, **environment: str) -> int:
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT,
                                   env=CLEAN_ENV | {"OMP_NUM_THREADS": "1"} | environment)  # fmt: skip
        try:
            return process.wait(seconds)
        finally:
            process.kill()


def read_result(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_torchrun_overrides_the_devices_of_the_dataset(fit, tmp_path):
    (tmp_path / "one.yaml").write_text("trainer:\n  devices: 1\n")
    command = [*fit("fine_tuning", f"--config={tmp_path / 'one.yaml'}"), "--", *fit("linear")]
    torchrun = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node=2", "-m", "cdc_mmpg"]
    assert run_program(tmp_path / "log", [*torchrun, *command]) == 0, (tmp_path / "log").read_text()
    for method in ("fine_tuning", "linear"):
        assert read_result(tmp_path / "msvd" / method / "seed0")["devices"] == "2 x cpu"


@pytest.mark.slow
def test_two_launchers_train_one_run(fit, tmp_path):
    """Two machines are simulated: each launcher starts one process."""
    torchrun = [str(BIN / "torchrun"), "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d",
                f"--rdzv-endpoint=127.0.0.1:{find_lasting_port()}", "--rdzv-id=run", "-m", "cdc_mmpg"]  # fmt: skip
    both = [start(tmp_path / f"log{node}", run_program, tmp_path / f"out{node}", [*torchrun, *fit("fine_tuning")])
            for node in range(2)]  # fmt: skip
    codes = [finish(process, 300) for process in both]
    assert codes == [0, 0], "\n".join((tmp_path / f"out{node}").read_text() for node in range(2))
    assert read_result(tmp_path / "msvd" / "fine_tuning" / "seed0")["devices"] == "2 x cpu"


@pytest.mark.slow
def test_chained_runs_on_two_devices_and_on_one(fit, writable_msvd, tmp_path):
    """Lightning starts a second process for each of the first two runs, which ends with the run.

    Seven test questions are divided into 4 and 3; the second run builds on the encoder that the first one exports; the
    third, on one device, is the same as outside of a chain.
    """
    for split, length in (("test", 7), ("val", 3)):
        rows = json.loads((writable_msvd / f"{split}_qa.json").read_text())
        (writable_msvd / f"{split}_qa.json").write_text(json.dumps(rows[:length]))
    witness = f"--trainer.callbacks+={Witness.__module__}.{Witness.__name__}"
    chain, alone, tested = tmp_path / "chain", tmp_path / "alone", tmp_path / "tested"
    encoder = f"--model.init_args.encoder.checkpoint={chain / 'msvd' / 'fine_tuning' / 'seed0' / 'encoder.safetensors'}"
    two_devices = ["--trainer.devices=2", "--data.init_args.batch_size=2"]
    commands = [*fit("fine_tuning", *two_devices, root=writable_msvd, out=chain), "--",
                *fit("linear", *two_devices, encoder, root=writable_msvd, out=chain), "--",
                *fit("hyper", "--trainer.devices=1", witness, root=writable_msvd, out=chain)]  # fmt: skip
    assert run_program(tmp_path / "log", [sys.executable, "-m", "cdc_mmpg", *commands]) == 0, (
        tmp_path / "log"
    ).read_text()
    for method in ("fine_tuning", "linear"):
        folder = chain / "msvd" / method / "seed0"
        results = read_result(folder)
        assert (results["devices"], results["questions_per_step"]) == ("2 x cpu", 2)
        assert results["recipe_questions_per_step"] == 256
        accuracy, loss = (results["metrics"][f"test/{name}"] for name in ("accuracy", "loss"))
        assert accuracy * 7 == pytest.approx(round(accuracy * 7), abs=1e-5)
        (tested / method).mkdir(parents=True)
        printed = run_separate_test(folder, tested / method)
        assert printed == pytest.approx({"accuracy": accuracy, "loss": loss}, abs=1e-4)
    command = fit("hyper", "--trainer.devices=1", witness, root=writable_msvd, out=alone)
    assert finish(start(tmp_path / "log", main, command)) == 0
    assert read_result(chain / "msvd" / "hyper" / "seed0")["devices"] == "1 x cpu"
    ours, theirs = (torch.load(out / "msvd" / "hyper" / "seed0" / "witness.0.pt", weights_only=False)
                    for out in (chain, alone))  # fmt: skip
    for name, value in theirs["weights"].items():
        assert torch.equal(ours["weights"][name], value), name
    assert ours["logged"] == theirs["logged"]


@pytest.mark.slow
def test_a_stopped_run_ends_the_process_that_lightning_started_for_it(fit, tmp_path):
    command = [sys.executable, "-m", "cdc_mmpg", *fit("fine_tuning", "--trainer.devices=2")]
    with (tmp_path / "log").open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
    end = time.monotonic() + 120
    started = "-m cdc_mmpg.__main__"  # how Lightning names the module; libraries start short processes, too
    while not list_session_processes(process.pid, started) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # while the processes connect
    try:
        assert process.wait(120) == 143, (tmp_path / "log").read_text()
        assert "Traceback" not in (tmp_path / "log").read_text()
        assert not list_session_processes(process.pid)
    finally:
        for remaining in list_session_processes(process.pid):
            os.kill(remaining, signal.SIGKILL)


def list_session_processes(leader: int, command: str = "") -> list[int]:
    """Return the running processes of a session whose commands contain `command`."""
    processes = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            number, _, rest = entry.read_text().partition(" (")
            if command not in entry.with_name("cmdline").read_text(errors="replace").replace("\0", " "):
                continue
        except OSError:
            continue
        fields = rest.rpartition(") ")[2].split()
        if int(fields[3]) == leader and fields[0] != "Z":
            processes.append(int(number))
    return processes


SRUN = """#!{python}
import os, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("-"):
    command.pop(0)
tasks = int(os.environ["SLURM_NTASKS"])
step = dict(SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS=str(tasks), SLURM_STEP_NUM_NODES="1")
ranks = [subprocess.Popen(command, env=os.environ | step | dict(SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)))
         for rank in range(tasks)]
sys.exit(max(rank.wait() for rank in ranks))
"""


@pytest.mark.slow
def test_the_sbatch_job_trains_like_make(msvd, tools, tmp_path):
    """`experiments/train.sbatch` runs as under SLURM, with a `srun` that starts two tasks."""
    if run_program(tmp_path / "log", ["make", "--question", "environment"]):
        pytest.skip("make would build the environment first")
    write_program(tools / "srun", SRUN.format(python=sys.executable))
    environment = task_variables(0, 2, find_lasting_port(), tools) | {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_STEP_NODELIST": "",
    }
    for name in ("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES"):
        del environment[name]
    small = ("data.init_args.num_classes=5", "data.init_args.image_size=32", "data.init_args.batch_size=4",
             "data.init_args.num_workers=0", "model.init_args.encoder.depth=1", "model.init_args.preset=small",
             "trainer.accelerator=cpu")  # fmt: skip
    job = ["bash", "experiments/train.sbatch", "DATASET=msvd", "METHOD=adr_pretraining", f"DATA={msvd}", "EPOCHS=1",
           f"VOCAB={msvd / 'vocab.txt'}", f"OUT={tmp_path / 'out'}",
           "ARGS=" + " ".join(f"--{option}" for option in small)]  # fmt: skip
    assert run_program(tmp_path / "log", job, **environment) == 0, (tmp_path / "log").read_text()
    assert (tmp_path / "out" / "msvd" / "data.json").exists()
    assert read_result(tmp_path / "out" / "msvd" / "adr_pretraining" / "seed0")["devices"] == "2 x cpu"
