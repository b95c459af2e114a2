"""Third-party weight files: formats, damage, pickled code that must not run, and atomic writes."""

import os
import pickle
import subprocess
import sys
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from cdc_mmpg.errors import CDCError, CheckpointError
from cdc_mmpg.files import HOST_TAG, atomic_write, remove_leftovers
from cdc_mmpg.models.weights import load_checkpoint, read_metadata, read_state_dict, save_safetensors, strip_prefix

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.zeros(2)}


class FolderCreator:
    """Object whose unpickling with `pickle` creates a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"model": s, "epoch": 3}])
@pytest.mark.parametrize("zipped", [True, False])
def test_common_checkpoint_layouts_are_read(tmp_path, wrap, zipped):
    torch.save(wrap(STATE), tmp_path / "weights.pth", _use_new_zipfile_serialization=zipped)
    read = read_state_dict(tmp_path / "weights.pth")
    assert {key: value.tolist() for key, value in read.items()} == {k: v.tolist() for k, v in STATE.items()}


def test_safetensors_metadata_is_read(tmp_path):
    save_safetensors(STATE, tmp_path / "w.safetensors", {"preset": "default"})
    assert torch.equal(read_state_dict(tmp_path / "w.safetensors")["a.weight"], STATE["a.weight"])
    assert read_metadata(tmp_path / "w.safetensors") == {"preset": "default"}


@pytest.mark.parametrize("zipped", [True, False])
def test_lightning_checkpoint_with_pickled_extras_is_read(tmp_path, zipped):
    """Callbacks and hyper-parameters may be objects of classes that are not installed."""
    extras = {"hyper_parameters": Namespace(lr=1e-4), "state_dict": torch.nn.Linear(3, 2).state_dict(), "epoch": 7}
    torch.save(extras, tmp_path / "old.ckpt", _use_new_zipfile_serialization=zipped)
    assert set(read_state_dict(tmp_path / "old.ckpt")) == {"weight", "bias"}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["extras", "state_dict", "content"])
def test_pickle_with_code_is_refused_and_not_executed(tmp_path, place, zipped):
    bomb = FolderCreator(tmp_path / "exploded")
    content = {"extras": {"state_dict": STATE, "x": bomb}, "state_dict": {"state_dict": bomb}, "content": bomb}[place]
    torch.save(content, tmp_path / "bomb.ckpt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"bomb\.ckpt.*posix\.mkdir, which is code"):
        read_state_dict(tmp_path / "bomb.ckpt")
    assert not (tmp_path / "exploded").exists()
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(bomb))
    with pytest.raises(CheckpointError):
        read_state_dict(tmp_path / "plain.pkl")
    assert not (tmp_path / "exploded").exists()


def test_damaged_checkpoints_are_refused_or_read_correctly(tmp_path):
    path = tmp_path / "w.ckpt"
    torch.save({"state_dict": {"weight": torch.randn(300)}}, path)
    content = path.read_bytes()
    for end in (0, 1, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:end])
        with pytest.raises(CheckpointError, match=r"w\.ckpt"):
            load_checkpoint(path)
    for offset in range(0, len(content), 61):
        path.write_bytes(content[:offset] + bytes([content[offset] ^ 16]) + content[offset + 1 :])
        try:
            value = load_checkpoint(path)["state_dict"]["weight"]
        except CheckpointError:
            continue
        path.write_bytes(content)
        assert torch.equal(value, load_checkpoint(path)["state_dict"]["weight"]), offset


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x04", b"PK\x03\x04"])
def test_files_without_weights_are_refused(tmp_path, content):
    for name in ("x.ckpt", "x.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            read_state_dict(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="list"):
        read_state_dict(tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(CheckpointError, match="no weights"):
        read_state_dict(tmp_path / "empty.pth")


def test_interrupted_atomic_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "deep" / "file"
    with atomic_write(path) as file:
        file.write(b"old")

    def fail() -> None:
        with atomic_write(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_leftovers_are_removed_unless_their_process_runs(tmp_path):
    for host in (HOST_TAG, "elsewhere"):
        for pid in (os.getpid(), 999_999_999, os.getppid()):
            (tmp_path / f".file.{host}.{pid}.tmp").touch()
    remove_leftovers(tmp_path)
    others = {f".file.elsewhere.{pid}.tmp" for pid in (os.getpid(), 999_999_999, os.getppid())}
    assert {path.name for path in tmp_path.iterdir()} == {f".file.{HOST_TAG}.{os.getppid()}.tmp"} | others


def test_uncreatable_folder_is_reported_with_its_path(tmp_path):
    (tmp_path / "file").touch()

    def write() -> None:
        with atomic_write(tmp_path / "file" / "below"):
            pass

    with pytest.raises(CDCError, match="below: cannot be written"):
        write()


def test_leftovers_of_an_unreaped_dead_process_are_removed(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    leftover = tmp_path / f".array.npy.{HOST_TAG}.{child.pid}.tmp"
    leftover.touch()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, but stays in the process table
    remove_leftovers(tmp_path)
    assert not leftover.exists()
    assert child.wait() == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git LFS pointer.*git lfs pull"),
        (b"\n<!DOCTYPE html><html><head></head></html>", "web page.*download the file itself"),
        (b'{"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}', "index of 2 files.*m-1.*join them"),
        (b'{"model_type": "bert"}', "JSON, not weights"),
        (b"\x1f\x8b\x08\x00anything", "gzip archive: unpack"),
        (b"\x89HDF\r\n\x1a\nanything", "HDF5"),
        (b"", "empty file"),
    ],
)
def test_other_kinds_of_files_are_named_in_the_error(tmp_path, content, words):
    for name in ("w.ckpt", "w.safetensors", "w.index.json"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"(?s){name}: .*{words}"):
            read_state_dict(tmp_path / name)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_errors_for_archives_scripts_and_folders_list_their_content(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.ckpt", "w") as archive:
        archive.writestr("release/encoder.pth", b"")
    with pytest.raises(CheckpointError, match=r"zip archive of something else \(release/encoder\.pth\): unpack"):
        read_state_dict(tmp_path / "w.ckpt")
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    with pytest.raises(CheckpointError, match=r"script\.pt: a TorchScript program, not weights"):
        read_state_dict(tmp_path / "script.pt")
    with pytest.raises(CheckpointError, match=r"a folder, not a checkpoint file: name one in it: script\.pt, w\.ckpt"):
        read_state_dict(tmp_path)


def test_file_format_is_detected_from_the_content(tmp_path):
    save_safetensors(STATE, tmp_path / "pytorch_model.bin")
    torch.save({"module": {"state_dict": STATE}}, tmp_path / "model.safetensors")
    for path in tmp_path.iterdir():
        assert set(read_state_dict(path)) == set(STATE)


def test_common_prefix_of_most_names_is_stripped():
    names = ["a.weight", "a.bias", "b.weight"]
    wrapped = {f"_orig_mod.module.model.{name}": torch.zeros(1) for name in names}
    assert list(strip_prefix(wrapped, names)) == names
    assert set(strip_prefix({**wrapped, "head.c": torch.ones(1)}, names)) == {*names, "head.c"}
    assert list(strip_prefix({name: torch.zeros(1) for name in names}, names)) == names
    assert set(strip_prefix({"teacher.a.weight": torch.zeros(1)} | wrapped, names)) == {*names, "teacher.a.weight"}
