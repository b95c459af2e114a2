"""Runs that something else starts: torchrun, SLURM as its variables and two programs make it look, and chains."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from cdc_mmpg.errors import ConfigError
from cdc_mmpg.launchers import Launch, find_launch, requeue
from cdc_mmpg.program import Stopped, exit_code, ignore_stop_signals, leave_on_signals, stop_signals
from cdc_mmpg.results import RESUME
from cdc_mmpg.training.cli import main
from cdc_mmpg.training.group import Tasks
from processes import Witness, finish, recording, result_of_testing_alone, start, steps, until

SLOW = 0.07  # seconds a step: time to be interrupted in, on a busy machine too
ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
# The tests may run under make themselves, with variables of their own.
OUTSIDE = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "ARGS")}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def in_slurm(rank: int, tasks: int, port: int, tools: Path) -> dict[str, str]:
    """What srun leaves in the environment of a task, with the programs of `tools` before all others."""
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
    """A folder with a `scontrol` that writes down what it is asked, in `asked`."""
    folder = tmp_path / "tools"
    write_program(folder / "scontrol", f'#!/bin/sh\necho "$@" >> "{folder}/asked"\n')
    return folder


def asked(tools: Path) -> list[str]:
    file = tools / "asked"
    return file.read_text().splitlines() if file.exists() else []


def as_task(command: list[str], environment: Mapping[str, str]) -> int:
    """A command in a process group of its own, as a task of a step."""
    os.setpgid(0, 0)
    os.environ.update(environment)
    return main(command)


def start_tasks(folder: Path, tools: Path, *commands: list[str]) -> list:
    """Begin a step of as many tasks as there are commands; their outputs go to `log<rank>` in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    return [start(folder / f"log{rank}", as_task, command, in_slurm(rank, len(commands), port, tools))
            for rank, command in enumerate(commands)]  # fmt: skip


def logs(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("log*")))


def test_tasks_train_one_run_and_go_on_after_a_requeue(fit, tools, tmp_path):
    """Against the first command of a chain: the second has a group of its own, the third is refused."""
    more = ["--trainer.devices=2", "--trainer.max_epochs=3", "--data.init_args.batch_size=2",
            f"--trainer.callbacks+={Witness.__module__}.{Witness.__name__}"]  # fmt: skip
    calm, stopped = tmp_path / "calm", tmp_path / "stopped"
    chain = [*fit("fine_tuning", *more, out=calm), "--", *fit("linear", "--trainer.devices=auto", out=calm), "--",
             *fit("hyper", "--trainer.devices=1", out=calm)]  # fmt: skip
    expected, folder = (out / "msvd" / "fine_tuning" / "seed0" for out in (calm, stopped))
    for run in (expected, folder):
        run.mkdir(parents=True)
        (run / "hpc_ckpt_1.ckpt").write_text("of Lightning's own requeue, half written")
    ranks = start_tasks(calm, tools, chain, chain)
    assert [finish(process) for process in ranks] == [2, 2], logs(calm)
    assert "the run takes 1 processes on 1 machines, srun started 2 on 1: DEVICES=2" in logs(calm)
    for method in ("fine_tuning", "linear"):
        assert json.loads((calm / "msvd" / method / "seed0" / "results.json").read_text())["devices"] == "2 x cpu"

    command = [*fit("fine_tuning", *more, out=stopped), *recording(tmp_path / "last", SLOW),
               "--data.init_args.num_workers=1"]  # fmt: skip
    ranks = start_tasks(stopped, tools, command, command)
    until(lambda: steps(tmp_path / "last") >= 14, ranks[1])  # of both: in the second epoch of six
    os.killpg(ranks[1].pid, signal.SIGUSR1)  # one is enough; loader processes get it, too
    assert [finish(process) for process in ranks] == [138, 138], logs(stopped)
    assert asked(tools) == ["requeue 4711"]
    assert "stopped by SIGUSR1; SLURM starts job 4711 again, which goes on" in (stopped / "log0").read_text()
    assert list((folder / RESUME).glob("stopped-step=*.ckpt"))
    assert not (folder / "results.json").exists()
    ranks = start_tasks(stopped, tools, command, command)
    assert [finish(process) for process in ranks] == [0, 0], logs(stopped)
    assert steps(tmp_path / "last") == 2 * 3 * 6, "a step was lost or taken twice"
    for rank in range(2):
        ours, theirs = (torch.load(run / f"witness.{rank}.pt", weights_only=False) for run in (folder, expected))
        assert ours["weights"].keys() == theirs["weights"].keys()
        for name, value in theirs["weights"].items():
            assert torch.equal(ours["weights"][name], value), name
        assert ours["logged"][-1] == theirs["logged"][-1]


def test_tasks_that_are_runs_of_their_own_each_log_and_each_ask_for_the_requeue(fit, tools, tmp_path):
    """The second one is stopped while the first goes on to its end."""
    commands = [[*fit("linear", "--trainer.devices=1", "--trainer.max_epochs=3", out=tmp_path / str(task)),
                 *recording(tmp_path / f"last{task}", SLOW)] for task in range(2)]  # fmt: skip
    ranks = start_tasks(tmp_path, tools, *commands)
    until(lambda: steps(tmp_path / "last1") >= 1, ranks[1])
    os.killpg(ranks[1].pid, signal.SIGUSR1)
    assert [finish(process) for process in ranks] == [0, 138], logs(tmp_path)
    assert asked(tools) == ["requeue 4711"]
    assert finish(start(tmp_path / "log1", as_task, commands[1], in_slurm(1, 2, free_port(), tools))) == 0
    for task in range(2):
        folder = tmp_path / str(task) / "msvd" / "linear" / "seed0"
        assert json.loads((folder / "results.json").read_text())["devices"] == "1 x cpu"
        assert "parameters on the device" in (tmp_path / f"log{task}").read_text()
        assert "test/accuracy" in "".join(path.read_text() for path in folder.glob("logs/*/metrics.csv"))


def test_before_training_the_signal_asks_for_the_requeue_and_leaves(fit, tools, tmp_path):
    environment = in_slurm(0, 1, free_port(), tools) | {"SLURM_ARRAY_JOB_ID": "4700", "SLURM_ARRAY_TASK_ID": "3"}
    process = start(tmp_path / "log", as_task, fit("linear"), environment)
    until((tmp_path / "msvd" / "linear" / "seed0" / "config.yaml").exists, process)
    os.killpg(process.pid, signal.SIGUSR1)
    assert finish(process) == 138, (tmp_path / "log").read_text()
    assert asked(tools) == ["requeue 4700_3"]


def test_the_signal_is_ours_in_a_job_alone(handlers, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    leave_on_signals()
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert signal.SIGUSR1 in stop_signals()
    leave_on_signals()
    with pytest.raises(Stopped) as left:
        signal.raise_signal(signal.SIGUSR1)
    assert left.value.code == 138
    signal.raise_signal(signal.SIGTERM)  # srun's, once another task has left: the requeue is still asked for
    ignore_stop_signals()
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN


def test_a_requeue_that_fails_is_said(tools, monkeypatch, caplog):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.setenv("PATH", str(tools))
    assert requeue() == "SLURM starts job 4711 again, which goes on"
    write_program(tools / "scontrol", "#!/bin/sh\necho 'Requeue is disabled\n for the job' >&2\nexit 3\n")

    def leave() -> None:
        raise Stopped(signal.SIGUSR1)

    assert exit_code(leave) == 138
    assert "`scontrol requeue 4711` failed (exit code 3 Requeue is disabled for the job): submit the job again" in (
        caplog.text
    )
    (tools / "scontrol").unlink()
    caplog.clear()
    assert exit_code(leave) == 138
    assert "No such file or directory: 'scontrol'): submit the job again to go on" in caplog.text
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    caplog.clear()
    assert exit_code(leave) == 138
    assert "the first process asks SLURM" in caplog.text


TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1",
            "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2"}  # fmt: skip


def test_the_launcher_is_known_by_its_variables(monkeypatch):
    def found(**variables: str) -> Launch:
        with monkeypatch.context() as patch:
            for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "SLURM_STEP_NUM_TASKS"):
                patch.delenv(name, raising=False)
            for name, value in variables.items():
                patch.setenv(name, value)
            return find_launch()

    assert found() == Launch("", 0, 1, 1, 1)
    assert found(**TORCHRUN) == Launch("torchrun", 3, 4, 2, 2)
    assert found(**TORCHRUN, SLURM_STEP_NUM_TASKS="2").by == "torchrun"
    step = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "5"}
    assert found(**step) == Launch("srun", 5, 8, 4, 2)
    assert found(SLURM_NTASKS="8", SLURM_PROCID="0") == Launch(""), "a shell of the job"
    hand = {"LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}
    assert (found(**hand).by, found(**hand).rank, found(**hand).processes) == ("the environment", 1, 2)
    assert found(LOCAL_RANK="1") == found(WORLD_SIZE="2") == Launch("")


def test_the_launcher_says_how_many_where_a_run_may_not(monkeypatch):
    for devices in (1, 3, "auto"):  # of a dataset's configuration
        assert Launch("torchrun", 0, 4, 2, 2).share(devices, 1) == (2, 2)
    assert Launch("srun", 0, 8, 4, 2).share("auto", 1) == (4, 2)
    assert Launch("srun", 0, 8, 4, 2).share(8, 1) == (8, 1)
    assert Launch("").share("auto", 1) == ("auto", 1)
    with pytest.raises(ConfigError, match="srun started 7 processes on 2 machines, 3 on this one"):
        Launch("srun", 0, 7, 3, 2).share("auto", 1)
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"2 machines .* MASTER_ADDR and MASTER_PORT and NODE_RANK not set"):
        Launch("").share(8, 2)


@pytest.mark.parametrize(
    ("launch", "run", "said"),
    [
        (Launch("srun", 0, 4, 4, 1), (3, 1, True), "3 processes on 1 machines, srun started 4 on 1: DEVICES=4 NODES=1"),
        (Launch("srun", 0, 4, 2, 2), (4, 1, True), "4 processes on 1 machines, srun started 4 on 2: DEVICES=2 NODES=2"),
        (Launch("srun", 0, 4, 4, 1), (1, 1, False), "so did the command before"),
        (Launch("torchrun", 0, 2, 2, 1), (1, 1, True), "torchrun started 2 processes: DEVICES=2"),
        (Launch("the environment", 0, 2), (1, 1, True), "the environment started 2 processes: DEVICES=2"),
        (Launch(""), (2, 1, True), "LOCAL_RANK=0 in the environment says that something else"),
    ],
)
def test_a_run_on_other_processes_than_were_started_is_refused(launch, run, said, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match=said):
        launch.check_processes(*run)
    launch.check_processes(launch.processes, launch.nodes, alone=True)
    Launch("srun", 0, 4, 4, 1).check_processes(1, 1, alone=True)


def test_torchrun_is_not_contradicted_on_the_command_line(fit, monkeypatch, capsys):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value if name != "LOCAL_RANK" else "0")  # others say nothing
    for wrong, number in (("--trainer.devices=3", 2), ("--trainer.devices=1", 2), ("--trainer.num_nodes=1", 2)):
        assert main(fit("linear", wrong)) == 2
        assert f"{wrong}, but torchrun started {number} " in capsys.readouterr().err
    find_launch().check_arguments({"devices": "2", "num_nodes": None})
    find_launch().check_arguments({"devices": "auto", "num_nodes": "2"})


def test_steps_of_a_job_meet_at_places_of_their_own(monkeypatch):
    places = set()
    for step in ("0", "1"):
        with monkeypatch.context() as patch:
            for name, value in {**in_slurm(0, 2, 0, Path()), "SLURM_JOB_ID": "98765", "SLURM_STEP_ID": step,
                                "SLURM_NODELIST": "gpu[1-2]", "SLURM_STEP_NODELIST": "gpu2",
                                "MASTER_ADDR": "set, so that what the step sets is taken back"}.items():  # fmt: skip
                patch.setenv(name, value)
            for name in ("MASTER_ADDR", "MASTER_PORT"):
                patch.delenv(name)
            tasks = Tasks()
            assert not tasks.auto_requeue
            places.add((tasks.main_address, tasks.main_port))
    assert places == {("gpu2", 23765), ("gpu2", 23766)}


def test_the_launcher_goes_before_the_very_same_command():
    def planned(*arguments: str) -> list[list[str]]:
        done = subprocess.run(["make", "-n", "train", "DATASET=msvd", "DEVICES=8", *arguments], cwd=ROOT, text=True,
                              capture_output=True, check=True, env=OUTSIDE)  # fmt: skip
        return [
            shlex.split(line) for line in done.stdout.replace("\\\n", " ").splitlines() if "-m cdc_mmpg fit" in line
        ]

    plain, launched = planned(), planned("LAUNCH=srun --kill-on-bad-exit=1")
    assert len(plain) == 2  # both phases
    assert [line[0] for line in plain] == [".venv/bin/python"] * 2
    assert [["srun", "--kill-on-bad-exit=1", *line] for line in plain] == launched


# What starts fresh interpreters.


def run_program(log: Path, command: list[str], seconds: float = 300, **environment: str) -> int:
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT,
                                   env=OUTSIDE | {"OMP_NUM_THREADS": "1"} | environment)  # fmt: skip
        try:
            return process.wait(seconds)
        finally:
            process.kill()


def result(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_torchrun_trains_one_run_whatever_the_dataset_says(fit, tmp_path):
    (tmp_path / "one.yaml").write_text("trainer:\n  devices: 1\n")
    command = [*fit("fine_tuning", f"--config={tmp_path / 'one.yaml'}"), "--", *fit("linear")]
    torchrun = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node=2", "-m", "cdc_mmpg"]
    assert run_program(tmp_path / "log", [*torchrun, *command]) == 0, (tmp_path / "log").read_text()
    for method in ("fine_tuning", "linear"):
        assert result(tmp_path / "msvd" / method / "seed0")["devices"] == "2 x cpu"


@pytest.mark.slow
def test_two_launchers_train_one_run(fit, tmp_path):
    """As on two machines: each starts one process."""
    torchrun = [str(BIN / "torchrun"), "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d",
                f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=run", "-m", "cdc_mmpg"]  # fmt: skip
    both = [start(tmp_path / f"log{node}", run_program, tmp_path / f"out{node}", [*torchrun, *fit("fine_tuning")])
            for node in range(2)]  # fmt: skip
    codes = [finish(process, 300) for process in both]
    assert codes == [0, 0], "\n".join((tmp_path / f"out{node}").read_text() for node in range(2))
    assert result(tmp_path / "msvd" / "fine_tuning" / "seed0")["devices"] == "2 x cpu"


@pytest.mark.slow
def test_chained_runs_on_two_devices_and_on_one(fit, own_msvd, tmp_path):
    """Lightning starts the second process of the first two runs, which ends with each.

    Seven test questions are shared out 4 and 3; the second run builds on what the first process of the first writes at
    its end; the third, on one device, is as it would be alone.
    """
    for split, length in (("test", 7), ("val", 3)):
        rows = json.loads((own_msvd / f"{split}_qa.json").read_text())
        (own_msvd / f"{split}_qa.json").write_text(json.dumps(rows[:length]))
    witness = f"--trainer.callbacks+={Witness.__module__}.{Witness.__name__}"
    chain, alone, tested = tmp_path / "chain", tmp_path / "alone", tmp_path / "tested"
    encoder = f"--model.init_args.encoder.checkpoint={chain / 'msvd' / 'fine_tuning' / 'seed0' / 'encoder.safetensors'}"
    two = ["--trainer.devices=2", "--data.init_args.batch_size=2"]
    commands = [*fit("fine_tuning", *two, root=own_msvd, out=chain), "--",
                *fit("linear", *two, encoder, root=own_msvd, out=chain), "--",
                *fit("hyper", "--trainer.devices=1", witness, root=own_msvd, out=chain)]  # fmt: skip
    assert run_program(tmp_path / "log", [sys.executable, "-m", "cdc_mmpg", *commands]) == 0, (
        tmp_path / "log"
    ).read_text()
    for method in ("fine_tuning", "linear"):
        folder = chain / "msvd" / method / "seed0"
        results = result(folder)
        assert (results["devices"], results["questions_per_step"]) == ("2 x cpu", 2)
        assert results["recipe_questions_per_step"] == 256
        accuracy, loss = (results["metrics"][f"test/{name}"] for name in ("accuracy", "loss"))
        assert accuracy * 7 == pytest.approx(round(accuracy * 7), abs=1e-5)
        (tested / method).mkdir(parents=True)
        printed = result_of_testing_alone(folder, tested / method)
        assert printed == pytest.approx({"accuracy": accuracy, "loss": loss}, abs=1e-4)
    command = fit("hyper", "--trainer.devices=1", witness, root=own_msvd, out=alone)
    assert finish(start(tmp_path / "log", main, command)) == 0
    assert result(chain / "msvd" / "hyper" / "seed0")["devices"] == "1 x cpu"
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
    while len(in_session(process.pid)) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # while they look for each other
    try:
        assert process.wait(120) == 143, (tmp_path / "log").read_text()
        assert "Traceback" not in (tmp_path / "log").read_text()
        assert not in_session(process.pid)
    finally:
        for left in in_session(process.pid):
            os.kill(left, signal.SIGKILL)


def in_session(leader: int) -> list[int]:
    """The processes of a session that run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            number, _, rest = entry.read_text().partition(" (")
        except OSError:
            continue
        fields = rest.rpartition(") ")[2].split()
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(number))
    return found


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
def test_the_job_trains_as_make_does(msvd, tools, tmp_path):
    """`experiments/train.sbatch` as SLURM runs it, with a `srun` that starts two tasks."""
    if run_program(tmp_path / "log", ["make", "--question", "environment"]):
        pytest.skip("make would build the environment first")
    write_program(tools / "srun", SRUN.format(python=sys.executable))
    environment = in_slurm(0, 2, free_port(), tools) | {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_STEP_NODELIST": ""}
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
    assert result(tmp_path / "out" / "msvd" / "adr_pretraining" / "seed0")["devices"] == "2 x cpu"
