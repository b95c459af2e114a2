"""Every dataset with every method, from annotation files in their published formats to results; and two processes."""

import csv
import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cdc_mmpg import catalogue
from cdc_mmpg.commands import predict, prepare
from cdc_mmpg.data.batch import FeatureBatch
from cdc_mmpg.errors import DataError
from cdc_mmpg.models.heads import Retrieval
from cdc_mmpg.report import tables
from cdc_mmpg.training.cli import main
from communities import (
    CLIPS,
    build_small,
    write_lines,
    write_msrvtt_choice,
    write_msrvtt_qa,
    write_msrvtt_retrieval,
    write_tgif,
)
from conftest import write_clip
from data_modules.clip_dataset import Sample
from data_modules.msrvtt_choice import MSRVTTChoice
from data_modules.msrvtt_qa import MSRVTTQA
from data_modules.tgif_qa import TGIFAction
from processes import find_lasting_port, finish, kill, run_separate_test, start, start_ranks, wait_until

METHODS = ("linear", "fine_tuning", "hyper", "cdc_mmpg")
WRITERS: dict[str, Callable[[Path], Path]] = {
    "msrvtt": write_msrvtt_qa,
    "tgif": write_tgif,
    "tgif_action": lambda root: write_tgif(root, "action"),
    "tgif_transition": lambda root: write_tgif(root, "transition", "clipbert"),
    "msrvtt_choice": write_msrvtt_choice,
    "msrvtt_retrieval": write_msrvtt_retrieval,
}
OPEN_ENDED = ("msrvtt", "tgif")


@pytest.fixture(scope="module")
def roots(tmp_path_factory) -> dict[str, Path]:
    """Return a folder in the format of each dataset; tests must not change it."""
    return {name: write(tmp_path_factory.mktemp(name)) for name, write in WRITERS.items()}


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """Return the folder of all runs of this module."""
    return tmp_path_factory.mktemp("out")


def data_arguments(dataset: str, root: Path, out: Path) -> list[str]:
    return [
        f"--data.init_args.root={root}", f"--data.init_args.cache_dir={out / dataset / 'data'}",
        f"--data.init_args.vocab={root / 'vocab.txt'}", "--data.init_args.image_size=32",
        "--data.init_args.batch_size=4", "--data.init_args.num_workers=0",
        *(["--data.init_args.num_classes=5"] if dataset in OPEN_ENDED else []),
    ]  # fmt: skip


def build_command(dataset: str, method: str, root: Path, out: Path, phase_one: Path, *more: str) -> list[str]:
    return [
        "fit", f"--config=experiments/methods/{method}.yaml", f"--config=experiments/datasets/{dataset}.yaml",
        f"--trainer.default_root_dir={out / dataset / method / 'seed0'}", *data_arguments(dataset, root, out),
        "--model.init_args.encoder.depth=1", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false",
        "--trainer.accelerator=cpu", *([f"--model.init_args.adr={phase_one}"] if method == "cdc_mmpg" else []), *more,
    ]  # fmt: skip


def run_prepare(dataset: str, root: Path, out: Path, *more: str) -> int:
    return prepare.main([
        str(out / dataset), "--config=experiments/methods/linear.yaml",
        f"--config=experiments/datasets/{dataset}.yaml", *data_arguments(dataset, root, out), *more,
    ])  # fmt: skip


# Questions and clips of train, val and test as `communities` writes them.
COUNTS = {
    "msrvtt": ((40, 10), (24, 6), (24, 6)),
    "tgif": ((36, 18), (4, 2), (8, 4)),
    "tgif_action": ((36, 18), (4, 2), (8, 4)),
    "tgif_transition": ((40, 20), (4, 2), (8, 4)),
    "msrvtt_choice": ((50, 10), (30, 6), (6, 6)),
    "msrvtt_retrieval": ((60, 10), (36, 6), (36, 6)),
}


# Published facts of each test split: what is counted, the published number, and the number in these small files.
TEST_COUNTS = {
    "msrvtt": [("questions", 72_821, 24), ("clips", 2_990, 6)],
    "tgif": [("questions", 13_691, 8)],
    "msrvtt_choice": [("questions", 2_990, 6), ("clips", 2_990, 6)],
    "msrvtt_retrieval": [("questions", 59_800, 36), ("clips", 2_990, 6)],
}


@pytest.mark.parametrize(
    "dataset", [name if name in ("msvd", "tgif") else pytest.param(name, marks=pytest.mark.slow) for name in WRITERS]
)
def test_make_data_prepares_the_clips_and_reports_counts(dataset, roots, out, capsys, caplog):
    assert run_prepare(dataset, roots[dataset], out) == 0
    report = json.loads((out / dataset / "data.json").read_text())
    rows = [report["splits"][split] for split in ("train", "val", "test")]
    assert tuple((row["questions"], row["clips"]) for row in rows) == COUNTS[dataset]
    assert all(row["ready"] == {"questions": row["questions"], "clips": row["clips"]} for row in rows)
    assert report["missing"] == []
    assert report["unreadable"] == report["shared_between_splits"] == {}
    for row in rows:
        assert row["ceiling"] == pytest.approx(1 - row["unknown_answers"] / row["questions"])
    assert (rows[2]["unknown_answers"] > 0) == (dataset in OPEN_ENDED)
    assert {"commit", "versions", "configuration"} <= report.keys()
    printed = capsys.readouterr().out
    assert f"{rows[0]['questions']:,}" in printed
    assert "clips ready, 0 absent" in printed
    assert "not the published splits" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dataset", ["msrvtt_choice", "msrvtt_retrieval", "msrvtt", "tgif"])
def test_every_method_trains_and_is_tested(dataset, method, roots, out, phase_one):
    assert main(build_command(dataset, method, roots[dataset], out, phase_one)) == 0
    folder = out / dataset / method / "seed0"
    results = json.loads((folder / "results.json").read_text())
    assert tuple(results["questions"].values()) == tuple(questions for questions, _ in COUNTS[dataset])
    assert [row for row in results["published"] if row["split"] == "test"] == [
        {"split": "test", "what": unit, "published": number, "here": count, "same": False, "edition": ""}
        for unit, number, count in TEST_COUNTS[dataset]
    ]
    cells = results["accuracy"]["own"]["test"]
    generating = {"own", "mean_head", "float32", "float16", "int8", "shuffled", "shuffled_device"}
    expected = {"linear": {"own"}, "fine_tuning": {"own"}, "hyper": generating}
    assert set(results["accuracy"]) == expected.get(method, generating | {"bypassed"})
    assert all({"value", "standard_error", "questions"} <= cell.keys() for cell in cells.values())
    with (folder / "predictions.test.csv").open() as file:
        rows = list(csv.DictReader(file))
    if dataset == "msrvtt_retrieval":
        assert results["protocol"] == "full"
        assert results["splits"]["test"].endswith("MSRVTT_test.full.csv")
        for direction, queries in (("VR", 6), ("TR", 36)):
            ranks = [int(row["own"]) for row in rows if row["direction"] == direction]
            assert len(ranks) == queries
            for k in (1, 5, 10):
                right = sum(rank <= k for rank in ranks)
                assert cells[f"{direction}@{k}"]["questions"] == queries
                assert cells[f"{direction}@{k}"]["value"] == pytest.approx(right / queries)
                assert results["metrics"][f"test/{direction}@{k}"] == pytest.approx(right / queries)
            assert results["floors"]["chance"]["test"]["TR@1"]["value"] == pytest.approx(1 / 6)
        assert results["classes"] == 256
        return
    right = sum(row["own"] == row["answer"] for row in rows)
    assert cells["all"]["questions"] == len(rows) == COUNTS[dataset][2][0]
    assert cells["all"]["value"] == pytest.approx(right / len(rows))
    assert results["metrics"]["test/accuracy"] == pytest.approx(right / len(rows))
    if dataset == "msrvtt_choice":
        assert results["floors"]["chance"]["test"]["all"]["value"] == pytest.approx(0.2)
        assert results["classes"] == 1
    else:
        assert cells["what"]["questions"] == 6 if dataset == "msrvtt" else cells["color"]["questions"] == 2


@pytest.mark.slow
def test_each_task_has_its_columns_in_the_table(roots, out, capsys):
    for dataset, header in (("msrvtt_choice", "paper %"), ("msrvtt_retrieval", "VR@1 | VR@5"), ("tgif", "location")):
        assert tables.main([str(out / dataset)]) == 0
        table = (out / dataset / "table.md").read_text()
        assert header in table
        assert all(catalogue.METHOD_LABELS[method] in table for method in METHODS)
    assert "| VR median | TR median |" in (out / "msrvtt_retrieval" / "table.md").read_text()
    assert "Not the published files" in (out / "msrvtt_choice" / "table.md").read_text()
    assert "MSRVTT_test.full.csv" in (out / "msrvtt_retrieval" / "table.md").read_text()
    capsys.readouterr()


@pytest.mark.slow
def test_prediction_chooses_among_texts(roots, out, capsys):
    clip = roots["msrvtt_choice"] / "videos" / "video7010.mp4"
    texts = "a man | the man | what is it | in it | the dog"
    for dataset, method in (("msrvtt_choice", "cdc_mmpg"), ("msrvtt_retrieval", "hyper"), ("msrvtt_choice", "linear")):
        command = ["--run", str(out / dataset / method / "seed0"), "--video", str(clip), "--choices"]
        assert predict.main([*command, texts]) == 0
        printed = capsys.readouterr().out
        scores = [float(number) for number in re.findall(r"^ +(-?\d+\.\d+)", printed, re.MULTILINE)]
        assert len(scores) == 5
        assert scores == sorted(scores, reverse=True)
        assert (sum(scores) == pytest.approx(100, abs=0.5)) == (dataset == "msrvtt_choice")
        assert predict.main([*command, ""]) == 2
        assert "CHOICES=" in capsys.readouterr().err


def test_training_warns_where_the_annotations_are_not_the_published_ones(roots, caplog, monkeypatch):
    data = build_small(MSRVTTQA, roots["msrvtt"], num_classes=5)
    data.prepare_data()
    (warning,) = (record.message for record in caplog.records if "not the published annotations" in record.message)
    assert "test 24 of 72,821 questions" in warning
    assert "train 4 of 1,500 answers" in warning
    caplog.clear()
    small_counts = {"train": {"questions": 40, "clips": 10, "answers": 4}, "test": {"questions": 24, "clips": 6}}
    monkeypatch.setattr(MSRVTTQA, "PUBLISHED", {"official": small_counts})
    data.prepare_data()
    assert "published" not in caplog.text
    assert all(row["same"] for row in data.published())


@pytest.mark.parametrize(("here", "same", "edition"), [
    (20_475, True, "as the paper counts"), (20_471, True, "the authors' repository"),
    (20_470, False, "as the paper counts"),
])  # fmt: skip
def test_the_edition_of_official_annotations_is_named(here, same, edition, roots, monkeypatch):
    data = build_small(TGIFAction, roots["tgif_action"])
    counts = {"train": here - 2_000, "val": 2_000, "test": 2_274}
    monkeypatch.setattr(data, "samples", lambda split: [Sample("clip", "")] * counts[split])
    published = {row["split"]: (row["here"], row["same"], row["edition"]) for row in data.published()}
    assert published == {"train+val": (here, same, edition), "test": (2_274, True, "")}


@pytest.mark.parametrize("protocol", ["9k", "7k"])
def test_the_protocol_is_in_the_results(protocol, roots, tmp_path, phase_one):
    command = build_command("msrvtt_retrieval", "linear", roots["msrvtt_retrieval"], tmp_path, phase_one,
                  f"--data.init_args.protocol={protocol}")  # fmt: skip
    assert main(command) == 0
    results = json.loads((tmp_path / "msrvtt_retrieval" / "linear" / "seed0" / "results.json").read_text())
    assert results["protocol"] == protocol
    assert "held out for validation" in results["splits"]["val"]
    assert results["questions"]["test"] == 2


def test_make_data_lists_all_problems(tmp_path, capsys):
    root = write_msrvtt_qa(tmp_path / "msrvtt")
    (root / "videos" / "video3.mp4").unlink()
    (root / "videos" / "video7011.mp4").write_bytes(b"<html>404</html>")
    rows = json.loads((root / "val_qa.json").read_text())
    rows[0]["video_id"] = 1
    (root / "val_qa.json").write_text(json.dumps(rows))
    assert run_prepare("msrvtt", root, tmp_path / "out") == 3
    errors = capsys.readouterr().err
    for part in ("train and val share 1 clips, but splits must not: fix", "fetch them again:\n  video1",
                 "2 of 22 clips are absent or unreadable", "video3: absent",
                 "video7011: ", "belongs", "max_missing=<number>"):  # fmt: skip
        assert part in errors
    report = json.loads((tmp_path / "out" / "msrvtt" / "data.json").read_text())
    assert report["missing"] == ["video3"]
    assert list(report["unreadable"]) == ["video7011"]
    assert report["shared_between_splits"] == {"train and val": ["video1"]}
    assert report["splits"]["train"]["ready"] == {"questions": 36, "clips": 9}
    # The splits still share a clip.
    assert run_prepare("msrvtt", root, tmp_path / "out", "--data.init_args.max_missing=2") == 3
    capsys.readouterr()
    (root / "train_qa.json").unlink()
    assert run_prepare("msrvtt", root, tmp_path / "out", "--data.init_args.max_missing=9") == 3
    errors = capsys.readouterr().err
    assert "train_qa.json: no such file" in errors
    assert errors.count("MSRVTT.zip") == 1
    assert "val" in json.loads((tmp_path / "out" / "msrvtt" / "data.json").read_text())["splits"]


def test_make_data_refuses_what_training_refuses(tmp_path, capsys):
    """Two cases: no clip of the validation split, and candidates that are equal once cut to so few words."""
    root = write_msrvtt_qa(tmp_path / "msrvtt")
    for number in CLIPS["val"]:
        (root / "videos" / f"video{number}.mp4").unlink()
    assert run_prepare("msrvtt", root, tmp_path / "out", "--data.init_args.only_present=true") == 3
    errors = capsys.readouterr().err
    assert "no question of split val has a readable clip: looked for 'video6513', among others; found 'video" in errors
    assert json.loads((tmp_path / "out" / "msrvtt" / "data.json").read_text())["problems"]
    root = write_msrvtt_choice(tmp_path / "choice")
    path = root / "msrvtt_mc_test.jsonl"
    row = json.loads(path.read_text().splitlines()[0])
    write_lines(path, [row | {"options": ["a the", "the a", "a a", "the the", "a a the"]}])
    assert run_prepare("msrvtt_choice", root, tmp_path / "out", "--data.init_args.text_length=3") == 3
    assert "cannot be told apart" in capsys.readouterr().err


def test_the_first_of_equal_candidates_is_the_right_one(tmp_path):
    """The model answers with the first; the others take its text, so that texts and labels agree."""
    root = write_msrvtt_choice(tmp_path / "choice")
    path = root / "msrvtt_mc_test.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row |= {"options": ["a dog", "The man", "a man", "the man", "it"], "answer": 3}
    write_lines(path, rows)
    data = build_small(MSRVTTChoice, root)
    data.prepare_data()
    data.setup("fit")
    assert data.labels("test").tolist() == [1] * 6
    words = [data.word("test", 0, label) for label in range(5)]
    assert words == ["a dog", "The man", "a man", "The man", "it"]
    assert data.word("test", 0) == "The man"


def test_the_same_file_in_two_splits_is_reported(roots, tmp_path, caplog):
    root = tmp_path / "msrvtt"
    shutil.copytree(roots["msrvtt"], root)
    shutil.copy(root / "videos" / "video2.mp4", root / "videos" / "video7012.mp4")
    for number, clip in enumerate(sorted((root / "videos").iterdir())):
        if clip.name not in ("video2.mp4", "video7012.mp4"):
            write_clip(clip, frames=5 + number // 2)  # a file twice within a split is no leak
    assert run_prepare("msrvtt", root, tmp_path / "out") == 0
    assert "video2, video7012" in caplog.text
    report = json.loads((tmp_path / "out" / "msrvtt" / "data.json").read_text())
    assert ["video2", "video7012"] in report["same_content_in_splits"]


@pytest.mark.parametrize("answer", [5, -1])
def test_an_invalid_right_candidate_is_refused_by_name(answer, tmp_path):
    data = build_small(MSRVTTChoice, write_msrvtt_choice(tmp_path / "choice"))
    samples = data.read_split("test")
    with pytest.raises(DataError, match=rf"sample 1, of clip video7011, has 5 candidates and names number {answer},"):
        data.check_samples("test", [samples[0], samples[1]._replace(right=answer)])
    with pytest.raises(DataError, match=r"sample 1, .* has 4 candidates"):
        data.check_samples("test", [samples[0], samples[1]._replace(options=("a",) * 4)])


def test_make_data_resumes_after_an_interruption(roots, tmp_path):
    root = tmp_path / "msrvtt"
    shutil.copytree(roots["msrvtt"], root)
    long = write_clip(tmp_path / "long.mp4", frames=300, size=(320, 240), codec="libx264")
    for clip in (root / "videos").iterdir():
        shutil.copy(long, clip)
    arguments = ("msrvtt", root, tmp_path / "out")
    process = start(tmp_path / "log", run_prepare, *arguments)
    wait_until(lambda: any((tmp_path / "out").rglob("*.npy")), process)
    kill(process, signal.SIGINT)
    assert finish(process, 20) == 130
    output = (tmp_path / "log").read_text()
    assert "stopped by SIGINT; run the same command again (training and decoding resume" in output
    assert "Traceback" not in output
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.npy")}
    assert 0 < len(written) < 22
    assert finish(start(tmp_path / "log", run_prepare, *arguments)) == 0
    assert written.items() <= {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.npy")}.items()


def test_a_finished_run_is_not_reused_for_changed_annotations(roots, tmp_path, phase_one, capsys):
    root = tmp_path / "tgif"
    shutil.copytree(roots["tgif"], root)
    command = build_command("tgif", "linear", root, tmp_path / "out", phase_one)
    assert main(command) == 0
    assert main(command) == 0
    assert "finished on" in capsys.readouterr().out
    path = root / "Test_frameqa_question.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert main(command) == 2
    assert "content of data.init_args.root" in capsys.readouterr().err


def test_a_partial_copy_is_not_compared_with_the_paper(roots, tmp_path, phase_one, capsys):
    root = tmp_path / "msrvtt"
    shutil.copytree(roots["msrvtt"], root)
    (root / "videos" / "video7011.mp4").unlink()
    command = build_command("msrvtt", "linear", root, tmp_path / "out", phase_one, "--data.init_args.only_present=true")
    assert main(command) == 0
    assert tables.main([str(tmp_path / "out" / "msrvtt")]) == 0
    table = (tmp_path / "out" / "msrvtt" / "table.md").read_text()
    assert "20 of 24 test questions" in table
    assert "A partial copy" in table
    assert "13.6" not in table


def test_training_uses_the_frames_that_make_data_prepared(roots, tmp_path, phase_one, caplog):
    root = roots["tgif"]
    assert run_prepare("tgif", root, tmp_path) == 0
    arrays = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    assert len(arrays) == 24
    caplog.clear()
    assert main(build_command("tgif", "linear", root, tmp_path, phase_one)) == 0
    assert "decoding" not in caplog.text
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")} == arrays


@pytest.mark.parametrize(
    ("dataset", "method", "more", "message"),
    [
        ("msrvtt", "cdc_mmpg_session", (), "does not know the devices of its clips"),
        ("msrvtt_choice", "session_oracle", (), "which sessions need"),
        ("tgif", "encoder_pretraining", (), "no captions"),
        ("tgif_action", "linear", ("--model.init_args.head=cdc_mmpg.models.heads.Retrieval",), "head for retrieval"),
        ("msrvtt_choice", "linear", ("--data.init_args.num_classes=5",), "for open-ended questions, and for no other"),
        ("msrvtt_retrieval", "linear", ("--data.init_args.protocol=8k",), "one of full, 9k, 7k"),
        ("tgif_action", "hyper", ("--model.init_args.head.init_args.candidates=4",
                                  "--model.init_args.head.init_args.per_candidate=true"), "candidates=5"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_with_the_reason(
    dataset, method, more, message, roots, tmp_path, phase_one, capsys
):
    assert main(build_command(dataset, method, roots[dataset], tmp_path, phase_one, *more)) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_two_processes_give_the_metrics_of_one(roots, tmp_path, phase_one):
    """One pair of each task, trained and tested over gloo: 23, 7 and 5 test samples, clips with 2 to 6 captions."""
    uneven = {}
    for dataset, clip in (("msrvtt", None), ("tgif_action", None), ("msrvtt_retrieval", "videos/video7015.mp4")):
        root = uneven[dataset] = tmp_path / f"uneven-{dataset}"
        shutil.copytree(roots[dataset], root)
        if clip:
            (root / clip).unlink()
    path = uneven["msrvtt"] / "test_qa.json"
    path.write_text(json.dumps(json.loads(path.read_text())[1:]))
    path = uneven["tgif_action"] / "Test_action_question.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    path = uneven["msrvtt_retrieval"] / "MSRVTT_data.json"
    captions = json.loads(path.read_text())
    matches = [(row, re.search(r"doing (\d+) to (\d+)", row["caption"])) for row in captions["sentences"]]
    captions["sentences"] = [row for row, parts in matches if parts and int(parts[1]) <= int(parts[2]) % 5 + 1]
    path.write_text(json.dumps(captions))
    running = {}
    for dataset, method in (("msrvtt", "fine_tuning"), ("tgif_action", "hyper"), ("msrvtt_retrieval", "cdc_mmpg"),
                            ("msrvtt_retrieval", "linear")):  # fmt: skip
        folder = tmp_path / f"{dataset}-{method}"
        command = build_command(dataset, method, uneven[dataset], folder, phase_one, "--trainer.devices=2",
                      "--data.init_args.batch_size=6", "--data.init_args.max_missing=1")  # fmt: skip
        running[dataset, method, folder] = start_ranks(folder, main, command)
    for (dataset, method, folder), ranks in running.items():
        for rank, process in enumerate(ranks):
            assert finish(process) == 0, (folder / f"log{rank}").read_text()
        results = json.loads((folder / dataset / method / "seed0" / "results.json").read_text())
        assert results["devices"] == "2 x cpu"
        single = run_separate_test(folder / dataset / method / "seed0", folder)
        joint = {name.removeprefix("test/"): value for name, value in results["metrics"].items() if "test/" in name}
        if dataset == "msrvtt_retrieval":
            single.pop("loss"), joint.pop("loss")  # depends on what else is in the batch
        assert single.keys() == joint.keys()
        assert single == pytest.approx(joint, abs=1e-4)
        counted = {cell["questions"] for cell in results["accuracy"]["own"]["test"].values()}
        assert max(counted) == {"msrvtt": 23, "tgif_action": 7}.get(dataset, results["questions"]["test"])


def save_gradients(rank: int, world: int, port: int, path: str) -> int:
    """Save the loss and the gradients from this process's part of a batch, averaged over processes as DDP does."""
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    torch.manual_seed(0)
    head, layer = Retrieval(), torch.nn.Linear(192, 256)
    videos, texts = torch.randn(6, 192), torch.randn(6, 1, 192)
    part = slice(rank, None, world)
    batch = FeatureBatch(videos[part], torch.zeros(6)[part], torch.arange(6)[part], texts[part], torch.ones(6, 1)[part])
    loss = head.loss(head(batch.frame_features, layer), batch)
    loss.backward()
    values = [loss.detach(), *(parameter.grad for parameter in (*head.parameters(), *layer.parameters()))]
    for value in values:
        torch.distributed.all_reduce(value)
    if rank == 0:
        torch.save([value / world for value in values], path)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return 0


def test_retrieval_has_the_same_gradient_on_any_number_of_processes(tmp_path):
    gradients = {}
    for world in (1, 2, 3):
        port = find_lasting_port()
        path = tmp_path / f"{world}.pt"
        ranks = [start(tmp_path / f"log{world}", save_gradients, rank, world, port, str(path)) for rank in range(world)]
        assert [finish(process, 60) for process in ranks] == [0] * world, (tmp_path / f"log{world}").read_text()
        gradients[world] = torch.load(path, weights_only=True)
    for world in (2, 3):
        for actual, expected in zip(gradients[world], gradients[1], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
