"""Session variant, its controls and encoder pretraining: learning, parameter counts, payload bytes, fallbacks."""

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
from cdc_mmpg.models.fda import BasisFDA, LowRankFDA, round_parts
from cdc_mmpg.models.heads import Head, MultipleChoice, OpenEnded, Retrieval
from cdc_mmpg.training.sessions import SessionDataset
from cdc_mmpg.wire import payloads
from cdc_mmpg.wire.payloads import PAYLOAD_PRECISIONS
from tolerances import assert_agree


def build_encoder() -> AllInOne:
    torch.manual_seed(0)
    return AllInOne(image_size=32, depth=1, vocab_size=50, dropout=0.0, drop_path=0.0)


def build_sessions() -> SessionBatch:
    """Return a batch of two devices that answer the same question about the same clip differently."""
    torch.manual_seed(1)
    feature = torch.randn(1, 3, 192).expand(2, -1, -1)
    uploads = torch.randn(2, 1, 192).repeat(1, len(SESSION_CASES), 1)
    anchors = torch.tensor([[case.anchors for case in SESSION_CASES.values()]] * 2)
    shuffled = [place for place, case in enumerate(SESSION_CASES.values()) if case.shuffled]
    uploads[:, shuffled] = uploads[:, shuffled].flip(0)
    casts = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    samples = FeatureBatch(feature, torch.tensor([0, 1]), torch.arange(2))
    sets = uploads.unsqueeze(2) + 0.1 * torch.randn(2, len(SESSION_CASES), SessionDataset.SET_SIZE, 192)
    present = torch.arange(SessionDataset.SET_SIZE) < anchors.unsqueeze(-1)
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
    parts = (build_encoder(), head or OpenEnded(classes))
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
    method = train(build(name), build_sessions(), 60)
    assert method.trainer.callback_metrics["val/accuracy"] == 1.0
    method.eval()
    with torch.no_grad():
        cases = method.scores(build_sessions(), "test")
    extra_cases = [] if name in ("concatenated", *OPPONENTS) else ["mean_head", *PAYLOAD_PRECISIONS]
    assert list(cases) == (["own"] if name == "oracle" else [*SESSION_CASES, *extra_cases])
    if name != "oracle":
        assert cases["n16"].argmax(-1).tolist() == [0, 1]
        assert cases["shuffled_n16"].argmax(-1).tolist() == [1, 0]  # upload and answers are the other's
        assert torch.equal(*cases["n0"])  # without an upload, both devices get the same answer


@pytest.mark.parametrize("name", ["low_rank", "full", "basis"])
def test_without_anchors_the_device_answers_with_its_shared_layer(name):
    method, batch = build(name).eval(), build_sessions()
    with torch.no_grad():
        fallback = method.scores(batch, "test")["n0"]
        assert torch.equal(fallback, method.head(method.fuse(batch.samples.frame_features), method.shared))
        assert torch.equal(fallback, method(batch.samples.frame_features))
        weight, bias = method.device_layers(batch.samples.frame_features)
    assert torch.equal(weight[0], method.shared.weight)
    assert torch.equal(bias[1], method.shared.bias)


def test_training_updates_the_generator_but_not_the_encoder():
    method = build("low_rank")
    before = {key: value.clone() for key, value in method.state_dict().items()}
    train(method, build_sessions(), 3)
    updated = {key for key, value in method.state_dict().items() if not torch.equal(value, before[key])}
    assert not any(key.startswith("encoder.") for key in updated)
    assert {"fda.hyper.weight", "fda.mlp.0.weight", "fda.shared.weight", "head.phi.0.weight"} <= updated


def test_counts_and_bytes():
    for classes, numbers in ((1501, 6392), (17, 456)):  # 4 (L + 97)
        assert LowRankFDA(96, classes, 4).numbers == numbers
    method = build("low_rank", 1501)
    assert method.traffic() == (768, 6408)  # int8 values, one float16 scale for each of 8 factor vectors
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


def test_generated_low_rank_layers_match_the_forward_pass_of_training():
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


def test_ranks_below_one_are_refused_and_large_ones_are_reduced():
    with pytest.raises(ConfigError, match="at least 1"):
        LowRankFDA(96, 17, 0)
    with pytest.raises(ConfigError, match="at least 1"):
        BasisFDA(96, 17, 0)
    assert LowRankFDA(192, 1, 4).numbers == 1 + 193  # the rank of a layer with a single score is 1


@pytest.mark.parametrize("name", ["low_rank", "full", "basis"])
def test_generated_layers_match_the_forward_pass_of_training(name):
    fda = build(name, 17).fda
    for parameter in fda.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    feature, hidden = torch.randn(3, 192), torch.randn(3, 96)
    weight, bias = fda.generate(feature)
    assert_agree(fda(feature, hidden), torch.einsum("bld,bd->bl", weight, hidden) + bias)
    candidates = torch.randn(3, 5, 96)  # hidden vectors that share a layer, like the candidates of a multiple choice
    together = fda(feature[:, None], candidates)
    for place in range(5):
        assert_agree(together[:, place], fda(feature, candidates[:, place]))


@pytest.mark.parametrize("name", ["low_rank", "full", "basis"])
def test_the_mean_layer_averages_the_layers_generated_in_training(name):
    fda = build(name, 17).fda.train()
    for parameter in fda.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    feature, hidden = torch.randn(8, 192), torch.randn(8, 96)
    fda(feature, hidden)
    fda.update_mean()
    fda.eval()
    weight, bias = (part.mean(0) for part in fda.generate(feature))
    assert_agree(fda.average(hidden), hidden @ weight.T + bias)
    before = fda.average(hidden)
    fda(torch.randn(8, 192), hidden)  # evaluation does not change the mean
    fda.update_mean()
    assert torch.equal(fda.average(hidden), before)


@pytest.mark.parametrize("task", ["open_ended", "choice"])
@pytest.mark.parametrize("name", ["low_rank", "full", "basis"])
def test_the_mean_layer_skips_samples_without_anchors(name, task):
    """Without an upload, the generated layer carries no information and must not enter the mean."""

    def train_and_read_mean(anchors: list[int]) -> dict[str, torch.Tensor]:
        method = build(name, head=MultipleChoice() if task == "choice" else None)
        for parameter in method.fda.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        data = build_sessions()._replace(anchors=torch.tensor([[number] for number in anchors]))
        if task == "choice":
            features = data.samples.frame_features[:, None].expand(-1, 5, -1, -1)
            data = data._replace(samples=data.samples._replace(frame_features=features))
        rows = [place for place, number in enumerate(anchors) if number]
        outputs = method.train().scores(data, "train")["n16"]
        outputs.sum().backward()
        method.fda.update_mean()
        assert all(parameter.grad is not None for parameter in method.fda.parameters())  # DDP waits for every gradient
        with torch.no_grad():
            shared = method.eval()._apply_layers(
                data.samples.frame_features, data.uploads[:, 0], torch.zeros(2), "float32"
            )
        assert [
            bool(torch.equal(output, shared_output)) for output, shared_output in zip(outputs, shared, strict=True)
        ] == [place not in rows for place in range(2)]
        return {key: value for key, value in method.fda.named_buffers() if key.startswith(("mean", "seen"))}

    both, first, second, none = (train_and_read_mean(anchors) for anchors in ([16, 16], [16, 0], [0, 16], [0, 0]))
    (key,) = both.keys() - {"seen"}
    assert both["seen"] == first["seen"] == 1
    torch.testing.assert_close((first[key] + second[key]) / 2, both[key])
    assert not torch.allclose(first[key], both[key])
    assert none["seen"] == 0
    assert not none[key].any()


@pytest.mark.parametrize("precision", PAYLOAD_PRECISIONS)
@pytest.mark.parametrize("name", ["low_rank", "full", "basis"])
def test_rounded_parts_equal_the_decoded_payload(name, precision):
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
        for part, matrix in zip(round_parts(parts, precision), arrived, strict=True):
            assert torch.equal(part[sample], torch.from_numpy(matrix))


def test_rounding_passes_the_gradient_on():
    part = torch.tensor([[0.3, -1.0, 0.004]], requires_grad=True)
    (arrived,) = round_parts((part,), "int8")
    arrived.sum().backward()
    assert torch.equal(part.grad, torch.ones(1, 3))
    assert arrived[0, 2] in (0.0, torch.tensor(1 / 127).half().float())


def test_without_axes_the_session_feature_is_the_layer_normed_mean():
    feature = build("low_rank").axes(torch.randn(4, 192) * 3 + 1)
    assert_agree(feature.mean(-1), torch.zeros(4))
    assert torch.allclose(feature.std(-1, correction=0), torch.ones(4), atol=1e-3)  # the norm's epsilon


def draw_device_anchors(number: int = 60, clips: int = 8, content: int = 0) -> tuple[torch.Tensor, list[list[int]]]:
    """Return anchors and clip pools of devices that differ in dimensions 3 and 5; `content` selects the clips.

    The content of clips varies ten times as much as the devices do.
    """
    angles = torch.rand(number, generator=torch.Generator().manual_seed(0)) * 2 * torch.pi
    generator = torch.Generator().manual_seed(1 + content)
    anchors = torch.randn(number * clips, 192, generator=generator) * torch.linspace(0.1, 5, 192)
    anchors[:, 3] += 2 * angles.cos().repeat_interleave(clips)
    anchors[:, 5] += 2 * angles.sin().repeat_interleave(clips)
    return anchors, [list(range(place * clips, (place + 1) * clips)) for place in range(number)]


def test_the_axes_are_the_directions_in_which_devices_differ():
    anchors, pools = draw_device_anchors()
    axes = DeviceAxes(2)
    axes.fit(anchors, pools)
    strength = axes.axes.norm(dim=1)
    assert set(strength.topk(2).indices.tolist()) == {3, 5}
    feature = axes(torch.stack([anchors[pool].mean(0) for pool in pools]))
    assert feature.shape == (60, 192)
    assert_agree(feature.norm(dim=-1), torch.full((60,), 192**0.5))
    assert not feature[:, 2:].any()
    # The features do not depend on the content: other clips of the same devices give similar ones.
    fresh, _ = draw_device_anchors(content=1)
    assert not (fresh == anchors).any()
    fresh_feature = axes(torch.stack([fresh[pool[:4]].mean(0) for pool in pools]))
    assert torch.nn.functional.cosine_similarity(feature, fresh_feature).min() > 0.8
    assert sum(p.numel() for p in axes.parameters()) == 3 * 192
    assert not any(p.requires_grad for p in axes.parameters())


@pytest.mark.parametrize("number", [0, 192])
def test_impossible_axes_are_refused(number):
    with pytest.raises(ConfigError, match="from 1 to 191"):
        DeviceAxes(number)


def test_the_number_of_axes_is_estimated():
    """It is the number of directions in which devices differ; shuffled devices, which differ in none, give one."""
    anchors, pools = draw_device_anchors()
    axes = DeviceAxes(None)
    assert axes.fit(anchors, pools) == 2
    assert set(axes.axes.norm(dim=1).topk(2).indices.tolist()) == {3, 5}
    assert not axes.axes[:, 2:].any()
    fixed = DeviceAxes(2)
    fixed.fit(anchors, pools)
    assert_agree(axes(anchors), fixed(anchors))
    anchors[:, 7] += torch.randn(60).repeat_interleave(8)
    assert axes.fit(anchors, pools) == 3
    assert axes.axes.shape == (192, DeviceAxes.MAX_AXES)  # fixed, so that checkpoints always fit
    shuffled = anchors[torch.randperm(len(anchors), generator=torch.Generator().manual_seed(5))]
    assert axes.fit(shuffled, pools) == 1


def test_axes_need_devices():
    anchors, pools = draw_device_anchors(2)
    with pytest.raises(DataError, match="2 devices have two or more unlabelled clips"):
        DeviceAxes(2).fit(anchors, [*pools, [0], []])


@pytest.mark.parametrize("name", ["low_rank", "full", "basis", "concatenated"])
@pytest.mark.parametrize("head", [MultipleChoice(), Retrieval(32)])
def test_session_methods_train_on_every_task(name, head):
    parts = {"axes": None, "learning_rate": 1e-3}
    if name == "concatenated":
        method = SessionConcatenated(build_encoder(), head, **parts)
    else:
        method = CDCMMPGSession(build_encoder(), head, name, **parts)
    batch = build_sessions()
    if head.task == "multiple_choice":
        features = torch.randn(2, 5, 3, 192)
        batch = batch._replace(samples=batch.samples._replace(frame_features=features))
    else:
        texts, present = torch.randn(2, 3, 192), torch.ones(2, 3, dtype=torch.bool)
        batch = batch._replace(samples=batch.samples._replace(texts=texts, there=present))
    train(method, batch, 2)
    with torch.no_grad():
        cases = method.eval().scores(batch, "test")
    shape = (2, 5) if head.task == "multiple_choice" else (2, 32)
    assert {tuple(outputs.shape) for outputs in cases.values()} == {shape}
    assert torch.isfinite(torch.stack(list(cases.values()))).all()


def draw_captions() -> CaptionBatch:
    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(256, (4, 3, 32, 32, 3), generator=generator, dtype=torch.uint8)
    ids = torch.cat([torch.full((4, 1), 2), torch.randint(5, 50, (4, 5), generator=generator)], 1)
    mask = torch.ones_like(ids)
    ids[3, 4:] = mask[3, 4:] = 0  # padded
    neutral = torch.tensor([2, *[4] * 8, 3])
    return CaptionBatch(
        frames, ids, mask, ids.flip(0).clone(), mask.flip(0).clone(), neutral, torch.arange(4), torch.arange(4)
    )


@pytest.mark.slow
def test_pretraining_memorizes_captions_and_questions():
    batch = draw_captions()._replace(text_ids=draw_captions().caption_ids, text_mask=draw_captions().caption_mask)
    method = train(EncoderPretraining(build_encoder(), OpenEnded(5), caption_epochs=60, learning_rate=2e-3), batch, 160)
    metrics = method.trainer.callback_metrics
    assert metrics["val/words_accuracy"] == 1.0
    assert metrics["val/answers_accuracy"] == 1.0


def test_validation_does_not_depend_on_the_rest_of_the_batch():
    """Processes share out the captions differently; masked words and means must not depend on that."""
    method, batch = EncoderPretraining(build_encoder(), OpenEnded(5)).eval(), draw_captions()
    single_losses = []
    with torch.no_grad():
        together = torch.stack(method.captions_loss(batch, training=False))
        for row in range(4):
            length = int(batch.caption_mask[row].sum())  # drop the padding
            neutral = batch.neutral
            single = CaptionBatch(*(part if part is neutral else part[row : row + 1] for part in batch))
            single = single._replace(
                caption_ids=single.caption_ids[:, :length], caption_mask=single.caption_mask[:, :length]
            )
            single_losses.append(torch.stack(method.captions_loss(single, training=False)))
    torch.testing.assert_close(torch.stack(single_losses).mean(0), together)
    masked = method.mask_words(batch, training=False)
    assert masked.any(1).all()
    assert 0.2 < masked.float().mean() < 0.9
    assert not torch.equal(masked[0], masked[1])  # every row has its own mask
    other = EncoderPretraining(build_encoder(), OpenEnded(5), seed=1)
    assert not torch.equal(other.mask_words(batch, training=False), masked)


def test_only_words_are_masked_and_validation_masks_the_same_ones(monkeypatch):
    method, batch, seen = EncoderPretraining(build_encoder(), OpenEnded(5)).eval(), draw_captions(), []
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


def test_pretraining_learns_captions_before_questions(monkeypatch):
    method = EncoderPretraining(build_encoder(), OpenEnded(5), caption_epochs=2, question_share=1.0)
    calls = []
    for name in ("captions_loss", "questions_loss"):
        function = getattr(method, name)

        def spy(*arguments, name=name, function=function, **options):
            if method.training:
                calls.append(name)
            return function(*arguments, **options)

        monkeypatch.setattr(method, name, spy)
    train(method, draw_captions(), 4)
    assert calls == ["captions_loss"] * 2 + ["questions_loss"] * 2


def test_the_words_of_a_text_do_not_depend_on_its_neighbours_padding():
    model, batch = build_encoder().eval(), draw_captions()
    video = torch.randn(4, 3, 3, 32, 32)
    with torch.no_grad():
        together = model.encode_words(video, batch.caption_ids, batch.caption_mask)
        single = model.encode_words(video[3:], batch.caption_ids[3:, :4], None)
        cls = model(video, batch.caption_ids, batch.caption_mask).frame_features.mean(1)
    assert_agree(together[3, :4], single[0])
    assert_agree(together[:, 0], cls)


@pytest.mark.parametrize("arguments", [{"caption_epochs": -1}, {"question_share": 1.5}])
def test_impossible_settings_are_refused(arguments):
    with pytest.raises(ConfigError, match="caption_epochs"):
        EncoderPretraining(build_encoder(), OpenEnded(5), **arguments)
