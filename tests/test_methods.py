"""Methods: trained and frozen parts, parameter counts and traffic, controls, and the ability to learn."""

from pathlib import Path

import pytest
import torch
from lightning import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from cdc_mmpg.data.batch import UNKNOWN_LABEL, FeatureBatch, VideoTextBatch, normalise
from cdc_mmpg.data.control_cases import draw_control_partners
from cdc_mmpg.data.interface import SampleOrigin
from cdc_mmpg.errors import ConfigError, DivergedError
from cdc_mmpg.methods.adr_pretraining import ADRPretraining
from cdc_mmpg.methods.answering import Answering
from cdc_mmpg.methods.base import Method
from cdc_mmpg.methods.cdc_mmpg import CDCMMPG
from cdc_mmpg.methods.fine_tuning import FineTuning
from cdc_mmpg.methods.hyper import Hyper
from cdc_mmpg.methods.linear import Linear
from cdc_mmpg.models.adr import ADR
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.heads import OpenEnded
from cdc_mmpg.models.weights import save_safetensors
from cdc_mmpg.wire.payloads import PAYLOAD_PRECISIONS
from tolerances import assert_agree


def encoder(**arguments: float) -> AllInOne:
    return AllInOne(**{"image_size": 32, "depth": 2, "vocab_size": 50, "dropout": 0.0, "drop_path": 0.0} | arguments)


def make_batch(size: int = 2) -> VideoTextBatch:
    """Return different samples with different labels."""
    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(256, (size, 3, 32, 32, 3), generator=generator, dtype=torch.uint8)
    ids = torch.randint(5, 50, (size, 6), generator=generator)
    return VideoTextBatch(frames, ids, torch.ones_like(ids), torch.arange(size), torch.arange(size))


def train(method: Method, data: VideoTextBatch | FeatureBatch, steps: int, folder: Path) -> Method:
    """Train some steps on one batch, then validate on it."""
    trainer = Trainer(
        max_epochs=steps,
        check_val_every_n_epoch=steps,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    loader = DataLoader([data], batch_size=None)
    trainer.fit(method, loader, loader)
    return method


def build(name: str, phase_one: Path, classes: int = 5, **arguments: object) -> Answering:
    torch.manual_seed(0)
    parts = (encoder(), OpenEnded(classes))
    methods = {"linear": Linear, "fine_tuning": FineTuning, "hyper": Hyper}
    if name in methods:
        return methods[name](*parts, **arguments)  # type: ignore[arg-type]
    return CDCMMPG(*parts, adr=str(phase_one), recipe="frozen" if "frozen" in name else "paper", **arguments)  # type: ignore[arg-type]


ANSWERING = ("linear", "fine_tuning", "hyper", "cdc_mmpg", "cdc_mmpg_frozen")
TRAINING_ENCODERS = ("fine_tuning", "cdc_mmpg")


@pytest.mark.slow
@pytest.mark.parametrize("name", ANSWERING)
def test_every_method_can_memorize_two_samples(name, phase_one, tmp_path):
    method = train(build(name, phase_one, learning_rate=3e-3), make_batch(), 50, tmp_path)
    assert method.trainer.callback_metrics["val/accuracy"] == 1.0


@pytest.mark.parametrize("name", ANSWERING)
def test_exactly_the_trainable_parameters_change(name, phase_one, tmp_path):
    method = build(name, phase_one, learning_rate=1e-3)
    before = {key: value.clone() for key, value in method.named_parameters()}
    train(method, make_batch(), 3, tmp_path)
    moved = {key for key, value in method.named_parameters() if not torch.equal(value, before[key])}
    parts = {key.split(".")[0] for key in moved}
    assert ("encoder" in parts) == (name in ("fine_tuning", "cdc_mmpg"))
    assert "adr" not in parts
    assert "head" in parts
    assert ("fda" in parts) == (name in ("hyper", "cdc_mmpg", "cdc_mmpg_frozen"))
    trainable = {key for key, parameter in method.named_parameters() if parameter.requires_grad}
    unread = {"encoder.token_type_embeddings.weight", "encoder.text_embeddings.token_type_embeddings.weight"}
    assert trainable - moved <= unread | {key for key in trainable if "adr" in key}
    assert moved <= trainable


def test_phase_two_updates_the_encoder_but_not_the_reasoner(phase_one, tmp_path):
    method = train(build("cdc_mmpg", phase_one, learning_rate=1e-3), make_batch(), 3, tmp_path)
    reasoner = ADR.load(phase_one)
    assert all(
        torch.equal(a, b) for a, b in zip(method.adr.state_dict().values(), reasoner.state_dict().values(), strict=True)
    )
    start = build("cdc_mmpg", phase_one).encoder.state_dict()
    assert not torch.equal(method.encoder.state_dict()["transformer.cls_token"], start["transformer.cls_token"])


def test_phase_one_updates_only_the_reasoner(tmp_path):
    method = ADRPretraining(encoder(), OpenEnded(5), "small", learning_rate=1e-3)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    train(method, make_batch(), 3, tmp_path)
    moved = {key.split(".")[0] for key, value in method.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {"adr"}
    assert method.trainer.callback_metrics["val/loss"] > 0
    method.export(tmp_path)
    assert torch.equal(ADR.load(tmp_path / "adr.safetensors").encoder[0].weight, method.adr.encoder[0].weight)


@pytest.mark.parametrize("name", ["linear", "hyper", "cdc_mmpg_frozen"])
def test_frozen_parts_stay_in_evaluation_mode(name, phase_one):
    method = build(name, phase_one)
    method.train()
    assert not method.encoder.training
    assert method.head.training
    if name == "cdc_mmpg_frozen":
        assert not method.adr.training


@pytest.mark.parametrize("name", ANSWERING)
@torch.no_grad()
def test_cached_features_give_the_same_scores_as_frames(name, phase_one):
    method, data = build(name, phase_one).eval(), make_batch()
    cached = method.encode(data)
    assert method.encode(cached) is cached
    scores = method.scores(cached, "val")["own"]
    assert_agree(scores, method(method.encoder(normalise(data.frames), *data[1:3]).frame_features))


@pytest.mark.parametrize("name", ANSWERING)
@pytest.mark.parametrize("classes", [5, 1001])
@torch.no_grad()
def test_the_installed_layer_gives_the_scores_of_the_method(name, classes, phase_one):
    method, data = build(name, phase_one, classes).eval(), make_batch()
    features = method.encode(data).frame_features
    weight, bias = method.device_layers(features)
    hidden = method.head.phi(method.encoder.pool(features.mean(1)))
    served = torch.einsum("bld,bd->bl", weight, hidden) + bias
    assert_agree(served, method(features))


@torch.no_grad()
def test_serving_is_reproducible_and_takes_the_middle_frame(phase_one):
    method = build("cdc_mmpg", phase_one).eval()
    features = method.encode(make_batch()).frame_features
    assert torch.equal(method.generator_input(features), method.generator_input(features))
    middle = features.clone()
    middle[:, [0, 2]] = 0
    assert torch.equal(method.generator_input(features), method.generator_input(middle))
    method.train()
    assert not torch.equal(method.generator_input(features), method.generator_input(features))


@pytest.mark.slow
def test_counts_and_bytes_at_the_papers_size(tmp_path):
    paper = AllInOne()
    phase_one = ADRPretraining(paper, OpenEnded(1001))  # the default sizes give the paper's counts
    phase_one.export(tmp_path)
    ADR("small").save(tmp_path / "small.safetensors")
    for classes, device, hyper, down in (
        (1501, 11_595_421, 28_100_221, 582_388),
        (1001, 11_546_921, 18_739_721, 388_388),
        (1541, 11_599_301, 28_849_061, 597_908),
    ):
        head = OpenEnded(classes)
        methods = [
            (Linear(paper, head), 0, (0, 0)),
            (Hyper(paper, head), hyper, (768, down)),
            (CDCMMPG(paper, head, str(tmp_path / "adr.safetensors")), hyper + 27_802_816, (768, down)),
            (CDCMMPG(paper, head, str(tmp_path / "small.safetensors"), project=True), hyper + 629_376, (768, down)),
        ]
        for method, cloud, traffic in methods:
            assert method.parameter_counts()[:2] == (device, cloud)
            assert tuple(method.traffic()) == traffic
    assert FineTuning(paper, OpenEnded(1001)).parameter_counts().trained == 11_546_921
    assert phase_one.parameter_counts() == (11_431_104, 27_802_816, 27_802_816)
    assert ADRPretraining(paper, OpenEnded(1001), "small").parameter_counts() == (11_431_104, 554_880, 554_880)


def test_a_reasoner_file_of_an_earlier_version_loads(tmp_path):
    save_safetensors(ADR("small").state_dict(), tmp_path / "adr.safetensors",
                     {"preset": "default", "axis": "feature", "target": "anchor"})  # fmt: skip
    assert sum(p.numel() for p in ADR.load(tmp_path / "adr.safetensors").parameters()) == 554_880


def test_unknown_answers_add_no_loss_and_count_as_wrong():
    head = OpenEnded(3)
    scores = torch.tensor([[5.0, 0, 0], [0, 5.0, 0], [0, 0, 5.0]], requires_grad=True)
    labels = torch.tensor([0, UNKNOWN_LABEL, UNKNOWN_LABEL])
    known = FeatureBatch(torch.empty(0), labels, torch.arange(3))
    (rows,) = head.outcomes({"own": scores.detach()}, known).values()
    assert head.evaluate({"own": (rows[0].numpy(), rows[1].numpy())}) == {"accuracy": pytest.approx(1 / 3)}
    assert_agree(head.loss(scores, known), torch.nn.functional.cross_entropy(scores[:1], labels[:1]))
    head.loss(scores, known).backward()
    assert scores.grad[1:].abs().sum() == 0
    assert head.loss(scores, known._replace(labels=torch.full((3,), UNKNOWN_LABEL))).item() == 0


def test_a_nan_loss_stops_the_run(phase_one, tmp_path):
    method = build("linear", phase_one)
    with torch.no_grad():
        method.layer.bias[0] = float("nan")
    with pytest.raises(DivergedError, match=r"loss is nan in epoch 1, step 0.*\[0, 1\]"):
        train(method, make_batch(), 1, tmp_path)


def test_polynomial_decay_ends_at_zero(phase_one, tmp_path):
    rates = []
    method = build("linear", phase_one, learning_rate=1e-2)
    method.on_train_batch_end = lambda *_: rates.append(method.optimizers().param_groups[0]["lr"])
    train(method, make_batch(), 4, tmp_path)
    assert rates == pytest.approx([7.5e-3, 5e-3, 2.5e-3, 0])


@pytest.mark.parametrize("value", [0, -1e-4, float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, "learning_rate") for name in ANSWERING] + [(name, "encoder_learning_rate") for name in TRAINING_ENCODERS],
)
def test_learning_rates_must_be_positive_and_finite(name, argument, value, phase_one):
    with pytest.raises(ConfigError, match=f"^{argument} {value} must be positive and finite"):
        build(name, phase_one, **{argument: value})


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
def test_impossible_weight_decay_is_refused(value, phase_one):
    with pytest.raises(ConfigError, match=f"weight_decay is {value}: must be at least 0 and finite"):
        build("linear", phase_one, weight_decay=value)


def test_phase_two_needs_phase_one():
    with pytest.raises(ConfigError, match="METHOD=adr_pretraining"):
        CDCMMPG(encoder(), OpenEnded(5))


def test_defaults_are_the_papers():
    import inspect

    def default(cls: type, name: str) -> object:
        return inspect.signature(cls).parameters[name].default

    assert default(ADRPretraining, "learning_rate") == 2e-5
    assert {default(cls, "learning_rate") for cls in (Linear, FineTuning, Hyper, CDCMMPG)} == {1e-4}
    assert default(OpenEnded, "hidden") == 96
    assert ADR.LAMBDA == 0.1
    assert default(CDCMMPG, "recipe") == "paper"
    assert default(Hyper, "init") == "printed"


def origin(device: str, kind: str) -> SampleOrigin:
    return SampleOrigin("", device, "", kind, "", "")


def test_control_partners_are_of_other_devices_and_of_the_same_type():
    origins = [origin(f"d{place % 5}", "color" if place % 2 else "size") for place in range(60)]
    origins.append(origin("alone", "count"))
    partners = draw_control_partners(origins, seed=0)
    assert list(partners) == ["shuffled", "shuffled_device"]
    assert sorted(partners["shuffled"]) == list(range(61))
    assert all(other != place for place, other in enumerate(partners["shuffled"]))
    for place, other in enumerate(partners["shuffled_device"][:-1]):
        assert origins[other].device != origins[place].device
        assert origins[other].type == origins[place].type
    assert origins[partners["shuffled_device"][-1]].device != "alone"  # no other sample has its type
    assert draw_control_partners(origins, seed=0) == partners
    assert draw_control_partners(origins, seed=1) != partners
    single = draw_control_partners([origin("a", ""), origin("a", "")], seed=0)  # with one device, any other
    assert single["shuffled_device"] == [1, 0]


class Data(LightningDataModule):
    """Data module with one test batch in two parts, every sample on a different device."""

    def __init__(self, data: VideoTextBatch) -> None:
        super().__init__()
        self.data = data

    def test_dataloader(self) -> DataLoader[VideoTextBatch]:
        halves = [VideoTextBatch(*(part[rows] for part in self.data)) for rows in ([0, 2, 4], [1, 3, 5])]
        return DataLoader(halves, batch_size=None)

    def origins(self, split: str) -> list[SampleOrigin]:
        return [origin(f"d{place}", "") for place in range(len(self.data.labels))]


@pytest.mark.parametrize("name", ["hyper", "cdc_mmpg"])
def test_controls_answer_with_the_layers_that_they_name(name, phase_one, tmp_path):
    method, data = build(name, phase_one, classes=6), Data(make_batch(6))
    torch.nn.init.normal_(method.fda.hyper.weight, std=0.2)
    torch.nn.init.normal_(method.fda.mean_latent)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
                      default_root_dir=tmp_path)  # fmt: skip
    (logged,) = trainer.test(method, data, verbose=False)
    outcomes = method.outcomes["test"]
    expected = {"own", "mean_head", *PAYLOAD_PRECISIONS, "shuffled", "shuffled_device"}
    assert set(outcomes) == expected | ({"bypassed"} if name == "cdc_mmpg" else set())
    method.eval()
    with torch.no_grad():
        features = method.encode(data.data).frame_features
        weight, bias = method.device_layers(features)
        hidden = method.head.phi(method.fuse(features))
        partners = {
            case: torch.tensor(other)
            for case, other in draw_control_partners(data.origins("test"), method.seed).items()
        }
        for case, other in {"own": torch.arange(6), "float32": torch.arange(6), **partners}.items():
            scores = torch.einsum("bld,bd->bl", weight[other], hidden) + bias[other]
            indices, rows = outcomes[case]
            assert indices.tolist() == list(range(6))
            assert rows[:, 0].tolist() == scores.argmax(-1).tolist(), case
            assert rows[:, 1].tolist() == list(range(6))
        mean = method.fda.average(hidden).argmax(-1)
    assert outcomes["mean_head"][1][:, 0].tolist() == mean.tolist()
    compared = [name for name in logged if name.endswith("_error")]
    assert compared == [f"test/{precision}_error" for precision in PAYLOAD_PRECISIONS]  # same order on all processes
    assert logged["test/float32_agreement"] == 1
    assert logged["test/float32_error"] == 0
    assert 0 < logged["test/float16_error"] < logged["test/int8_error"]
    layer = 4 * 6 * 97
    assert method.payloads() == {"float32": layer, "float16": layer // 2, "int8": layer // 4 + 12}
