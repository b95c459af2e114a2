"""Training and evaluation steps of all methods: seeds, learning rates, losses, and logged values."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning import Trainer
from torch.utils.data import DataLoader

from cdc_mmpg.data.batch import UNKNOWN_LABEL, CaptionBatch, FeatureBatch, SessionBatch, VideoTextBatch, normalise
from cdc_mmpg.data.control_cases import SESSION_CASES
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.evaluation.metrics import CAPTIONS
from cdc_mmpg.methods.adr_pretraining import ADRPretraining, select_anchor_feature
from cdc_mmpg.methods.base import Method
from cdc_mmpg.methods.cdc_mmpg import CDCMMPG
from cdc_mmpg.methods.cdc_mmpg_session import CDCMMPGSession
from cdc_mmpg.methods.encoder_pretraining import EncoderPretraining
from cdc_mmpg.methods.fine_tuning import FineTuning
from cdc_mmpg.methods.hyper import Hyper
from cdc_mmpg.methods.linear import Linear
from cdc_mmpg.methods.session_concatenated import SessionConcatenated
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.device_axes import DeviceAxes
from cdc_mmpg.models.fda import round_parts
from cdc_mmpg.models.heads import MultipleChoice, OpenEnded, Retrieval
from tolerances import assert_agree


def build_encoder() -> AllInOne:
    torch.manual_seed(0)
    return AllInOne(image_size=32, depth=1, vocab_size=50, dropout=0.0, drop_path=0.0)


METHODS: dict[str, Callable[..., Method]] = {
    "linear": Linear,
    "fine_tuning": FineTuning,
    "hyper": Hyper,
    "cdc_mmpg": CDCMMPG,
    "adr_pretraining": ADRPretraining,
    "encoder_pretraining": EncoderPretraining,
    "cdc_mmpg_session": CDCMMPGSession,
    "session_concatenated": SessionConcatenated,
}


def build(name: str, phase_one: Path, **arguments: object) -> Method:
    reasoner = {"adr": str(phase_one)} if name == "cdc_mmpg" else {}
    return METHODS[name](build_encoder(), OpenEnded(5), **reasoner, **arguments)


def build_trainer(**arguments: object) -> Trainer:
    silent_options = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(accelerator="cpu", num_sanity_val_steps=0, **silent_options, **arguments)


@pytest.mark.parametrize("name", METHODS)
def test_methods_store_learning_rate_weight_decay_and_seed(name, phase_one):
    method = build(name, phase_one, learning_rate=0.125, weight_decay=0.25, seed=5)
    assert (method.learning_rate, method.weight_decay, method.seed) == (0.125, 0.25, 5)
    assert method.encoder_learning_rate == 0.125
    default_method = build(name, phase_one)
    assert (default_method.weight_decay, default_method.seed) == (0.01, 0)


def test_random_draws_of_a_step_depend_only_on_seed_epoch_batch_and_rank(phase_one, monkeypatch):
    method, drawn = build("linear", phase_one), {}
    for position in ((0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 0, 0)):
        method.seed, epoch, number, rank = position
        monkeypatch.setattr(Method, "current_epoch", epoch)
        monkeypatch.setattr(Method, "global_rank", rank)
        method.on_train_batch_start(None, number)
        value = torch.rand(()).item()
        assert drawn.setdefault(position, value) == value
    assert len(set(drawn.values())) == 5


@pytest.mark.parametrize("name", ["fine_tuning", "cdc_mmpg"])
def test_encoder_can_have_a_separate_learning_rate(name, phase_one, monkeypatch):
    monkeypatch.setattr(Trainer, "estimated_stepping_batches", 8)
    for rate in (1e-3, 1e-2):
        method = build(name, phase_one, learning_rate=1e-2, encoder_learning_rate=rate, weight_decay=0.125)
        method.trainer = build_trainer(max_epochs=3)
        configured = method.configure_optimizers()
        rates = {id(p): group["lr"] for group in configured["optimizer"].param_groups for p in group["params"]}
        decays = {group["weight_decay"] for group in configured["optimizer"].param_groups}
        assert decays == {0.125}
        for key, parameter in method.named_parameters():
            expected = (rate if key.startswith("encoder.") else 1e-2) if parameter.requires_grad else None
            assert rates.get(id(parameter)) == expected, key
        for _ in range(4):
            configured["optimizer"].step()
            configured["lr_scheduler"]["scheduler"].step()
        halved = sorted({group["lr"] for group in configured["optimizer"].param_groups})
        assert halved == pytest.approx(sorted({rate / 2, 5e-3}))
        assert configured["lr_scheduler"]["interval"] == "step"


def draw_feature_batch(labels: list[int], seed: int, first: int = 0) -> FeatureBatch:
    features = torch.randn(len(labels), 3, 192, generator=torch.Generator().manual_seed(seed))
    return FeatureBatch(features, torch.tensor(labels), torch.arange(first, first + len(labels)))


@torch.no_grad()
def test_validation_weighs_samples_not_batches(phase_one):
    """The loss is a mean over the questions with a known answer, the accuracy a mean over all questions."""
    method = build("linear", phase_one)
    batches = [draw_feature_batch([0, 1, 2, 3, UNKNOWN_LABEL], 0), draw_feature_batch([4, UNKNOWN_LABEL], 1, 5)]
    (logged,) = build_trainer().validate(method, DataLoader(batches, batch_size=None), verbose=False)
    features = torch.cat([batch.frame_features for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    scores = method.layer(method.head.phi(torch.tanh(method.encoder.pooler["dense"](features.mean(1)))))
    losses = F.cross_entropy(scores, labels.clamp(min=0), reduction="none")[labels != UNKNOWN_LABEL]
    assert logged["val/loss"] == pytest.approx(losses.mean().item(), rel=1e-4)
    assert logged["val/accuracy"] == pytest.approx((scores.argmax(-1) == labels).float().mean().item())
    indices, rows = method.outcomes["val"]["own"]
    assert indices.tolist() == list(range(7))
    assert rows[:, :2].tolist() == torch.stack([scores.argmax(-1), labels], 1).tolist()
    assert rows[:, 2] == pytest.approx(scores.softmax(-1).amax(-1).numpy(), rel=1e-4)  # confidence of the answer


def test_rounding_errors_equal_a_manual_computation():
    layers, rounded = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]]), torch.tensor([[1.5, 1.0, 0.0], [2.0, 0.0, 0.0]])
    errors = OpenEnded(3).compare(layers, rounded)
    assert errors["agreement"].item() == 0.5
    assert errors["error"].item() == pytest.approx(2.5 / 6)
    errors = Retrieval(3).compare(layers, rounded)  # embeddings have no answers to agree on
    assert list(errors) == ["error"]
    assert errors["error"].item() == pytest.approx(2.5 / 6)


@torch.no_grad()
def test_phase_one_logs_sample_means_of_its_loss_terms(phase_one):
    method = ADRPretraining(build_encoder(), OpenEnded(5), axis="group:3")
    batches = [draw_feature_batch([0, 1, 2, 3], 0), draw_feature_batch([4], 1, 4)]
    (logged,) = build_trainer().validate(method, DataLoader(batches, batch_size=None), verbose=False)
    features = torch.cat([batch.frame_features for batch in batches])
    pool = method.encoder.pooler["dense"]
    anchor = torch.tanh(pool(features[:, 1]))
    reasoned = method.adr.eval()(anchor, sample=False)
    f, decoded, generated = (x.double().numpy() for x in (anchor, reasoned.decoded, reasoned.generated))
    mean, log_variance = reasoned.mean.double().numpy(), reasoned.log_variance.double().numpy()
    expected = {
        "kl": (mean**2 + np.exp(log_variance) - 1 - log_variance).mean() / 2,
        "reconstruction": ((decoded - f) ** 2).mean(),
        "generation": ((generated - f) ** 2).mean() + 0.1 * ((generated - decoded) ** 2).mean(),
    }
    for term, value in expected.items():
        assert logged[f"val/{term}"] == pytest.approx(value, rel=1e-3), term
    assert logged["val/loss"] == pytest.approx(sum(expected.values()), rel=1e-3)


@torch.no_grad()
def test_phase_one_with_a_global_target_uses_the_mean_of_all_frames():
    method = ADRPretraining(build_encoder(), OpenEnded(5), target="global").eval()
    batch = draw_feature_batch([0, 1, 2], 0)
    features, pool = batch.frame_features, method.encoder.pooler["dense"]
    anchor, fused = torch.tanh(pool(features[:, 1])), torch.tanh(pool(features.mean(1)))
    reasoned = method.adr(anchor, sample=False)
    terms = method.adr.losses(anchor, fused, reasoned)
    method.log = lambda *arguments, **more: None
    assert_agree(method._step(batch, "val"), terms.kl + terms.reconstruction + terms.generation)
    # All candidates share one anchor, taken from their mean.
    choice = ADRPretraining(build_encoder(), MultipleChoice()).eval()
    choice.log = lambda *arguments, **more: None
    candidates = batch._replace(frame_features=torch.stack([features, features * 0.5, features * 1.5], 1))
    choice.adr = method.adr
    method.adr.target = "anchor"
    assert_agree(choice._step(candidates, "val"), method._step(batch, "val"))


@torch.no_grad()
def test_anchor_is_the_middle_frame_or_a_random_frame_in_training():
    model = build_encoder()
    for frames, middle in ((1, 0), (2, 1), (3, 1), (4, 2), (5, 2)):
        features = torch.randn(400, 2, frames, 192)
        frame_anchors = torch.tanh(model.pooler["dense"](features))
        assert torch.equal(select_anchor_feature(model, features, draw=False), frame_anchors[:, :, middle])
        drawn = select_anchor_feature(model, features, draw=True)
        is_drawn_frame = (drawn.unsqueeze(2) == frame_anchors).all(-1)
        assert (is_drawn_frame.sum(-1) == 1).all()
        assert is_drawn_frame.float().mean((0, 1)).tolist() == pytest.approx([1 / frames] * frames, abs=0.07)
        if frames > 1:
            assert not torch.equal(is_drawn_frame[:, 0], is_drawn_frame[:, 1])


@torch.no_grad()
def test_bypassed_reasoner_feeds_the_anchor_to_the_hypernetwork(phase_one):
    method, batch = build("cdc_mmpg", phase_one).eval(), draw_feature_batch([0, 1, 2], 0)
    method.keep = lambda *arguments: None
    cases = method.scores(batch, "test")
    features = batch.frame_features
    anchor = torch.tanh(method.encoder.pooler["dense"](features[:, 1]))
    hidden = method.head.phi(torch.tanh(method.encoder.pooler["dense"](features.mean(1))))
    assert_agree(cases["bypassed"], method.fda(anchor, hidden))
    assert_agree(cases["own"], method.fda(method.adr(anchor, sample=False).generated, hidden))
    assert_agree(cases["mean_head"], method.fda.average(hidden))
    assert list(method.scores(batch, "val")) == ["own"]


def draw_session_batch(anchors: list[int]) -> SessionBatch:
    number = len(anchors)
    generator = torch.Generator().manual_seed(2)
    uploads = torch.randn(number, len(SESSION_CASES), 192, generator=generator).tanh()
    counts = torch.tensor(anchors)[:, None].expand(-1, len(SESSION_CASES))
    casts = torch.tensor([[0.6, 0.8], [-1.0, 0.0], [0.0, 0.0]])[:number]
    return SessionBatch(draw_feature_batch(list(range(number)), 3), uploads, counts, casts)


@torch.no_grad()
@pytest.mark.parametrize("generated", ["low_rank", "basis", "full"])
def test_session_layer_is_generated_from_the_upload_and_rounded(generated, phase_one):
    method = CDCMMPGSession(build_encoder(), OpenEnded(5), generated, axes=None).eval()
    for parameter in method.fda.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    batch = draw_session_batch([16, 0, 4])
    hidden = method.head.phi(method.fuse(batch.samples.frame_features))
    static_scores = hidden @ method.shared.weight.T + method.shared.bias
    cases = method.scores(batch, "test")
    for place, case in enumerate(SESSION_CASES):
        upload = batch.uploads[:, place]
        feature = (upload - upload.mean(-1, keepdim=True)) / (upload.var(-1, correction=0, keepdim=True) + 1e-5) ** 0.5
        parts = method.fda.parts(feature)
        exact_scores, int8_scores, float16_scores = (
            torch.einsum("bld,bd->bl", weight, hidden) + bias
            for weight, bias in (
                method.fda.install(round_parts(parts, name)) for name in ("float32", "int8", "float16")
            )
        )
        expected = torch.where(torch.tensor([[True], [False], [True]]), int8_scores, static_scores)
        assert_agree(cases[case], expected)  # int8 is the default precision
        if case == "n16":
            assert_agree(cases["int8"], expected)
            assert_agree(cases["float32"][::2], exact_scores[::2])
            assert_agree(cases["float16"][::2], float16_scores[::2])
            assert (exact_scores - int8_scores)[::2].abs().max() > 1e-3
            assert_agree(cases["mean_head"], method.fda.average(hidden))
            assert list(method.scores(batch, "val")) == ["n16"]
            assert_agree(method.train().scores(batch, "train")["n16"][::2], exact_scores[::2])
            method.eval()


@torch.no_grad()
def test_oracle_generates_its_layer_from_the_cast_alone():
    method = CDCMMPGSession(build_encoder(), OpenEnded(5), oracle=True).eval()
    torch.nn.init.normal_(method.fda.hyper.weight, std=0.1)
    batch = draw_session_batch([0, 0, 0])
    feature = torch.zeros(3, 192)
    feature[:, :2] = torch.tensor([[0.6, 0.8], [-1.0, 0.0], [0.0, 0.0]]) * 192**0.5
    (scores,) = method.scores(batch, "test").values()
    hidden = method.head.phi(method.fuse(batch.samples.frame_features))
    assert_agree(scores, method.fda(feature, hidden))


@torch.no_grad()
def test_concatenation_control_reads_the_sample_and_the_upload():
    method = SessionConcatenated(build_encoder(), OpenEnded(5), axes=None).eval()
    batch = draw_session_batch([16, 0, 4])
    fused = torch.tanh(method.encoder.pooler["dense"](batch.samples.frame_features.mean(1)))
    weight, bias = method.mix.weight, method.mix.bias
    for case, scores in method.scores(batch, "test").items():
        upload = F.layer_norm(batch.uploads[:, list(SESSION_CASES).index(case)], (192,))
        upload[1] = 0  # a session without an upload
        mixed = fused @ weight[:, :192].T + upload @ weight[:, 192:].T + bias
        assert_agree(scores, method.layer(method.head.phi(mixed)))
    assert_agree(method.fuse(batch.samples.frame_features), fused @ weight[:, :192].T + bias)


def test_device_axes_are_generalized_eigenvectors_of_both_covariances():
    generator = np.random.default_rng(0)
    sizes = [2, 3, 5, 8, 1, 4, 6]  # a device with one clip has no variance within it
    anchors = generator.normal(size=(sum(sizes), 192)) * 0.1
    pools, first = [], 0
    for number, size in enumerate(sizes):
        pools.append(list(range(first, first + size)))
        anchors[pools[-1], :4] += generator.normal(size=4) * (number + 1)
        first += size
    axes = DeviceAxes(3)
    axes.fit(torch.from_numpy(anchors).float(), pools)
    groups = [anchors[pool] for pool in pools if len(pool) > 1]
    means = np.stack([group.mean(0) for group in groups])
    within = sum((group - group.mean(0)).T @ (group - group.mean(0)) for group in groups) / (28 - 6)
    between = np.cov(means.T) - np.mean([1 / len(group) for group in groups]) * within
    within = within + 0.1 * np.trace(within) / 192 * np.eye(192)
    values, vectors = np.linalg.eig(np.linalg.solve(within, between))
    order = np.argsort(-values.real)[:3]
    expected = vectors.real[:, order]
    expected = expected / np.sqrt(np.einsum("dk,de,ek->k", expected, within, expected))
    fitted = axes.axes.numpy()
    expected = expected * np.sign((expected * fitted).sum(0))
    np.testing.assert_allclose(fitted, expected, atol=1e-2 * np.abs(expected).max())
    assert_agree(axes.mean.detach(), means.mean(0).astype(np.float32))
    upload = generator.normal(size=(5, 192)).astype(np.float32)
    projected = (upload - means.mean(0)) @ fitted
    projected = projected / np.linalg.norm(projected, axis=1, keepdims=True) * 192**0.5
    assert_agree(axes(torch.from_numpy(upload)), np.pad(projected, ((0, 0), (0, 189))).astype(np.float32))


@torch.no_grad()
def test_retrieval_encodes_clips_and_captions_separately():
    """Captions are padded to the longest caption of a batch, and clips to the largest number of captions."""
    generator, model, head = torch.Generator().manual_seed(4), build_encoder().eval(), Retrieval()
    frames = torch.randint(256, (2, 3, 32, 32, 3), generator=generator, dtype=torch.uint8)
    ids = torch.randint(5, 50, (2, 2, 6), generator=generator)
    mask = torch.ones_like(ids)
    ids[0, 1, 4:], mask[0, 1, 4:], ids[1, 1], mask[1, 1] = 0, 0, 0, 0
    batch = head.encode(model, VideoTextBatch(frames, ids, mask, torch.zeros(2), torch.arange(2)))
    assert batch.there.tolist() == [[True, True], [True, False]]
    for place, length in (((0, 0), 6), ((0, 1), 4), ((1, 0), 6)):
        encoded = model.encode_text(ids[place][None, :length], mask[place][None, :length])
        assert_agree(batch.texts[place], encoded[0])
    assert not batch.texts[1, 1].any()
    assert_agree(batch.frame_features, model.encode_video(normalise(frames)))
    embedded = head.embed_captions(batch.texts)
    expected = batch.texts @ head.text_projection.weight.T + head.text_projection.bias
    assert_agree(embedded, expected / expected.norm(dim=-1, keepdim=True))
    rows = head.outcomes({"own": torch.zeros(2, 256)}, batch)[CAPTIONS]
    assert rows[0].tolist() == [0, 0, 1]
    assert_agree(rows[1], embedded[batch.there])


def test_retrieval_loss_equals_a_numpy_computation():
    generator, head = torch.Generator().manual_seed(5), Retrieval(hidden=7, temperature=0.25)
    videos = F.normalize(torch.randn(4, 7, generator=generator), dim=-1)
    texts = torch.randn(4, 2, 192, generator=generator)
    is_present = torch.ones(4, 2, dtype=torch.bool)
    batch = FeatureBatch(torch.empty(0), torch.zeros(4), torch.tensor([3, 1, 3, 0]), texts, is_present)
    captions = head.embed_captions(texts[:, 0]).detach().double().numpy()
    scores = videos.double().numpy() @ captions.T / 0.25
    scores = scores[np.ix_([0, 1, 3], [0, 1, 3])]  # the third row repeats the first clip
    losses = [np.log(np.exp(row).sum()) - row[i] for table in (scores, scores.T) for i, row in enumerate(table)]
    assert head.eval().loss(videos, batch).item() == pytest.approx(np.mean(losses), rel=1e-4)


@pytest.mark.parametrize(
    "build_invalid",
    [
        lambda: OpenEnded(0),
        lambda: OpenEnded(5, hidden=0),
        lambda: Retrieval(hidden=0),
        lambda: Retrieval(temperature=0),
        lambda: Retrieval(temperature=-0.05),
        lambda: Retrieval(temperature=float("nan")),
        lambda: EncoderPretraining(build_encoder(), OpenEnded(5), caption_epochs=-1),
        lambda: EncoderPretraining(build_encoder(), OpenEnded(5), whole_epochs=-1),
        lambda: EncoderPretraining(build_encoder(), OpenEnded(5), anchor_weight=-1.0),
        lambda: EncoderPretraining(build_encoder(), OpenEnded(5), anchor_weight=float("nan")),
        lambda: EncoderPretraining(build_encoder(), OpenEnded(5), question_share=-0.1),
        lambda: EncoderPretraining(build_encoder(), OpenEnded(5), question_share=1.1),
        lambda: FineTuning(build_encoder(), OpenEnded(5), learning_rate=float("inf")),
        lambda: FineTuning(build_encoder(), OpenEnded(5), learning_rate=-1.0),
        lambda: FineTuning(build_encoder(), OpenEnded(5), weight_decay=float("inf")),
    ],
)
def test_impossible_settings_are_refused(build_invalid):
    with pytest.raises(ConfigError):
        build_invalid()
    for valid in (OpenEnded(1, 1), Retrieval(1, 1e-3), FineTuning(build_encoder(), OpenEnded(5), weight_decay=0.0)):
        assert isinstance(valid, torch.nn.Module)
    EncoderPretraining(build_encoder(), OpenEnded(5), caption_epochs=0, whole_epochs=0, question_share=0.0)


def draw_caption_batch(number: int, words: int = 8) -> CaptionBatch:
    """Return clips of three gray frames with captions [CLS], words, [SEP]; every second caption is shorter."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 50, (number, words + 2), generator=generator)
    mask = torch.ones_like(ids)
    ids[:, 0], ids[:, -1], ids[::2, -2] = 2, 3, 3
    ids[::2, -1], mask[::2, -1] = 0, 0
    greys = torch.arange(3 * number).view(number, 3, 1, 1, 1) % 256
    frames = greys.to(torch.uint8).expand(-1, -1, 32, 32, 3)
    return CaptionBatch(
        frames, ids, mask, ids.flip(0), mask.flip(0), torch.tensor([2, *[4] * 8, 3]), torch.arange(number) % 5,
        torch.arange(number),
    )  # fmt: skip


def test_half_of_the_words_are_masked_and_all_words_in_a_fifth_of_the_captions(monkeypatch):
    method, batch, seen_ids = EncoderPretraining(build_encoder(), OpenEnded(5)).eval(), draw_caption_batch(400), []

    def spy(video: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        seen_ids.append(ids)
        return torch.zeros(*ids.shape, 192)

    monkeypatch.setattr(method.encoder, "encode_words", spy)
    with torch.no_grad():
        loss, accuracy = method.captions_loss(batch, training=True)
    is_word = batch.caption_ids >= 5
    masked = (seen_ids[0] == 4) & is_word
    assert (masked == (seen_ids[0] != batch.caption_ids)).all()
    assert masked[:, 1].all()  # at least one
    masked_share, words = masked[:, 2:][is_word[:, 2:]].float().mean().item(), is_word[:, 2:].sum(1)
    assert masked_share == pytest.approx(0.2 + 0.8 * 0.5, abs=0.05)
    fully_masked_share = (masked[:, 2:].sum(1) == words).float().mean().item()
    assert fully_masked_share == pytest.approx(0.2, abs=0.06)
    # All hidden states are equal, so every position has the same scores.
    hidden = method.word_head(torch.zeros(1, 192))
    scores = (hidden @ method.encoder.text_embeddings.word_embeddings.weight.T + method.word_bias)[0].log_softmax(-1)
    targets = batch.caption_ids[masked]
    assert loss.item() == pytest.approx(-scores[targets].mean().item(), rel=1e-4)
    assert accuracy.item() == pytest.approx((targets == scores.argmax()).float().mean().item(), abs=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(("number", "quarter"), [(9, 2), (3, 1)])
def test_anchor_loss_predicts_caption_words_from_single_frames_of_a_quarter_of_the_batch(number, quarter):
    method, batch = EncoderPretraining(build_encoder(), OpenEnded(5)).eval(), draw_caption_batch(number)
    generator = torch.Generator().manual_seed(6)
    frames = torch.randint(256, (number, 3, 32, 32, 3), generator=generator, dtype=torch.uint8)
    batch = batch._replace(frames=frames)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    prompt = torch.tensor([[2, 4, 4, 4, 4, 4, 4, 4, 4, 3]] * quarter)
    is_in_caption = np.array(
        [[word in row and word > 0 for word in range(50)] for row in batch.caption_ids[:quarter].tolist()]
    )
    expected = []
    for frame in range(3):
        video = ((batch.frames[:quarter, frame : frame + 1].double() / 255 - mean) / std).movedim(-1, 2).float()
        scores = method.anchor_head(method.encoder(video, prompt, torch.ones_like(prompt)).fused).double().numpy()
        losses = np.log1p(np.exp(-np.abs(scores))) + np.maximum(scores, 0) - scores * is_in_caption
        expected.append(10 * losses.mean())
    torch.manual_seed(0)
    drawn_frames = set()
    for _ in range(12):
        loss = method.anchors_loss(batch).item()
        (frame,) = [frame for frame in range(3) if loss == pytest.approx(expected[frame], rel=1e-5)]
        drawn_frames.add(frame)
    assert drawn_frames == {0, 1, 2}  # any of the three frames can be drawn


@torch.no_grad()
def test_pretraining_answers_questions_with_words_of_the_vocabulary():
    method, batch = EncoderPretraining(build_encoder(), OpenEnded(5)).eval(), draw_caption_batch(6)
    pixels = (batch.frames.double() / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    fused = method.encoder(pixels.movedim(-1, 2).float(), batch.text_ids, batch.text_mask).fused
    scores = method.layer(method.head.phi(fused))
    assert scores.shape == (6, 50)  # the vocabulary, not the head's classes
    loss, accuracy = method.questions_loss(batch)
    assert_agree(loss, F.cross_entropy(scores, batch.labels))
    assert accuracy.item() == pytest.approx((scores.argmax(-1) == batch.labels).float().mean().item())


def test_pretraining_sees_single_frames_until_the_final_epochs(monkeypatch):
    method = EncoderPretraining(build_encoder(), OpenEnded(5), caption_epochs=3, question_share=1.0, whole_epochs=1)
    monkeypatch.setattr(EncoderPretraining, "SINGLE_FRAME_RATE", 1.0)
    batch, calls = draw_caption_batch(8), []

    def record_loss(kind: str) -> Callable[..., object]:
        def loss(seen: CaptionBatch, training: bool = True) -> object:
            calls.append((kind, seen.frames[:, :, 0, 0, 0].tolist()))
            value = method.word_bias.square().sum()
            return value if kind == "anchors" else (value, value)

        return loss

    for kind in ("captions", "questions", "anchors"):
        monkeypatch.setattr(method, f"{kind}_loss", record_loss(kind))
    loader = DataLoader([batch], batch_size=None)
    build_trainer(max_epochs=5).fit(method, loader)
    assert [kind for kind, _ in calls] == ["captions", "anchors"] * 3 + ["questions", "anchors"] * 2
    clip_greys = batch.frames[:, :, 0, 0, 0].tolist()
    chosen_frames = []
    for kind, greys in calls[:8]:
        places = [frames.index(grey) for (grey,), frames in zip(greys, clip_greys, strict=True)]
        chosen_frames += places if kind != "anchors" else []
    assert set(chosen_frames) == {0, 1, 2}
    assert len(set(map(tuple, zip(*[iter(chosen_frames)] * 8, strict=True)))) > 1
    assert [greys for _, greys in calls[8:]] == [clip_greys] * 2


def test_zero_anchor_weight_skips_the_anchor_loss(monkeypatch):
    method, batch = EncoderPretraining(build_encoder(), OpenEnded(5), anchor_weight=0.0), draw_caption_batch(4)
    monkeypatch.setattr(method, "anchors_loss", None)
    with torch.no_grad():
        torch.manual_seed(0)
        expected = method.captions_loss(batch, training=True)[0]
        torch.manual_seed(0)
        assert_agree(method._step(batch, "train"), expected)


@pytest.mark.slow
def test_pretraining_mixes_caption_and_question_steps_at_the_set_shares(monkeypatch):
    method, steps = EncoderPretraining(build_encoder(), OpenEnded(5)), []
    method.trainer = build_trainer(max_epochs=9)
    zero_loss = torch.zeros(())
    monkeypatch.setattr(
        method, "captions_loss", lambda batch, training: steps.append((0, batch.frames.shape[1])) or [zero_loss]
    )
    monkeypatch.setattr(method, "questions_loss", lambda batch: steps.append((1, batch.frames.shape[1])) or [zero_loss])
    monkeypatch.setattr(method, "anchors_loss", lambda batch: zero_loss)
    batch = draw_caption_batch(1)
    for epoch, share, single in ((0, 0, 0.95), (3, 0, 0.95), (4, 0.75, 0.95), (6, 0.75, 0.95), (7, 0.75, 0)):
        monkeypatch.setattr(Method, "current_epoch", epoch)
        steps.clear()
        for number in range(1500):
            method.on_train_batch_start(batch, number)
            method._step(batch, "train")
        questions, frames = zip(*steps, strict=True)
        assert np.mean(questions) == pytest.approx(share, abs=0.04)
        assert np.mean(np.array(frames) == 1) == pytest.approx(single, abs=0.02)


def test_processes_share_the_step_type_but_draw_different_masks(monkeypatch):
    method, batch = (
        EncoderPretraining(build_encoder(), OpenEnded(5), caption_epochs=0, question_share=0.5),
        draw_caption_batch(8),
    )
    method.trainer = build_trainer(max_epochs=9)
    turns: list[list[object]] = [[], []]
    random_values: list[list[float]] = [[], []]
    for rank in (0, 1):
        monkeypatch.setattr(Method, "global_rank", rank)
        for number in range(40):
            method.on_train_batch_start(batch, number)
            captions, frames, _ = method._turn
            turns[rank].append((captions, None if frames is None else frames.tolist()))
            random_values[rank].append(torch.rand(()).item())
    assert turns[0] == turns[1]
    assert {captions for captions, _ in turns[0]} == {True, False}
    assert not set(random_values[0]) & set(random_values[1])


@torch.no_grad()
def test_validation_masks_depend_on_the_seed(monkeypatch):
    method, masked_ids = EncoderPretraining(build_encoder(), OpenEnded(5)).eval(), []
    monkeypatch.setattr(
        method.encoder, "encode_words", lambda video, ids, mask: masked_ids.append(ids) or torch.zeros(*ids.shape, 192)
    )
    for method.seed in (0, 1, 0):
        method.captions_loss(draw_caption_batch(9), training=False)
    assert torch.equal(masked_ids[0], masked_ids[2])
    assert not torch.equal(masked_ids[0], masked_ids[1])


@torch.no_grad()
def test_pretraining_validation_loss_is_the_sum_of_both_losses(monkeypatch):
    method, batches = EncoderPretraining(build_encoder(), OpenEnded(5)), [draw_caption_batch(6), draw_caption_batch(2)]
    (logged,) = build_trainer().validate(method, DataLoader(batches, batch_size=None), verbose=False)
    expected = {}
    for batch, weight in zip(batches, (6 / 8, 2 / 8), strict=True):
        words, words_accuracy = method.eval().captions_loss(batch, training=False)
        loss, accuracy = method.questions_loss(batch)
        for name, value in (("words_accuracy", words_accuracy), ("answers_accuracy", accuracy), ("loss", words + loss)):
            expected[f"val/{name}"] = expected.get(f"val/{name}", 0.0) + weight * value.item()
    assert logged == pytest.approx(expected, rel=1e-4)


def test_pretraining_learning_rate_warms_up_then_decays(monkeypatch):
    monkeypatch.setattr(EncoderPretraining, "WARM_UP_STEPS", 4)
    method, rates = EncoderPretraining(build_encoder(), OpenEnded(5), learning_rate=1.0), []
    method.training_step = lambda batch, batch_idx: method.word_bias.square().sum()
    method.on_train_batch_end = lambda *_: rates.append(method.optimizers().param_groups[0]["lr"])
    build_trainer(max_epochs=8).fit(method, DataLoader([draw_caption_batch(2)], batch_size=None))
    # Warm-up from 1/4 to 1 over four steps, times a linear decay to 0 over eight steps.
    assert rates == pytest.approx([7 / 16 * 7 / 8, 10 / 16 * 6 / 8, 13 / 16 * 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0])
    assert method.parameter_counts() == (
        sum(p.numel() for p in method.encoder.parameters()), 0, sum(p.numel() for p in method.parameters())
    )  # fmt: skip
    assert method.traffic() == (0, 0)
