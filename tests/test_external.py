"""Predictions of other models as rows of the tables, and the tasks with which lmms-eval makes such predictions."""

import argparse
import importlib.util
import inspect
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml
from test_report import build_report, recompute
from test_tables import write_answers

from cdc_mmpg.commands import score
from cdc_mmpg.commands.main import main as run_command
from cdc_mmpg.commands.plan import PLANS
from cdc_mmpg.commands.request import Request
from cdc_mmpg.errors import DataError
from cdc_mmpg.evaluation.predictions import normalize_answer, read_predictions, score_predictions
from cdc_mmpg.evidence.comparisons import Evidence
from cdc_mmpg.evidence.pairing import Side
from cdc_mmpg.report import tables
from cdc_mmpg.results import read_results
from cdc_mmpg.training.cli import main as train
from communities import build_small, write_msrvtt_qa, write_tgif
from conftest import write_msvd
from data_modules.msrvtt_qa import MSRVTTQA
from data_modules.msvd_qa import MSVDQA
from data_modules.tgif_qa import TGIFAction, TGIFFrameQA, TGIFTransition

TASKS = Path(__file__).parents[1] / "experiments" / "lmms_eval"


def write_predictions(path, rows, header="id,answer"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *(f"{identity},{answer}" for identity, answer in rows)]) + "\n")
    return path


def score_files(root, folder, *files, dataset="msvd", options=()):
    """Run `cdc-mmpg score` on a small dataset and return its exit code."""
    return score.main([
        str(folder), *(f"--predictions={file}" for file in files), "--config=experiments/methods/linear.yaml",
        f"--config=experiments/datasets/{dataset}.yaml", f"--data.init_args.root={root}",
        f"--data.init_args.cache_dir={folder.parent / 'cache'}", f"--data.init_args.vocab={root / 'vocab.txt'}",
        "--data.init_args.image_size=32", "--data.init_args.num_workers=0", *options,
    ])  # fmt: skip


def read_questions(root):
    return json.loads((root / "test_qa.json").read_text())


@pytest.fixture(scope="module")
def scored(msvd, tmp_path_factory):
    """Folder with the run of a file that answers seven of eight questions, all right but one."""
    folder = tmp_path_factory.mktemp("scored") / "msvd"
    first, second, *others, _ = read_questions(msvd)
    rows = [(first["id"], "wrong"), (second["id"], f'" {second["answer"].upper()}. "')]
    rows += [(row["id"], row["answer"]) for row in others]
    file = write_predictions(folder.parent / "llava-1.5.csv", rows[::-1])
    assert score_files(msvd, folder, file, options=["--data.init_args.num_classes=5"]) == 0
    return folder


def test_a_predictions_file_becomes_a_run_with_its_sources(scored):
    results = read_results(scored / "llava-1.5" / "seed0")
    cell = results["accuracy"]["predicted"]["test"]["all"]
    assert (cell["value"], cell["questions"]) == (6 / 8, 8)
    assert cell["low"] <= cell["value"] <= cell["high"]
    assert set(results["floors"]) == {"majority", "majority_per_type"}
    assert (results["predictions"]["file"], results["predictions"]["unanswered"]) == ("llava-1.5.csv", 1)
    assert len(results["predictions"]["sha256"]) == 64
    assert results["questions"]["test"] == 8
    assert {"commit", "versions", "finished", "published", "arguments"} <= results.keys()
    assert (scored / "llava-1.5" / "seed0" / "predictions.test.csv").read_text().endswith("(no answer),w\n")
    answers = Evidence(scored).runs["llava-1.5"][0].answers
    assert answers.correct["predicted"].tolist() == [0, 1, 1, 1, 1, 1, 1, 0]  # in the order of the annotations


def test_an_answer_outside_the_vocabulary_can_be_right(scored, msvd):
    known = (msvd / "answer_set.txt").read_text().split()
    outside = [row["answer"] not in known for row in read_questions(msvd)]
    correct = Evidence(scored).runs["llava-1.5"][0].answers.correct["predicted"]
    assert correct[[place for place, is_outside in enumerate(outside) if is_outside]].all()
    assert any(outside)


@pytest.fixture
def beside_fine_tuning(scored, tmp_path):
    """Copy of the scored run, with a run of fine-tuning that has half of the same questions right."""
    folder = shutil.copytree(scored, tmp_path / "msvd")
    lines = (folder / "llava-1.5" / "seed0" / "predictions.test.csv").read_text().splitlines()[1:]
    samples = [tuple(line.split(",")[:6]) for line in lines]
    results = read_results(folder / "llava-1.5" / "seed0")
    same = {name: results[name] for name in ("protocol", "splits", "domains", "published", "floors", "data")}
    write_answers(folder, "fine_tuning", samples=samples, cases={"own": [True, False] * 4}, **same)
    return folder


def test_the_row_comes_after_the_methods_with_interval_and_paired_difference(beside_fine_tuning, capsys):
    assert tables.main([str(beside_fine_tuning)]) == 0
    lines = (beside_fine_tuning / "table.md").read_text().splitlines()
    header = [cell.strip() for cell in next(line for line in lines if line.startswith("| method")).split("|")]
    labels = [line.split("|")[1].strip() for line in lines if line.startswith("|")]
    assert labels.index("llava-1.5") == labels.index("Fine-tuning") + 1 == len(labels) - 1
    (row,) = ([cell.strip() for cell in line.split("|")] for line in lines if line.startswith("| llava-1.5 "))
    cells = dict(zip(header, row, strict=True))
    assert cells["test %"].startswith("75.0 [")
    assert cells["vs fine-tuning"].startswith("+25.0 [")
    assert [cells[name] for name in ("D-Param", "C-Param", "up, B", "down, B", "epoch", "seeds")] == [""] * 5 + ["1"]
    note = "Predictions of other models (llava-1.5.csv: 1 of 8 questions unanswered): right if equal to the annotated"
    assert note in "\n".join(lines)
    assert note in " ".join(capsys.readouterr().out.split())
    assert "no trained method can exceed" in "\n".join(lines)
    assert Evidence(beside_fine_tuning).compare(Side("llava-1.5"), Side("fine_tuning")).value.amount == 25


def test_the_row_is_in_all_tables_and_in_the_report_with_its_command(beside_fine_tuning):
    assert tables.main([str(beside_fine_tuning), "--paper"]) == 0
    text = (beside_fine_tuning / "tables.md").read_text()
    assert text.count("| llava-1.5 |") == 2  # in the layout of the paper, and among all methods
    assert text.count("Predictions of other models") == 2
    html, reader, entries = build_report(beside_fine_tuning)
    assert "llava-1.5" in "".join(reader.text)
    assert f"make table DATASET=msvd PREDICTIONS=llava-1.5.csv SEED=0 OUT={beside_fine_tuning.parent}" in html
    of_file = {name: entry for name, entry in entries.items() if "llava-1.5/" in str(entry["sources"])}
    assert len(of_file) > 5
    for entry in of_file.values():
        recomputed = recompute(beside_fine_tuning, entry)
        assert isinstance(recomputed, str) or recomputed == pytest.approx(entry["value"], abs=1e-6), entry


def test_a_table_of_predictions_alone_names_no_encoder(scored, tmp_path):
    folder = shutil.copytree(scored, tmp_path / "msvd")
    assert tables.main([str(folder)]) == 0
    text = (folder / "table.md").read_text()
    assert "| llava-1.5 |" in text
    assert "Encoder from" not in text


def test_the_same_file_scores_the_same_again_and_a_name_of_other_files_is_refused(scored, msvd, capsys):
    run, options = scored / "llava-1.5" / "seed0", ["--data.init_args.num_classes=5"]
    before = (run / "predictions.test.csv").read_bytes()
    assert score_files(msvd, scored, scored.parent / "llava-1.5.csv", options=options) == 0
    assert (run / "predictions.test.csv").read_bytes() == before
    assert "7 of 8 test questions answered" in capsys.readouterr().out
    (run.parent.parent / "mine" / "seed0").mkdir(parents=True)
    (run.parent.parent / "mine" / "seed0" / "config.yaml").touch()
    for name, message in (
        ("cdc_mmpg", "is for other files"), ("linear.new", "is for other files"), ("mine", "is for other files"),
        ("a b", "letters, digits"),
    ):  # fmt: skip
        assert score_files(msvd, scored, scored.parent / f"{name}.csv", options=options) == 2
        assert message in capsys.readouterr().err
    assert score_files(msvd, scored, "a/same.csv", "b/same.csv", options=options) == 2
    assert "2 predictions files have this name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ": no predictions: write the header id,answer"),
        (b"id,answer\n\n", ": no predictions"),
        (b"id,word\n1,a\n", r", line 1: no column answer in the header \(id,word\)"),
        (b"id,answer,answer\n1,a,b\n", ", line 1: several columns answer"),
        (b"id,answer\n1,a\n2,b,c\n", ", line 3: 3 fields where the header has 2: put an answer that contains a comma"),
        (b"id,answer\n1,a\n2,b\n1,c\n", ", line 4: the id '1' is also in .*, line 2"),
        (b"id,answer\n1,\xff\n", ": not UTF-8"),
        (b'id,answer\n1,"a\n', ", line 1: the next line is not CSV"),
    ],
)
def test_an_unusable_file_is_refused_with_its_line(tmp_path, content, message):
    path = tmp_path / "model.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"^{path}{message}"):
        read_predictions(path)


def test_an_absent_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"none.csv: cannot be read \(No such file or directory\)"):
        read_predictions(tmp_path / "none.csv")


def test_a_file_may_have_further_columns_a_byte_order_mark_and_quoted_answers(tmp_path):
    path = tmp_path / "model.csv"
    path.write_bytes(b'\xef\xbb\xbfid,answer,name\r\n 7 ,"a, b\r\nc",x\r\n\r\n')
    assert {key: value.answer for key, value in read_predictions(path).items()} == {"7": "a, b\r\nc"}


ANSWERS = {
    "Dog": "dog", " a  dog.\n": "a dog", "dog .": "dog", "U.S.": "u.s", "no": "no", ".": "", "": "", "É!": "é!",
}  # fmt: skip


def test_an_answer_is_compared_without_case_repeated_blanks_and_a_full_stop():
    assert {answer: normalize_answer(answer) for answer in ANSWERS} == ANSWERS


def set_up(data):
    data.prepare_data()
    data.setup("test")
    return data


def test_an_id_of_no_test_question_is_refused_with_an_example(msvd, tmp_path):
    data = set_up(build_small(MSVDQA, write_msvd(tmp_path / "msvd"), num_classes=5))
    first = read_questions(msvd)[0]["id"]
    file = write_predictions(tmp_path / "model.csv", [(first, "a"), (0, "b")])
    with pytest.raises(DataError, match=f"model.csv, line 3: no test question has the id '0'; .* such as '{first}'"):
        score_predictions(data, read_predictions(file), tmp_path / "table.csv")


def test_questions_of_absent_clips_are_known_and_not_scored(msvd, tmp_path):
    root = write_msvd(tmp_path / "msvd")
    (root / "YouTubeClips" / "t_0_1.avi").unlink()
    data = set_up(build_small(MSVDQA, root, num_classes=5, only_present=True))
    places = data.locate_test_questions()
    assert list(places.values()) == [None] * 4 + [0, 1, 2, 3]
    file = write_predictions(tmp_path / "model.csv", [(row["id"], row["answer"]) for row in read_questions(root)])
    scores = score_predictions(data, read_predictions(file), tmp_path / "table.csv")
    assert scores["accuracy"]["predicted"]["test"]["all"]["questions"] == 4
    assert scores["accuracy"]["predicted"]["test"]["all"]["value"] == 1
    assert scores["unanswered"] == 0


def test_questions_with_one_id_are_refused(tmp_path):
    root = write_msvd(tmp_path / "msvd")
    rows = read_questions(root)
    (root / "test_qa.json").write_text(json.dumps([row | {"id": 7} for row in rows]))
    data = build_small(MSVDQA, root, num_classes=5)
    data._ready = {"t_0_1", "u_0_9"}  # without decoding them
    with pytest.raises(DataError, match="several questions have the id '7'"):
        data.locate_test_questions()
    (root / "test_qa.json").write_text(json.dumps([rows[0] | {"id": [7]}, *rows[1:]]))
    with pytest.raises(DataError, match=r"\[0\].id is \[7\], not a text or an integer"):
        build_small(MSVDQA, root, num_classes=5).samples("test")


def test_questions_without_ids_have_their_row_in_the_file(tmp_path):
    data = set_up(build_small(MSRVTTQA, write_msrvtt_qa(tmp_path / "msrvtt", "clipbert"), num_classes=5))
    places = data.locate_test_questions()
    assert list(places) == [str(number) for number in range(len(data.samples("test")))]
    assert list(places.values()) == list(range(len(places)))


def test_a_choice_is_named_by_text_or_number(tmp_path):
    root = write_tgif(tmp_path / "tgif", "action")
    data = set_up(build_small(TGIFAction, root))
    samples = data.samples("test")
    rows = [(sample.id, sample.right) for sample in samples]
    rows[1] = (samples[1].id, samples[1].options[samples[1].right].upper() + ".")
    rows[2] = (samples[2].id, (samples[2].right + 1) % 5)
    rows[3] = (samples[3].id, "")
    scores = score_predictions(data, read_predictions(write_predictions(tmp_path / "m.csv", rows)), tmp_path / "t.csv")
    cell = scores["accuracy"]["predicted"]["test"]["all"]
    assert (cell["value"] * len(rows), scores["unanswered"]) == (pytest.approx(len(rows) - 2), 1)
    assert list(scores["floors"]) == ["chance"]
    for wrong in ("A", "5", "-1", "sleeps"):
        file = write_predictions(tmp_path / "wrong.csv", [rows[0], (samples[1].id, wrong)])
        with pytest.raises(DataError, match=f"wrong.csv, line 3: '{wrong}' is none of the question's 5 options"):
            score_predictions(data, read_predictions(file), tmp_path / "t.csv")


def test_retrieval_is_refused(msvd, tmp_path, capsys):
    file = write_predictions(tmp_path / "model.csv", [(1, "a")])
    assert score_files(msvd, tmp_path / "msrvtt_retrieval", file, dataset="msrvtt_retrieval") == 2
    assert "msrvtt_retrieval is for retrieval" in capsys.readouterr().err


def test_make_table_scores_the_files_first():
    given = {"DATASET": "msvd", "DATA": "d", "PREDICTIONS": "a.csv 'my b.csv'", "SEED": "3",
             "ARGS": "--data.init_args.domains=casts"}  # fmt: skip
    first, last = PLANS["table"](Request("table", given, {})).steps.values()
    assert first.words[:4] == ["score", "checkpoints/msvd", "--predictions=a.csv", "--predictions=my b.csv"]
    assert {"--seed_everything=3", "--data.init_args.root=d", "--data.init_args.domains=casts"} <= {*first.words}
    assert last.words == ["table", "checkpoints/msvd"]
    (alone,) = PLANS["table"](Request("table", {"DATASET": "msvd"}, {})).steps.values()
    assert alone.words == ["table", "checkpoints/msvd"]


@pytest.mark.slow
def test_the_command_of_the_page_puts_predictions_beside_a_trained_method(fit, msvd, tmp_path):
    assert train(fit("fine_tuning")) == 0
    file = write_predictions(tmp_path / "llava.csv", [(row["id"], row["answer"]) for row in read_questions(msvd)])
    page = (Path(__file__).parents[1] / "checkpoints" / "README.md").read_text()
    (command,) = re.findall(r"^make (table .* PREDICTIONS=.*)$", page, re.MULTILINE)
    small = " ".join(f"--data.init_args.{name}" for name in ("num_classes=5", "image_size=32", "num_workers=0"))
    words = [word.replace("=data/msvd", f"={msvd}").replace("=llava.csv", f"={file}") for word in command.split()]
    assert run_command([*words, f"OUT={tmp_path}", f"VOCAB={msvd / 'vocab.txt'}", f"ARGS={small}"]) == 0
    lines = (tmp_path / "msvd" / "table.md").read_text().splitlines()
    (row,) = (line for line in lines if line.startswith("| llava |"))
    trained = read_results(tmp_path / "msvd" / "fine_tuning" / "seed0")["accuracy"]["own"]["test"]["all"]["value"]
    assert f"| +{100 * (1 - trained):.1f} [" in row


# The tasks of lmms-eval


@pytest.fixture(scope="module")
def utils():
    """The scorer, loaded as lmms-eval does: by its path."""
    spec = importlib.util.spec_from_file_location("utils", TASKS / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FunctionLoader(yaml.SafeLoader):
    """Loader that reads `!function utils.name` as "utils.name"."""


FunctionLoader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def read_task(name):
    """Return a task's settings with those that it includes."""
    settings = yaml.load((TASKS / name).read_text(), FunctionLoader)
    included = settings.pop("include", None)
    return (read_task(included) if included else {}) | settings


def test_the_scorer_compares_answers_as_our_tables_do(utils, tmp_path):
    assert {answer: utils.normalize_answer(answer) for answer in ANSWERS} == ANSWERS
    doc = {"dataset": "msvd", "id": "7", "answer": "dog", "options": []}
    right = {answer: utils.score_answer(doc, [answer])["exact_match"] for answer in ("Dog.", "a dog", "", "dogs")}
    assert right == {"Dog.": 1, "a dog": 0, "": 0, "dogs": 0}


def test_a_response_is_an_option_by_its_text_or_letter_alone(utils):
    options = ["step like a goose", "talk", "flap wings", "a", "fall over"]
    chosen = {
        "B": "1", "(C)": "2", "E. fall over": "4", "A": "3", "a": "3", "Flap wings.": "2", "D)": "3",
        "A man talks": "", "F": "", "b": "", "talking": "", "": "", "(B": "1",
    }  # fmt: skip
    assert {response: utils.choose_option(response, options) for response in chosen} == chosen
    doc = {"dataset": "tgif_action", "id": "ACTION1", "answer": 2, "options": options}
    assert utils.score_answer(doc, ["C"]) == {
        "exact_match": 1, "predictions": {"dataset": "tgif_action", "id": "ACTION1", "answer": "2"},
    }  # fmt: skip
    assert utils.score_answer(doc, ["none"])["exact_match"] == 0
    prompt = utils.write_prompt(doc | {"question": "what ?"}, {"pre_prompt": "", "post_prompt": "\nletter"})
    assert prompt == "what ?\nA. step like a goose\nB. talk\nC. flap wings\nD. a\nE. fall over\nletter"


def test_the_predictions_that_it_writes_are_read_here(utils, tmp_path):
    items = [{"dataset": "msvd", "id": 7, "answer": 'a "big", dog\n'}, {"dataset": "msvd", "id": 8, "answer": ""}]
    utils.write_predictions(items, args=argparse.Namespace(output_path=str(tmp_path), model="llava"))
    predictions = read_predictions(tmp_path / "msvd" / "llava.csv")
    assert {key: value.answer for key, value in predictions.items()} == {"7": 'a "big", dog', "8": ""}


@pytest.mark.parametrize("path", sorted(TASKS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_task_names_functions_that_exist_and_files_that_the_datasets_read(utils, path):
    task = read_task(path.name)
    assert task["task"] == path.stem
    functions = [value for value in task.values() if str(value).startswith("utils.")]
    functions += [metric["aggregation"] for metric in task["metric_list"] if "utils." in metric["aggregation"]]
    assert len(functions) == 5
    for function in functions:
        assert callable(getattr(utils, function.removeprefix("utils.")))
    assert [metric["metric"] for metric in task["metric_list"]] == ["exact_match", "predictions"]
    assert "args" in inspect.signature(utils.write_predictions).parameters
    ((split, file),) = task["dataset_kwargs"]["data_files"].items()
    assert split == task["test_split"] == "test"
    assert (TASKS / file).resolve().parent.parent == TASKS.parents[1] / "data" == utils.DATA


def test_a_video_is_found_where_the_datasets_have_it(utils, monkeypatch, tmp_path):
    monkeypatch.setattr(utils, "DATA", tmp_path)
    for path in ("msvd/YouTubeClips/-a_0_1.avi", "msrvtt/TestVideo/video7.mp4", "tgif/gifs/t.gif", "tgif/gifs/u.gif",
                 "tgif/gifs/u.mp4"):  # fmt: skip
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    found = {("msvd", "-a_0_1"): "-a_0_1.avi", ("msrvtt", "video7"): "video7.mp4", ("tgif_action", "t"): "t.gif",
             ("tgif", "u"): "u.mp4"}  # fmt: skip
    for (dataset, clip), name in found.items():
        (path,) = utils.find_video({"dataset": dataset, "clip": clip})
        assert Path(path).name == name
    with pytest.raises(FileNotFoundError, match="no video v with one of the suffixes"):
        utils.find_video({"dataset": "tgif", "clip": "v"})


def list_samples(data):
    """Return the test questions in the form of the tasks' documents."""
    return [
        [sample.id or str(place), sample.clip, sample.question, sample.answer or str(sample.right), [*sample.options]]
        for place, sample in enumerate(data.samples("test"))
    ]


@pytest.mark.slow
def test_lmms_eval_loads_the_questions_that_the_datasets_read(tmp_path, monkeypatch):
    """With its own loader, where it is installed; on the real annotations if they are there."""
    pytest.importorskip("lmms_eval")
    from lmms_eval.tasks import TaskManager, get_task_dict

    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    tasks, real = shutil.copytree(TASKS, tmp_path / "experiments" / "lmms_eval"), os.environ.get("CDC_MMPG_REAL")
    data = tmp_path / "data"
    if real:
        data.symlink_to(real)
    else:
        write_msvd(data / "msvd")
        write_msrvtt_qa(data / "msrvtt", "clipbert")
        (data / "msrvtt" / "test.jsonl").rename(data / "msrvtt" / "msrvtt_qa_test.jsonl")
        for part in ("frameqa", "action", "transition"):
            write_tgif(data / "tgif", part)
    kinds = {"msvd_qa": MSVDQA, "msrvtt_qa_clipbert": MSRVTTQA, "tgif_frame_qa": TGIFFrameQA,
             "tgif_action": TGIFAction, "tgif_transition": TGIFTransition}  # fmt: skip
    if not real:
        write_msrvtt_qa(data / "msrvtt", "original")
        kinds["msrvtt_qa"] = MSRVTTQA
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    for name, kind in kinds.items():
        task = get_task_dict([name], manager)[name]
        loaded = [
            [str(doc["id"]), doc["clip"], doc["question"], str(doc["answer"]), doc["options"]]
            for doc in task.test_docs()
        ]
        classes = {"num_classes": 5} if kind not in (TGIFAction, TGIFTransition) else {}
        root = data / name.partition("_")[0]
        expected = list_samples(kind(str(root), cache_dir=str(tmp_path / "frames"), **classes))
        if name == "msrvtt_qa_clipbert" and not real:
            expected = [[str(place), *row[1:]] for place, row in enumerate(expected)]
        assert loaded == expected, name
        doc = task.test_docs()[0]
        assert task.doc_to_text(doc).startswith(doc["question"])
        assert task.process_results(doc, ["nothing at all"])["exact_match"] == 0
        assert set(task.aggregation()) == {"exact_match", "predictions"}
