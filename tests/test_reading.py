"""What is recognised in an anchor: pairs of words of captions, learned from captions alone."""

from itertools import pairwise

import pytest
import torch

from cdc_mmpg.errors import CheckpointError, ConfigError, DataError
from cdc_mmpg.methods.cdc_mmpg_session import CDCMMPGSession
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.heads import OpenEnded
from cdc_mmpg.models.reading import Reading, frequent_pairs
from cdc_mmpg.models.weights import save_safetensors

THINGS, LOOKS = 3, 4


def clips(number: int = 600) -> tuple[torch.Tensor, list[list[int]]]:
    """Features in which thing and look are told apart, and captions "<look> <thing> here": words 20.., 10.., 1."""
    generator = torch.Generator().manual_seed(0)
    things = torch.randint(THINGS, (number,), generator=generator)
    looks = torch.randint(LOOKS, (number,), generator=generator)
    features = 0.1 * torch.randn(number, 2, 192, generator=generator)
    features[torch.arange(number), :, things] += 1
    features[torch.arange(number), :, 10 + looks] += 1
    words = [[20 + look, 10 + thing, 1] for thing, look in zip(things.tolist(), looks.tolist(), strict=True)]
    return features, words


def test_pairs_are_those_that_tell_captions_apart():
    captions = [[1, 2, 3], [1, 2, 4], [1, 2, 3], [1, 2, 5], [9, 2, 3]]
    assert frequent_pairs(captions, rarest=0.3) == [(2, 3), (1, 2)]  # in three, and in four of five
    assert frequent_pairs([[1, 2]] * 3, rarest=0.1) == []  # all have it
    many = [[i, 1000 + i] for i in range(300)]
    assert len(frequent_pairs(many, rarest=0.0)) == 192


def test_a_reading_holds_which_thing_has_which_look():
    """The mean of readings over clips does, too; that of features does not."""
    features, words = clips()
    reading = Reading()
    reading.fit(features, words, seed=0)
    pairs = frequent_pairs(words, Reading.RAREST)
    with torch.no_grad():
        read = reading(features[:, 0])
    assert read.shape == (600, 192)
    assert 0 <= read.min() <= read.max() <= 1  # what an upload may hold
    assert not read[:, len(pairs) :].round(decimals=6).any()
    wanted = torch.tensor([[pair in set(pairwise(own)) for pair in pairs] for own in words])
    assert ((read[:, : len(pairs)] > 0.5) == wanted).float().mean() > 0.99
    # Two devices with the same things and the same looks, in which other things have the looks.
    thing, look = (torch.tensor([own[place] % 10 for own in words]) for place in (1, 0))
    first, second = ((thing == look), (thing == (look + 1) % THINGS))
    assert (features[first, 0].mean(0) - features[second, 0].mean(0)).abs().max() < 0.5
    assert (read[first].mean(0) - read[second].mean(0)).abs().max() > 0.3


def test_captions_that_are_all_the_same_teach_nothing():
    with pytest.raises(DataError, match="no pair of words"):
        Reading().fit(torch.zeros(3, 1, 192), [[1, 2]] * 3, seed=0)


def test_a_session_averages_what_is_read(tmp_path):
    torch.manual_seed(0)
    reading = Reading()
    reading.save(tmp_path / "reading.safetensors")
    encoder = AllInOne(image_size=32, depth=1, vocab_size=50)
    method = CDCMMPGSession(encoder, OpenEnded(5), reading=str(tmp_path / "reading.safetensors"))
    features = torch.randn(4, 1, 192)
    with torch.no_grad():
        assert torch.equal(method.upload(features), reading(encoder.pool(features[:, 0])))
    plain = CDCMMPGSession(encoder, OpenEnded(5))
    more = sum(p.numel() for p in reading.parameters())
    assert more == 193 * 384 + 385 * 384 + 385 * 192
    assert method.parameter_counts().device == plain.parameter_counts().device + more
    assert not any(p.requires_grad for p in method.reading.parameters())
    (tmp_path / "run").mkdir()
    method.export(tmp_path / "run")
    with torch.no_grad():
        again = Reading.load(tmp_path / "run" / "reading.safetensors")(features)
        assert torch.equal(again, reading(features))
    save_safetensors(encoder.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="not a reading"):
        Reading.load(tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="virtual -1"):
        CDCMMPGSession(encoder, OpenEnded(5), virtual=-1)
