"""Sweeps: grids without a server, and W&B's client and agent with a stand-in for W&B's server."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from cdc_mmpg.commands import sweep
from cdc_mmpg.commands.execute import Executor
from cdc_mmpg.commands.plan import Step
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.results import hash_command
from processes import finish, start
from wandb_server import run_online, serve

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "ARGS")
}


# Without a server

ACCURACY = {"linear": {"1": 0.25, "2": 0.75, "3": 0.5}, "hyper": {"1": 0.375, "2": 0.875}}


def write_sweep(folder: Path, **changed: object) -> Path:
    """Write a sweep file over two methods and two numbers of epochs; `changed` replaces keys."""
    config = {
        "method": "grid",
        "metric": {"name": "val/accuracy", "goal": "maximize"},
        "parameters": {"METHOD": {"values": ["linear", "hyper"]}, "SEED": {"value": 0}, "EPOCHS": {"values": [1, 2]}},
        "command": ["make", "train", "${args_no_hyphens}", "DATASET=msvd", "JOBS=1", "OUT=elsewhere/$(WANDB_RUN_ID)"],
    } | changed
    (folder / "own.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return folder / "own.yaml"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Working folder with links to the configurations and data modules."""
    monkeypatch.chdir(tmp_path)
    for name in ("experiments", "data_modules"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


@pytest.fixture
def runs(folder, monkeypatch):
    """Method, epochs and GPU of the runs of a sweep, in order; runs write results instead of training."""
    recorded: list[tuple[str, str, str]] = []

    def run(executor: Executor, step: Step, slot: int) -> int:
        options = dict(word[2:].split("=", 1) for word in step.arguments if word.startswith("--") and "=" in word)
        method, epochs = Path(step.folder).parent.name, options["trainer.max_epochs"]
        recorded.append((method, epochs, executor.environment_of(step, slot).get("CUDA_VISIBLE_DEVICES", "")))
        time.sleep(0.1 if executor.plan.gpus else 0)
        if epochs == "3" and not (folder / "mended").exists():
            return 6
        Path(step.folder).mkdir(parents=True)
        results = {"method": method, "metrics": {"val/accuracy": ACCURACY[method][epochs]}, "best_epoch": 3,
                   "fingerprint": hash_command(step.words)}  # fmt: skip
        Path(step.folder, "results.json").write_text(json.dumps(results))
        return 0

    monkeypatch.setattr(Executor, "_run", run)
    monkeypatch.setattr(Executor, "_check_settings", lambda self, steps: None)
    return recorded


def read_rows(folder: Path) -> list[list[str]]:
    (path,) = folder.glob("checkpoints/sweeps/own-*/sweep.md")
    return [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in path.read_text().splitlines()
        if line.startswith("|")
    ]


def test_grid_runs_in_order_and_the_table_lists_the_best_first(folder, runs, capfd):
    assert sweep.main([str(write_sweep(folder))]) == 0
    assert [run[:2] for run in runs] == [("linear", "1"), ("linear", "2"), ("hyper", "1"), ("hyper", "2")]
    assert read_rows(folder)[0] == ["METHOD", "EPOCHS", "val/accuracy", "best epoch"]  # SEED is the same in all runs
    assert read_rows(folder)[2:] == [["hyper", "2", "0.8750", "4"], ["linear", "2", "0.7500", "4"],
                               ["hyper", "1", "0.3750", "4"], ["linear", "1", "0.2500", "4"]]  # fmt: skip
    out = capfd.readouterr().out
    assert "| hyper | 2 | 0.8750 | 4 |" in out
    assert "4 of 4 combinations of" in out
    assert "make train SEED=0 DATASET=msvd" in out
    assert not (folder / "elsewhere").exists()
    assert len(list(folder.glob("checkpoints/sweeps/own-*/*/msvd/*/seed0/results.json"))) == 4


def test_table_is_updated_while_runs_continue(folder, runs, monkeypatch):
    row_counts = []
    run = Executor._run
    monkeypatch.setattr(
        Executor, "_run", lambda *args: row_counts.append(len(read_rows(folder)) if row_counts else 0) or run(*args)
    )
    assert sweep.main([str(write_sweep(folder))]) == 0
    assert row_counts == [0, 3, 4, 5]


def test_one_run_per_gpu_at_a_time(folder, runs, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    assert sweep.main([str(write_sweep(folder))]) == 0
    assert sorted(gpu for *_, gpu in runs[:2]) == sorted(gpu for *_, gpu in runs[2:]) == ["6", "7"]
    assert [row[:2] for row in read_rows(folder)[2:]] == [
        ["hyper", "2"],
        ["linear", "2"],
        ["hyper", "1"],
        ["linear", "1"],
    ]


def test_prerequisites_of_a_run_are_trained_in_its_folder(folder):
    spec = sweep.read_sweep(
        write_sweep(folder, parameters={"METHOD": {"value": "cdc_mmpg"}, "EPOCHS": {"values": [1, 2]}})
    )
    steps = list(sweep.plan_grid(spec, sweep.expand_grid(spec), Path("sweeps")).steps.values())
    assert [Path(step.folder).parent.name for step in steps] == ["adr_pretraining", "cdc_mmpg"] * 2
    assert [step.needs for step in steps[1::2]] == [(step.name,) for step in steps[::2]]
    folders = {f"sweeps/{sweep.name_folder(combination)}" for combination in sweep.expand_grid(spec)}
    assert {step.folder.split("/msvd/")[0] for step in steps} == folders


def test_shared_encoder_is_trained_first_if_it_is_missing(folder):
    encoder = "checkpoints/synthetic/encoder_pretraining/seed0/encoder.safetensors"
    command = ["make", "train", "${args_no_hyphens}", "CACHE=checkpoints/synthetic/data", f"CHECKPOINT={encoder}"]
    parameters = {"METHOD": {"value": "linear"}, "EPOCHS": {"values": [1, 2]}}
    spec = sweep.read_sweep(write_sweep(folder, parameters=parameters, command=command))
    for is_trained in (False, True):
        steps = list(sweep.plan_grid(spec, sweep.expand_grid(spec), Path("sweeps")).steps.values())
        required = ["clips checkpoints/synthetic/data/clips", *([] if is_trained else ["encoder_pretraining/seed0"])]
        assert sorted(step.name for step in steps[:-2]) == required
        assert [sorted({*step.needs}) for step in steps[-2:]] == [required, required]
        assert all(f"--model.init_args.encoder.checkpoint={encoder}" in step.arguments for step in steps[-2:])
        Path(encoder).parent.mkdir(parents=True, exist_ok=True)
        Path(encoder).touch()


def test_only_unfinished_combinations_run(folder, runs):
    single = {"METHOD": {"value": "linear"}, "EPOCHS": {"values": [1]}}
    assert sweep.main([str(write_sweep(folder, parameters=single))]) == 0
    wider = single | {"EPOCHS": {"values": [2, 1]}}
    assert sweep.main([str(write_sweep(folder, parameters=wider))]) == 0
    assert [epochs for _, epochs, _ in runs] == ["1", "2"]
    assert [row[0] for row in read_rows(folder)[2:]] == ["2", "1"]
    path = write_sweep(folder, metric={"name": "val/accuracy", "goal": "minimize"}, parameters=wider)
    assert sweep.main([str(path)]) == 0
    assert [row[0] for row in read_rows(folder)[2:]] == ["1", "2"]
    assert len(runs) == 2


def test_failed_run_does_not_stop_the_others_and_is_retried(folder, runs, capfd):
    path = write_sweep(folder, parameters={"METHOD": {"value": "linear"}, "EPOCHS": {"values": [3, 1]}})
    assert sweep.main([str(path)]) == 1
    assert read_rows(folder)[2:] == [["1", "0.2500", "4"], ["3", "exit code 6", ""]]
    err = capfd.readouterr().err
    assert "1 of 2 combinations have no result" in err
    assert "METHOD=linear EPOCHS=3: exit code 6" in err
    (folder / "mended").touch()
    assert sweep.main([str(path)]) == 0
    assert [epochs for _, epochs, _ in runs] == ["3", "1", "3"]
    assert [row[0] for row in read_rows(folder)[2:]] == ["3", "1"]


def test_a_run_without_the_metric_fails(folder, runs, capfd):
    parameters = {"METHOD": {"value": "linear"}, "EPOCHS": {"value": 1}}
    assert (
        sweep.main([str(write_sweep(folder, parameters=parameters, metric={"name": "val/recall", "goal": "maximize"}))])
        == 1
    )
    assert "its results.json has no val/recall" in capfd.readouterr().err


@pytest.mark.slow
def test_offline_sweep_trains_and_a_signal_stops_the_current_run(folder, fit):
    """Real processes: one combination finishes, the next is stopped, and the log says how to resume."""
    words = [word for word in fit("linear") if word.startswith("--") and "config" not in word]
    replaced = ("trainer.default_root_dir", "data.init_args.root", "data.init_args.cache_dir", "data.init_args.vocab",
              "trainer.max_epochs")  # fmt: skip
    options = " ".join(word for word in words if not word[2:].startswith(replaced))
    root = next(word.partition("=")[2] for word in words if word.startswith("--data.init_args.root="))
    command = ["make", "train", "${args_no_hyphens}", "DATASET=msvd", f"DATA={root}", f"VOCAB={root}/vocab.txt",
               "METHOD=linear", f"ARGS={options}", "CACHE=frames"]  # fmt: skip
    path = write_sweep(folder, parameters={"EPOCHS": {"values": [1, 2000]}}, command=command)
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-m", "cdc_mmpg", "sweep", str(path)], stdout=file, stderr=file,
                                   env=ENVIRONMENT | {"WANDB_MODE": "disabled"})  # fmt: skip
    end = time.monotonic() + 200
    while not list(folder.glob("checkpoints/sweeps/own-*/2000-*/msvd/linear/seed0/resume/*.ckpt")):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(100) == 128 + signal.SIGTERM
    assert "run the same command again" in log.read_text()
    assert [row[0] for row in read_rows(folder)[2:]] == ["1"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"method": "random"}, "method is 'random', which needs W&B's server"),
        ({"method": "bayes"}, "method is 'bayes', which needs W&B's server"),
        ({"early_terminate": {"type": "hyperband"}}, "early_terminate needs W&B's server"),
        ({"metric": "val/accuracy"}, "metric is 'val/accuracy': it needs a name"),
        ({"metric": {"name": "val/accuracy", "goal": "maximise"}}, "metric.goal is 'maximise': use maximize or"),
        ({"metrics": {}}, "the key 'metrics' is unknown"),
        (
            {"parameters": {"PRECISION": {"min": 0, "max": 1}}},
            "parameters.PRECISION is {'min': 0, 'max': 1}: a grid needs",
        ),
        ({"parameters": {"PRECISION": 3}}, "parameters.PRECISION is 3: a grid needs"),
        ({"parameters": {"PRECISION": {"values": []}}}, "parameters.PRECISION is {'values': []}: a grid needs"),
        ({"parameters": {}}, "parameters is {}"),
        ({"parameters": {"rate": {"value": 1}}}, "parameters.rate: `make train` reads no such variable"),
        ({"parameters": {"OUT": {"value": 1}}}, "parameters.OUT is not allowed: every run has a separate folder"),
        ({"parameters": {"SEEDS": {"value": 3}}}, "parameters.SEEDS is not allowed"),
        ({"parameters": {"METHOD": {"values": ["all"]}}}, "parameters.METHOD is 'all'"),
        ({"command": "make train ${args_no_hyphens}"}, "a list of words"),
        ({"command": ["make", "train", "${args}"]}, "command must contain ${args_no_hyphens} once"),
        ({"command": ["python", "own.py", "${args_no_hyphens}"]}, "without W&B's server only `make train` is run"),
        ({"parameters": {"EPOCHS": {"value": 1}}}, "METHOD must be one method"),
        ({"command": ["make", "train", "${args_no_hyphens}", "SEEDS=3"]}, "SEED replaces SEEDS"),
        ({"command": ["make", "train", "${args_no_hyphens}", "EPOCHS=3"]}, "EPOCHS is both a parameter and in the"),
        (
            {"parameters": {"METHOD": {"value": "linear"}, "DEVICES": {"values": [1, 2]}}},
            "parameters.DEVICES is not allowed: all runs share the machine",
        ),
        ({"parameters": {"METHOD": {"value": "linaer"}}}, "METHOD=linaer: no such method or variant; did you mean"),
    ],
)
def test_wrong_sweep_files_are_refused_with_key_and_file(folder, changed, message, capfd):
    assert sweep.main([str(write_sweep(folder, **changed))]) == 2
    err = capfd.readouterr().err
    assert message in err
    assert "own.yaml" in err or "METHOD=" in err
    assert "Traceback" not in err
    assert not (folder / "checkpoints").exists()


def test_unreadable_sweep_files_are_refused(folder, capfd):
    for name, content, message in (("absent", None, "No such file"), ("not", "a: [", "is not YAML"),
                                   ("list", "- a", "has no keys"), ("empty", "method: grid", "'metric' is missing"),
                                   ("bytes", b"\xff\xfe\xff", "cannot be read")):  # fmt: skip
        path = folder / f"{name}.yaml"
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        assert sweep.main([str(path)]) == 2
        err = capfd.readouterr().err
        assert message in err
        assert f"{name}.yaml" in err


@pytest.mark.slow
def test_the_provided_sweep_runs_make_and_parses(tmp_path):
    """The commands of `make -n` for every combination parse against the real signatures."""
    spec = sweep.read_sweep(Path("experiments/sweep.yaml"))
    combinations = sweep.expand_grid(spec)
    assert (spec.metric, spec.maximises, spec.config["method"]) == ("val/accuracy", True, "grid")
    assert len({sweep.name_folder(combination) for combination in combinations}) == len(combinations) >= 6
    assert len({combination["METHOD"] for combination in combinations}) >= 2
    from cdc_mmpg.models.all_in_one import AllInOne
    from cdc_mmpg.models.weights import save_safetensors
    from cdc_mmpg.training.experiment import Experiment

    encoder = tmp_path / "encoder.safetensors"
    folders = set()
    for combination in combinations:
        words = [f"{name}={value}" for name, value in combination.items()]
        command = [*spec.command[:2], "-n", *words, *spec.command[3:]]
        environment = ENVIRONMENT | {"WANDB_SWEEP_ID": "sw", "WANDB_RUN_ID": sweep.name_folder(combination)}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        lines = [shlex.split(line) for line in done.stdout.splitlines() if "-m cdc_mmpg fit" in line]
        (arguments,) = [line[line.index("fit") + 1 :] for line in lines]  # one run per combination
        options = dict(word.split("=", 1) for word in arguments if word.startswith("--") and "=" in word)
        folders.add(options["--trainer.default_root_dir"])
        pretrained = options["--model.init_args.encoder.checkpoint"]
        assert pretrained == "checkpoints/synthetic/encoder_pretraining/seed0/encoder.safetensors"
        assert options["--data.init_args.cache_dir"] == "checkpoints/synthetic/data"  # as `make train` has it
        arguments = [word.replace(pretrained, str(encoder)) for word in arguments]
        if not encoder.exists():
            save_safetensors(AllInOne(image_size=64, depth=3, text_length=24, vocab_size=30522).state_dict(), encoder)
        arguments = [word for word in arguments if not word.startswith("--data.init_args.vocab=")]
        experiment = Experiment(arguments, run=False)
        assert f"learning_rate={experiment.model.learning_rate}" in combination["ARGS"]
        assert str(experiment.trainer.max_epochs) == combination["EPOCHS"]
    assert len(folders) == len(combinations)
    assert all(folder.startswith("checkpoints/sweeps/sw/") for folder in folders)


# With a server


@pytest.mark.slow
def test_server_receives_every_run_of_a_command_with_its_results(fit, tmp_path):
    with serve() as server:
        overfitting = fit("linear", "--trainer.max_epochs=6", "--model.init_args.learning_rate=0.01")
        command = [*overfitting, "--", *fit("hyper")]
        assert finish(start(tmp_path / "log", run_online, command, server.url)) == 0, (tmp_path / "log").read_text()
    assert len(server.begun) == len(server.summaries) == 2
    for method, (run, begun) in zip(("linear", "hyper"), server.begun.items(), strict=True):
        folder = tmp_path / "msvd" / method / "seed0"
        results, summary = json.loads((folder / "results.json").read_text()), server.summaries[run]
        assert (folder / "wandb" / "id").read_text() == run
        assert (begun["project"], begun["displayName"]) == ("cdc-mmpg", f"msvd/{method}/seed0")
        assert (begun["groupName"], begun["jobType"]) == (f"msvd/{method}", "train")
        assert set(begun["tags"]) == {"msvd", method, "seed0"}
        assert summary["val/accuracy"] == results["metrics"]["val/accuracy"]  # the value of the best epoch
        assert summary["test/loss"] == results["metrics"]["test/loss"]
        assert summary["test/own/test"] == results["accuracy"]["own"]["test"]["all"]["value"]
        assert (summary["best_epoch"], summary["bytes/up"]) == (results["best_epoch"], results["bytes"]["up"])
        assert summary["parameters/device"] == results["parameters"]["device"]
        logged = [row for row in server.histories[run] if "val/accuracy" in row]
        assert [row["trainer/global_step"] for row in logged] == ([2, 5, 8, 11, 14, 17] if method == "linear" else [2])
        if method == "linear":
            assert logged[-1]["val/accuracy"] < summary["val/accuracy"], "choose a run whose best epoch is not its last"
        for split in ("val", "test"):
            assert any(name.startswith(f"run-{run}-{split}examples") for name in server.list_artifacts("run_table"))
    assert "environment variables will be ignored" not in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_unresponsive_server_delays_the_run_by_seconds_only(fit, tmp_path):
    with serve(silent=True) as server:
        process = start(tmp_path / "log", run_online, fit("linear"), server.url)
        assert finish(process) == 0, (tmp_path / "log").read_text()
        assert len(server.begun) == 1
        assert not server.summaries
    folder = tmp_path / "msvd" / "linear" / "seed0"
    assert (folder / "results.json").exists()
    assert list(folder.glob("wandb/run-*/*.wandb"))  # for `wandb sync`


@pytest.mark.slow
def test_agent_run_is_the_requested_method_not_its_prerequisites(fit, tmp_path):
    (tmp_path / "parameters.yaml").write_text("METHOD:\n  value: linear\n")
    environment = {"WANDB_SWEEP_ID": "sweep1", "WANDB_RUN_ID": "of_the_agent", "METHOD": "linear",
              "WANDB_SWEEP_PARAM_PATH": str(tmp_path / "parameters.yaml")}  # fmt: skip
    with serve() as server:
        command = [*fit("adr_pretraining"), "--", *fit("linear")]
        process = start(tmp_path / "log", run_in_agent, command, server.url, environment)
        assert finish(process) == 0, (tmp_path / "log").read_text()
    prerequisite, requested = server.begun.values()
    assert prerequisite["sweep"] is None
    assert prerequisite["name"] == (tmp_path / "msvd" / "adr_pretraining" / "seed0" / "wandb" / "id").read_text()
    assert (requested["name"], requested["sweep"]) == ("of_the_agent", "sweep1")
    assert server.summaries["of_the_agent"]["val/accuracy"] >= 0
    assert "METHOD" in requested["config"]


def run_in_agent(command: list[str], url: str, environment: dict[str, str]) -> int:
    return run_online(command, url, **environment)


def start_sweep(fit, folder: Path, url: str, options: str) -> tuple[dict[str, object], subprocess.Popen]:
    """Start a sweep of one method on a server, in a folder whose Makefile runs a tiny training."""
    shutil.copytree(ROOT / "experiments", folder / "experiments")
    (folder / "data_modules").symlink_to(ROOT / "data_modules")
    words = [word for word in fit("linear") if not word.startswith("--trainer.default_root_dir")]
    line = " ".join(shlex.quote(word) for word in words)
    output_option = "--trainer.default_root_dir=$(OUT)/msvd/$(METHOD)/seed0"
    (folder / "Makefile").write_text(f"train:\n\texec {sys.executable} -m cdc_mmpg {line} {output_option} $(ARGS)\n")
    config = {"name": "own", "method": "random", "metric": {"name": "val/accuracy", "goal": "maximize"},
              "project": "cdc-mmpg", "parameters": {"METHOD": {"value": "linear"}, "ARGS": {"values": [options]}},
              "command": ["make", "train", "${args_no_hyphens}",
                          "OUT=sweeps/$(WANDB_SWEEP_ID)/$(WANDB_RUN_ID)"]}  # fmt: skip
    (folder / "own.yaml").write_text(yaml.safe_dump(config))
    environment = {key: value for key, value in os.environ.items() if key != "WANDB_MODE"}
    environment |= {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40, "MAKEFLAGS": " -- ARGS=--wrong"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "cdc_mmpg", "sweep", "own.yaml"], cwd=folder,
                                   env=environment, stdout=log, stderr=log)  # fmt: skip
    return config, process


@pytest.mark.slow
def test_sweep_with_a_key_runs_through_the_wandb_agent(fit, tmp_path):
    """W&B's client registers the sweep, and its agent runs `make`, which logs the run."""
    rate = "--model.init_args.learning_rate=0.5"
    with serve(commands={"run1": {"METHOD": "linear", "ARGS": rate}}) as server:
        config, process = start_sweep(fit, tmp_path, server.url, rate)
        assert process.wait(280) == 0, (tmp_path / "log").read_text()
    assert server.sweeps == [config]
    (begun,) = server.begun.values()
    assert (begun["name"], begun["sweep"]) == ("run1", "sweep1")
    folder = tmp_path / "sweeps" / "sweep1" / "run1" / "msvd" / "linear" / "seed0"
    results = json.loads((folder / "results.json").read_text())
    assert rate in results["arguments"]
    assert server.summaries["run1"]["val/accuracy"] == results["metrics"]["val/accuracy"]
    created = {path.name for path in tmp_path.iterdir()}
    assert created <= {
        "Makefile",
        "data_modules",
        "experiments",
        "own.yaml",
        "sweeps",
        "checkpoints",
        "msvd",
        "msvd0",
        "log",
    }


@pytest.mark.slow
def test_signal_reaches_the_run_of_the_agent_which_saves(fit, tmp_path):
    many_epochs = "--trainer.max_epochs=5000"
    with serve(commands={"run1": {"METHOD": "linear", "ARGS": many_epochs}}) as server:
        _, process = start_sweep(fit, tmp_path, server.url, many_epochs)
        end = time.monotonic() + 200
        while not list(tmp_path.rglob("resume/*.ckpt")):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < end
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 143, (tmp_path / "log").read_text()
    log = (tmp_path / "log").read_text()
    assert "`wandb agent --project=cdc-mmpg sweep1` continues this sweep" in log
    assert "stopped by SIGTERM" in log
    assert "Traceback" not in log
    assert list(tmp_path.rglob("resume/*.ckpt"))


@pytest.mark.slow
def test_each_gpu_has_an_agent(folder):
    """Each of two runs waits until the other runs, too, on another GPU."""
    wait = "for i in `seq 900`; do [ `ls gpus | wc -l` = 2 ] && exit 0; sleep 0.1; done; exit 1"
    (folder / "Makefile").write_text(f"train:\n\tmkdir -p gpus && touch gpus/$$CUDA_VISIBLE_DEVICES && {wait}\n")
    path = write_sweep(folder, parameters={"METHOD": {"values": ["linear", "hyper"]}})
    with serve(commands={"run1": {"METHOD": "linear"}, "run2": {"METHOD": "hyper"}}) as server:
        environment = {key: value for key, value in ENVIRONMENT.items() if key != "WANDB_MODE"}
        environment |= {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40, "CUDA_VISIBLE_DEVICES": "6,7"}
        done = subprocess.run([sys.executable, "-m", "cdc_mmpg", "sweep", str(path)], env=environment, check=False,
                              capture_output=True, text=True, timeout=280)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (folder / "gpus").iterdir()) == ["6", "7"]
    assert not server.commands


def test_sweep_refused_by_the_server_names_the_remedy(folder):
    with serve(known=False) as server:
        environment = os.environ | {"WANDB_MODE": "online", "WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40}
        done = subprocess.run([sys.executable, "-m", "cdc_mmpg", "sweep", str(write_sweep(folder))], env=environment,
                              capture_output=True, text=True, check=False, timeout=280)  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "WANDB_MODE=offline runs the grid without it" in done.stderr
    assert "Traceback" not in done.stderr


def test_grid_of_variables_that_make_does_not_read_is_refused(folder):
    with pytest.raises(ConfigError, match="`make table` reads no such variable"):
        sweep.read_sweep(write_sweep(folder, command=["make", "table", "${args_no_hyphens}"]))
