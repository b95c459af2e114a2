"""The benchmark of adaptation costs: every adaptation leaves the model unchanged; seconds and memory are measured."""

import os

import pytest
import torch

from cdc_mmpg.benchmarks import adapting
from cdc_mmpg.benchmarks.adapting import ADAPTATIONS, QUESTIONS, Device, main, measure_in_subprocess
from cdc_mmpg.errors import CDCError


@pytest.fixture(scope="module")
def device() -> Device:
    return Device(32, 2)


@pytest.mark.parametrize("adaptation", ADAPTATIONS)
def test_every_adaptation_leaves_the_model_unchanged(device, adaptation):
    weights_before = {name: value.clone() for name, value in device.model.state_dict().items()}
    ADAPTATIONS[adaptation](device)
    assert all(torch.equal(value, weights_before[name]) for name, value in device.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in device.model.parameters())


def test_answering_one_question_at_a_time_gives_the_features_of_the_batch(device):
    fused = device.answer()
    assert fused.shape == (QUESTIONS, 192)
    with torch.no_grad():
        torch.testing.assert_close(fused, device.model.fuse(device.model.encode(device.batch).frame_features))


def test_an_adaptation_is_measured_in_a_subprocess(device, monkeypatch):
    seconds, megabytes = measure_in_subprocess(device, "T3A")
    assert seconds > 0
    assert megabytes is None or megabytes >= 0
    monkeypatch.setattr(adapting.Path, "write_text", lambda *_: (_ for _ in ()).throw(OSError))
    assert adapting.measure(device, "T3A")[1] is None  # on a system that does not report memory
    monkeypatch.setitem(ADAPTATIONS, "T3A", lambda device: os._exit(1))
    with pytest.raises(CDCError, match="T3A: its process ended"):
        measure_in_subprocess(device, "T3A")


def test_the_measurements_are_printed_as_a_table(monkeypatch, capsys):
    monkeypatch.setattr(adapting, "ADAPTATIONS", dict(list(ADAPTATIONS.items())[:2]))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    assert main(["--image-size=32", "--depth=1"]) == 0
    printed = capsys.readouterr().out
    assert "only answering" in printed
    assert "1.00" in printed
