"""Multiple choice and retrieval: encoding, training, parameters and bytes, exact ranks, and truncation of texts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_methods import ANSWERING, encoder, train
from torchmetrics.retrieval import RetrievalRecall

from cdc_mmpg.data.batch import FeatureBatch, VideoTextBatch, normalise
from cdc_mmpg.errors import ConfigError, DataError
from cdc_mmpg.evaluation.metrics import CAPTIONS, RECALLS, TIE, compute_accuracies, compute_ranks, compute_recalls
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


def draw_batch(texts: int, size: int = 4) -> VideoTextBatch:
    """Return a batch of `size` random samples with `texts` texts each."""
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
    # An untrained reasoner outputs tiny features: the norm of the projection rescales them.
    return CDCMMPG(encoder(), head, adr=str(phase_one), recipe=recipe, project=True, **arguments)


HEADS = {"choice": MultipleChoice, "retrieval": Retrieval}


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ANSWERING)
def test_methods_overfit_two_samples(name, head, phase_one, tmp_path):
    data = draw_batch(1 if head == "retrieval" else 5, size=2)
    method = train(build(name, HEADS[head](), phase_one, learning_rate=3e-3), data, 40, tmp_path)
    metrics = method.trainer.callback_metrics
    if head == "retrieval":
        assert metrics["val/VR@1"] == metrics["val/TR@1"] == 1.0
        assert metrics["val/recall"] == metrics["val/VR_median_rank"] == 1.0
    else:
        assert metrics["val/accuracy"] == 1.0


@pytest.mark.parametrize("head", HEADS)
def test_phase_one_trains_on_every_task(head, tmp_path):
    method = train(ADRPretraining(encoder(), HEADS[head](), learning_rate=1e-3), draw_batch(5), 3, tmp_path)
    assert method.trainer.callback_metrics["val/loss"] > 0


def test_retrieval_loss_is_float32_under_autocast():
    """The cosines are too close to be distinguished in bfloat16."""
    torch.manual_seed(0)
    head = Retrieval()
    videos = torch.nn.functional.normalize(torch.randn(64, 256) + 3, dim=-1)
    texts = torch.randn(64, 1, 192) + 3
    batch = FeatureBatch(torch.empty(0), torch.zeros(64), torch.arange(64), texts, torch.ones(64, 1, dtype=torch.bool))
    expected = head.loss(videos, batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head.loss(videos, batch), expected)


def test_all_trainable_parameters_get_a_gradient_in_retrieval(phase_one):
    """Otherwise DDP hangs on the unused parameters."""
    for name in ANSWERING:
        method, data = build(name, Retrieval(), phase_one), draw_batch(1)
        method.train()._step(data, "train").backward()
        without_gradient = {
            key for key, parameter in method.named_parameters() if parameter.requires_grad and parameter.grad is None
        }
        assert not without_gradient, name


@torch.no_grad()
def test_candidates_share_only_the_patch_embedding():
    """One pass over five texts per clip equals five passes, and embeds the patches once."""
    data, model = draw_batch(5), encoder().eval()
    together = MultipleChoice().encode(model, data).frame_features
    assert together.shape == (4, 5, 3, 192)
    for k in range(5):
        single = model(normalise(data.frames), data.text_ids[:, k], data.text_mask[:, k]).frame_features
        assert_agree(together[:, k], single)
    embedded_counts = []
    model.transformer.patch_embed.register_forward_hook(lambda *call: embedded_counts.append(len(call[1][0])))
    MultipleChoice().encode(model, data)
    assert embedded_counts == [4 * 3]


@torch.no_grad()
def test_candidates_use_one_shared_layer_or_one_each(phase_one):
    data = draw_batch(5)
    for name in ("hyper", "cdc_mmpg"):
        for per_candidate in (False, True):
            method = build(name, MultipleChoice(per_candidate=per_candidate), phase_one).eval()
            features = method.encode(data).frame_features
            weight, bias = method.device_layers(features)
            assert weight.shape == (4, 5 if per_candidate else 1, 1, 192)
            expected = (weight @ method.fuse(features).unsqueeze(-1)).squeeze(-1) + bias
            assert_agree(method(features), expected.squeeze(-1))
            assert method.traffic() == ((3840, 3860) if per_candidate else (768, 772))
            # Permuted candidates get permuted scores.
            order = [3, 1, 4, 0, 2]
            assert_agree(method(features[:, order]), method(features)[:, order])


@torch.no_grad()
def test_clip_embeddings_ignore_the_text_and_every_caption_is_one_row(phase_one):
    data = draw_batch(3)
    data.text_mask[3, 2] = 0
    method = build("cdc_mmpg", Retrieval(), phase_one).eval()
    batch = method.encode(data)
    other = method.encode(data._replace(text_ids=data.text_ids.flip(0)))
    assert torch.equal(method.scores(batch, "val")["own"], method.scores(other, "val")["own"])
    rows = method.head.outcomes(method.scores(batch, "test"), batch)
    assert list(rows) == ["own", "mean_head", *PAYLOAD_PRECISIONS, "bypassed", CAPTIONS]
    assert rows[CAPTIONS][0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]
    encoded = method.encoder.encode_text(data.text_ids[1, 2:], data.text_mask[1, 2:])
    assert_agree(rows[CAPTIONS][1][5], method.head.embed_captions(encoded)[0])
    for embeddings in (rows["own"][1], rows[CAPTIONS][1]):
        assert_agree(embeddings.norm(dim=-1), torch.ones(len(embeddings)))
    weight, bias = method.device_layers(batch.frame_features)
    expected = torch.einsum("bld,bd->bl", weight, batch.frame_features.mean(1)) + bias
    assert_agree(rows["own"][1], torch.nn.functional.normalize(expected, dim=-1))


def test_parameters_and_bytes_at_the_papers_size():
    paper = AllInOne()
    choice, retrieval = MultipleChoice(), Retrieval()
    assert Linear(paper, choice).parameter_counts()[:2] == (11_431_297, 0)
    assert Hyper(paper, choice).parameter_counts()[:2] == (11_431_297, 37_249)
    assert Hyper(paper, choice).traffic() == (768, 772)
    assert Hyper(paper, retrieval).parameter_counts()[:2] == (11_431_104 + 2 * 49_408, 9_535_744)
    assert Hyper(paper, retrieval).traffic() == (768, 4 * 49_408)
    for head, cloud in ((choice, 20_213_984), (retrieval, 27_802_816)):
        assert ADRPretraining(paper, head).parameter_counts().cloud == cloud


def test_repeated_clips_in_a_step_are_left_out_of_the_loss():
    """Such a clip pads the batch of a process with fewer samples; see `EpochBatches`."""
    torch.manual_seed(0)
    head, videos, texts = Retrieval(), torch.randn(3, 256), torch.randn(3, 1, 192)
    videos = torch.nn.functional.normalize(videos[[0, 1, 1]], dim=-1)
    is_present = torch.ones(3, 1, dtype=torch.bool)
    repeated = FeatureBatch(torch.empty(0), torch.zeros(3), torch.tensor([0, 1, 1]), texts[[0, 1, 1]], is_present)
    distinct = FeatureBatch(torch.empty(0), torch.zeros(2), torch.tensor([0, 1]), texts[:2], is_present[:2])
    scores = videos[:2] @ head.embed_captions(distinct.texts[:, 0]).T / 0.05
    rows = torch.nn.functional.cross_entropy(scores, torch.arange(2), reduction="none")
    columns = torch.nn.functional.cross_entropy(scores.T, torch.arange(2), reduction="none")
    assert_agree(head.loss(videos, repeated), ((rows + columns) / 2).mean())
    videos.requires_grad_()
    head.loss(videos, repeated).backward()
    assert torch.isfinite(videos.grad).all()
    assert videos.grad[:2].abs().min(0).values.max() > 0
    assert not videos.grad[2].any()


def draw_embeddings(videos: int, texts: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    owners = np.concatenate([np.arange(videos), generator.integers(videos, size=texts - videos)])
    rows = [generator.normal(size=(size, 16)).astype(np.float32) for size in (videos, texts)]
    return (*(row / np.linalg.norm(row, axis=1, keepdims=True) for row in rows), owners)


@pytest.mark.parametrize("seed", range(3))
def test_recalls_equal_torchmetrics_on_random_scores(seed, monkeypatch):
    monkeypatch.setattr("cdc_mmpg.evaluation.metrics.MAX_SCORES", 500)  # several chunks
    videos, texts, owners = draw_embeddings(40, 90, seed)
    scores, relevant = torch.from_numpy(texts @ videos.T), torch.from_numpy(owners[:, None] == np.arange(40))
    by_video, by_text = compute_ranks(videos, texts, owners)
    for k in RECALLS:
        metric = RetrievalRecall(top_k=k)
        query = torch.arange(90)[:, None].expand(90, 40)
        assert np.mean(by_text <= k) == pytest.approx(
            metric(scores.flatten(), relevant.flatten(), query.flatten()).item()
        )
        best = scores.T.masked_fill(~relevant.T, -2).argmax(1)  # the best-ranked caption of a clip counts
        others = ~relevant.T
        others[torch.arange(40), best] = True
        hit = torch.zeros(40, 90, dtype=torch.bool).scatter_(1, best[:, None], True)
        query = torch.arange(40)[:, None].expand(40, 90)
        assert np.mean(by_video <= k) == pytest.approx(metric(scores.T[others], hit[others], query[others]).item())


def test_ties_and_nan_get_the_worst_rank():
    owners = np.arange(12)
    constant = np.full((12, 16), 0.25, np.float32)
    by_video, by_text = compute_ranks(constant, constant, owners)
    assert by_video.tolist() == by_text.tolist() == [12] * 12
    not_numbers = np.full((12, 16), np.nan, np.float32)
    assert {rank for ranks in compute_ranks(not_numbers, constant, owners) for rank in ranks.tolist()} == {12}
    recalls = compute_recalls({"own": (owners, constant), CAPTIONS: (owners, constant)})
    assert recalls["VR@1"] == recalls["TR@10"] == recalls["recall"] == 0
    perfect = np.eye(12, dtype=np.float32)
    assert compute_recalls({"own": (owners, perfect), CAPTIONS: (owners, perfect)})["recall"] == 1
    assert TIE < 1e-5


def test_ranks_at_the_size_of_msrvtt_stay_within_memory():
    import resource

    videos, texts, owners = draw_embeddings(2_990, 59_800, 0)
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    by_video, by_text = compute_ranks(videos, texts, owners)
    assert len(by_video) == 2_990
    assert by_text.mean() == pytest.approx(2_990 / 2, rel=0.02)  # chance
    growth_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before) / 2**10
    assert growth_mb < 500, "MB; the whole matrix has 715"


def test_rows_are_sorted_by_sample():
    rows = SampleRows()
    rows.update(torch.tensor([3, 1]), torch.tensor([[30], [10]]))
    rows.update(torch.tensor([0, 1]), torch.tensor([[0], [11]]))
    indices, values = rows.compute()
    assert indices.tolist() == [0, 1, 1, 3]
    assert values[:, 0].tolist() == [0, 10, 11, 30]


def test_accuracies_have_counts_and_standard_errors():
    generator = np.random.default_rng(0)
    correct = generator.random(400) < 0.3
    clips = [str(i) for i in range(400)]
    cell = compute_accuracies({"own": correct}, clips, clips, [""] * 400, [""] * 400)["own"]["test"]["all"]
    assert cell["questions"] == 400
    assert cell["standard_error"] == pytest.approx((correct.mean() * (1 - correct.mean()) / 400) ** 0.5, rel=0.1)


def test_wrong_number_of_candidates_is_refused_with_a_layer_per_candidate():
    assert MultipleChoice().encode(encoder(), draw_batch(3)).frame_features.shape == (4, 3, 3, 192)
    with pytest.raises(ConfigError, match="candidates=3"):
        MultipleChoice(per_candidate=True).encode(encoder(), draw_batch(3))


@pytest.fixture(scope="module")
def vocab(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join([*WORDS, *"bcdefgh"]) + "\n")
    return path


def decode_words(encoder: TextEncoder, ids: list[int]) -> str:
    return " ".join(encoder._tokenizer.id_to_token(i) for i in ids)


def test_choices_are_encoded_as_question_separator_candidate(vocab):
    encoder = TextEncoder(vocab, 20)
    (choices,) = encoder.encode_choices([("what is it ?", ["a man", "the man"])])
    assert [decode_words(encoder, ids) for ids in choices] == [
        "[CLS] what is it ? [SEP] a man [SEP]", "[CLS] what is it ? [SEP] the man [SEP]"
    ]  # fmt: skip
    (captions,) = encoder.encode_choices([("", ["a man", "the man"])])
    assert decode_words(encoder, captions[0]) == "[CLS] a man [SEP]"


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
    (choices,) = encoder.encode_choices([(question, options)])
    assert len({tuple(ids) for ids in choices}) == len(options)
    assert all(len(ids) <= length and ids[0] == 2 and ids[-1] == 3 for ids in choices)
    if question:
        assert all(ids.count(3) == 2 for ids in choices)
        assert all(ids[:2] == choices[0][:2] for ids in choices)


def test_equal_candidates_stay_equal_and_too_short_texts_are_refused(vocab):
    for length, options in ((8, ["a man", "a man"]), (4, ["b b b c", "b c", "b c b b", "b b", "b c b b"])):
        (choices,) = TextEncoder(vocab, length).encode_choices([("", options)])
        assert len({tuple(ids) for ids in choices}) == len(set(options))
        assert choices[1 if len(options) == 2 else 2] == choices[-1]
    with pytest.raises(DataError, match="text_length"):
        TextEncoder(vocab, 3).encode_choices([("what", ["a", "the"])])


def test_single_texts_are_truncated_at_the_end(vocab):
    encoder = TextEncoder(vocab, 5)
    assert [decode_words(encoder, ids) for ids in encoder(["what is the man doing", "", "a"])] == [
        "[CLS] what is the [SEP]", "[CLS] [SEP]", "[CLS] a [SEP]"
    ]  # fmt: skip
    assert OpenEnded.pooled
    assert not Retrieval.pooled


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("man\n", r"vocab\.txt, line \d+: 'man' repeats line \d+"),
        ("\nowl\n", r"line \d+: '' is not a WordPiece"),
    ],
)
def test_vocabulary_with_repeated_or_empty_lines_is_refused(extra, message, vocab, tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text(vocab.read_text() + extra)
    with pytest.raises(DataError, match=message):
        TextEncoder(path)
    path.write_text(vocab.read_text().replace("\n", "\r\n"))
    assert TextEncoder(path).words() == TextEncoder(vocab).words()
