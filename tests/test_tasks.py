"""Multiple choice and retrieval: what is scored, shared and counted, that each method learns them, and exact ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_methods import ANSWERING, encoder, train
from torchmetrics.retrieval import RetrievalRecall

from cdc_mmpg.data.batch import FeatureBatch, VideoTextBatch, normalise
from cdc_mmpg.errors import ConfigError, DataError
from cdc_mmpg.evaluation.metrics import CAPTIONS, RECALLS, TIE, accuracies, ranks, recalls
from cdc_mmpg.media.text import TextEncoder
from cdc_mmpg.methods.adr_pretraining import ADRPretraining
from cdc_mmpg.methods.answering import Answering, SampleRows
from cdc_mmpg.methods.cdc_mmpg import CDCMMPG
from cdc_mmpg.methods.fine_tuning import FineTuning
from cdc_mmpg.methods.hyper import Hyper
from cdc_mmpg.methods.linear import Linear
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.heads import Head, MultipleChoice, OpenEnded, Retrieval
from cdc_mmpg.wire.payloads import PAYLOAD_PRECISIONS
from conftest import WORDS
from tolerances import assert_agree


def several(texts: int, size: int = 4) -> VideoTextBatch:
    """Samples with `texts` texts each; the last sample of a retrieval batch lacks its last text."""
    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(256, (size, 3, 32, 32, 3), generator=generator, dtype=torch.uint8)
    ids = torch.randint(5, 50, (size, texts, 6), generator=generator)
    return VideoTextBatch(frames, ids, torch.ones_like(ids), torch.arange(size) % texts, torch.arange(size))


def build(name: str, head: Head, phase_one: Path, **arguments: float) -> Answering:
    torch.manual_seed(0)
    methods = {"linear": Linear, "fine_tuning": FineTuning, "hyper": Hyper}
    if name in methods:
        return methods[name](encoder(), head, **arguments)
    recipe = "frozen" if "frozen" in name else "paper"
    # A reasoner that has learned nothing makes tiny features: the projection's norm brings them to size.
    return CDCMMPG(encoder(), head, adr=str(phase_one), recipe=recipe, project=True, **arguments)


HEADS = {"choice": MultipleChoice, "retrieval": Retrieval}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ANSWERING)
def test_a_few_samples_are_learned_by_heart(name, head, phase_one, tmp_path):
    data = several(1 if head == "retrieval" else 5, size=2)
    method = train(build(name, HEADS[head](), phase_one, learning_rate=3e-3), data, 40, tmp_path)
    metrics = method.trainer.callback_metrics
    if head == "retrieval":
        assert metrics["val/VR@1"] == metrics["val/TR@1"] == 1.0
        assert metrics["val/recall"] == metrics["val/VR_median_rank"] == 1.0
    else:
        assert metrics["val/accuracy"] == 1.0


@pytest.mark.parametrize("head", HEADS)
def test_phase_one_reads_every_task(head, tmp_path):
    method = train(ADRPretraining(encoder(), HEADS[head](), learning_rate=1e-3), several(5), 3, tmp_path)
    assert method.trainer.callback_metrics["val/loss"] > 0


def test_the_contrast_is_float32_whatever_the_precision():
    """Cosines near each other, which bfloat16 cannot tell apart."""
    torch.manual_seed(0)
    head = Retrieval()
    videos = torch.nn.functional.normalize(torch.randn(64, 256) + 3, dim=-1)
    texts = torch.randn(64, 1, 192) + 3
    batch = FeatureBatch(torch.empty(0), torch.zeros(64), torch.arange(64), texts, torch.ones(64, 1, dtype=torch.bool))
    expected = head.loss(videos, batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head.loss(videos, batch), expected)


def test_everything_that_trains_gets_a_gradient_in_retrieval(phase_one):
    """DDP waits for parameters that nothing reads."""
    for name in ANSWERING:
        method, data = build(name, Retrieval(), phase_one), several(1)
        method.train()._step(data, "train").backward()
        unread = {
            key for key, parameter in method.named_parameters() if parameter.requires_grad and parameter.grad is None
        }
        assert not unread, name


@torch.no_grad()
def test_candidates_share_the_patches_and_nothing_else():
    """Five texts about a clip give what five passes give."""
    data, model = several(5), encoder().eval()
    together = MultipleChoice().encode(model, data).frame_features
    assert together.shape == (4, 5, 3, 192)
    for k in range(5):
        alone = model(normalise(data.frames), data.text_ids[:, k], data.text_mask[:, k]).frame_features
        assert_agree(together[:, k], alone)
    embedded = []
    model.transformer.patch_embed.register_forward_hook(lambda *call: embedded.append(len(call[1][0])))
    MultipleChoice().encode(model, data)
    assert embedded == [4 * 3]


@torch.no_grad()
def test_one_layer_serves_the_candidates_or_each_has_its_own(phase_one):
    data = several(5)
    for name in ("hyper", "cdc_mmpg"):
        for own in (False, True):
            method = build(name, MultipleChoice(per_candidate=own), phase_one).eval()
            features = method.encode(data).frame_features
            weight, bias = method.device_layers(features)
            assert weight.shape == (4, 5 if own else 1, 1, 192)
            served = (weight @ method.fuse(features).unsqueeze(-1)).squeeze(-1) + bias
            assert_agree(method(features), served.squeeze(-1))
            assert method.traffic() == ((3840, 3860) if own else (768, 772))
            # In another order the candidates get the same scores, in that order.
            order = [3, 1, 4, 0, 2]
            assert_agree(method(features[:, order]), method(features)[:, order])


@torch.no_grad()
def test_a_clips_embedding_knows_no_text_and_every_caption_counts_once(phase_one):
    data = several(3)
    data.text_mask[3, 2] = 0
    method = build("cdc_mmpg", Retrieval(), phase_one).eval()
    batch = method.encode(data)
    other = method.encode(data._replace(text_ids=data.text_ids.flip(0)))
    assert torch.equal(method.scores(batch, "val")["own"], method.scores(other, "val")["own"])
    rows = method.head.outcomes(method.scores(batch, "test"), batch)
    assert list(rows) == ["own", "mean_head", *PAYLOAD_PRECISIONS, "bypassed", CAPTIONS]
    assert rows[CAPTIONS][0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]
    alone = method.encoder.encode_text(data.text_ids[1, 2:], data.text_mask[1, 2:])
    assert_agree(rows[CAPTIONS][1][5], method.head.captions(alone)[0])
    for embeddings in (rows["own"][1], rows[CAPTIONS][1]):
        assert_agree(embeddings.norm(dim=-1), torch.ones(len(embeddings)))
    weight, bias = method.device_layers(batch.frame_features)
    served = torch.einsum("bld,bd->bl", weight, batch.frame_features.mean(1)) + bias
    assert_agree(rows["own"][1], torch.nn.functional.normalize(served, dim=-1))


def test_counts_and_bytes_at_the_papers_size():
    paper = AllInOne()
    choice, retrieval = MultipleChoice(), Retrieval()
    assert Linear(paper, choice).parameter_counts()[:2] == (11_431_297, 0)
    assert Hyper(paper, choice).parameter_counts()[:2] == (11_431_297, 37_249)
    assert Hyper(paper, choice).traffic() == (768, 772)
    assert Hyper(paper, retrieval).parameter_counts()[:2] == (11_431_104 + 2 * 49_408, 9_535_744)
    assert Hyper(paper, retrieval).traffic() == (768, 4 * 49_408)
    for head, cloud in ((choice, 20_213_984), (retrieval, 27_802_816)):
        assert ADRPretraining(paper, head).parameter_counts().cloud == cloud


def test_a_clip_that_comes_again_in_a_step_is_left_out():
    """It stands in for a sample that another process has; see `EpochBatches`."""
    torch.manual_seed(0)
    head, videos, texts = Retrieval(), torch.randn(3, 256), torch.randn(3, 1, 192)
    videos = torch.nn.functional.normalize(videos[[0, 1, 1]], dim=-1)
    there = torch.ones(3, 1, dtype=torch.bool)
    twice = FeatureBatch(torch.empty(0), torch.zeros(3), torch.tensor([0, 1, 1]), texts[[0, 1, 1]], there)
    once = FeatureBatch(torch.empty(0), torch.zeros(2), torch.tensor([0, 1]), texts[:2], there[:2])
    scores = videos[:2] @ head.captions(once.texts[:, 0]).T / 0.05
    rows = torch.nn.functional.cross_entropy(scores, torch.arange(2), reduction="none")
    columns = torch.nn.functional.cross_entropy(scores.T, torch.arange(2), reduction="none")
    assert_agree(head.loss(videos, twice), ((rows + columns) / 2).mean())
    videos.requires_grad_()
    head.loss(videos, twice).backward()
    assert torch.isfinite(videos.grad).all()
    assert videos.grad[:2].abs().min(0).values.max() > 0
    assert not videos.grad[2].any()


def random_scores(videos: int, texts: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    owners = np.concatenate([np.arange(videos), generator.integers(videos, size=texts - videos)])
    rows = [generator.normal(size=(size, 16)).astype(np.float32) for size in (videos, texts)]
    return (*(row / np.linalg.norm(row, axis=1, keepdims=True) for row in rows), owners)


@pytest.mark.parametrize("seed", range(3))
def test_recalls_equal_torchmetrics_on_random_scores(seed, monkeypatch):
    monkeypatch.setattr("cdc_mmpg.evaluation.metrics.SCORES", 500)  # several parts
    videos, texts, owners = random_scores(40, 90, seed)
    scores, relevant = torch.from_numpy(texts @ videos.T), torch.from_numpy(owners[:, None] == np.arange(40))
    by_video, by_text = ranks(videos, texts, owners)
    for k in RECALLS:
        metric = RetrievalRecall(top_k=k)
        query = torch.arange(90)[:, None].expand(90, 40)
        assert np.mean(by_text <= k) == pytest.approx(
            metric(scores.flatten(), relevant.flatten(), query.flatten()).item()
        )
        best = scores.T.masked_fill(~relevant.T, -2).argmax(1)  # of a clip's captions the best counts
        others = ~relevant.T
        others[torch.arange(40), best] = True
        hit = torch.zeros(40, 90, dtype=torch.bool).scatter_(1, best[:, None], True)
        query = torch.arange(40)[:, None].expand(40, 90)
        assert np.mean(by_video <= k) == pytest.approx(metric(scores.T[others], hit[others], query[others]).item())


def test_ties_and_what_is_no_number_count_against_us():
    owners = np.arange(12)
    constant = np.full((12, 16), 0.25, np.float32)
    by_video, by_text = ranks(constant, constant, owners)
    assert by_video.tolist() == by_text.tolist() == [12] * 12
    nothing = np.full((12, 16), np.nan, np.float32)
    assert {rank for both in ranks(nothing, constant, owners) for rank in both.tolist()} == {12}
    found = recalls({"own": (owners, constant), CAPTIONS: (owners, constant)})
    assert found["VR@1"] == found["TR@10"] == found["recall"] == 0
    perfect = np.eye(12, dtype=np.float32)
    assert recalls({"own": (owners, perfect), CAPTIONS: (owners, perfect)})["recall"] == 1
    assert TIE < 1e-5


def test_ranks_at_the_size_of_msrvtt_stay_within_memory():
    import resource

    videos, texts, owners = random_scores(2_990, 59_800, 0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    by_video, by_text = ranks(videos, texts, owners)
    assert len(by_video) == 2_990
    assert by_text.mean() == pytest.approx(2_990 / 2, rel=0.02)  # chance
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    assert grown < 500, "MB; the whole matrix has 715"


def test_rows_come_in_the_samples_order_each_once():
    rows = SampleRows()
    rows.update(torch.tensor([3, 1]), torch.tensor([[30], [10]]))
    rows.update(torch.tensor([0, 1]), torch.tensor([[0], [11]]))
    indices, values = rows.compute()
    assert indices.tolist() == [0, 1, 1, 3]
    assert values[:, 0].tolist() == [0, 10, 11, 30]


def test_every_figure_has_its_count_and_standard_error():
    generator = np.random.default_rng(0)
    correct = generator.random(400) < 0.3
    clips = [str(i) for i in range(400)]
    cell = accuracies({"own": correct}, clips, clips, [""] * 400, [""] * 400)["own"]["test"]["all"]
    assert cell["questions"] == 400
    assert cell["standard_error"] == pytest.approx((correct.mean() * (1 - correct.mean()) / 400) ** 0.5, rel=0.1)


def test_another_number_of_candidates_is_refused():
    assert MultipleChoice().encode(encoder(), several(3)).frame_features.shape == (4, 3, 3, 192)
    with pytest.raises(ConfigError, match="candidates=3"):
        MultipleChoice(per_candidate=True).encode(encoder(), several(3))


@pytest.fixture(scope="module")
def vocab(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join([*WORDS, *"bcdefgh"]) + "\n")
    return path


def words(encoder: TextEncoder, ids: list[int]) -> str:
    return " ".join(encoder._tokenizer.id_to_token(i) for i in ids)


def test_a_choice_is_question_separator_candidate(vocab):
    encoder = TextEncoder(vocab, 20)
    (own,) = encoder.choices([("what is it ?", ["a man", "the man"])])
    assert [words(encoder, ids) for ids in own] == [
        "[CLS] what is it ? [SEP] a man [SEP]", "[CLS] what is it ? [SEP] the man [SEP]"
    ]  # fmt: skip
    (captions,) = encoder.choices([("", ["a man", "the man"])])
    assert words(encoder, captions[0]) == "[CLS] a man [SEP]"


@pytest.mark.parametrize(
    ("question", "options"),
    [
        ("what is the man doing in it ? " * 5, ["a man", "the man"]),
        ("", ["the man is doing " * 10 + "b", "the man is doing " * 10 + "c", "the man is doing " * 10]),
        ("what ?", ["a " * 30, "a " * 31]),
        ("what " * 30, ["a " * 30 + "b", "a " * 30 + "c", "a " * 29 + "d", "e", "a " * 12]),
    ],
)
@pytest.mark.parametrize("length", [8, 12])
def test_truncation_never_makes_candidates_equal(vocab, question, options, length):
    encoder = TextEncoder(vocab, length)
    (own,) = encoder.choices([(question, options)])
    assert len({tuple(ids) for ids in own}) == len(options)
    assert all(len(ids) <= length and ids[0] == 2 and ids[-1] == 3 for ids in own)
    if question:
        assert all(ids.count(3) == 2 for ids in own)
        assert all(ids[:2] == own[0][:2] for ids in own)


def test_equal_candidates_stay_equal_and_no_room_is_refused(vocab):
    for length, options in ((8, ["a man", "a man"]), (4, ["b b b c", "b c", "b c b b", "b b", "b c b b"])):
        (own,) = TextEncoder(vocab, length).choices([("", options)])
        assert len({tuple(ids) for ids in own}) == len(set(options))
        assert own[1 if len(options) == 2 else 2] == own[-1]
    with pytest.raises(DataError, match="text_length"):
        TextEncoder(vocab, 3).choices([("what", ["a", "the"])])


def test_texts_are_cut_as_before(vocab):
    encoder = TextEncoder(vocab, 5)
    assert [words(encoder, ids) for ids in encoder(["what is the man doing", "", "a"])] == [
        "[CLS] what is the [SEP]", "[CLS] [SEP]", "[CLS] a [SEP]"
    ]  # fmt: skip
    assert OpenEnded.pooled
    assert not Retrieval.pooled


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("man\n", r"vocab\.txt, line \d+: 'man' stands in line \d+, too"),
        ("\nowl\n", r"line \d+: '' is no WordPiece"),
    ],
)
def test_a_vocabulary_whose_ids_would_shift_is_refused(extra, message, vocab, tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text(vocab.read_text() + extra)
    with pytest.raises(DataError, match=message):
        TextEncoder(path)
    path.write_text(vocab.read_text().replace("\n", "\r\n"))
    assert TextEncoder(path).words() == TextEncoder(vocab).words()
