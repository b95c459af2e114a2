"""The benchmark of what adapting takes: every way does what it is named after, and says seconds and memory."""

import json

import pytest
import torch

from cdc_mmpg.benchmarks import adapting
from cdc_mmpg.benchmarks.adapting import QUESTIONS, WAYS, Device, main


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


def test_a_way_is_measured_in_this_process(monkeypatch, capsys):
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    assert main(["--way=T3A", "--image-size=32", "--depth=1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["seconds"] > 0
    assert found["megabytes"] is None or found["megabytes"] >= 0
    monkeypatch.setattr(adapting.Path, "write_text", lambda *_: (_ for _ in ()).throw(OSError))
    assert adapting.measure("T3A", 32, 1)["megabytes"] is None  # of a system that does not tell


@pytest.mark.slow
def test_all_ways_stand_in_a_table(monkeypatch, capsys):
    monkeypatch.setattr(adapting, "WAYS", dict(list(WAYS.items())[:2]))
    assert main(["--image-size=32", "--depth=1"]) == 0
    shown = capsys.readouterr().out
    assert "only answering" in shown
    assert "1.00" in shown
