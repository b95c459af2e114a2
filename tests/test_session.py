"""The session variant, its controls and the encoder's pretraining: counts, bytes, fall-backs, and that each learns."""

import pytest
import torch
from lightning import Trainer
from torch.utils.data import DataLoader

from cdc_mmpg.data.batch import CaptionBatch, FeatureBatch, SessionBatch
from cdc_mmpg.data.control_cases import SESSION_CASES
from cdc_mmpg.errors import ConfigError, DataError
from cdc_mmpg.methods.base import Method
from cdc_mmpg.methods.cdc_mmpg_session import CDCMMPGSession
from cdc_mmpg.methods.encoder_pretraining import EncoderPretraining
from cdc_mmpg.methods.in_context import InContext
from cdc_mmpg.methods.mean_anchor import MeanAnchor
from cdc_mmpg.methods.session_concatenated import SessionConcatenated
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.device_axes import DeviceAxes
from cdc_mmpg.models.fda import BasisFDA, LowRankFDA, as_sent
from cdc_mmpg.models.heads import Head, MultipleChoice, OpenEnded, Retrieval
from cdc_mmpg.training.sessions import SessionDataset
from cdc_mmpg.wire import payloads
from cdc_mmpg.wire.payloads import PAYLOAD_PRECISIONS
from tolerances import assert_agree


def encoder() -> AllInOne:
    torch.manual_seed(0)
    return AllInOne(image_size=32, depth=1, vocab_size=50, dropout=0.0, drop_path=0.0)


def sessions() -> SessionBatch:
    """Two devices that answer the same question about the same clip differently."""
    torch.manual_seed(1)
    feature = torch.randn(1, 3, 192).expand(2, -1, -1)
    uploads = torch.randn(2, 1, 192).repeat(1, len(SESSION_CASES), 1)
    anchors = torch.tensor([[case.anchors for case in SESSION_CASES.values()]] * 2)
    shuffled = [place for place, case in enumerate(SESSION_CASES.values()) if case.shuffled]
    uploads[:, shuffled] = uploads[:, shuffled].flip(0)
    casts = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    samples = FeatureBatch(feature, torch.tensor([0, 1]), torch.arange(2))
    sets = uploads.unsqueeze(2) + 0.1 * torch.randn(2, len(SESSION_CASES), SessionDataset.SET, 192)
    present = torch.arange(SessionDataset.SET) < anchors.unsqueeze(-1)
    return SessionBatch(samples, uploads * (anchors > 0).unsqueeze(-1), anchors, casts, sets * present.unsqueeze(-1))


def train(method: Method, batch: object, steps: int) -> Method:
    trainer = Trainer(
        max_epochs=steps, check_val_every_n_epoch=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    loader = DataLoader([batch], batch_size=None)
    trainer.fit(method, loader, loader)
    return method


OPPONENTS = {"mean_anchor": MeanAnchor, "in_context": InContext}


def build(name: str, classes: int = 5, head: Head | None = None) -> CDCMMPGSession | SessionConcatenated:
    parts = (encoder(), head or OpenEnded(classes))
    plain = {"axes": None, "learning_rate": 1e-3}
    if name == "concatenated":
        return SessionConcatenated(*parts, **plain)
    if name in OPPONENTS:
        return OPPONENTS[name](*parts, learning_rate=1e-3)
    kind = {
        "low_rank": {},
        "film": {"generated": "film"},
        "bias": {"generated": "bias"},
        "full": {"generated": "full"},
        "basis": {"generated": "basis", "size": 8},
        "oracle": {"oracle": True},
    }[name]
    return CDCMMPGSession(*parts, **plain, **kind)


@pytest.mark.parametrize("name", ["low_rank", "full", "basis", "film", "bias", "oracle", "concatenated", *OPPONENTS])
def test_a_cue_that_only_the_session_holds_is_learned(name):
    method = train(build(name), sessions(), 60)
    assert method.trainer.callback_metrics["val/accuracy"] == 1.0
    method.eval()
    with torch.no_grad():
        cases = method.scores(sessions(), "test")
    further = [] if name in ("concatenated", *OPPONENTS) else ["mean_head", *PAYLOAD_PRECISIONS]
    assert list(cases) == (["own"] if name == "oracle" else [*SESSION_CASES, *further])
    if name != "oracle":
        assert cases["n16"].argmax(-1).tolist() == [0, 1]
        assert cases["shuffled_n16"].argmax(-1).tolist() == [1, 0]  # the other's upload gives the other's answers
        assert torch.equal(*cases["n0"])  # without an upload both get one answer


@pytest.mark.parametrize("name", ["low_rank", "full", "basis"])
def test_without_anchors_the_device_answers_with_its_own_layer(name):
    method, batch = build(name).eval(), sessions()
    with torch.no_grad():
        fallback = method.scores(batch, "test")["n0"]
        assert torch.equal(fallback, method.head(method.fuse(batch.samples.frame_features), method.shared))
        assert torch.equal(fallback, method(batch.samples.frame_features))
        weight, bias = method.device_layers(batch.samples.frame_features)
    assert torch.equal(weight[0], method.shared.weight)
    assert torch.equal(bias[1], method.shared.bias)


def test_the_encoder_does_not_move_and_the_generator_does():
    method = build("low_rank")
    before = {key: value.clone() for key, value in method.state_dict().items()}
    train(method, sessions(), 3)
    moved = {key for key, value in method.state_dict().items() if not torch.equal(value, before[key])}
    assert not any(key.startswith("encoder.") for key in moved)
    assert {"fda.hyper.weight", "fda.mlp.0.weight", "fda.shared.weight", "head.phi.0.weight"} <= moved


def test_counts_and_bytes():
    for classes, numbers in ((1501, 6392), (17, 456)):  # 4 (L + 97)
        assert LowRankFDA(96, classes, 4).numbers == numbers
    method = build("low_rank", 1501)
    assert method.traffic() == (768, 6408)  # int8, a float16 scale for each of 8 factor vectors
    assert method.payloads() == {"float32": 4 * 6392, "float16": 2 * 6392, "int8": 6408}
    counts = method.parameter_counts()
    assert counts.device == sum(p.numel() for p in method.encoder.parameters()) + 18_720 + 145_597
    assert counts.cloud == 74_496 + 193 * 6392
    assert build("full", 1501).payloads() == {"float32": 582_388, "float16": 291_194, "int8": 148_599}
    basis = build("basis", 1501)
    assert basis.traffic() == (768, 10)
    assert basis.parameter_counts().device == counts.device + 8 * 145_597
    assert basis.parameter_counts().cloud == 193 * 200
    assert build("concatenated").traffic() == (0, 0)
    plain = build("low_rank").parameter_counts().device
    assert build("concatenated").parameter_counts().device == plain + 385 * 192


def test_the_low_rank_layers_are_what_training_applies():
    torch.manual_seed(0)
    fda = LowRankFDA(96, 17, 4)
    feature, hidden = torch.randn(3, 192), torch.randn(3, 96)
    assert torch.equal(fda(feature, hidden), fda.shared(hidden))  # the residual starts at zero
    torch.nn.init.normal_(fda.hyper.weight, std=0.1)
    weight, bias = fda.generate(feature)
    assert weight.shape == (3, 17, 96)
    expected = torch.einsum("bld,bd->bl", weight, hidden) + bias
    assert_agree(fda(feature, hidden), expected)
    residual = torch.cat([weight, bias[..., None]], -1) - torch.cat([fda.shared.weight, fda.shared.bias[:, None]], -1)
    assert torch.linalg.matrix_rank(residual, atol=1e-4).tolist() == [4, 4, 4]


def test_a_rank_must_fit():
    with pytest.raises(ConfigError, match="at least 1"):
        LowRankFDA(96, 17, 0)
    with pytest.raises(ConfigError, match="at least 1"):
        BasisFDA(96, 17, 0)
    assert LowRankFDA(192, 1, 4).numbers == 1 + 193  # of a single score there is no other rank


@pytest.mark.parametrize("name", ["low_rank", "full", "basis"])
def test_the_layers_that_a_device_installs_are_what_training_applies(name):
    fda = build(name, 17).fda
    for parameter in fda.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    feature, hidden = torch.randn(3, 192), torch.randn(3, 96)
    weight, bias = fda.generate(feature)
    assert_agree(fda(feature, hidden), torch.einsum("bld,bd->bl", weight, hidden) + bias)
    several = torch.randn(3, 5, 96)  # hidden vectors that share a layer, as the candidates of a multiple choice do
    together = fda(feature[:, None], several)
    for place in range(5):
        assert_agree(together[:, place], fda(feature, several[:, place]))


@pytest.mark.parametrize("name", ["low_rank", "full", "basis"])
def test_the_mean_layer_is_the_mean_of_what_training_generated(name):
    fda = build(name, 17).fda.train()
    for parameter in fda.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    feature, hidden = torch.randn(8, 192), torch.randn(8, 96)
    fda(feature, hidden)
    fda.settle()
    fda.eval()
    weight, bias = (part.mean(0) for part in fda.generate(feature))
    assert_agree(fda.average(hidden), hidden @ weight.T + bias)
    before = fda.average(hidden)
    fda(torch.randn(8, 192), hidden)  # evaluation does not move it
    fda.settle()
    assert torch.equal(fda.average(hidden), before)


@pytest.mark.parametrize("task", ["open_ended", "choice"])
@pytest.mark.parametrize("name", ["low_rank", "full", "basis"])
def test_the_mean_layer_holds_no_layer_of_a_sample_without_anchors(name, task):
    """Nothing was uploaded: what the generator would make of nothing says nothing."""

    def mean_after(anchors: list[int]) -> dict[str, torch.Tensor]:
        method = build(name, head=MultipleChoice() if task == "choice" else None)
        for parameter in method.fda.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        data = sessions()._replace(anchors=torch.tensor([[number] for number in anchors]))
        if task == "choice":
            features = data.samples.frame_features[:, None].expand(-1, 5, -1, -1)
            data = data._replace(samples=data.samples._replace(frame_features=features))
        rows = [place for place, number in enumerate(anchors) if number]
        outputs = method.train().scores(data, "train")["n16"]
        outputs.sum().backward()
        method.fda.settle()
        assert all(parameter.grad is not None for parameter in method.fda.parameters())  # DDP waits for each
        with torch.no_grad():
            shared = method.eval()._answer(data.samples.frame_features, data.uploads[:, 0], torch.zeros(2), "float32")
        assert [bool(torch.equal(own, other)) for own, other in zip(outputs, shared, strict=True)] == [
            place not in rows for place in range(2)
        ]
        return {key: value for key, value in method.fda.named_buffers() if key.startswith(("mean", "seen"))}

    both, first, second, none = (mean_after(anchors) for anchors in ([16, 16], [16, 0], [0, 16], [0, 0]))
    (key,) = both.keys() - {"seen"}
    assert both["seen"] == first["seen"] == 1
    torch.testing.assert_close((first[key] + second[key]) / 2, both[key])
    assert not torch.allclose(first[key], both[key])
    assert none["seen"] == 0
    assert not none[key].any()


@pytest.mark.parametrize("precision", PAYLOAD_PRECISIONS)
@pytest.mark.parametrize("name", ["low_rank", "full", "basis"])
def test_test_answers_come_from_the_decoded_bytes(name, precision):
    method = build(name, 17)
    fda = method.fda
    for parameter in fda.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    feature = torch.randn(3, 192)
    parts = fda.parts(feature)
    for sample in range(3):
        content = payloads.encode_matrices([part[sample].detach().numpy() for part in parts], precision)
        assert len(content) == method.payloads()[precision]
        arrived = payloads.decode_matrices(content, fda.shapes, precision)
        for part, matrix in zip(as_sent(parts, precision), arrived, strict=True):
            assert torch.equal(part[sample], torch.from_numpy(matrix))


def test_rounding_passes_the_gradient_on():
    part = torch.tensor([[0.3, -1.0, 0.004]], requires_grad=True)
    (arrived,) = as_sent((part,), "int8")
    arrived.sum().backward()
    assert torch.equal(part.grad, torch.ones(1, 3))
    assert arrived[0, 2] in (0.0, torch.tensor(1 / 127).half().float())


def test_without_axes_the_session_feature_is_the_layer_normed_mean():
    feature = build("low_rank").axes(torch.randn(4, 192) * 3 + 1)
    assert_agree(feature.mean(-1), torch.zeros(4))
    assert torch.allclose(feature.std(-1, correction=0), torch.ones(4), atol=1e-3)  # the norm's epsilon


def devices(number: int = 60, clips: int = 8, content: int = 0) -> tuple[torch.Tensor, list[list[int]]]:
    """Anchor features of devices that differ along two known directions, amid content that varies ten times as much.

    Other `content` is other clips of the same devices.
    """
    angles = torch.rand(number, generator=torch.Generator().manual_seed(0)) * 2 * torch.pi
    generator = torch.Generator().manual_seed(1 + content)
    anchors = torch.randn(number * clips, 192, generator=generator) * torch.linspace(0.1, 5, 192)
    anchors[:, 3] += 2 * angles.cos().repeat_interleave(clips)
    anchors[:, 5] += 2 * angles.sin().repeat_interleave(clips)
    return anchors, [list(range(place * clips, (place + 1) * clips)) for place in range(number)]


def test_the_axes_are_those_in_which_devices_differ():
    anchors, pools = devices()
    axes = DeviceAxes(2)
    axes.fit(anchors, pools)
    strength = axes.axes.norm(dim=1)
    assert set(strength.topk(2).indices.tolist()) == {3, 5}
    feature = axes(torch.stack([anchors[pool].mean(0) for pool in pools]))
    assert feature.shape == (60, 192)
    assert_agree(feature.norm(dim=-1), torch.full((60,), 192**0.5))
    assert not feature[:, 2:].any()
    # The same directions whatever the content is, and the same from clips it was not fitted on.
    fresh, _ = devices(content=1)
    assert not (fresh == anchors).any()
    again = axes(torch.stack([fresh[pool[:4]].mean(0) for pool in pools]))
    assert torch.nn.functional.cosine_similarity(feature, again).min() > 0.8
    assert sum(p.numel() for p in axes.parameters()) == 3 * 192
    assert not any(p.requires_grad for p in axes.parameters())


@pytest.mark.parametrize("number", [0, 192])
def test_impossible_axes_are_refused(number):
    with pytest.raises(ConfigError, match="from 1 to 191"):
        DeviceAxes(number)


def test_how_many_axes_there_are_is_found():
    """Those in which devices differ, whatever the content is; one of shuffled devices, which differ in none."""
    anchors, pools = devices()
    axes = DeviceAxes(None)
    assert axes.fit(anchors, pools) == 2
    assert set(axes.axes.norm(dim=1).topk(2).indices.tolist()) == {3, 5}
    assert not axes.axes[:, 2:].any()
    fixed = DeviceAxes(2)
    fixed.fit(anchors, pools)
    assert_agree(axes(anchors), fixed(anchors))
    anchors[:, 7] += torch.randn(60).repeat_interleave(8)
    assert axes.fit(anchors, pools) == 3
    assert axes.axes.shape == (192, DeviceAxes.MOST)  # whatever is found, so that a checkpoint fits
    shuffled = anchors[torch.randperm(len(anchors), generator=torch.Generator().manual_seed(5))]
    assert axes.fit(shuffled, pools) == 1


def test_axes_need_devices():
    anchors, pools = devices(2)
    with pytest.raises(DataError, match="2 devices have two unlabelled clips"):
        DeviceAxes(2).fit(anchors, [*pools, [0], []])


@pytest.mark.parametrize("name", ["low_rank", "full", "basis", "concatenated"])
@pytest.mark.parametrize("head", [MultipleChoice(), Retrieval(32)])
def test_every_task_has_sessions(name, head):
    parts = {"axes": None, "learning_rate": 1e-3}
    if name == "concatenated":
        method = SessionConcatenated(encoder(), head, **parts)
    else:
        method = CDCMMPGSession(encoder(), head, name, **parts)
    batch = sessions()
    if head.task == "multiple_choice":
        features = torch.randn(2, 5, 3, 192)
        batch = batch._replace(samples=batch.samples._replace(frame_features=features))
    else:
        texts, there = torch.randn(2, 3, 192), torch.ones(2, 3, dtype=torch.bool)
        batch = batch._replace(samples=batch.samples._replace(texts=texts, there=there))
    train(method, batch, 2)
    with torch.no_grad():
        cases = method.eval().scores(batch, "test")
    shape = (2, 5) if head.task == "multiple_choice" else (2, 32)
    assert {tuple(outputs.shape) for outputs in cases.values()} == {shape}
    assert torch.isfinite(torch.stack(list(cases.values()))).all()


def captions() -> CaptionBatch:
    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(256, (4, 3, 32, 32, 3), generator=generator, dtype=torch.uint8)
    ids = torch.cat([torch.full((4, 1), 2), torch.randint(5, 50, (4, 5), generator=generator)], 1)
    mask = torch.ones_like(ids)
    ids[3, 4:] = mask[3, 4:] = 0  # padded
    neutral = torch.tensor([2, *[4] * 8, 3])
    return CaptionBatch(
        frames, ids, mask, ids.flip(0).clone(), mask.flip(0).clone(), neutral, torch.arange(4), torch.arange(4)
    )


def test_captions_and_questions_are_learned_by_heart():
    batch = captions()._replace(text_ids=captions().caption_ids, text_mask=captions().caption_mask)
    method = train(EncoderPretraining(encoder(), OpenEnded(5), caption_epochs=60, learning_rate=2e-3), batch, 160)
    metrics = method.trainer.callback_metrics
    assert metrics["val/words_accuracy"] == 1.0
    assert metrics["val/answers_accuracy"] == 1.0


def test_validation_does_not_depend_on_what_else_is_in_the_batch():
    """As many processes, as many ways to share out the captions: the masked words and the means are the same."""
    method, batch = EncoderPretraining(encoder(), OpenEnded(5)).eval(), captions()
    alone = []
    with torch.no_grad():
        together = torch.stack(method.captions_loss(batch, training=False))
        for row in range(4):
            length = int(batch.caption_mask[row].sum())  # padded no longer than it is
            neutral = batch.neutral
            own = CaptionBatch(*(part if part is neutral else part[row : row + 1] for part in batch))
            own = own._replace(caption_ids=own.caption_ids[:, :length], caption_mask=own.caption_mask[:, :length])
            alone.append(torch.stack(method.captions_loss(own, training=False)))
    torch.testing.assert_close(torch.stack(alone).mean(0), together)
    masked = method.mask_words(batch, training=False)
    assert masked.any(1).all()
    assert 0.2 < masked.float().mean() < 0.9
    assert not torch.equal(masked[0], masked[1])  # rows draw for themselves
    other = EncoderPretraining(encoder(), OpenEnded(5), seed=1)
    assert not torch.equal(other.mask_words(batch, training=False), masked)


def test_only_words_are_masked_and_validation_masks_the_same_ones(monkeypatch):
    method, batch, seen = EncoderPretraining(encoder(), OpenEnded(5)).eval(), captions(), []
    encode = method.encoder.encode_words

    def spy(video, ids, mask):
        seen.append(ids)
        return encode(video, ids, mask)

    monkeypatch.setattr(method.encoder, "encode_words", spy)
    with torch.no_grad():
        first, second = (method.captions_loss(batch, training=False)[0] for _ in range(2))
        for seed in range(5):
            torch.manual_seed(seed)
            method.captions_loss(batch, training=True)
    assert torch.equal(first, second)
    assert torch.equal(seen[0], seen[1])
    assert any(not torch.equal(seen[0], ids) for ids in seen[2:])
    for ids in seen:
        masked = ids == 4
        assert masked.any()
        assert (batch.caption_ids[masked] >= 5).all()
        assert torch.equal(ids[~masked], batch.caption_ids[~masked])


def test_the_order_of_the_pretraining_is_captions_first(monkeypatch):
    method = EncoderPretraining(encoder(), OpenEnded(5), caption_epochs=2, question_share=1.0)
    asked = []
    for name in ("captions_loss", "questions_loss"):
        function = getattr(method, name)

        def spy(*arguments, name=name, function=function, **more):
            if method.training:
                asked.append(name)
            return function(*arguments, **more)

        monkeypatch.setattr(method, name, spy)
    train(method, captions(), 4)
    assert asked == ["captions_loss"] * 2 + ["questions_loss"] * 2


def test_the_words_of_a_text_do_not_depend_on_its_neighbours_padding():
    model, batch = encoder().eval(), captions()
    video = torch.randn(4, 3, 3, 32, 32)
    with torch.no_grad():
        together = model.encode_words(video, batch.caption_ids, batch.caption_mask)
        alone = model.encode_words(video[3:], batch.caption_ids[3:, :4], None)
        cls = model(video, batch.caption_ids, batch.caption_mask).frame_features.mean(1)
    assert_agree(together[3, :4], alone[0])
    assert_agree(together[:, 0], cls)


@pytest.mark.parametrize("arguments", [{"caption_epochs": -1}, {"question_share": 1.5}])
def test_impossible_settings_are_refused(arguments):
    with pytest.raises(ConfigError, match="caption_epochs"):
        EncoderPretraining(encoder(), OpenEnded(5), **arguments)
