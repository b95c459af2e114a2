"""Competing methods, each on a case with a hand-computed answer."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from cdc_mmpg.controls.forward_only import adjust_prototypes, compute_entropy, shift_activations, smooth_over_neighbours
from cdc_mmpg.data.batch import normalise
from cdc_mmpg.data.control_cases import CORRECTION_CASES
from cdc_mmpg.data.sampling import Jitter, draw_cast, draw_copy, draw_jitter
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.evaluation.metrics import compute_accuracies
from cdc_mmpg.evidence.pairing import Side, pair_answers
from cdc_mmpg.evidence.runs import RunAnswers
from cdc_mmpg.media.text import count_wordpieces
from cdc_mmpg.methods.corrected import Corrected
from cdc_mmpg.methods.linear import Linear
from cdc_mmpg.methods.static_mlp import StaticMLP
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.fda import LowRankFDA
from cdc_mmpg.models.heads import OpenEnded
from cdc_mmpg.training.corrections import CorrectedDataModule, average_chroma, point_at_hue
from cdc_mmpg.training.features import FeatureDataModule, FeatureDataset
from cdc_mmpg.training.sessions import SessionDataModule, shuffle_pools
from data_modules.device_cache import DeviceCache
from data_modules.domains import ColorJitter, rotate_hues
from data_modules.synthetic import Synthetic
from data_modules.synthetic_clips import paint

# Estimates of a cast


def paint_frame(*shares: tuple[float, float, float]) -> np.ndarray:
    """Return a frame (1, 10, 10, 3), painted with (share of the pixels, hue in degrees, saturation) each."""
    pixels = [paint(hue, saturation) for share, hue, saturation in shares for _ in range(round(100 * share))]
    return (255 * np.array(pixels) + 0.5).astype(np.uint8).reshape(1, 10, 10, 3)


@pytest.mark.parametrize("hue", [0.0, 60.0, 120.0, 200.0, 300.0])
def test_both_estimators_find_the_hue_of_a_single_hue_frame(hue):
    frame = paint_frame((1.0, hue, 0.8))
    for vector in (average_chroma(frame)[0], point_at_hue(frame)[0]):
        estimate = np.degrees(np.arctan2(vector[1], vector[0])) % 360
        assert abs((estimate - hue + 180) % 360 - 180) < 3  # half a bin of the histogram
    assert np.hypot(*point_at_hue(frame)[0]) == pytest.approx(1)
    assert np.hypot(*average_chroma(frame)[0]) == pytest.approx(0.8, abs=0.1)


def test_a_second_hue_shifts_the_mean_but_not_the_mode():
    frame = paint_frame((0.5, 240.0, 0.9), (0.3, 0.0, 0.9), (0.2, 10.0, 0.02))  # the last are nearly grey
    mode, mean = (np.degrees(np.arctan2(v[1], v[0])) % 360 for v in (point_at_hue(frame)[0], average_chroma(frame)[0]))
    assert mode == pytest.approx(240, abs=3)
    assert 255 < mean < 300


def build_module(synthetic, tmp_path, **arguments) -> Synthetic:
    return Synthetic(str(synthetic), str(tmp_path), 17, image_size=64, resize=64, batch_size=7, num_workers=0,
                     vocab=str(synthetic / "vocab.txt"), **arguments)  # fmt: skip


def attach_trainer(view, data, model):
    view.trainer = SimpleNamespace(
        strategy=SimpleNamespace(broadcast=lambda value: value, root_device=torch.device("cpu")), world_size=1,
        global_rank=0,
    )  # fmt: skip
    return view


@pytest.fixture(scope="module")
def prepared(synthetic, tmp_path_factory):
    data = build_module(synthetic, tmp_path_factory.mktemp("cache"))
    data.prepare_data()
    data.setup("fit")
    torch.manual_seed(0)
    model = AllInOne(image_size=64, depth=1, vocab_size=count_wordpieces(synthetic / "vocab.txt")).eval()
    return data, model


def encode(model, dataset, index, degrees):
    """Return the features of one sample whose frames are rotated by `degrees` of hue."""
    batch = dataset.__getitems__([(0, index)])
    frames = torch.from_numpy(rotate_hues(batch.frames[0].numpy(), degrees))[None] if degrees else batch.frames
    with torch.no_grad():
        return model(normalise(frames), batch.text_ids, batch.text_mask).frame_features[0]


@pytest.mark.parametrize("correction", ["grey_world", "hue_mode", "true_cast"])
def test_frames_are_rotated_back_before_the_encoder(prepared, correction):
    data, model = prepared
    view = attach_trainer(CorrectedDataModule(data, model, OpenEnded(17), correction), data, model)
    view.setup("fit")
    sessions = data.sessions()
    cases = 1 if correction == "true_cast" else len(CORRECTION_CASES)
    estimates = view.estimate(sessions)
    assert estimates.shape == (cases, len(sessions.pools))
    test, features = data.dataset("test", augment=False), view._splits["test"].features["frame_features"][0]
    assert features.shape[:2] == (len(test), cases)
    index = len(test) - 1
    device = sessions.devices["test"][index]
    for case in range(cases):
        cast = estimates[case, device]
        assert torch.allclose(features[index, case], encode(model, test, index, -cast), atol=1e-4)
    if correction == "true_cast":
        assert estimates[0].tolist() == sessions.casts
    else:  # the first clips of the session, as many as the case has
        number = list(CORRECTION_CASES).index("n4")
        order = shuffle_pools(sessions, data.seed)[device][:4].tolist()
        frames = sessions.anchors.__getitems__([(0, place) for place in order]).frames[:, 1].numpy()
        vector = (average_chroma if correction == "grey_world" else point_at_hue)(frames).sum(0)
        assert estimates[number, device] == pytest.approx(np.degrees(np.arctan2(vector[1], vector[0])))
    method = Corrected(model, OpenEnded(17), correction)
    with torch.no_grad():
        scores = method.scores(view._splits["test"].__getitems__([(0, index)]), "test")
    assert list(scores) == (["own"] if cases == 1 else list(CORRECTION_CASES))
    for case, case_scores in enumerate(scores.values()):
        assert torch.equal(case_scores, method(features[index : index + 1, case]))


def test_rotation_changes_only_the_rotated_clips(prepared, synthetic, tmp_path):
    data, _ = prepared
    plain = data.dataset("val", augment=False)
    rotated, digest = data.rotate(plain, [0.0] + [90.0] * (len(plain) - 1))
    clips = [sample.clip for sample in plain.samples]
    last = next(i for i in range(len(plain)) if clips[i] != clips[0])
    assert torch.equal(rotated.frames(0, last), torch.from_numpy(rotate_hues(plain.frames(0, last).numpy(), 90.0)))
    assert digest != plain.digest(frames=True)
    unrotated, digest = data.rotate(plain, [0.0] * len(plain))
    assert digest == plain.digest(frames=True)
    assert torch.equal(unrotated.frames(0, last), plain.frames(0, last))
    cached = build_module(synthetic, tmp_path, frame_cache="device")
    cached.prepare_data()
    cached.setup("fit")
    with pytest.raises(ConfigError, match="leave out FRAME_CACHE"):
        cached.rotate(cached.dataset("val", augment=False), [0.0] * len(plain))


# Virtual devices


def test_all_clips_of_a_virtual_device_share_one_extra_cast(prepared):
    data, model = prepared
    upload = lambda features: model.pool(features.mean(-2))  # noqa: E731
    view = attach_trainer(SessionDataModule(data, model, OpenEnded(17), upload, virtual=2), data, model)
    view.setup("fit")
    train, split, sessions = data.dataset("train", augment=False), view._splits["train"], data.sessions()
    names = [origin.device for origin in data.origins("train")]
    copies = split.samples.features["frame_features"]
    assert len(copies) == len(split.anchors) == 3
    for number in (0, 1):
        index = 5
        cast = draw_cast(names[index], number)
        expected = encode(model, train, index, cast)
        assert torch.allclose(copies[number + 1, index], expected, atol=1e-4)
        anchor_index = sessions.pools[sessions.devices["train"][index]][0]
        batch = sessions.anchors.__getitems__([(0, anchor_index)])
        frame = torch.from_numpy(rotate_hues(batch.frames[0, 1:2].numpy(), cast))[None]
        with torch.no_grad():
            anchor = model(normalise(frame), batch.text_ids, batch.text_mask).fused[0]
        assert torch.allclose(split.anchors[number + 1][anchor_index], anchor, atol=1e-4)
    # In training a sample and its upload come from the same copy, drawn anew in every epoch.
    drawn_copies = set()
    for epoch in range(20):
        batch = split.__getitems__([(epoch, 5)])
        (copy,) = [i for i in range(3) if torch.equal(batch.samples.frame_features[0], copies[i, 5])]
        # The oracle gets the cast of the same copy.
        cast = sessions.casts[sessions.devices["train"][5]] + (draw_cast(names[5], copy - 1) if copy else 0)
        expected_cast = [np.cos(np.radians(cast)), np.sin(np.radians(cast))]
        assert batch.casts[0].tolist() == pytest.approx(expected_cast, abs=1e-5)
        if batch.anchors[0, 0]:
            assert torch.equal(batch.uploads[0, 0], split._uploads[copy, 5])
            drawn_copies.add(copy)
    assert drawn_copies == {0, 1, 2}
    assert len(view._splits["val"].samples.features["frame_features"]) == 1  # virtual devices are for training only
    assert {draw_cast("a", 0), draw_cast("a", 0)} != {draw_cast("a", 1), draw_cast("b", 0)}
    plain = attach_trainer(FeatureDataModule(data, model, OpenEnded(17), virtual=1), data, model)
    plain.setup("fit")
    assert torch.equal(plain._splits["train"].features["frame_features"][1], copies[1])


def test_virtual_devices_change_only_training_frames(prepared):
    data, _ = prepared
    data.virtual = 2
    try:
        dataset, devices = data.train_dataloader().dataset, [origin.device for origin in data.origins("train")]
        for loader in (data.val_dataloader(), data.test_dataloader()):
            assert loader.dataset.virtual == 0
    finally:
        data.virtual = 0
    plain, drawn_copies = data.train_dataloader().dataset, set()
    for epoch in range(20):
        copy = draw_copy(data.seed, epoch, 5, 3)
        expected = plain.frames(epoch, 5)
        if copy:
            expected = torch.from_numpy(rotate_hues(expected.numpy(), draw_cast(devices[5], copy - 1)))
        assert torch.equal(dataset.frames(epoch, 5), expected)
        drawn_copies.add(copy)
    assert drawn_copies == {0, 1, 2}
    cached = data.dataset("train", augment=True)
    cached.cache = object.__new__(DeviceCache)
    with pytest.raises(ConfigError, match="leave out FRAME_CACHE"):
        cached.with_virtual_devices(1, devices)


def test_jitter_matches_hand_computed_values_and_depends_on_the_device():
    frames = np.zeros((2, 4, 4, 3), np.uint8)
    frames[..., :] = (100, 50, 20)
    frames[0, 0, 0] = (200, 200, 200)

    def apply_jitter(**changes: float) -> np.ndarray:
        jitter = Jitter(1.0, 1.0, 1.0, 0.0)._replace(**changes)
        return ColorJitter({"a": jitter}, None).apply("a", frames)

    assert np.array_equal(apply_jitter(), frames)
    assert apply_jitter(brightness=1.2)[1, 0, 0].tolist() == [120, 60, 24]
    assert apply_jitter(brightness=1.4)[0, 0, 0].tolist() == [255, 255, 255]
    grey = 0.299 * 100 + 0.587 * 50 + 0.114 * 20
    assert apply_jitter(saturation=0.6)[1, 0, 0].tolist() == [round(grey + 0.6 * (v - grey)) for v in (100, 50, 20)]
    mean = (31 * grey + 200) / 32
    assert apply_jitter(contrast=0.8)[1, 0, 0].tolist() == [round(mean + 0.8 * (v - mean)) for v in (100, 50, 20)]
    assert np.array_equal(apply_jitter(hue=30.0), rotate_hues(frames, 30.0))
    draws = [draw_jitter("a", number) for number in range(400)]
    for position, (low, high) in enumerate([(0.6, 1.4)] * 3 + [(-36, 36)]):
        values = [draw[position] for draw in draws]
        assert low <= min(values) < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < max(values) <= high
    assert draw_jitter("a", 0) == draws[0] != draw_jitter("b", 0)


def test_virtual_devices_can_jitter_colours_in_place_of_rotating_hues(prepared):
    data, model = prepared
    upload = lambda features: model.pool(features.mean(-2))  # noqa: E731
    view = attach_trainer(SessionDataModule(data, model, OpenEnded(17), upload, virtual=1, jitters=True), data, model)
    view.setup("fit")
    train, split = data.dataset("train", augment=False), view._splits["train"]
    names = [origin.device for origin in data.origins("train")]
    jittered, _ = data.jitter(train, [draw_jitter(name, 0) for name in names])
    batch = jittered.__getitems__([(0, 5)])
    with torch.no_grad():
        expected = model(normalise(batch.frames), batch.text_ids, batch.text_mask).frame_features[0]
    assert torch.allclose(split.samples.features["frame_features"][1, 5], expected, atol=1e-4)
    cast = data.sessions().casts[data.sessions().devices["train"][5]] + draw_jitter(names[5], 0).hue
    stored_cast = split.casts[1, data.sessions().devices["train"][5]].tolist()
    assert stored_cast == pytest.approx([np.cos(np.radians(cast)), np.sin(np.radians(cast))], abs=1e-5)


def test_one_copy_is_the_sample_itself():
    features = {"frame_features": torch.arange(6.0).view(2, 1, 3)}
    dataset = FeatureDataset(features, torch.tensor([0, 1]))
    assert torch.equal(dataset.__getitems__([(7, 1)]).frame_features[0], features["frame_features"][1])


def test_sets_hold_the_anchors_whose_mean_is_uploaded(prepared):
    data, model = prepared
    upload = lambda features: model.pool(features.mean(-2))  # noqa: E731
    view = attach_trainer(SessionDataModule(data, model, OpenEnded(17), upload, sets=True), data, model)
    view.setup("fit")
    for split in ("test", "train"):
        batch = view._splits[split].__getitems__([(0, i) for i in range(6)])
        for row, anchors in enumerate(batch.anchors):
            for case, size in enumerate(anchors.tolist()):
                members = batch.sets[row, case, :size]
                if split == "test" and size:
                    assert torch.allclose(members.mean(0), batch.uploads[row, case], atol=1e-5)
                assert len({tuple(anchor.tolist()) for anchor in members}) == size


def test_the_static_mlp_has_as_many_parameters_as_the_generator():
    torch.manual_seed(0)
    encoder = AllInOne(image_size=32, depth=1, vocab_size=50)
    mlp, plain = StaticMLP(encoder, OpenEnded(17)), Linear(encoder, OpenEnded(17))
    extra = mlp.parameter_counts().device - plain.parameter_counts().device
    generator = LowRankFDA(96, 17, 4)
    generator_size = sum(p.numel() for part in generator.cloud_modules() for p in part.parameters())
    assert extra == 192 * 424 + 424 + 424 * 192 + 192
    assert extra == pytest.approx(generator_size, rel=0.01)


# On the device, with forward passes only


def build_layer(weight: list[list[float]]) -> nn.Linear:
    linear = nn.Linear(len(weight[0]), len(weight), bias=False)
    linear.weight.data = torch.tensor(weight)
    return linear.requires_grad_(False)


def test_prototypes_follow_confident_features():
    axes = build_layer([[1.0, 0.0], [0.0, 1.0]])
    assert torch.equal(adjust_prototypes(torch.tensor([[0.2, 0.1]]), axes, 1), torch.tensor([[0.2, 0.1]]))
    # (6, 3) is more confident of the first class than its weights are: alone it is the prototype, (2, 1) / sqrt(5).
    hidden = torch.tensor([[6.0, 3.0], [1.0, 1.1]])
    scores = adjust_prototypes(hidden, axes, 1)
    assert torch.allclose(scores[1], torch.tensor([3.1 / 5**0.5, 1.1]))
    assert scores[1].argmax() == 0 != axes(hidden[1]).argmax()
    # With all members, the prototypes are the means of (1, 0) and (2, 1) / sqrt(5), and of (0, 1) and (1, 1.1) / |.|.
    first = torch.tensor([1 + 2 / 5**0.5, 1 / 5**0.5])
    second = torch.tensor([0.0, 1.0]) + hidden[1] / hidden[1].norm()
    expected = torch.stack([total / total.norm() @ hidden[1] for total in (first, second)])
    assert torch.allclose(adjust_prototypes(hidden, axes, 0)[1], expected)


def test_answers_are_smoothed_over_near_neighbours_only():
    hidden = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.99, 0.02], [0.0, 1.0], [0.01, 1.0]])
    scores = torch.tensor([[3.0, 0.0], [3.0, 0.0], [0.0, 0.2], [0.0, 3.0], [0.0, 3.0]])
    answers = smooth_over_neighbours(hidden, scores, 1)
    assert answers.argmax(-1).tolist() == [0, 0, 0, 1, 1]  # alone, the third would be answered with 1
    assert smooth_over_neighbours(hidden[2:3], scores[2:3], 1).argmax(-1).tolist() == [1]
    # A fixed point: equation 6 of the paper, with affinities 1 between mutual neighbours.
    affinity = torch.tensor([[0.0, 1, 0], [1, 0, 0.5], [0, 0.5, 0]])
    answers = smooth_over_neighbours(hidden[:3], scores[:3], 1).exp()
    updated = (scores[:3].log_softmax(-1) + affinity @ answers).softmax(-1)
    assert torch.allclose(answers, updated, atol=1e-5)


def test_activations_are_shifted_from_the_running_mean_to_the_source_mean():
    features, source = torch.tensor([[1.0, 0.0], [3.0, 2.0]]), torch.tensor([0.0, 0.0])
    assert torch.equal(shift_activations(features, source, 0.0), features)
    shifted = shift_activations(features, source, 1.0)
    assert torch.allclose(shifted[0], torch.tensor([0.0, 0.0]))  # the mean starts at the first feature
    assert torch.allclose(shifted[1], features[1] - torch.tensor([1.2, 0.2]))  # 0.9 (1, 0) + 0.1 (3, 2)
    assert torch.allclose(shift_activations(features, source, 0.5)[1], features[1] - torch.tensor([0.6, 0.1]))


def test_entropy_of_even_scores_is_the_logarithm_of_their_number():
    assert torch.allclose(compute_entropy(torch.zeros(1, 5)), torch.tensor([np.log(5)], dtype=torch.float32))


# Worlds


def test_an_interval_over_worlds_includes_differences_between_worlds():
    names = [f"{world}{device}" for world in "ab" for device in range(20) for _ in range(3)]
    right = np.array([name[0] == "a" for name in names], float)
    groups, types = ["unseen"] * len(names), [""] * len(names)

    def compute_interval(**options):
        cell = compute_accuracies({"own": right}, names, names, groups, types, **options)["own"]["unseen"]["all"]
        return cell["value"], cell["low"], cell["high"]

    value, low, high = compute_interval()
    assert (value, low > 0.3, high < 0.7) == (0.5, True, True)
    assert compute_interval(worlds=[name[0] for name in names]) == (0.5, 0.0, 1.0)
    assert compute_interval(worlds=["a"] * len(names)) == compute_interval()


def build_run(seed: int, device: str, right: list[float]) -> SimpleNamespace:
    keys = [(device, str(number)) for number in range(len(right))]
    answers = RunAnswers(keys, [device] * len(right), [device] * len(right), ["unseen"] * len(right),
                         {"own": np.array(right)}, [])  # fmt: skip
    return SimpleNamespace(answers=answers, seed=seed, find_case=lambda case: "own")


def test_seeds_of_one_world_are_averaged_and_worlds_are_concatenated():
    sides = Side("a"), Side("b")
    averaged = pair_answers(
        [
            (build_run(0, "x", [1, 1]), build_run(0, "x", [0, 1])),
            (build_run(1, "x", [1, 0]), build_run(1, "x", [0, 0])),
        ],
        *sides,
    )
    assert averaged.differences.tolist() == [1, 0]
    assert averaged.first_correct.tolist() == [1, 0.5]
    assert averaged.questions.worlds == []
    concatenated = pair_answers(
        [(build_run(0, "x", [1, 1]), build_run(0, "x", [0, 1])), (build_run(1, "y", [1]), build_run(1, "y", [0]))],
        *sides,
    )
    assert concatenated.differences.tolist() == [1, 0, 1]
    assert concatenated.questions.worlds == ["0", "0", "1"]
    assert concatenated.questions.devices == ["x", "x", "y"]
    assert (
        pair_answers(
            [(build_run(0, "x", [1, 1]), build_run(0, "x", [0, 1])), (build_run(1, "x", [1]), build_run(1, "x", [0]))],
            *sides,
        )
        is None
    )
    assert pair_answers([(build_run(0, "x", [1, 1]), build_run(0, "y", [0, 1]))], *sides) is None
