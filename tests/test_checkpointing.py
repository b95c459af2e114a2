"""Checkpoints and signal handling in units; `test_interruptions.py` kills real runs."""

import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cdc_mmpg.errors import CheckpointError
from cdc_mmpg.files import HOST_TAG
from cdc_mmpg.models.weights import load_checkpoint
from cdc_mmpg.results import RESUME
from cdc_mmpg.training.checkpointing import (
    AtomicCheckpointIO,
    StopOnSignal,
    build_checkpoint_callbacks,
    find_newest_state,
)


def save_state(path: Path, step: int) -> Path:
    AtomicCheckpointIO().save_checkpoint({"step": step}, path)
    return path


def test_a_checkpoint_is_saved_loaded_and_removed(tmp_path):
    io, path = AtomicCheckpointIO(), tmp_path / "deep" / "state.ckpt"
    io.save_checkpoint({"weights": torch.arange(3.0)}, path)
    assert torch.equal(io.load_checkpoint(path)["weights"], torch.arange(3.0))
    assert [entry.name for entry in path.parent.iterdir()] == ["state.ckpt"]
    io.remove_checkpoint(path)
    io.remove_checkpoint(path)  # already removed
    assert not path.exists()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"state\.ckpt: cannot be saved; the previous checkpoint is unchanged"):
        io.save_checkpoint({}, tmp_path / "file" / "state.ckpt")


def test_the_newest_state_is_the_one_with_the_most_steps(tmp_path):
    assert find_newest_state(tmp_path) is None
    folder = tmp_path / RESUME
    folder.mkdir()
    assert find_newest_state(tmp_path) is None
    for epoch, step in ((0, 8), (1, 9), (2, 10), (3, 100)):
        save_state(folder / f"epoch={epoch}-step={step}.ckpt", step)
    stopped = save_state(folder / "stopped-step=99.ckpt", 99)
    save_state(folder / "last.ckpt", 1000)  # not ours: no step in its name
    leftovers = [parent / f".state.ckpt.{HOST_TAG}.999999999.tmp" for parent in (tmp_path, folder)]
    for leftover in leftovers:
        leftover.write_bytes(b"half")
    newest = find_newest_state(tmp_path)
    assert newest == folder / "epoch=3-step=100.ckpt"
    assert sorted(folder.iterdir()) == sorted([newest, stopped])  # the last two are kept
    assert not any(leftover.exists() for leftover in leftovers)


def test_another_process_may_delete_an_old_state_meanwhile(tmp_path, monkeypatch):
    states = [save_state(tmp_path / RESUME / f"epoch={n}-step={n}.ckpt", n) for n in range(3)]

    def load_after_deletion(path: Path) -> object:
        states[0].unlink()
        return load_checkpoint(path)

    monkeypatch.setattr("cdc_mmpg.training.checkpointing.load_checkpoint", load_after_deletion)
    assert find_newest_state(tmp_path) == states[2]


def test_a_damaged_state_is_skipped_unless_all_are_damaged(tmp_path, caplog):
    folder = tmp_path / RESUME
    states = [save_state(folder / f"epoch={n}-step={n}.ckpt", n) for n in range(4)]
    states[3].write_bytes(states[3].read_bytes()[:-20])
    assert find_newest_state(tmp_path) == states[2]
    assert "epoch=3-step=3.ckpt" in caplog.text
    assert "trying the state saved before it" in caplog.text
    assert sorted(folder.iterdir()) == states[1:]  # the last two intact ones; the damaged one for inspection
    for state in states[1:]:
        state.write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"{RESUME}: all 3 states are damaged: delete {tmp_path}"):
        find_newest_state(tmp_path)


def test_the_best_weights_are_saved_before_the_state_that_refers_to_them(tmp_path):
    best, last = build_checkpoint_callbacks(tmp_path, "val/accuracy", "max")
    assert (best.dirpath, best.filename, best.monitor, best.mode) == (str(tmp_path), "best", "val/accuracy", "max")
    assert (best.save_weights_only, best.save_top_k) == (True, 1)
    assert (last.dirpath, last.filename) == (str(tmp_path / RESUME), "{epoch}-{step}")
    assert (last.save_weights_only, last.save_top_k, last.monitor, last.mode) == (False, 2, "step", "max")
    for callback in (best, last):
        assert callback._save_on_train_epoch_end
        assert not callback._enable_version_counter
    assert build_checkpoint_callbacks(tmp_path, "val/loss", "min")[0].mode == "min"


class FakeTrainer:
    """Trainer stub with eight batches an epoch; another process has received `remote_signal`, unless it is 0."""

    global_step, current_epoch, world_size = 41, 0, 1

    def __init__(self, accumulate: int = 1, remote_signal: int = 0) -> None:
        self.num_training_batches, self.accumulate_grad_batches = 8, accumulate
        self.saved: list[Path] = []
        self.strategy = SimpleNamespace(
            reduce_boolean_decision=self._reduce_decision, reduce=self._reduce_max, root_device=torch.device("cpu")
        )
        self._remote_signal = remote_signal

    def _reduce_decision(self, decision: bool, all: bool) -> bool:
        assert not all  # a signal in one process is enough
        return decision or bool(self._remote_signal)

    def _reduce_max(self, number: torch.Tensor, reduce_op: str) -> torch.Tensor:
        assert reduce_op == "max"
        return number.clamp(min=self._remote_signal)

    def save_checkpoint(self, path: Path) -> None:
        self.saved.append(path)


def end_batch(callback: StopOnSignal, trainer: FakeTrainer, batch_idx: int) -> None:
    outputs, batch = {"loss": torch.tensor(0.5)}, SimpleNamespace(indices=torch.arange(2))
    callback.on_train_batch_end(trainer, SimpleNamespace(log=lambda *_, **__: None), outputs, batch, batch_idx)


@pytest.fixture
def handlers() -> Iterator[dict[int, object]]:
    """Yield the signal handlers as they were; restore them afterwards."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    former = {number: signal.getsignal(number) for number in numbers}
    yield former
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_a_state_at_the_end_of_the_step_and_exits(number, code, handlers, tmp_path):
    callback, trainer = StopOnSignal(tmp_path), FakeTrainer(accumulate=3)
    callback.on_train_start(trainer, None)
    end_batch(callback, trainer, 2)
    callback.on_train_epoch_start(trainer, None)
    assert trainer.saved == []
    signal.raise_signal(number)
    for batch in (0, 1, 3, 4, 6):  # within an accumulation of gradients
        end_batch(callback, trainer, batch)
    end_batch(callback, trainer, 7)  # the end of an epoch saves a state anyway
    assert trainer.saved == []
    with pytest.raises(SystemExit) as exit_info:
        end_batch(callback, trainer, 2)
    assert exit_info.value.code == code
    assert trainer.saved == [tmp_path / RESUME / "stopped-step=41.ckpt"]
    with pytest.raises(SystemExit) as exit_info:
        callback.on_train_epoch_start(trainer, None)
    assert exit_info.value.code == code
    assert len(trainer.saved) == 1
    with pytest.raises(SystemExit) as exit_info:  # too late for a step: the end of training exits
        callback.on_train_end(trainer, None)
    assert exit_info.value.code == code
    assert {number: signal.getsignal(number) for number in handlers} == handlers


def test_without_a_signal_training_ends_and_restores_the_handlers(handlers, tmp_path):
    callback, trainer = StopOnSignal(tmp_path), FakeTrainer()
    callback.on_train_start(trainer, None)
    assert all(signal.getsignal(number) not in handlers.values() for number in handlers)
    callback.on_train_end(trainer, None)
    assert {number: signal.getsignal(number) for number in handlers} == handlers


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_process_exits_when_another_one_received_a_signal(number, code, handlers, tmp_path):
    with pytest.raises(SystemExit) as exit_info:
        StopOnSignal(tmp_path).on_train_epoch_start(FakeTrainer(remote_signal=number), None)
    assert exit_info.value.code == code


def test_a_second_signal_exits_at_once_unless_it_follows_within_a_second(handlers, tmp_path, monkeypatch):
    """Ctrl-C reaches a process twice, from the terminal and from make: within a second that counts as one signal."""
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr("cdc_mmpg.training.checkpointing.time", clock)
    callback, now = StopOnSignal(tmp_path), 0.5  # also right after the machine has booted
    callback.on_train_start(FakeTrainer(), None)
    signal.raise_signal(signal.SIGINT)
    for now in (0.6, 1.4):  # noqa: B007
        signal.raise_signal(signal.SIGTERM)
    now = 1.6
    with pytest.raises(SystemExit) as exit_info:
        signal.raise_signal(signal.SIGTERM)
    assert exit_info.value.code == 143
    with pytest.raises(SystemExit) as exit_info:
        end_batch(callback, FakeTrainer(), 0)
    assert exit_info.value.code == 130  # the exit code of the first signal
