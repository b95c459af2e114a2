"""Real kills of real processes: nothing complete is lost, and resumed runs end like uninterrupted ones."""

import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from cdc_mmpg.data.sampling import EpochDataModule
from cdc_mmpg.errors import CheckpointError
from cdc_mmpg.files import LOCK_NAME
from cdc_mmpg.models.adr import ADR
from cdc_mmpg.models.weights import load_checkpoint
from cdc_mmpg.results import RESUME
from cdc_mmpg.training.checkpointing import AtomicCheckpointIO, find_newest_state
from cdc_mmpg.training.cli import main
from conftest import write_clip, write_msvd
from data_modules.clip_dataset import QADataset
from processes import build_recorder_arguments, count_steps, finish, kill, start, wait_until

STEP_PAUSE = 0.07  # seconds after each step: time to interrupt it, even on a busy machine


def save_repeatedly(path: Path) -> None:
    """Save one state after another; a state's number and weights agree."""
    for number in range(1_000_000):
        state = {"number": number, "weights": torch.full((200_000,), float(number))}
        AtomicCheckpointIO().save_checkpoint(state, path)


def test_a_kill_while_saving_never_damages_the_checkpoint(tmp_path):
    path, generator, seen = tmp_path / "state.ckpt", random.Random(0), []
    for _ in range(25):
        process = start(tmp_path / "log", save_repeatedly, path)
        before = path.stat().st_mtime_ns if path.exists() else 0
        wait_until(lambda before=before: path.exists() and path.stat().st_mtime_ns > before, process)
        time.sleep(generator.random() * 0.05)
        kill(process)
        assert finish(process) == -signal.SIGKILL
        state = load_checkpoint(path)
        assert (state["weights"] == state["number"]).all()
        seen.append(state["number"])
    assert len(set(seen)) > 1, "the kills all came at the same moment"


@pytest.fixture(scope="module")
def expected(msvd, phase_one, tmp_path_factory):
    """Return the last weights and the folders of uninterrupted runs, by method and options; `run` fills it."""
    return {}


@pytest.fixture
def run(fit, expected, tmp_path, tmp_path_factory):
    """Return a function that prepares a method's command, run folder and recording, and its uninterrupted run."""

    def prepare(method: str, *arguments: str) -> tuple[list[str], Path, Path]:
        last = tmp_path / "last.pt"
        options = ["--trainer.max_epochs=3", "--data.init_args.batch_size=2", *arguments]
        key = (method, *arguments)
        if key not in expected:
            folder = tmp_path_factory.mktemp(method)
            command = fit(method, *options, *build_recorder_arguments(folder / "last.pt"), out=folder)
            process = start(folder / "log", main, command)
            assert finish(process) == 0, (folder / "log").read_text()
            expected[key] = torch.load(folder / "last.pt"), folder / "msvd" / method / "seed0"
        return (
            fit(method, *options, *build_recorder_arguments(last, STEP_PAUSE)),
            tmp_path / "msvd" / method / "seed0",
            last,
        )

    return prepare


def assert_ends_as_uninterrupted(expected, key, folder: Path, last: Path) -> None:
    weights, undisturbed = expected[key]
    for name, value in torch.load(last).items():
        assert torch.equal(value, weights[name]), name
    ours, theirs = (json.loads((place / "results.json").read_text()) for place in (folder, undisturbed))
    assert ours["metrics"] == theirs["metrics"]
    assert ours["best_epoch"] == theirs["best_epoch"]
    assert not (folder / RESUME).exists()
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize(
    "method", ["fine_tuning", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cdc_mmpg", "adr_pretraining"))]
)
def test_a_run_killed_at_random_moments_ends_like_an_uninterrupted_one(method, run, expected, tmp_path):
    """Kills come at random: in steps, saves and validations. Dropout, shuffling, augmentation and draws are on."""
    command, folder, last = run(method)
    generator, kills = random.Random(method), 0
    for _ in range(4):
        process = start(tmp_path / "log", main, command)
        taken = count_steps(last)
        wait_until(lambda taken=taken: count_steps(last) > taken, process)
        time.sleep(generator.random() * 0.1)  # about three steps: four such starts do not reach the end
        kill(process)
        kills += finish(process) == -signal.SIGKILL
    assert kills >= 3
    process = start(tmp_path / "log", main, command)
    assert finish(process) == 0, (tmp_path / "log").read_text()
    assert_ends_as_uninterrupted(expected, (method,), folder, last)
    process = start(tmp_path / "log", main, command)  # run again after the end: nothing is repeated
    taken = count_steps(last)
    assert finish(process) == 0
    assert count_steps(last) == taken
    assert "finished on" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("number", "code", "accumulate"),
    [
        (signal.SIGTERM, 143, 2),
        pytest.param(signal.SIGTERM, 143, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, 2, marks=pytest.mark.slow),
    ],
)
def test_a_signal_finishes_the_step_and_saves_without_losing_one(number, code, accumulate, run, expected, tmp_path):
    options = [f"--data.init_args.per_device={2 // accumulate}"]
    command, folder, last = run("fine_tuning", *options)
    process = start(tmp_path / "log", main, command)
    wait_until(lambda: count_steps(last) >= 9 * accumulate, process)  # in the second epoch of six steps
    kill(process, number)
    assert finish(process) == code, (tmp_path / "log").read_text()
    taken = count_steps(last)
    assert 9 * accumulate <= taken < 12 * accumulate
    assert list(folder.glob(f"{RESUME}/stopped-step=*.ckpt"))
    process = start(tmp_path / "log", main, command)
    assert finish(process) == 0, (tmp_path / "log").read_text()
    assert count_steps(last) == 18 * accumulate, "a step was lost or taken twice"
    assert_ends_as_uninterrupted(expected, ("fine_tuning", *options), folder, last)


def test_a_signal_before_training_leaves_at_once(run, tmp_path):
    command, folder, _ = run("fine_tuning")
    process = start(tmp_path / "log", main, command)
    wait_until((folder / "config.yaml").exists, process)
    kill(process, signal.SIGTERM)
    assert finish(process) == 143


def run_until_step(command: list[str], last: Path, log: Path, at: int) -> None:
    process = start(log, main, command)
    wait_until(lambda: count_steps(last) >= at, process)
    kill(process)
    finish(process)


def test_resuming_skips_a_damaged_state(run, expected, tmp_path):
    command, folder, last = run("fine_tuning")
    run_until_step(command, last, tmp_path / "log", at=14)  # in the third epoch
    states = sorted((folder / RESUME).glob("*.ckpt"))
    assert [state.name for state in states] == ["epoch=0-step=6.ckpt", "epoch=1-step=12.ckpt"]
    content = states[1].read_bytes()
    states[1].write_bytes(content[: len(content) // 2])
    assert find_newest_state(folder) == states[0]
    process = start(tmp_path / "log", main, command)
    assert finish(process) == 0, (tmp_path / "log").read_text()
    assert "epoch=1-step=12.ckpt: not a readable checkpoint" in (tmp_path / "log").read_text()
    assert_ends_as_uninterrupted(expected, ("fine_tuning",), folder, last)


def test_resuming_is_refused_when_all_states_are_damaged(run, tmp_path):
    command, folder, last = run("fine_tuning")
    run_until_step(command, last, tmp_path / "log", at=14)
    for state in (folder / RESUME).glob("*.ckpt"):
        state.write_bytes(b"")
    with pytest.raises(CheckpointError, match="all 2 states are damaged"):
        find_newest_state(folder)
    process = start(tmp_path / "log", main, command)
    assert finish(process) == 4


def test_resuming_with_another_configuration_is_refused(run, tmp_path, capsys):
    command, folder, last = run("fine_tuning")
    run_until_step(command, last, tmp_path / "log", at=8)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != LOCK_NAME}
    assert main([*command, "--model.init_args.learning_rate=0.5"]) == 2
    assert "model.init_args.learning_rate: 0.0001 there, 0.5 requested" in capsys.readouterr().err
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != LOCK_NAME]
    assert before == {path: path.read_bytes() for path in paths}


def save_with_little_room(path: Path) -> int:
    """Save beyond the limit of a file's size, which fails like a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
        AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(100_000)}, path)
    except CheckpointError as error:
        print(error)
        return 7 if "state.ckpt: cannot be saved; the previous checkpoint is unchanged" in str(error) else 1
    return 0


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path):
    path = tmp_path / "state.ckpt"
    AtomicCheckpointIO().save_checkpoint({"number": 1}, path)
    process = start(tmp_path / "log", save_with_little_room, path)
    assert finish(process) == 7, (tmp_path / "log").read_text()
    assert "File too large" in (tmp_path / "log").read_text()
    assert load_checkpoint(path) == {"number": 1}
    assert {entry.name for entry in tmp_path.iterdir()} == {"state.ckpt", "log"}


def test_resuming_with_other_data_is_refused(run, writable_msvd, tmp_path):
    command, _, last = run("fine_tuning")
    run_until_step(command, last, tmp_path / "log", at=8)
    rows = json.loads((writable_msvd / "train_qa.json").read_text())
    rows[0]["answer"] = "man"
    (writable_msvd / "train_qa.json").write_text(json.dumps(rows))
    process = start(tmp_path / "log", main, [*command, f"--data.init_args.root={writable_msvd}"])
    assert finish(process) == 2
    assert "this run began with other data: train differ" in (tmp_path / "log").read_text()


def test_a_finished_run_is_not_reused_for_other_data(run, msvd, writable_msvd, tmp_path):
    command, _, _ = run("linear")
    assert finish(start(tmp_path / "log", main, command)) == 0
    assert finish(start(tmp_path / "log", main, [*command, f"--data.init_args.root={msvd}/../{msvd.name}"])) == 0
    assert finish(start(tmp_path / "log", main, [*command, f"--data.init_args.root={writable_msvd}"])) == 2
    assert "data.init_args.root: " in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_phase_two_is_refused_after_phase_one_changed(run, phase_one, tmp_path):
    """It is refused when resuming, and after the run has finished."""
    adr = tmp_path / "adr.safetensors"
    shutil.copy(phase_one, adr)
    command, folder, last = run("cdc_mmpg")
    command.append(f"--model.init_args.adr={adr}")
    run_until_step(command, last, tmp_path / "log", at=8)
    torch.manual_seed(1)
    ADR().save(adr)
    assert finish(start(tmp_path / "log", main, command)) == 2
    assert "content of model.init_args.adr: " in (tmp_path / "log").read_text()
    shutil.copy(phase_one, adr)
    assert finish(start(tmp_path / "log", main, command)) == 0
    (folder / RESUME).mkdir()  # as a kill right after writing the results leaves it
    assert finish(start(tmp_path / "log", main, command)) == 0
    assert not (folder / RESUME).exists()
    ADR().save(adr)
    assert finish(start(tmp_path / "log", main, command)) == 2
    shutil.copy(phase_one, adr)
    assert finish(start(tmp_path / "log", main, [*command, "--trainer.log_every_n_steps=3"])) == 0, "the same run"


def run_in_process_group(command: list[str]) -> int:
    """Run a command in a process group, like a shell: Ctrl-C reaches it and its children."""
    os.setpgid(0, 0)
    return main(command)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_process_group_is_handled_by_the_run(number, code, run, expected, tmp_path):
    command, folder, last = run("fine_tuning")
    command.append("--data.init_args.num_workers=2")
    process = start(tmp_path / "log", run_in_process_group, command)
    wait_until(lambda: count_steps(last) >= 8, process)
    os.killpg(process.pid, number)
    assert finish(process) == code, (tmp_path / "log").read_text()
    assert list(folder.glob(f"{RESUME}/stopped-step=*.ckpt"))
    assert finish(start(tmp_path / "log", main, command)) == 0
    assert_ends_as_uninterrupted(expected, ("fine_tuning",), folder, last)


def run_and_kill_worker(command: list[str]) -> int:
    """Run a command whose first loader worker is killed, as the system does when memory runs out."""
    from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

    EpochDataModule.TIMEOUT_SECONDS = 3
    original = _MultiProcessingDataLoaderIter._next_data

    def next_data(self):
        self._workers[0].kill()
        return original(self)

    _MultiProcessingDataLoaderIter._next_data = next_data
    return main(command)


def run_with_hung_worker(command: list[str]) -> int:
    """Run a command whose loader process never returns a batch."""
    EpochDataModule.TIMEOUT_SECONDS = 3
    torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.5  # how long the loader waits for a worker to exit
    QADataset.__getitems__ = lambda self, items: time.sleep(1000)
    return main(command)


def test_a_hung_worker_is_a_data_error_and_leaves_nothing_behind(run, tmp_path):
    command, _, _ = run("fine_tuning")
    process = start(tmp_path / "log", run_with_hung_worker, [*command, "--data.init_args.num_workers=1"])
    wait_until(
        lambda: bool(list_descendants(process.pid)) and "parameters on the device" in (tmp_path / "log").read_text(),
        process,
    )
    time.sleep(1.5)
    workers = list_descendants(process.pid)
    assert finish(process, 30) == 3
    assert "DataError: a loader process hung or was killed" in (tmp_path / "log").read_text()
    time.sleep(0.5)
    assert not [pid for pid in workers if is_running(pid)]


def test_a_killed_worker_is_a_data_error(run, tmp_path):
    command, _, _ = run("fine_tuning")
    process = start(tmp_path / "log", run_and_kill_worker, [*command, "--data.init_args.num_workers=1"])
    assert finish(process) == 3
    assert "DataError: a loader process hung or was killed" in (tmp_path / "log").read_text()


def list_descendants(pid: int) -> set[int]:
    """Return the children of process `pid`, and their children."""
    descendants = set()
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            number, _, rest = entry.read_text().partition(" (")
        except OSError:
            continue
        if int(rest.rpartition(") ")[2].split()[1]) == pid:
            descendants |= {int(number)} | list_descendants(int(number))
    return descendants


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopping_while_decoding_keeps_finished_clips(number, run, fit, tmp_path):
    """Among many clips some are done and one is half done: none is lost, and no process is left behind."""
    root = write_msvd(tmp_path / "many")
    names = [f"more_{index}_1" for index in range(50)]
    with (root / "youtube_mapping.txt").open("a") as file:
        file.writelines(f"{name} vid{1000 + index}\n" for index, name in enumerate(names))
    rows = json.loads((root / "train_qa.json").read_text())
    for index, name in enumerate(names):
        write_clip(root / "YouTubeClips" / f"{name}.avi", frames=150, size=(160, 120))
        rows.append({"answer": "red", "id": index, "question": "what is it?", "video_id": 1000 + index})
    (root / "train_qa.json").write_text(json.dumps(rows))
    command = fit("linear", root=root, out=tmp_path / "out")
    frames = tmp_path / "out" / "msvd" / "data" / "frames" / "pyav-38px-3x3"
    process = start(tmp_path / "log", main, command)
    wait_until(lambda: len(list(frames.glob("*.npy"))) >= 5, process)
    workers = list_descendants(process.pid)
    kill(process, number)
    assert finish(process, 20) == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    decoded = {path: path.stat().st_mtime_ns for path in frames.glob("*.npy")}
    assert 5 <= len(decoded) < 56
    assert workers
    end = time.monotonic() + 10
    while any(is_running(pid) for pid in workers) and time.monotonic() < end:
        time.sleep(0.05)
    assert not [pid for pid in workers if is_running(pid)], "a decoding process was left behind"
    process = start(tmp_path / "log", main, command)
    assert finish(process) == 0, (tmp_path / "log").read_text()
    assert len(list(frames.glob("*.npy"))) == 56
    assert decoded == {path: path.stat().st_mtime_ns for path in decoded}, "a clip was decoded twice"
    assert not list(frames.glob(".*"))


@pytest.mark.slow
def test_features_are_completed_after_a_kill_and_repaired_after_damage(run, tmp_path):
    command, _, _ = run("linear")
    data = tmp_path / "msvd" / "data"
    process = start(tmp_path / "log", main, command)
    joined = f"features/train.{'?' * 16}.safetensors"
    wait_until(lambda: any(data.glob(joined)), process)
    kill(process)
    finish(process)
    (path,) = data.glob(joined)
    content = path.read_bytes()
    path.write_bytes(content[:100])  # damaged as well
    process = start(tmp_path / "log", main, command)
    assert finish(process) == 0, (tmp_path / "log").read_text()
    assert path.read_bytes() == content
    assert len(list(data.glob("features/*.safetensors"))) == 3
