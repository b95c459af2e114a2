"""A finished run from Python: its answers are those of its test, its layers what a device installs; the notebook."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient

import cdc_mmpg
from cdc_mmpg.commands import predict
from cdc_mmpg.commands.plan import ARGUMENTS
from cdc_mmpg.commands.request import Request
from cdc_mmpg.errors import CDCError, CheckpointError, ConfigError, DataError
from cdc_mmpg.models.reading import Reading
from cdc_mmpg.training import reopen as reopening
from cdc_mmpg.training.cli import main as train
from cdc_mmpg.training.finished import FinishedRun
from cdc_mmpg.training.sessions import shuffle_pools
from cdc_mmpg.wire.payloads import decode_matrices, encode_matrices
from data_modules.synthetic import Synthetic

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "experiments" / "session.ipynb"
QUESTION = "what color is the ring?"


@pytest.fixture(scope="module")
def runs(synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train tiny runs of a session and of a static method; return the folder of the methods."""
    base = tmp_path_factory.mktemp("load")
    out = base / "checkpoints" / "synthetic"
    Reading().save(base / "reading.safetensors")
    reading = f"--model.init_args.reading={base / 'reading.safetensors'}"
    train_run(out, synthetic, "cdc_mmpg_session", reading, "--model.init_args.axes=null")
    train_run(out, synthetic, "linear")
    return out


def train_run(out: Path, data: Path, method: str, *options: str) -> None:
    assert train([
        "fit", f"--config=experiments/methods/{method}.yaml", "--config=experiments/datasets/synthetic.yaml",
        f"--trainer.default_root_dir={out / method / 'seed0'}", f"--data.init_args.root={data}",
        f"--data.init_args.cache_dir={out / 'data'}", f"--data.init_args.vocab={data / 'vocab.txt'}",
        "--data.init_args.batch_size=16", "--model.init_args.encoder.depth=1", "--trainer.max_epochs=3",
        "--model.init_args.learning_rate=3e-3", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu",
        *options,
    ]) == 0  # fmt: skip


@pytest.fixture(scope="module")
def run(runs: Path) -> FinishedRun:
    return cdc_mmpg.load(runs / "cdc_mmpg_session" / "seed0")


@pytest.fixture
def clips(synthetic: Path) -> list[Path]:
    return sorted((synthetic / "YouTubeClips").glob("unseen000*.mp4"))


@pytest.fixture
def copied(run: FinishedRun, tmp_path: Path) -> Path:
    """Writable copy of a run, without its weights, which no test of it reads."""
    (tmp_path / "out").mkdir()
    shutil.copytree(run.folder, tmp_path / "out" / "method" / "seed0", ignore=shutil.ignore_patterns("logs", "*.ckpt"))
    (tmp_path / "out" / "method" / "seed0" / "best.ckpt").touch()
    return tmp_path / "out" / "method" / "seed0"


def test_a_run_holds_its_configuration_and_results(run, runs):
    assert run.results == json.loads((runs / "cdc_mmpg_session" / "seed0" / "results.json").read_text())
    assert run.configuration["trainer"]["max_epochs"] == 3
    assert run.configuration["trainer"]["default_root_dir"] == str(run.folder)
    assert (len(run.words), run.words[-1]) == (17, "(unknown)")
    assert not any(module.training for module in run.model.modules())
    best = torch.load(run.folder / "best.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, best[name]) for name, value in run.model.state_dict().items())


@pytest.mark.slow
def test_results_and_predictions_need_no_torch(run):
    code = (
        f"import cdc_mmpg, sys; run = cdc_mmpg.load({str(run.folder)!r}); run.configuration; run.predictions(); "
        "assert not {'torch', 'lightning'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_loading_leaves_random_numbers_alone(run):
    fresh = cdc_mmpg.load(run.folder)
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(2), np.random.rand(2)
    torch.manual_seed(5)
    np.random.seed(5)
    assert fresh.model is fresh.model
    assert torch.equal(torch.rand(2), expected[0])
    assert np.array_equal(np.random.rand(2), expected[1])


def build_data(run: FinishedRun, root: Path) -> Synthetic:
    data = Synthetic(str(root), str(run.folder.parents[1] / "data"), vocab=str(root / "vocab.txt"), **{
        name: run.configuration["data"]["init_args"][name] for name in ("num_classes", "image_size", "resize")
    })  # fmt: skip
    data.prepare_data()
    data.setup("test")
    return data


def test_anchors_are_those_of_the_dataset(run, synthetic):
    """Of its middle frame and its neutral prompt."""
    clips = build_data(run, synthetic).sessions().anchors
    batch = clips.__getitems__([(0, index) for index in range(3)])
    middle = run.model.encoder.num_frames // 2
    with torch.no_grad():
        encoded = run.model.encode(batch._replace(frames=batch.frames[:, middle : middle + 1]))
        expected = run.model.upload(encoded.frame_features)
    paths = [synthetic / "YouTubeClips" / f"{clips.samples[index].clip}.mp4" for index in range(3)]
    assert torch.allclose(run.anchors(paths), expected, rtol=0, atol=1e-6)
    assert not torch.allclose(expected[0], expected[1], rtol=0, atol=1e-5)


def draw_session(data: Synthetic, device: str, number: int) -> list[Path]:
    """Return the clips of a device's session of `number` clips in the test, which seed 0 draws."""
    sessions, names = data.sessions(), [origin.device for origin in data.origins("test")]
    place = sessions.devices["test"][names.index(device)]
    clips = [sessions.anchors.samples[i].clip for i in shuffle_pools(sessions, 0)[place][:number]]
    return [data.root / "YouTubeClips" / f"{clip}.mp4" for clip in clips]


@pytest.mark.parametrize("method", ["cdc_mmpg_session", "linear"])
def test_answers_are_those_of_the_test(method, runs, synthetic):
    compare_answers(cdc_mmpg.load(runs / method / "seed0"), synthetic)


@pytest.mark.slow
def test_a_method_that_reads_each_anchor_answers_as_in_its_test(runs, synthetic):
    train_run(runs, synthetic, "in_context", "--trainer.max_epochs=8")
    run = cdc_mmpg.load(runs / "in_context" / "seed0")
    compare_answers(run, synthetic)
    with pytest.raises(ConfigError, match="InContext generates no layer"):
        run.layer(torch.zeros(1, 192))


def compare_answers(run: FinishedRun, root: Path) -> None:
    """Compare a run's answers to a sixth of the test's questions, without and with a session, with its predictions."""
    data = build_data(run, root)
    frame = run.predictions()
    asked = frame[::6]
    given = set()
    for row in asked.to_dict("records"):
        video = root / "YouTubeClips" / f"{row['clip']}.mp4"
        cases = {"own": ()} if "own" in frame else {"n0": (), "n4": draw_session(data, row["device"], 4)}
        for case, session in cases.items():
            answers = run.answer(video, row["question"], session=session)
            assert answers[0].text == row[case], (case, row)
            assert sum(answer.score for answer in answers) == pytest.approx(1)
            assert len({answer.text for answer in answers}) == 17
            given.add(answers[0].text)
    assert len(asked) == 4
    assert len(given) > 1  # else nothing was compared


def test_a_layer_is_what_the_session_answers_with(run, clips):
    video, *session = clips[:5]
    anchors = run.anchors(session)
    assert anchors.shape == (4, 192)
    assert ((anchors > 0) & (anchors < 1)).all()  # a reading's probabilities
    weight, bias = run.layer(anchors)
    assert (weight.shape, bias.shape) == ((17, 96), (17,))
    shared = run.layer(run.anchors([]))
    assert torch.equal(shared[0], run.model.shared.weight)
    assert torch.equal(shared[1], run.model.shared.bias)
    assert not torch.allclose(weight, shared[0], atol=1e-3)
    expected = run.answer(video, QUESTION, session=session)
    other = cdc_mmpg.load(run.folder)
    with torch.no_grad():
        other.model.shared.weight.copy_(weight)
        other.model.shared.bias.copy_(bias)
    installed = dict(other.answer(video, QUESTION))
    assert [installed[text] for text, _ in expected] == pytest.approx([score for _, score in expected], abs=1e-5)
    assert dict(run.answer(video, QUESTION)) != pytest.approx(installed, abs=1e-3)


def test_a_layer_is_rounded_as_it_is_sent(run, clips):
    """By the service's generator, from the mean that the device uploads, as int8."""
    anchors = run.anchors(clips[:3])
    deployed = run.model.deployment_parts()
    with torch.no_grad():
        parts = [part[0].numpy() for part in deployed.generator(anchors.mean(0, keepdim=True))]
    sent = decode_matrices(encode_matrices(parts, "int8"), [part.shape for part in parts], "int8")
    shared = deployed.offline.detach().numpy()
    layer = shared + sent[0].T @ sent[1]
    weight, bias = run.layer(anchors)
    assert np.allclose(weight, layer[:, :-1], atol=1e-6)
    assert np.allclose(bias, layer[:, -1], atol=1e-6)
    assert not np.allclose(weight, (shared + parts[0].T @ parts[1])[:, :-1], atol=1e-6)


def test_the_frame_of_predictions_has_the_shares_of_the_results(run):
    frame = run.predictions()
    assert list(frame.columns[:8]) == ["clip", "device", "group", "type", "question", "answer", "n16", "n16_right"]
    assert len(frame) == run.results["questions"]["test"]
    for case, groups in run.results["accuracy"].items():
        right = frame[f"{case}_right"]
        assert right.dtype == "boolean"
        assert right.mean() == pytest.approx(groups["test"]["all"]["value"])
        assert right.equals((frame[case] == frame["answer"]).astype("boolean"))
    unseen = frame[frame["group"] == "unseen"]
    assert unseen["n16_right"].mean() == pytest.approx(run.results["accuracy"]["n16"]["unseen"]["all"]["value"])


def write_table(run: Path, cases: list[str], text: str, task: str = "open_ended") -> FinishedRun:
    results = json.loads((run / "results.json").read_text())
    cells = next(iter(results["accuracy"].values()))
    (run / "results.json").write_text(json.dumps(results | {"task": task, "accuracy": dict.fromkeys(cases, cells)}))
    (run / "predictions.test.csv").write_text(text)
    return cdc_mmpg.load(run)


def test_words_stay_words_and_cases_that_were_not_asked_are_missing(copied):
    rows = "a,d,seen,,how many?,1,1,NA,rw\nb,d,seen,,x?,nan,1,,w.\n"
    text = f"clip,device,group,type,question,answer,own,labels,right\n{rows}"
    frame = write_table(copied, ["own", "labels"], text).predictions()
    assert frame["answer"].tolist() == ["1", "nan"]
    assert frame["labels"].tolist() == ["NA", ""]
    assert frame["own"].tolist() == ["1", "1"]
    assert frame["own_right"].tolist() == [True, False]
    assert frame["labels_right"].isna().tolist() == [False, True]
    assert frame["labels_right"].mean() == 0


def test_ranks_of_retrieval_are_numbers(copied):
    run = write_table(copied, ["own"], "direction,clip,caption,own\nVR,a,,3\nTR,a,a man,1\n", "retrieval")
    frame = run.predictions()
    assert frame["own"].tolist() == [3, 1]
    assert frame["caption"].tolist() == ["", "a man"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no rows"),
        ("clip,device,group,type,question,answer,own\na,d,seen,x,y?,1,1\n", "'right'"),
        ("clip,device,group,type,question,answer,own,right\na,d,seen,x,y?,1,1,rr\n", "column 'right' does not fit"),
        ("clip,device,group,type,question,answer,other,right\na,d,seen,x,y?,1,1,r\n", "own"),
    ],
)
def test_a_damaged_table_of_predictions_is_named(text, words, copied):
    run = write_table(copied, ["own"], text)
    with pytest.raises(DataError, match=rf"predictions\.test\.csv: cannot be read \(.*{words}.*train anew"):
        run.predictions()
    (copied / "predictions.test.csv").unlink()
    with pytest.raises(DataError, match=r"predictions\.test\.csv: cannot be read \(.*No such file"):
        run.predictions()


def test_without_pandas_the_error_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match="pip install pandas"):
        run.predictions()


def test_what_does_not_fit_a_run_is_refused(run, runs, clips, tmp_path, monkeypatch):
    linear = cdc_mmpg.load(str(runs / "linear" / "seed0"))
    video = str(clips[0])
    for kind, words, call in (
        (CheckpointError, "not a finished run", lambda: cdc_mmpg.load(tmp_path)),
        (DataError, r"absent\.mp4: no such clip \(VIDEO=\)", lambda: run.answer("absent.mp4", QUESTION)),
        (DataError, r"a folder, not a clip \(SESSION=\)", lambda: run.answer(video, QUESTION, session=[tmp_path])),
        (DataError, r"absent\.mp4: no such clip", lambda: run.anchors(["absent.mp4"])),
        (ConfigError, "the question is empty", lambda: run.answer(video, " ")),
        (ConfigError, "give no choices", lambda: run.answer(video, QUESTION, ["red", "blue"])),
        (ConfigError, "linear takes no session", lambda: linear.answer(video, QUESTION, session=clips[1:3])),
        (ConfigError, "linear takes no session", lambda: linear.layer(torch.zeros(1, 192))),
        (DataError, r"anchors of shape \(192,\): must be \(n, 192\)", lambda: run.layer(torch.zeros(192))),
        (DataError, r"anchors of shape \(2, 96\)", lambda: run.layer(torch.zeros(2, 96))),
    ):  # fmt: skip
        with pytest.raises(kind, match=words):
            call()
    monkeypatch.setattr(run.model, "oracle", True)
    with pytest.raises(ConfigError, match="reads the camera's true cast"):
        run.answer(video, QUESTION, session=clips[1:3])


def test_a_run_without_answers_is_refused(copied):
    results = json.loads((copied / "results.json").read_text())
    (copied / "results.json").write_text(json.dumps({key: results[key] for key in results.keys() - {"accuracy"}}))
    run = cdc_mmpg.load(copied)
    for call in (run.predictions, lambda: run.answer(__file__, QUESTION), lambda: run.anchors([])):
        with pytest.raises(ConfigError, match="method answers no questions"):
            call()


def test_outside_the_checkout_the_error_says_where_to_work(run, monkeypatch):
    monkeypatch.setattr(reopening, "find_spec", lambda name: None if name == "data_modules" else name)
    with pytest.raises(ConfigError, match=r"classes of data_modules, which cannot be imported: work in the folder"):
        _ = cdc_mmpg.load(run.folder).model


def test_predict_takes_the_clips_of_a_session(run, clips, tmp_path, capsys):
    for clip in clips[1:4]:
        shutil.copy(clip, tmp_path)
    asked = [f"--run={run.folder}", f"--video={clips[0]}", f"--question={QUESTION}"]
    assert predict.main([*asked, f"--session={tmp_path}/*.mp4", f"--session={clips[4]}"]) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    expected = run.answer(clips[0], QUESTION, session=clips[1:5])[:5]
    assert printed == [[f"{score:.1%}", text] for text, score in expected]
    assert predict.main([*asked, f"--session={tmp_path}/*.avi"]) == 3
    assert "*.avi: no such clip (SESSION=)" in capsys.readouterr().err
    arguments = ARGUMENTS["predict"](Request("predict", {"SESSION": "'a b.mp4' c*.mp4"}, {}))
    assert [word for word in arguments if word.startswith("--session")] == ["--session=a b.mp4", "--session=c*.mp4"]


@pytest.fixture
def checkout(run: FinishedRun, clips: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working folder in which the examples of the pages find their run and clips."""
    (tmp_path / "checkpoints").symlink_to(run.folder.parents[2])
    (tmp_path / "kitchen").mkdir()
    for clip in clips[1:4]:
        shutil.copy(clip, tmp_path / "kitchen")
    for name, clip in (("garden", clips[0]), ("kitchen", clips[4])):
        shutil.copy(clip, tmp_path / f"{name}.mp4")
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_examples_of_the_pages_run(checkout, capsys):
    examples = [
        block
        for page in ("README.md", "experiments/README.md")
        for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
        if "cdc_mmpg.load(" in block
    ]
    assert examples
    for example in examples:
        exec(example, {})
    assert re.search(r"^\d+\.\d% \S+$", capsys.readouterr().out, re.MULTILINE)


def test_the_notebook_is_stored_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec"}
    for cell in notebook.cells:
        assert not cell.metadata
        assert cell.cell_type == "markdown" or (cell.outputs, cell.execution_count) == ([], None)


@pytest.mark.slow
def test_the_notebook_runs(run, tmp_path, monkeypatch):
    """In a kernel that starts, as Jupyter's do, in the notebook's folder."""
    monkeypatch.setenv("CDC_MMPG_RUN", str(run.folder))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    assert CDCError.__name__ not in str(outputs)
