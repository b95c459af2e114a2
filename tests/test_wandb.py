"""W&B as a record: offline by its own files, online by a stand-in for its server."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cdc_mmpg.benchmarks import delay
from cdc_mmpg.deployment import demo, export
from cdc_mmpg.evaluation.answers import read_answers
from cdc_mmpg.files import hash_file
from cdc_mmpg.report import workspace
from cdc_mmpg.training import wandb_record
from cdc_mmpg.training.cli import main
from processes import finish, kill, start, wait_until
from wandb_files import LoggedRun, read_offline_run
from wandb_server import run_online, serve


def join(*commands: list[str]) -> list[str]:
    return [word for command in commands for word in ("--", *command)][1:]


def run_offline(command: list[str]) -> int:
    os.environ["WANDB_MODE"] = "offline"
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # which W&B found on import; the log is behind them
    return main(command)


# Offline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("offline")


@pytest.fixture
def offline(fit, folder) -> Path:
    """Folder of two offline runs, the second with the encoder of the first; the first test trains them."""
    out = folder
    if (out / "log").exists():
        return out / "msvd"
    encoder = out / "msvd" / "fine_tuning" / "seed0" / "encoder.safetensors"
    command = join(
        fit("fine_tuning", "--trainer.max_epochs=2", "--model.init_args.learning_rate=0.01", out=out),
        fit("linear", f"--model.init_args.encoder.checkpoint={encoder}", out=out),
    )
    assert finish(start(out / "log", run_offline, command)) == 0, (out / "log").read_text()
    return out / "msvd"


def read_run(offline: Path, method: str) -> tuple[Path, LoggedRun]:
    return offline / method / "seed0", read_offline_run(offline / method / "seed0")


def test_seeds_of_a_method_have_one_group(offline):
    _, run = read_run(offline, "linear")
    assert (run.name, run.group, run.job_type) == ("msvd/linear/seed0", "msvd/linear", "train")
    assert run.tags == ["msvd", "linear", "seed0"]
    assert [run.config[key] for key in ("dataset", "method", "seed")] == ["msvd", "linear", 0]


def test_outputs_are_artifacts_that_are_not_copied(offline):
    folder, run = read_run(offline, "fine_tuning")
    checkpoint, encoder = (run.artifacts[f"msvd-fine_tuning-seed0-{kind}"] for kind in ("checkpoint", "encoder"))
    assert (checkpoint.type, sorted(checkpoint.aliases)) == ("model", ["best", "latest"])
    assert checkpoint.files == {"best.ckpt": str(folder / "best.ckpt")}
    assert encoder.type == "encoder"
    assert encoder.files == {"encoder.safetensors": str(folder / "encoder.safetensors")}
    copies = [path for path in (folder / "wandb").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in copies) < 1_000_000 < (folder / "best.ckpt").stat().st_size


def test_inputs_are_configuration_with_digests_offline(offline):
    _, run = read_run(offline, "linear")
    inputs, digests = run.config["inputs"], json.loads((offline / "linear" / "seed0" / "inputs.json").read_text())
    assert inputs["encoder"] == {
        "artifact": "msvd-fine_tuning-seed0-encoder",
        "encoder.safetensors": hash_file(offline / "fine_tuning" / "seed0" / "encoder.safetensors"),
    }
    assert inputs["dataset"]["artifact"] == "msvd-data"
    assert inputs["dataset"]["annotations"] in digests.values()
    assert {"train", "val", "test"} <= inputs["dataset"].keys()
    assert "msvd-fine_tuning-seed0-encoder" not in run.artifacts
    assert not {"use_artifact", "alert"} & run.kinds


def test_answers_are_a_table_by_type_and_device(offline):
    folder, run = read_run(offline, "linear")
    columns, rows = run.read_table("test/predictions")
    assert columns == ["clip", "device", "group", "type", "question", "answer", "own", "own is right"]
    results = json.loads((folder / "results.json").read_text())
    for kind in {row[3] for row in rows}:
        right = [row[-1] for row in rows if row[3] == kind]
        assert sum(right) / len(right) == results["accuracy"]["own"]["test"][kind]["value"]


def test_short_epochs_log_loss_rate_and_seconds(offline):
    folder, run = read_run(offline, "fine_tuning")  # 3 steps an epoch
    for name in ("train/loss", "lr-AdamW", "seconds/epoch"):
        assert [row["trainer/global_step"] for row in run.history if name in row] == [2, 5], name
    with (folder / "logs" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["seconds/epoch"]] == ["2", "5"]


def test_summary_has_the_best_epoch(offline):
    folder, run = read_run(offline, "fine_tuning")
    results = json.loads((folder / "results.json").read_text())
    assert run.summary["best_epoch"] == results["best_epoch"]
    assert run.summary["val/accuracy"] == results["metrics"]["val/accuracy"]
    assert run.summary["test/accuracy/test"] == results["accuracy"]["own"]["test"]["all"]["value"]
    assert run.exit_code == 0


def test_console_is_logged_once(offline):
    _, run = read_run(offline, "linear")
    log = (run.folder / "files" / "output.log").read_text()
    assert log.count("msvd/linear/seed0: 662,597 parameters on the device") == 1


@pytest.mark.slow
def test_a_stopped_run_is_marked_as_failed(fit, tmp_path):
    process = start(tmp_path / "log", run_offline, fit("linear", "--trainer.max_epochs=5000"))
    folder = tmp_path / "msvd" / "linear" / "seed0"
    wait_until(lambda: any(folder.glob("resume/*.ckpt")), process)
    kill(process, signal.SIGTERM)
    assert finish(process) == 128 + signal.SIGTERM, (tmp_path / "log").read_text()
    assert read_offline_run(folder).exit_code == 128 + signal.SIGTERM


@pytest.mark.slow
def test_wandb_sync_uploads_an_offline_run(offline):
    """W&B's command; the checkpoint itself is read from the run's folder."""
    (folder,) = (offline / "fine_tuning" / "seed0" / "wandb").glob("offline-run-*")
    with serve() as server:
        environment = {key: value for key, value in os.environ.items() if key != "WANDB_MODE"}
        environment |= {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40}
        done = subprocess.run([sys.executable, "-m", "wandb", "sync", str(folder)], env=environment, check=False,
                              cwd=folder, capture_output=True, text=True, timeout=200)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(server.begun) == [(folder.parent / "id").read_text()]
    assert server.list_artifacts("model") == ["msvd-fine_tuning-seed0-checkpoint"]
    assert server.list_artifacts("encoder") == ["msvd-fine_tuning-seed0-encoder"]


def record_other_commands(root: Path, bundles: Path) -> int:
    """Record a control, probes, an export, a session of the demo and a measurement of delays."""
    os.environ["WANDB_MODE"] = "offline"
    run = root / "linear" / "seed0"
    results = json.loads((run / "results.json").read_text())
    (root / "on_device" / "seed0").mkdir(parents=True)
    shutil.copy(run / "predictions.test.csv", root / "on_device" / "seed0")
    wandb_record.record_evaluation(run, root / "on_device" / "seed0", results)
    probe = {"what": "cast", "from": "one clip", "clips": 1, "degrees": 40.0, "low": 30.0, "high": 50.0, "chance": 90.0,
             "majority": 80.0}  # fmt: skip
    wandb_record.record_evaluation(run, root / "privacy" / "seed0", {"arguments": [], "probes": [probe]})
    export.record_export(run, bundles, {"bytes": {"up": 768}, "test": {"device": {"accuracy": 0.5}}})
    row = ["a.mp4", "what color?", "red", "blue", "red", 3, 768, 472, 9.5]
    demo.record_session(run, root / "played", {"device": "unseen003"}, [row, row])
    cell = {"case": "msvd_qa", "rate_mib_s": 5, "whole_p50_ms": 20.0, "requests": [{}]}
    answer = {"name": "cdc_mmpg/device", "whole_p50_ms": 30.0}
    settings = {"machine": {}, "link": "proxy", "requests": 1, "commit": "unknown"}
    delay.record_delay(root, {"cells": [cell], "delay": {"cells": [cell]}, "answers": [answer], **settings})
    return 0


@pytest.mark.slow
def test_other_commands_are_runs_of_the_same_project(offline, deployed, tmp_path):
    bundles, log = tmp_path / "deployment", offline.parent / "log_others"
    shutil.copytree(deployed / "sample", bundles)
    assert finish(start(log, record_other_commands, offline, bundles)) == 0, log.read_text()
    checkpoint = {"artifact": "msvd-linear-seed0-checkpoint",
                  "best.ckpt": hash_file(offline / "linear" / "seed0" / "best.ckpt")}  # fmt: skip
    control = read_offline_run(offline / "on_device" / "seed0")
    assert (control.name, control.group, control.job_type) == ("msvd/on_device/seed0", "msvd/on_device", "control")
    assert control.config["inputs"] == {"model": checkpoint}
    assert control.read_table("test/predictions")[0][-1] == "own is right"
    assert control.summary["test/accuracy/test"] == control.summary["test/own/test"]
    probes = read_offline_run(offline / "privacy" / "seed0")
    assert probes.summary["privacy/cast/one clip"] == 40
    assert probes.read_table("privacy/probes")[1] == [["cast", "one clip", 1, 40, 30, 50, 90, 80]]
    exported = read_offline_run(bundles)
    assert (exported.name, exported.job_type) == ("msvd/linear/seed0/export", "export")
    assert exported.config["inputs"] == {"model": checkpoint}
    files = exported.artifacts["msvd-linear-seed0-bundles"].files
    assert {"device/encoder.onnx", "device-int8/encoder.onnx", "cloud/generator.safetensors"} <= files.keys()
    assert not any("signing_key" in name for name in files)  # which is there
    assert (bundles / "cloud" / "signing_key.pem").is_file()
    played = read_offline_run(offline / "played")
    assert (played.name, played.group, played.job_type) == ("msvd/linear/seed0/demo", "msvd/linear", "demo")
    assert (played.summary["demo/static"], played.summary["demo/adapted"]) == (0, 1)
    assert len(played.read_table("demo/answers")[1]) == 2
    delays = read_offline_run(offline / "delay")
    assert (delays.name, delays.job_type) == ("msvd/delay", "delay")
    assert delays.read_table("delay/cells") == (["case", "rate_mib_s", "whole_p50_ms"], [["msvd_qa", 5, 20]])
    assert log.read_text() == ""


def test_marks_become_numbers_by_case(tmp_path):
    path = tmp_path / "predictions.test.csv"
    path.write_text("clip,device,group,type,question,answer,n16,n0,right\na,d,unseen,what,q?,red,red,,r.\n"
                    "b,d,seen,who,q?,man,red,man,wr\n")  # fmt: skip
    columns, rows = wandb_record.list_answers(read_answers(path))
    assert columns[6:] == ["n16", "n0", "n16 is right", "n0 is right"]
    assert [row[6:] for row in rows] == [["red", "", 1, None], ["red", "man", 0, 1]]
    path.write_text("direction,clip,caption,own\nVR,a,,3\n")
    assert wandb_record.list_answers(read_answers(path)) == (
        ["direction", "clip", "caption", "own"],
        [["VR", "a", "", 3]],
    )


def test_a_workspace_is_online_only(monkeypatch, capsys):
    for variables, remedy in (({"WANDB_MODE": "offline"}, "unset WANDB_MODE"), ({}, "wandb login")):
        monkeypatch.delenv("WANDB_MODE", raising=False)
        monkeypatch.setenv("HOME", "/nowhere")  # has no .netrc
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert workspace.main([]) == 2
        err = capsys.readouterr().err
        assert "online only" in err
        assert remedy in err


# Online


def diverge_online(command: list[str], diverging: list[str], url: str) -> int:
    if code := run_online(command, url):
        return code
    from cdc_mmpg.methods.linear import Linear

    step = Linear.training_step
    Linear.training_step = lambda self, batch, batch_idx: step(self, batch, batch_idx) * float("nan")
    code = main(diverging)
    return code if workspace.main([]) == 0 else 1


@pytest.mark.slow
def test_server_gets_lineage_alert_and_workspace(fit, tmp_path):
    encoder = tmp_path / "msvd" / "fine_tuning" / "seed0" / "encoder.safetensors"
    loads = f"--model.init_args.encoder.checkpoint={encoder}"
    with serve() as server:
        command = join(fit("fine_tuning"), fit("linear", loads))
        diverging = fit("linear", "--seed_everything=1", out=tmp_path / "diverging")
        code = finish(start(tmp_path / "log", diverge_online, command, diverging, server.url))
    log = (tmp_path / "log").read_text()
    assert code == 6, log
    first, second, _ = server.begun
    (logged,) = {artifact["id"] for artifact in server.artifacts if artifact["type"] == "encoder"}
    assert (second, logged) in server.used
    assert (first, logged) not in server.used
    data = {artifact["id"] for artifact in server.artifacts if artifact["name"] == "msvd-data"}
    assert len(data) == 1
    assert {run for run, used in server.used if used in data} == set(server.begun)
    (alert,) = server.alerts
    assert alert["severity"] == "ERROR"
    assert "the loss is nan in epoch 1" in alert["text"]
    (view,) = server.views
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("me", "cdc-mmpg", "CDC-MMPG")
    sections = {section["name"]: section for section in
                json.loads(view["spec"])["section"]["panelBankConfig"]["sections"]}  # fmt: skip
    assert {"Unseen accuracy", "Controls", "Bytes", "Curves"} <= sections.keys()
    bands = sections["Unseen accuracy"]["panels"][0]["config"]
    assert (bands["metrics"], bands["groupBy"], bands["groupArea"]) == (["test/accuracy/unseen"], "group", "stddev")
    assert f"written: {server.url}/me/cdc-mmpg?nw=" in log
