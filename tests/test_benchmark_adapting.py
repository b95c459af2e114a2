"""The benchmark of what adapting takes: every way does what it is named after, and says seconds and memory."""

import os

import pytest
import torch

from cdc_mmpg.benchmarks import adapting
from cdc_mmpg.benchmarks.adapting import QUESTIONS, WAYS, Device, main, measure_apart
from cdc_mmpg.errors import CDCError


@pytest.fixture(scope="module")
def device() -> Device:
    return Device(32, 2)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_leaves_the_model_as_it_was(device, way):
    before = {name: value.clone() for name, value in device.model.state_dict().items()}
    WAYS[way](device)
    assert all(torch.equal(value, before[name]) for name, value in device.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in device.model.parameters())


def test_what_is_answered_alone_is_what_adapts(device):
    fused = device.answer()
    assert fused.shape == (QUESTIONS, 192)
    with torch.no_grad():
        torch.testing.assert_close(fused, device.model.fuse(device.model.encode(device.batch).frame_features))


def test_a_way_is_measured_apart(device, monkeypatch):
    seconds, megabytes = measure_apart(device, "T3A")
    assert seconds > 0
    assert megabytes is None or megabytes >= 0
    monkeypatch.setattr(adapting.Path, "write_text", lambda *_: (_ for _ in ()).throw(OSError))
    assert adapting.measure(device, "T3A")[1] is None  # of a system that does not tell
    monkeypatch.setitem(WAYS, "T3A", lambda device: os._exit(1))
    with pytest.raises(CDCError, match="T3A: its process ended"):
        measure_apart(device, "T3A")


def test_the_ways_stand_in_a_table(monkeypatch, capsys):
    monkeypatch.setattr(adapting, "WAYS", dict(list(WAYS.items())[:2]))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    assert main(["--image-size=32", "--depth=1"]) == 0
    shown = capsys.readouterr().out
    assert "only answering" in shown
    assert "1.00" in shown
