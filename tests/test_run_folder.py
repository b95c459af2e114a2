"""Run folders: locking, damaged or foreign contents, bad paths and environment variables, full disks, signals."""

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from cdc_mmpg.commands import predict
from cdc_mmpg.controls import on_device
from cdc_mmpg.deployment import export
from cdc_mmpg.errors import CDCError, CheckpointError, ConfigError
from cdc_mmpg.files import HOST_TAG, LOCK_NAME, lock_folder
from cdc_mmpg.program import Stopped, run_to_exit_code
from cdc_mmpg.results import RESUME
from cdc_mmpg.training import wandb_record
from cdc_mmpg.training.cli import main
from cdc_mmpg.training.reopen import IMPORTS_VARIABLE, load_finished_results, reopen
from conftest import write_clip
from processes import build_recorder_arguments, count_steps, finish, kill, start, wait_until

STEP_SECONDS = 0.07  # pause after each training step


@pytest.fixture(scope="module")
def trained(msvd, tmp_path_factory):
    """Train a fine-tuning run, not to be changed; return its folder."""
    out = tmp_path_factory.mktemp("trained")
    folder = out / "msvd" / "fine_tuning" / "seed0"
    command = [
        "fit", "--config=experiments/methods/fine_tuning.yaml", "--config=experiments/datasets/msvd.yaml",
        f"--trainer.default_root_dir={folder}", f"--data.init_args.root={msvd}",
        f"--data.init_args.cache_dir={out / 'data'}", f"--data.init_args.vocab={msvd / 'vocab.txt'}",
        "--data.init_args.num_classes=5", "--data.init_args.image_size=32", "--data.init_args.batch_size=4",
        "--data.init_args.num_workers=0", "--model.init_args.encoder.depth=1", "--trainer.max_epochs=1",
        "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu",
    ]  # fmt: skip
    assert finish(start(out / "log", main, command)) == 0, (out / "log").read_text()
    return folder


@pytest.fixture
def own_run(trained, tmp_path):
    """Copy that run, to be damaged; return its folder."""
    folder = tmp_path / "msvd" / "fine_tuning" / "seed0"
    shutil.copytree(trained, folder)
    return folder


@pytest.mark.slow
def test_a_run_folder_is_for_one_command_at_a_time(fit, tmp_path):
    """A second command is refused and changes nothing while the first trains; killing the first frees the folder."""
    last = tmp_path / "last.pt"
    command = [*fit("fine_tuning", "--trainer.max_epochs=50"), *build_recorder_arguments(last, STEP_SECONDS)]
    folder = tmp_path / "msvd" / "fine_tuning" / "seed0"
    first = start(tmp_path / "log", main, command)
    wait_until(lambda: count_steps(last) > 0, first)
    config = (folder / "config.yaml").read_bytes()
    other = [*fit("fine_tuning", "--trainer.max_epochs=50"), "--model.init_args.learning_rate=0.5"]
    assert finish(start(tmp_path / "log2", main, other)) == 2
    assert f"seed0 is in use by process {first.pid} on " in (tmp_path / "log2").read_text()
    assert (folder / "config.yaml").read_bytes() == config
    kill(first)
    finish(first)
    with lock_folder(folder):
        pass


def hold_lock(folder: Path, ready: Path) -> int:
    with lock_folder(folder):
        if (child := os.fork()) == 0:  # the child outlives its parent, as a loader process may
            signal.pause()
        ready.write_text(str(child))
        signal.pause()
    return 0


def test_a_lock_ends_with_its_process_and_the_next_one_removes_leftovers(tmp_path):
    folder, ready = tmp_path / "run", tmp_path / "ready"
    process = start(tmp_path / "log", hold_lock, folder, ready)
    wait_until(lambda: ready.exists() and bool(ready.read_text()), process)

    def write() -> None:
        with lock_folder(folder):
            pass

    with pytest.raises(ConfigError, match=f"in use by process {process.pid} on .* since 20"):
        write()
    for host in (HOST_TAG, "another"):
        (folder / f".config.yaml.{host}.{process.pid}.tmp").touch()
    (folder / ".kept").touch()
    kill(process)
    finish(process)
    write()
    os.kill(int(ready.read_text()), signal.SIGKILL)
    assert {path.name for path in folder.iterdir()} == {LOCK_NAME, ".kept"}


def test_a_folder_that_cannot_be_locked_is_not_called_in_use(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("cdc_mmpg.files.fcntl.lockf", fail)
    with pytest.raises(CDCError, match=r"cannot be locked \(Input/output error\)"), lock_folder(tmp_path):
        pass


def test_temporary_files_of_a_killed_run_are_removed(fit, tmp_path):
    folder = tmp_path / "msvd" / "linear" / "seed0"
    folder.mkdir(parents=True)
    leftover = folder / ".config.yaml.elsewhere.4711.tmp"
    leftover.touch()
    assert finish(start(tmp_path / "log", main, fit("linear"))) == 0, (tmp_path / "log").read_text()
    assert not leftover.exists()


def run_with_environment(command: list[str], variables: dict[str, str]) -> int:
    os.environ.update(variables)
    return main(command)


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "1"},
        {"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train"},
        *(
            pytest.param({name: "1"}, marks=pytest.mark.slow)
            for name in ("LOCAL_RANK", "SLURM_PROCID", "NODE_RANK", "JSM_NAMESPACE_RANK")
        ),
    ],
    ids=lambda variables: next(iter(variables)),
)
def test_a_stray_rank_variable_does_not_suppress_logs(variables, fit, tmp_path):
    """In a shell of a SLURM job these variables describe another program, so they must not suppress logs."""
    process = start(tmp_path / "log", run_with_environment, fit("linear"), variables)
    assert finish(process) == 0, (tmp_path / "log").read_text()
    folder = tmp_path / "msvd" / "linear" / "seed0"
    assert "test/accuracy" in (folder / "logs" / "version_0" / "metrics.csv").read_text()
    assert "parameters on the device" in (tmp_path / "log").read_text()


def test_a_rank_that_is_no_number_is_named(fit, tmp_path, monkeypatch, capsys):
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        monkeypatch.setenv(name, "abc")
        assert main(fit("linear")) == 2
        assert f"{name}='abc' in the environment is not a number: unset it" in capsys.readouterr().err
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"TORCH_DISTRIBUTED_DEBUG": "LOUD"}, "ConfigError: TORCH_DISTRIBUTED_DEBUG='LOUD' in the environment"),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_JOB_NAME": "train"}, "--ntasks-per-node=4"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_environment_variables_give_a_message_without_a_traceback(variables, message, fit, tmp_path):
    process = start(tmp_path / "log", run_with_environment, fit("linear"), variables)
    assert finish(process) == 2, (tmp_path / "log").read_text()
    log = (tmp_path / "log").read_text()
    assert message in log
    assert "Traceback" not in log


def test_matplotlib_always_uses_the_agg_backend(monkeypatch):
    """An unknown backend would make matplotlib, which torchmetrics imports, fail."""
    monkeypatch.setenv("MPLBACKEND", "no such backend")
    assert run_to_exit_code(lambda: None) == 0
    assert os.environ["MPLBACKEND"] == "agg"


FOREIGN_CODE = "import pathlib; pathlib.Path({path!r}).touch()\nclass Head: pass\n"


def name_foreign_class(settings: dict, place: str) -> None:
    if place == "head":
        settings["model"]["init_args"]["head"] = {"class_path": "evil_module.Head", "init_args": {}}
    elif place == "head without arguments":
        settings["model"]["init_args"]["head"] = "evil_module.Head"
    elif place == "encoder":
        settings["model"]["init_args"]["encoder"] = {"class_path": "evil_module.Head"}
    elif place in ("data", "model"):
        settings[place]["class_path"] = "evil_module.Head"
    else:
        settings["trainer"][place] = [{"class_path": "evil_module.Head"}]


@pytest.mark.parametrize("place", ["head", "head without arguments", "encoder", "data", "model", "callbacks",
                                   "plugins", "logger", "profiler"])  # fmt: skip
def test_reopening_a_run_executes_no_foreign_code(place, own_run, tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text(FOREIGN_CODE.format(path=str(tmp_path / "exploded")))
    monkeypatch.syspath_prepend(tmp_path)
    settings = yaml.safe_load((own_run / "config.yaml").read_text())
    name_foreign_class(settings, place)
    (own_run / "config.yaml").write_text(yaml.safe_dump(settings))
    if place in ("callbacks", "plugins", "logger", "profiler"):
        reopen(own_run)  # settings of the trainer are ignored
    else:
        with pytest.raises(ConfigError, match=r"names classes outside this project|not the configuration of a run"):
            reopen(own_run)
    assert not (tmp_path / "exploded").exists()


def test_every_command_that_reopens_a_run_refuses_foreign_code_unless_told_otherwise(own_run, tmp_path, capsys,
                                                                                    monkeypatch):  # fmt: skip
    (tmp_path / "evil_module.py").write_text(FOREIGN_CODE.format(path=str(tmp_path / "exploded")))
    monkeypatch.syspath_prepend(tmp_path)
    settings = yaml.safe_load((own_run / "config.yaml").read_text())
    name_foreign_class(settings, "head")
    (own_run / "config.yaml").write_text(yaml.safe_dump(settings))
    results = json.loads((own_run / "results.json").read_text())
    sent = results | {"bytes": {"up": 768, "down": 344}}  # as if the run could be exported
    (own_run / "results.json").write_text(json.dumps(sent))
    clip = write_clip(tmp_path / "own.mp4", codec="libx264")
    for command in (
        lambda: predict.main([f"--run={own_run}", f"--video={clip}", "--question=what?"]),
        lambda: export.main([str(own_run)]),
        lambda: on_device.main([str(own_run)]),
    ):
        assert command() == 2
        assert f"evil_module.Head. If you trust the run and that code, set {IMPORTS_VARIABLE}=evil_module" in (
            capsys.readouterr().err
        )
    assert not (tmp_path / "exploded").exists()
    monkeypatch.setenv(IMPORTS_VARIABLE, "other,evil_module")
    assert predict.main([f"--run={own_run}", f"--video={clip}", "--question=what?"]) == 2  # not a head
    assert (tmp_path / "exploded").exists()


def test_predict_names_the_runs_that_are_finished(trained, tmp_path, capsys):
    clip = write_clip(tmp_path / "own.mp4", codec="libx264")
    absent = trained.parents[1] / "all" / "seed0"
    assert predict.main([f"--run={absent}", f"--video={clip}", "--question=what?"]) == 4
    assert "not a finished run (no results.json, no config.yaml, no best.ckpt)" in (error := capsys.readouterr().err)
    assert "\n  METHOD=fine_tuning SEED=0\n" in error


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("results.json", "{", "results.json: cannot be used"),
        ("config.yaml", "a: [", "not a configuration"),
        ("config.yaml", "- 1", "holds a list"),
        ("config.yaml", "{}", "Repeat that run's command to see that it is finished"),
        ("inputs.json", "{", "inputs.json: damaged"),
        ("inputs.json", "[]", "holds a list"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(name, content, words, own_run, fit, tmp_path, capsys):
    (own_run / name).write_text(content)
    assert main([*fit("fine_tuning"), "--trainer.log_every_n_steps=7"]) == 2
    assert words in capsys.readouterr().err
    if name == "results.json":
        with pytest.raises(CheckpointError, match=r"\(results\.json cannot be used\)"):
            load_finished_results(own_run)
    elif content == "{}":
        (own_run / "best.ckpt").unlink()
        with pytest.raises(CheckpointError, match=r"not a finished run \(no best\.ckpt\)"):
            load_finished_results(own_run)
    else:
        with pytest.raises(ConfigError, match=name):
            reopen(own_run)


@pytest.mark.slow
def test_the_warning_about_counted_answers_comes_once(fit, writable_msvd, caplog):
    (writable_msvd / "answer_set.txt").unlink()
    assert main([*fit("linear", root=writable_msvd), "--data.init_args.num_classes=9"]) == 3
    assert main([*fit("linear", root=writable_msvd), "--data.init_args.num_classes=6"]) == 0
    assert main([*fit("hyper", root=writable_msvd), "--data.init_args.num_classes=6"]) == 0
    assert caplog.text.count("most frequent of 5 training answers") <= 2  # once for each number of classes


def test_a_tilde_in_paths_is_expanded(fit, msvd, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "clips").symlink_to(msvd)
    command = fit("linear", "--trainer.default_root_dir=~/out/msvd/linear/seed0", "--data.init_args.root=~/clips",
                  "--data.init_args.vocab=~/clips/vocab.txt", "--data.init_args.cache_dir=~/out/data")  # fmt: skip
    assert main(command) == 0
    assert (tmp_path / "out" / "msvd" / "linear" / "seed0" / "results.json").is_file()
    assert (tmp_path / "out" / "data" / "frames").is_dir()
    assert not Path("~").exists()
    assert main(command) == 0
    clip = write_clip(tmp_path / "own.mp4", codec="libx264")
    assert clip.is_file()
    run = "--run=~/out/msvd/linear/seed0"
    assert predict.main([run, "--video=~/own.mp4", "--question=what?", "--vocab=~/clips/vocab.txt"]) == 0


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        (f"--trainer.default_root_dir=/tmp/{'x' * 300}/linear/seed0", "not a usable folder (File name too long)"),
        ("--trainer.default_root_dir=/dev/null/linear/seed0", "not a usable folder (Not a directory)"),
        (f"--data.init_args.root=/{'x' * 300}", "not a usable path (File name too long)"),
        (f"--data.init_args.vocab=/{'x' * 300}.txt", "not a usable path (File name too long)"),
        (f"--model.init_args.encoder.checkpoint=/{'x' * 300}.ckpt", "not a usable path (File name too long)"),
        ("--trainer.default_root_dir=~nobody_of_this_name/linear/seed0", "~nobody_of_this_name"),
    ],
)
def test_an_unusable_path_is_refused(argument, words, fit, capsys):
    assert main([*fit("linear"), argument]) == 2
    assert words in capsys.readouterr().err


def test_running_out_of_memory_gives_a_short_message(capsys):
    def fail_on_gpu() -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 8 GiB"
        )

    assert run_to_exit_code(fail_on_gpu) == 2
    assert "per_device=64" in (error := capsys.readouterr().err)
    assert "Tried to allocate 20.00 MiB" in error
    assert run_to_exit_code(lambda: torch.empty(2**58)) == 2
    assert "the machine is out of memory: accumulate smaller batches" in capsys.readouterr().err


def test_an_error_of_the_disk_is_reported(capsys):
    def write() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    assert run_to_exit_code(write) == 1
    assert "No space left on device" in capsys.readouterr().err
    with pytest.raises(OSError, match="Interrupted"):  # not an error of the disk: raised as a bug
        run_to_exit_code(lambda: (_ for _ in ()).throw(OSError(errno.EINTR, "Interrupted")))


def run_in_terminal(command: list[str]) -> int:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever the parent of these tests set
    return main(command)


def test_a_closed_terminal_stops_the_run_after_the_step_and_saves(fit, tmp_path):
    last = tmp_path / "last.pt"
    command = [
        *fit("fine_tuning", "--trainer.max_epochs=50", "--data.init_args.batch_size=2"),
        *build_recorder_arguments(last, STEP_SECONDS),
    ]
    process = start(tmp_path / "log", run_in_terminal, command)
    wait_until(lambda: count_steps(last) >= 2, process)
    kill(process, signal.SIGHUP)
    assert finish(process) == 129, (tmp_path / "log").read_text()
    assert list((tmp_path / "msvd" / "fine_tuning" / "seed0" / RESUME).glob("*.ckpt"))
    assert "stopped by SIGHUP; run the same command again (training" in (tmp_path / "log").read_text()


def run_under_nohup(command: list[str]) -> int:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    return main(command)


@pytest.mark.slow
def test_a_run_under_nohup_survives_a_closed_terminal(fit, tmp_path):
    last = tmp_path / "last.pt"
    command = [*fit("fine_tuning"), *build_recorder_arguments(last, STEP_SECONDS)]
    process = start(tmp_path / "log", run_under_nohup, command)
    wait_until(lambda: count_steps(last) >= 1, process)
    kill(process, signal.SIGHUP)
    assert finish(process) == 0, (tmp_path / "log").read_text()


SECRET = "s3cr3t" * 7
WANDB_SETTINGS: list[dict[str, str]] = [
    {"WANDB_BASE_URL": "wandb.example.org"},
    {"WANDB_BASE_URL": f"http://user:{SECRET}@127.0.0.1:9", "WANDB_MODE": "online"},
    {"WANDB_PROJECT": "team/project"},
    {"WANDB_CONSOLE": "yes"},
    {"WANDB_MODE": "nonsense"},
    {"WANDB_RUN_ID": "a/b c?#"},
    {"WANDB_DIR": "/proc/absent"},
    {"WANDB_API_KEY": SECRET[:9], "WANDB_MODE": "online"},
    {"WANDB_API_KEY": f"{SECRET}\r\n", "WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9"},
    {"WANDB_SILENT": "maybe"},
    {"WANDB_SWEEP_ID": "of nobody"},
    {"WANDB_CONFIG_DIR": "/proc/absent"},
    {"HOME": "/proc/absent"},
    {"WANDB_SERVICE": "nonsense"},
]


def record_with_each(settings: list[dict[str, str]], folder: Path) -> None:
    """Start and end a record with each of the settings, which must not raise anything."""
    wandb_record.PATIENCE_SECONDS = 3
    os.environ.pop("WANDB_MODE", None)
    before = os.environ.copy()
    for number, variables in enumerate(settings):
        os.environ.update(variables)
        run = folder / "msvd" / "linear" / f"seed{number}"
        record = wandb_record.start_record(run, wandb_record.Subject.of_run(run, "train"), {"learning_rate": 1e-4})
        record.log_table("answers", ["question", "answer"], [["what?", "red"]])
        record.summarise({"accuracy": 0.5})
        record.end()
        os.environ.clear()
        os.environ.update(before)


@pytest.mark.slow
def test_no_setting_of_wandb_stops_a_record(tmp_path):
    process = start(tmp_path / "log", record_with_each, WANDB_SETTINGS, tmp_path)
    assert finish(process, 300) == 0, (tmp_path / "log").read_text()
    assert SECRET[:9] not in (tmp_path / "log").read_text()


def run_with_wandb(command: list[str], variables: dict[str, str]) -> int:
    wandb_record.PATIENCE_SECONDS = 3
    os.environ.pop("WANDB_MODE", None)
    os.environ.update(variables)
    return main(command)


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 8], ids=["invalid", "no server"])
def test_no_setting_of_wandb_stops_a_run(number, fit, tmp_path):
    process = start(tmp_path / "log", run_with_wandb, fit("linear"), WANDB_SETTINGS[number])
    assert finish(process) == 0, (tmp_path / "log").read_text()
    log = (tmp_path / "log").read_text()
    assert SECRET[:9] not in log
    folder = tmp_path / "msvd" / "linear" / "seed0"
    assert (folder / "results.json").is_file()
    assert "test/accuracy" in (folder / "logs" / "version_0" / "metrics.csv").read_text()


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
def test_a_full_disk_is_reported_and_the_run_resumes_later(fit, tmp_path):
    """The disk grows from too small for the first file to large enough for all."""
    disk, data, sizes = tmp_path / "disk", tmp_path / "data", (8, 12, 16, 20, 64, 4_000, 9_000, 60_000)  # KiB
    disk.mkdir()
    command = [*fit("fine_tuning", "--trainer.max_epochs=2", out=disk), f"--data.init_args.cache_dir={data}"]
    folder, failures = disk / "msvd" / "fine_tuning" / "seed0", 0
    mount = ["mount", "-t", "tmpfs", "-o", f"size={sizes[0]}k", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        for number, size in enumerate(sizes):
            subprocess.run(["mount", "-o", f"remount,size={size}k", str(disk)], check=True)
            log = tmp_path / f"log{number}"
            code, output = finish(start(log, main, command)), log.read_text()
            assert "Traceback" not in output, output
            if code == 0:
                break
            failures += 1
            assert code in (1, 4), output
            assert "No space left on device" in output
            assert not (folder / "results.json").exists()
        else:
            pytest.fail("it never ended")
        assert failures > 2
        assert json.loads((folder / "results.json").read_text())["epochs"] == 2
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_the_message_about_a_signal_is_logged_last(caplog):
    """`run_to_exit_code` logs it after the progress bar is closed."""

    def train() -> None:
        try:
            raise Stopped(signal.SIGINT)
        finally:
            logging.getLogger("cdc_mmpg").warning("the bar is closed")

    assert run_to_exit_code(train) == 130
    assert [record.message for record in caplog.records] == [
        "the bar is closed",
        "stopped by SIGINT; run the same command again (training and decoding resume where they stopped)",
    ]
