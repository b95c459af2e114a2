"""Readings of anchors: probabilities of word pairs, learned from captions alone."""

from itertools import pairwise

import pytest
import torch

from cdc_mmpg.errors import CheckpointError, ConfigError, DataError
from cdc_mmpg.methods.cdc_mmpg_session import CDCMMPGSession
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.heads import OpenEnded
from cdc_mmpg.models.reading import Reading, select_pairs
from cdc_mmpg.models.weights import save_safetensors

THINGS, LOOKS = 3, 4


def draw_clips(number: int = 600) -> tuple[torch.Tensor, list[list[int]]]:
    """Return features that encode thing and look, and captions "<look> <thing> here" as words 20.., 10.., 1."""
    generator = torch.Generator().manual_seed(0)
    things = torch.randint(THINGS, (number,), generator=generator)
    looks = torch.randint(LOOKS, (number,), generator=generator)
    features = 0.1 * torch.randn(number, 2, 192, generator=generator)
    features[torch.arange(number), :, things] += 1
    features[torch.arange(number), :, 10 + looks] += 1
    words = [[20 + look, 10 + thing, 1] for thing, look in zip(things.tolist(), looks.tolist(), strict=True)]
    return features, words


def test_selected_pairs_distinguish_captions():
    captions = [[1, 2, 3], [1, 2, 4], [1, 2, 3], [1, 2, 5], [9, 2, 3]]
    assert select_pairs(captions, rarest=0.3) == [(2, 3), (1, 2)]  # in three and in four of five captions
    assert select_pairs([[1, 2]] * 3, rarest=0.1) == []  # a pair in every caption distinguishes nothing
    many = [[i, 1000 + i] for i in range(300)]
    assert len(select_pairs(many, rarest=0.0)) == 192


def test_a_reading_holds_which_thing_has_which_look():
    """So does the mean of readings over clips; the mean of features does not."""
    features, words = draw_clips()
    reading = Reading()
    reading.fit(features, words, seed=0)
    pairs = select_pairs(words, Reading.MIN_PAIR_SHARE)
    with torch.no_grad():
        readings = reading(features[:, 0])
    assert readings.shape == (600, 192)
    assert 0 <= readings.min() <= readings.max() <= 1  # the range that an upload may hold
    assert not readings[:, len(pairs) :].round(decimals=6).any()
    expected = torch.tensor([[pair in set(pairwise(caption)) for pair in pairs] for caption in words])
    assert ((readings[:, : len(pairs)] > 0.5) == expected).float().mean() > 0.99
    # Two devices with the same things and looks, paired differently.
    thing, look = (torch.tensor([caption[position] % 10 for caption in words]) for position in (1, 0))
    first, second = ((thing == look), (thing == (look + 1) % THINGS))
    assert (features[first, 0].mean(0) - features[second, 0].mean(0)).abs().max() < 0.5
    assert (readings[first].mean(0) - readings[second].mean(0)).abs().max() > 0.3


def test_identical_captions_are_refused():
    with pytest.raises(DataError, match=r"no pair of neighbouring words is in at least 0\.4 %"):
        Reading().fit(torch.zeros(3, 1, 192), [[1, 2]] * 3, seed=0)


def test_a_session_uploads_the_reading_of_its_anchors(tmp_path):
    torch.manual_seed(0)
    reading = Reading()
    reading.save(tmp_path / "reading.safetensors")
    encoder = AllInOne(image_size=32, depth=1, vocab_size=50)
    method = CDCMMPGSession(encoder, OpenEnded(5), reading=str(tmp_path / "reading.safetensors"))
    features = torch.randn(4, 1, 192)
    with torch.no_grad():
        assert torch.equal(method.upload(features), reading(encoder.pool(features[:, 0])))
    plain = CDCMMPGSession(encoder, OpenEnded(5))
    extra = sum(p.numel() for p in reading.parameters())
    assert extra == 193 * 384 + 385 * 384 + 385 * 192
    assert method.parameter_counts().device == plain.parameter_counts().device + extra
    assert not any(p.requires_grad for p in method.reading.parameters())
    (tmp_path / "run").mkdir()
    method.export(tmp_path / "run")
    with torch.no_grad():
        loaded = Reading.load(tmp_path / "run" / "reading.safetensors")(features)
        assert torch.equal(loaded, reading(features))
    save_safetensors(encoder.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="not a reading"):
        Reading.load(tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="virtual -1"):
        CDCMMPGSession(encoder, OpenEnded(5), virtual=-1)
