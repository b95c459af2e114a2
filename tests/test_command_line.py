"""The command line on small real files: every method, the table, prediction, W&B, and invalid input."""

import csv
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from cdc_mmpg import catalogue, load
from cdc_mmpg.commands import predict
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.evidence.selection import load_comparable
from cdc_mmpg.models.weights import load_checkpoint
from cdc_mmpg.report import tables
from cdc_mmpg.report.method_table import build_method_table
from cdc_mmpg.training import wandb_record as dashboard
from cdc_mmpg.training.cli import main
from conftest import write_clip
from processes import finish, run_separate_test, start

METHODS = ("linear", "fine_tuning", "hyper", "hyper_fan_in", "cdc_mmpg", "cdc_mmpg_frozen")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return a folder of runs, which the tests below fill in their order."""
    return tmp_path_factory.mktemp("finished")


@pytest.mark.parametrize("method", ["adr_pretraining", *METHODS])
def test_a_run_writes_its_results_and_is_not_repeated(method, fit, finished):
    command = fit(method, "--trainer.max_epochs=2", "--trainer.log_every_n_steps=1", out=finished)
    assert main(command) == 0
    folder = finished / "msvd" / method / "seed0"
    results = json.loads((folder / "results.json").read_text())
    assert (results["dataset"], results["method"], results["seed"]) == ("msvd", method, 0)
    assert results["questions"] == {"train": 12, "val": 4, "test": 8}
    assert (results["classes"], results["epochs"]) == (5, 2)
    generates = method in METHODS[2:]
    assert results["bytes"] == ({"up": 768, "down": 4 * 5 * 97} if generates else {"up": 0, "down": 0})
    assert results["parameters"]["trained"] > 0
    assert results["reasoner"] == ("small" if "adr" in method or "cdc" in method else None)
    assert results["seconds"]["train"] > 0
    assert {"commit", "versions", "arguments", "finished", "data"} <= results.keys()
    for name in ("val", "test"):
        metric = f"{name}/{'loss' if method == 'adr_pretraining' else 'accuracy'}"
        assert results["metrics"][metric] >= 0
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["max_epochs"] == 2
    best = load_checkpoint(folder / "best.ckpt")
    assert best["epoch"] == results["best_epoch"]
    assert "optimizer_states" not in best
    assert not (folder / "resume").exists()
    assert list(folder.glob("logs/version_0/metrics.csv"))
    expected_files = {"linear": set(), "hyper": set(), "hyper_fan_in": set(), "fine_tuning": {"encoder.safetensors"}}
    assert {path.name for path in folder.glob("*.safetensors")} == expected_files.get(method, {"adr.safetensors"})
    times_before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    cpu_seconds_before = time.process_time()
    assert main(command) == 0
    assert times_before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert time.process_time() - cpu_seconds_before < 5


def test_the_logs_contain_the_metrics(finished):
    text = (finished / "msvd" / "fine_tuning" / "seed0" / "logs" / "version_0" / "metrics.csv").read_text()
    for name in ("train/loss", "val/accuracy", "val/loss", "test/accuracy", "lr-AdamW"):
        assert name in text.splitlines()[0]


def test_the_best_epoch_is_the_one_that_was_tested(fit, tmp_path):
    """The weights in best.ckpt, of an earlier epoch, give the loss that results.json reports."""
    command = fit("linear", "--trainer.max_epochs=6", "--model.init_args.learning_rate=1.0", out=tmp_path)
    assert main(command) == 0
    folder = tmp_path / "msvd" / "linear" / "seed0"
    results = json.loads((folder / "results.json").read_text())
    (log,) = folder.glob("logs/version_0/metrics.csv")
    with log.open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/accuracy"]]
    scores = [float(row["val/accuracy"]) for row in rows]
    best = scores.index(max(scores))
    assert best < 5, "choose a run whose best epoch is not its last"
    assert results["best_epoch"] == best
    assert results["metrics"]["val/accuracy"] == pytest.approx(max(scores))
    assert run_separate_test(folder, tmp_path)["loss"] == pytest.approx(results["metrics"]["test/loss"], abs=1e-4)


def test_the_table_compares_the_methods(finished, capsys):
    assert tables.main([str(finished / "msvd")]) == 0
    printed = capsys.readouterr().out
    table = (finished / "msvd" / "table.md").read_text()
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")]
    by_label = {row[0].strip("| "): row for row in rows[2:]}
    assert [label for label in by_label if label in catalogue.METHOD_LABELS.values()] == [
        catalogue.METHOD_LABELS[name] for name in METHODS
    ]
    for method in METHODS:
        row = by_label[catalogue.METHOD_LABELS[method]]
        results = json.loads((finished / "msvd" / method / "seed0" / "results.json").read_text())
        assert row[1].startswith(f"{100 * results['metrics']['test/accuracy']:.1f} [")
        assert row[rows[0].index("D-Param")] == f"{results['parameters']['device']:,}"
        assert f"{results['parameters']['cloud']:,}" in printed
    assert "35.4" not in table  # the paper's accuracy, which is over all questions
    assert "Not the published files" in table
    assert "8 test questions" in table
    assert "random weights" in table


def test_the_table_of_an_empty_folder_says_what_to_do(tmp_path, capsys):
    assert tables.main([str(tmp_path)]) == 2
    assert "make train" in capsys.readouterr().err


def test_the_table_gives_the_spread_over_seeds(finished, tmp_path):
    source = json.loads((finished / "msvd" / "linear" / "seed0" / "results.json").read_text())
    for seed, accuracy in enumerate((0.2, 0.4)):
        folder = tmp_path / "msvd" / "linear" / f"seed{seed}"
        folder.mkdir(parents=True)
        source["accuracy"]["own"]["test"]["all"]["value"] = accuracy
        (folder / "results.json").write_text(json.dumps(source))
    table = {row[0]: row for row in build_method_table(load_comparable(tmp_path / "msvd")).texts()}
    assert table["F-linear"][1] == "30.0 ± 14.1"


@pytest.mark.parametrize("method", ["linear", "cdc_mmpg"])
def test_prediction_works_for_any_clip(method, finished, tmp_path, capsys):
    clip = write_clip(tmp_path / "own.mp4", codec="libx264")
    run = finished / "msvd" / method / "seed0"
    assert predict.main([f"--run={run}", f"--video={clip}", "--question=what is the man doing?"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert {line.split()[1] for line in lines} == {"red", "green", "blue", "man", "(unknown)"}
    assert sum(float(line.split("%")[0]) for line in lines) == pytest.approx(100, abs=0.3)


def test_prediction_refuses_unusable_input(finished, tmp_path, capsys):
    run = finished / "msvd" / "linear" / "seed0"
    assert predict.main([f"--run={run}", "--video=absent.mp4", "--question=what?"]) == 3
    assert "absent.mp4: no such clip" in capsys.readouterr().err
    clip = write_clip(tmp_path / "own.mp4", codec="libx264")
    assert predict.main([f"--run={tmp_path}", f"--video={clip}", "--question=what?"]) == 4
    assert "not a finished run" in capsys.readouterr().err
    phase_one = finished / "msvd" / "adr_pretraining" / "seed0"
    assert predict.main([f"--run={phase_one}", f"--video={clip}", "--question=what?"]) == 2
    assert "adr_pretraining answers no questions" in capsys.readouterr().err
    assert predict.main([f"--run={run}", f"--video={clip}", "--question= "]) == 2
    assert "the question is empty" in capsys.readouterr().err
    assert predict.main([f"--run={run}", f"--video={clip}", "--question=what?", "--choices=red | blue"]) == 2
    assert "give no choices" in capsys.readouterr().err
    assert predict.main([f"--run={run}", f"--video={tmp_path}", "--question=what?"]) == 3
    assert "a folder, not a clip" in capsys.readouterr().err


def test_prediction_matches_the_test_of_the_same_sample(finished, msvd):
    """A clip's file with an explicit layer, and the loader with a contraction, give the same scores."""
    run = finished / "msvd" / "cdc_mmpg" / "seed0"
    from cdc_mmpg.training.experiment import Experiment

    experiment = Experiment(["--config", str(run / "config.yaml")], run=False)
    data, model = experiment.dataset, experiment.model.eval()
    model.load_state_dict(load_checkpoint(run / "best.ckpt")["state_dict"])
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    with torch.no_grad():
        scores = model(model.encode(batch).frame_features).softmax(-1)[0]
    clip = msvd / "YouTubeClips" / "t_0_1.avi"
    answers = dict(load(run).answer(clip, data.example("test", 0).question))
    for word, label in zip(data.answers(), range(4), strict=True):
        assert answers[word] == pytest.approx(scores[label].item(), abs=1e-5)


def test_a_split_smaller_than_the_processes_is_refused(msvd, tmp_path):
    from data_modules.msvd_qa import MSVDQA

    data = MSVDQA(
        str(msvd), str(tmp_path), 5, image_size=32, batch_size=5, num_workers=0, vocab=str(msvd / "vocab.txt")
    )
    data.prepare_data()
    data.setup("fit")
    data.trainer = SimpleNamespace(world_size=5, global_rank=0)
    with pytest.raises(ConfigError, match="4 samples cannot be divided among 5 processes"):
        data.val_dataloader()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("model: {init_args: {encoder: {dept: 2}}}", "model.init_args.encoder.dept: there is no such key; the nearest"),
        ("modle: {init_args: {encoder: {depth: 2}}}", "that exists is model.init_args.encoder.depth"),
        (
            "data:\n  init_args:\n    resize 64\n    batch_size: 8",
            "mine.yaml: not a configuration (mapping values are not",
        ),
    ],
)
def test_bad_configurations_are_refused_with_their_place(content, message, fit, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(content)
    assert main([*fit("linear"), f"--config={tmp_path / 'mine.yaml'}"]) == 2
    captured = capsys.readouterr().err
    assert message in captured, captured
    assert "Traceback" not in captured


@pytest.mark.parametrize(
    ("argument", "message", "code"),
    [
        ("--model.init_args.learnin_rate=1", "the nearest that exists is model.init_args.learning_rate", 2),
        ("--data.init_args.batchsize=3", "data.init_args.batchsize: there is no such key; the nearest", 2),
        ("--trainer.max_epoch=3", "the nearest that exists is trainer.max_epochs", 2),
        ("--model.init_args.encoder.depht=3", "the nearest that exists is model.init_args.encoder.depth", 2),
        ("--model.init_args.head.init_args.hiden=3", "that exists is model.init_args.head.init_args.hidden", 2),
        ("--model.init_args.zzqqxx=1", "model.init_args.zzqqxx: there is no such key, and no similar one", 2),
        ("--only_present=true", "the nearest that exists is data.init_args.only_present", 2),
        ("--seed=3", "the nearest that exists is seed_everything", 2),
        ("--modl.init_args.learning_rate=1", "the nearest that exists is model.init_args.learning_rate", 2),
        ("--data.init_args.batch_size=many", "batch_size", 2),
        ("--data.init_args.batch_size=0", "batch_size is 0: must be at least 1", 2),
        ("--data.init_args.image_size=100", "image_size 100 is not a multiple of 16", 2),
        ("--data.init_args.decoder=opencv", "decoder", 2),
        ("--model.init_args.learning_rate=nan", "learning_rate", 2),
        ("--trainer.max_epochs=0", "max_epochs must be at least 1", 2),
        ("--trainer.accelerator=gpu", "No supported gpu backend", 2),
        ("--data.init_args.num_classes=9", "num_classes=5", 3),
        ("--data.init_args.root=/nowhere", "/nowhere: no such folder", 3),
        ("--data.init_args.vocab=/nowhere/vocab.txt", "VOCAB= must name a file", 3),
        ("--model.init_args.encoder.checkpoint=/nowhere/x.ckpt", "CHECKPOINT= must name a file", 4),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_with_the_remedy(argument, message, code, fit, tmp_path, capsys):
    if "gpu" in argument and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert main([*fit("linear"), argument]) == code
    captured = capsys.readouterr().err
    assert message in captured, captured
    assert "Traceback" not in captured
    assert main(["check", *fit("linear")]) == 0, "the folder must be free for the corrected command"


def test_a_bad_root_is_refused_before_anything_slow_is_imported(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name, reason in (("empty", "an empty folder"), ("file", "a file"), ("absent", "no such folder")):
        code = (
            "import sys; from cdc_mmpg.training.cli import main; "
            "code = main(['fit', '--config=experiments/datasets/msvd.yaml', "
            f"'--data.init_args.root={tmp_path / name}']); "
            "assert 'torch' not in sys.modules; sys.exit(code)"
        )
        completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert completed.returncode == 3, completed.stderr
        assert reason in completed.stderr
        assert "YouTubeClips" in completed.stderr  # what to fetch, and where from
        assert "https://" in completed.stderr


def test_a_checkpoint_of_another_shape_or_with_code_is_refused(fit, tmp_path, capsys):
    torch.save({"state_dict": {"transformer.cls_token": torch.zeros(1, 1, 7)}}, tmp_path / "other.ckpt")
    assert main([*fit("linear"), f"--model.init_args.encoder.checkpoint={tmp_path / 'other.ckpt'}"]) == 4
    assert "other.ckpt lacks" in capsys.readouterr().err
    (tmp_path / "bomb.ckpt").write_bytes(b"cos\nsystem\n(S'touch exploded'\ntR.")
    assert main([*fit("linear"), f"--model.init_args.encoder.checkpoint={tmp_path / 'bomb.ckpt'}"]) == 4
    assert not Path("exploded").exists()


def test_a_run_starts_from_a_checkpoint(fit, finished, tmp_path, caplog):
    encoder = finished / "msvd" / "fine_tuning" / "seed0" / "encoder.safetensors"
    assert main([*fit("linear"), f"--model.init_args.encoder.checkpoint={encoder}"]) == 0
    results = json.loads((tmp_path / "msvd" / "linear" / "seed0" / "results.json").read_text())
    assert results["encoder"] == str(encoder)
    assert "no CHECKPOINT" not in caplog.text


def test_without_a_checkpoint_a_warning_says_what_that_means(fit, caplog):
    assert main(fit("linear")) == 0
    assert "no CHECKPOINT: the encoder starts from random weights" in caplog.text


def test_phase_two_refuses_an_absent_checkpoint_of_phase_one(fit, tmp_path, capsys):
    assert main([*fit("cdc_mmpg"), "--model.init_args.adr=absent.safetensors"]) == 4
    assert "absent.safetensors: no such checkpoint" in capsys.readouterr().err


def run_offline(command: list[str]) -> int:
    os.environ["WANDB_MODE"] = "offline"
    return main(command)


def test_wandb_writes_examples_and_results_into_the_folder_of_each_run(fit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").symlink_to(Path(__file__).parents[1] / "experiments")
    command = [*fit("fine_tuning", out=tmp_path / "out"), "--", *fit("linear", out=tmp_path / "out")]
    assert finish(start(tmp_path / "log", run_offline, command)) == 0, (tmp_path / "log").read_text()
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "log", "experiments", "msvd", "msvd0"}
    for method, other in (("fine_tuning", "linear"), ("linear", "fine_tuning")):
        folder = tmp_path / "out" / "msvd" / method / "seed0"
        (run,) = folder.glob("wandb/offline-run-*")
        assert run.name.endswith((folder / "wandb" / "id").read_text())
        content = (run / f"run-{run.name.rpartition('-')[2]}.wandb").read_bytes()
        assert b"test/own/test" in content  # of the results, in the run's summary
        # A run's name follows its length; the recorded command also contains both names, within longer paths.
        name, other_name = (f"msvd/{run_method}/seed0".encode() for run_method in (method, other))
        assert bytes([len(name)]) + name in content
        assert bytes([len(other_name)]) + other_name not in content
        logged = [json.loads(path.read_text()) for path in run.rglob("*.table.json")]
        assert ("frames", "clip", "question", "prediction", "answer") in {tuple(table["columns"]) for table in logged}
        assert any(row[1] == "t_0_1" for table in logged for row in table["data"])


@pytest.mark.slow
def test_a_silent_wandb_server_only_delays_a_run(fit, tmp_path):
    """The server accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        process = start(tmp_path / "log", run_online, fit("linear", out=tmp_path / "out"), f"http://127.0.0.1:{port}")
        assert finish(process) == 0, (tmp_path / "log").read_text()
    assert "W&B cannot be used" in (tmp_path / "log").read_text()
    assert (tmp_path / "out" / "msvd" / "linear" / "seed0" / "results.json").exists()


def run_online(command: list[str], server: str) -> int:
    dashboard.PATIENCE_SECONDS = 3
    os.environ |= {"WANDB_MODE": "online", "WANDB_BASE_URL": server, "WANDB_API_KEY": "0" * 40}
    return main(command)


def test_examples_cover_the_whole_split(finished):
    folder = finished / "msvd" / "cdc_mmpg" / "seed0"
    with (folder / "examples.test.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["clip"] for row in rows} == {"t_0_1", "u_0_9"}
    assert all(row["prediction"] in {"red", "green", "blue", "man", "(unknown)"} for row in rows)


@pytest.mark.slow
def test_the_real_clips_at_the_papers_size(real, tmp_path):
    """One clip of each split of MSVD-QA gives the counts and bytes of the full-sized model with 1,001 classes."""
    root = tmp_path / "one_of_each"
    (root / "YouTubeClips").mkdir(parents=True)
    for path in (real / "msvd").iterdir():
        if path.is_file():
            (root / path.name).symlink_to(path)
    from data_modules.msvd_qa import MSVDQA

    data = MSVDQA(str(root), str(tmp_path), 1001)
    available, question_counts = {path.stem: path for path in (real / "msvd" / "YouTubeClips").iterdir()}, {}
    for split in ("train", "val", "test"):
        clips = [sample.clip for sample in data.read_split(split) if sample.clip in available]
        fewest = min(set(clips), key=lambda clip: (clips.count(clip), clip))
        question_counts[split] = clips.count(fewest)
        (root / "YouTubeClips" / available[fewest].name).symlink_to(available[fewest])
    run, vocab = tmp_path / "msvd" / "hyper" / "seed0", real.parent / "vocab" / "vocab.txt"
    command = ["fit", "--config=experiments/methods/hyper.yaml", "--config=experiments/datasets/msvd.yaml",
               f"--trainer.default_root_dir={run}", f"--data.init_args.root={root}",
               f"--data.init_args.cache_dir={tmp_path / 'data'}", f"--data.init_args.vocab={vocab}",
               "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false",
               "--data.init_args.only_present=true", "--data.init_args.batch_size=32"]  # fmt: skip
    assert main(command) == 0
    results = json.loads((run / "results.json").read_text())
    assert results["questions"] == question_counts
    assert results["classes"] == 1001
    assert results["parameters"]["device"] == 11_546_921
    assert results["parameters"]["cloud"] == 18_739_721
    assert results["bytes"]["down"] == 388_388


def test_disabled_wandb_writes_no_files(fit, tmp_path):
    assert main(fit("linear")) == 0
    assert not list(tmp_path.rglob("wandb"))


def test_several_commands_in_one_process_give_the_results_of_separate_ones(fit, tmp_path):
    separate_commands = [fit(method, out=tmp_path / "once") for method in ("linear", "hyper")]
    pair = [fit(method, out=tmp_path / "both") for method in ("linear", "hyper")]
    for command in separate_commands:
        assert finish(start(tmp_path / "log", main, command)) == 0, (tmp_path / "log").read_text()
    assert finish(start(tmp_path / "log", main, [*pair[0], "--", *pair[1], "--"])) == 0, (tmp_path / "log").read_text()
    for method in ("linear", "hyper"):
        separate, joint = (
            json.loads((tmp_path / out / "msvd" / method / "seed0" / "results.json").read_text())
            for out in ("once", "both")
        )
        assert joint["accuracy"] == separate["accuracy"]
        assert joint["metrics"] == separate["metrics"]
        assert joint["method"] == method


def test_a_failing_command_stops_the_following_ones(fit, tmp_path):
    invalid, valid = fit("linear", "--trainer.max_epochs=0", out=tmp_path), fit("hyper", out=tmp_path)
    assert finish(start(tmp_path / "log", main, [*invalid, "--", *valid])) == 2
    assert not (tmp_path / "msvd" / "hyper").exists()
