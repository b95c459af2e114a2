"""bfloat16: only the encoder computes in it; everything after the encoder matches float32 bit for bit."""

import numpy as np
import pytest
import torch
from lightning import LightningDataModule, Trainer
from test_methods import encoder, origin
from test_session import build_sessions, draw_captions
from torch.utils.data import DataLoader

from cdc_mmpg.data.batch import FeatureBatch, SessionBatch, VideoTextBatch
from cdc_mmpg.data.interface import SampleOrigin
from cdc_mmpg.evaluation.metrics import CAPTIONS
from cdc_mmpg.methods.adr_pretraining import ADRPretraining
from cdc_mmpg.methods.answering import KEPT_INPUTS, Answering
from cdc_mmpg.methods.base import Method
from cdc_mmpg.methods.cdc_mmpg import CDCMMPG
from cdc_mmpg.methods.cdc_mmpg_session import CDCMMPGSession
from cdc_mmpg.methods.encoder_pretraining import EncoderPretraining
from cdc_mmpg.methods.fine_tuning import FineTuning
from cdc_mmpg.methods.hyper import Hyper
from cdc_mmpg.methods.linear import Linear
from cdc_mmpg.methods.session_concatenated import SessionConcatenated
from cdc_mmpg.models.adr import ADR
from cdc_mmpg.models.device_axes import DeviceAxes
from cdc_mmpg.models.fda import FDA, BasisFDA, LowRankFDA
from cdc_mmpg.models.heads import MultipleChoice, OpenEnded, Retrieval
from cdc_mmpg.training.cli import main
from cdc_mmpg.wire.payloads import PAYLOAD_PRECISIONS

pytestmark = pytest.mark.slow

CLASSES = 321  # bfloat16 has 8 significant bits: above 256 it skips every other integer, or more
HEADS = {"open_ended": lambda: OpenEnded(CLASSES), "choice": MultipleChoice, "retrieval": lambda: Retrieval(64)}
METHODS = {
    "linear": Linear, "fine_tuning": FineTuning, "hyper": Hyper, "cdc_mmpg": CDCMMPG, "cdc_mmpg_frozen": CDCMMPG,
    "session_low_rank": CDCMMPGSession, "session_full": CDCMMPGSession, "session_basis": CDCMMPGSession,
    "session_oracle": CDCMMPGSession, "session_concatenated": SessionConcatenated,
}  # fmt: skip
FROZEN = [name for name in METHODS if name not in ("fine_tuning", "cdc_mmpg")]


class Data(LightningDataModule):
    """The same batch for every split; each sample comes from a different device."""

    def __init__(self, data: VideoTextBatch | FeatureBatch | SessionBatch) -> None:
        super().__init__()
        self.data = data

    def train_dataloader(self) -> DataLoader[object]:
        return DataLoader([self.data], batch_size=None)

    val_dataloader = test_dataloader = train_dataloader

    def origins(self, split: str) -> list[SampleOrigin]:
        return [origin(f"d{number}", "") for number in range(len(self.data.labels))]

    def history(self) -> tuple[torch.Tensor, list[list[int]]]:
        return torch.randn(16, 192, generator=torch.Generator().manual_seed(0)), [[0, 1, 2, 3, 4], [5, 6, 7], [8, 9]]


def build_method(name: str, task: str, reasoner: str) -> Answering:
    torch.manual_seed(0)
    head = HEADS[task]()
    arguments: dict[str, object] = {"learning_rate": 1e-3}
    if name.startswith("cdc_mmpg"):
        arguments |= {"adr": reasoner, "recipe": "frozen" if name.endswith("frozen") else "paper"}
    if name in ("session_full", "session_low_rank", "session_basis"):
        arguments |= {"generated": name.removeprefix("session_")}
    if name == "session_oracle":
        arguments |= {"oracle": True}
    return METHODS[name](encoder(), head, **arguments)


def draw_samples(task: str, seed: int = 2) -> VideoTextBatch:
    """Return six clips with their texts; the labels of open-ended questions change when rounded to bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    text_shape = {"open_ended": (), "choice": (5,), "retrieval": (2,)}[task]
    frames = torch.randint(256, (6, 3, 32, 32, 3), generator=generator, dtype=torch.uint8)
    ids = torch.randint(5, 50, (6, *text_shape, 6), generator=generator)
    labels = torch.arange(6) + 311 if task == "open_ended" else torch.arange(6) % 5
    return VideoTextBatch(frames, ids, torch.ones_like(ids), labels, torch.arange(6))


def train_and_test(method: Method, data: object, precision: str) -> dict[str, float]:
    """Return the metrics logged by two epochs of training and the test."""
    trainer = Trainer(
        precision=precision, max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    module = Data(data)
    trainer.fit(method, module)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return metrics | trainer.test(method, module, verbose=False)[0]


@pytest.fixture(scope="module")
def reasoner(tmp_path_factory) -> str:
    """Save a reasoner with batch statistics; return its path."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("reasoner") / "adr.safetensors"
    ADR(axis="batch").save(path)
    return str(path)


@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("name", ["fine_tuning", "cdc_mmpg", "linear", "hyper"])
def test_every_method_trains_and_tests_in_bfloat16(name, task, reasoner):
    method, data = build_method(name, task, reasoner), draw_samples(task)
    dtypes = {}
    original_keep = method.keep
    method.keep = lambda case, *rows: (dtypes.update({case: rows[1].dtype}), original_keep(case, *rows))
    logged = train_and_test(method, data, "bf16-mixed")
    assert all(np.isfinite(value) for value in logged.values())
    outcomes = method.outcomes["test"]
    assert dtypes.pop(KEPT_INPUTS, torch.float32) == torch.float32
    assert set(dtypes.values()) == {torch.float32}
    assert ("shuffled" in outcomes) == (name in ("cdc_mmpg", "hyper"))
    for case, (indices, rows) in outcomes.items():
        if case != CAPTIONS:
            assert indices.tolist() == list(range(6))
        if task != "retrieval":
            assert rows[:, 1].tolist() == data.labels.tolist(), case


@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("name", FROZEN)
def test_methods_compute_in_float32_after_the_encoder(name, task, reasoner):
    """On stored features the encoder computes nothing, so nothing is rounded."""
    with torch.no_grad():
        features = build_method("linear", task, reasoner).encode(draw_samples(task))
    data = features
    if METHODS[name].reads == "sessions":
        session_batch = build_sessions()
        data = SessionBatch(features, *(part.repeat(3, *[1] * (part.dim() - 1)) for part in session_batch[1:]))
        data.anchors[0] = 0
    results = {}
    for precision in ("32-true", "bf16-mixed"):
        method = build_method(name, task, reasoner)
        results[precision] = train_and_test(method, data, precision), method.state_dict(), method.outcomes["test"]
    (logged, weights, outcomes), (mixed_logged, mixed_weights, mixed_outcomes) = results.values()
    assert mixed_logged == logged
    assert all(torch.equal(mixed_weights[key], value) for key, value in weights.items())
    assert list(mixed_outcomes) == list(outcomes)
    for case, (indices, rows) in outcomes.items():
        assert np.array_equal(indices, mixed_outcomes[case][0])
        assert np.array_equal(rows, mixed_outcomes[case][1]), case


@pytest.mark.parametrize("axis", ["feature", "group:8", "batch"])
def test_phase_one_computes_in_float32_after_the_encoder(axis):
    results = []
    for precision in ("32-true", "bf16-mixed"):
        torch.manual_seed(0)
        method = ADRPretraining(encoder(), OpenEnded(5), axis=axis)
        with torch.no_grad():
            data = method.encode(draw_samples("open_ended"))
        results.append(
            (
                train_and_test(method, data, precision),
                {key: value.clone() for key, value in method.adr.state_dict().items()},
            )
        )
        assert np.isfinite(train_and_test(method, draw_samples("open_ended"), precision)["test/loss"])
    assert results[0][0] == results[1][0]
    assert all(torch.equal(value, results[1][1][key]) for key, value in results[0][1].items())


def test_the_encoders_pretraining_runs_in_bfloat16():
    logged = train_and_test(
        EncoderPretraining(encoder(), OpenEnded(5), caption_epochs=1), draw_captions(), "bf16-mixed"
    )
    assert logged["test/loss"] > 0
    assert 0 <= logged["test/words_accuracy"] <= 1


def test_cloud_modules_compute_in_float32_under_autocast():
    torch.manual_seed(0)
    feature, hidden = torch.randn(6, 192), torch.randn(6, 96)
    axes = DeviceAxes(2)
    axes.fit(*Data(draw_samples("open_ended")).history())
    cases = [
        (ADR(axis=axis).train(), lambda module: module(feature, False)) for axis in ("feature", "group:8", "batch")
    ]
    cases.append((axes, lambda module: [module(feature)]))
    for fda in (FDA(96, 1001, "hyperfan_in", True), LowRankFDA(96, 17, 4), BasisFDA(96, 17, 4)):
        fda.train()(feature, hidden)
        cases.append((
            fda.eval(),
            lambda module: [module.average(hidden), *module.generate(feature),
                            *(module.apply_rounded(feature, hidden, name) for name in PAYLOAD_PRECISIONS)],
        ))  # fmt: skip
    for module, call in cases:
        initial_state = {key: value.clone() for key, value in module.state_dict().items()}
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            rounded = call(module)
        autocast_state = {key: value.clone() for key, value in module.state_dict().items()}
        module.load_state_dict(initial_state)
        with torch.no_grad():
            expected = call(module)
        for output, value in zip(rounded, expected, strict=True):
            assert output.dtype == torch.float32
            assert torch.equal(output, value)
        assert all(torch.equal(autocast_state[key], value) for key, value in module.state_dict().items())


@torch.no_grad()
def test_the_encoder_computes_in_bfloat16_and_returns_float32():
    model, head = encoder().eval(), OpenEnded(5)
    data = draw_samples("open_ended")
    expected = head.encode(model, data).frame_features
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [head.encode(model, data).frame_features, Retrieval().encode(model, draw_samples("retrieval")).texts,
                 model.encode_words(torch.randn(6, 3, 3, 32, 32), data.text_ids, data.text_mask)]  # fmt: skip
    assert {output.dtype for output in outputs} == {torch.float32}
    assert not torch.equal(outputs[0], expected)
    torch.testing.assert_close(outputs[0], expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true", "transformer-engine"])
def test_unsupported_precisions_are_refused_by_every_command(precision, fit, capsys):
    for verb in ("fit", "test", "validate"):
        arguments = [verb, *fit("linear", f"--trainer.precision={precision}")[1:]]
        assert main(arguments) == 2
        assert "use 32-true, bf16-mixed or 16-mixed" in capsys.readouterr().err
