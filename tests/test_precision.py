"""bfloat16: the encoder alone computes in it; what stands behind it gives what float32 gives, to the last bit."""

import numpy as np
import pytest
import torch
from lightning import LightningDataModule, Trainer
from test_methods import encoder, origin
from test_session import captions, sessions
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

CLASSES = 321  # bfloat16 has 8 binary digits: above 256 it knows every other whole number, or fewer
HEADS = {"open_ended": lambda: OpenEnded(CLASSES), "choice": MultipleChoice, "retrieval": lambda: Retrieval(64)}
METHODS = {
    "linear": Linear, "fine_tuning": FineTuning, "hyper": Hyper, "cdc_mmpg": CDCMMPG, "cdc_mmpg_frozen": CDCMMPG,
    "session_low_rank": CDCMMPGSession, "session_full": CDCMMPGSession, "session_basis": CDCMMPGSession,
    "session_oracle": CDCMMPGSession, "session_concatenated": SessionConcatenated,
}  # fmt: skip
FROZEN = [name for name in METHODS if name not in ("fine_tuning", "cdc_mmpg")]


class Data(LightningDataModule):
    """One batch for everything, each of its samples from a device of its own."""

    def __init__(self, data: VideoTextBatch | FeatureBatch | SessionBatch) -> None:
        super().__init__()
        self.data = data

    def train_dataloader(self) -> DataLoader[object]:
        return DataLoader([self.data], batch_size=None)

    val_dataloader = test_dataloader = train_dataloader

    def origins(self, split: str) -> list[SampleOrigin]:
        return [origin(f"d{place}", "") for place in range(len(self.data.labels))]

    def history(self) -> tuple[torch.Tensor, list[list[int]]]:
        return torch.randn(16, 192, generator=torch.Generator().manual_seed(0)), [[0, 1, 2, 3, 4], [5, 6, 7], [8, 9]]


def build(name: str, task: str, reasoner: str) -> Answering:
    torch.manual_seed(0)
    head = HEADS[task]()
    more: dict[str, object] = {"learning_rate": 1e-3}
    if name.startswith("cdc_mmpg"):
        more |= {"adr": reasoner, "recipe": "frozen" if name.endswith("frozen") else "paper"}
    if name in ("session_full", "session_low_rank", "session_basis"):
        more |= {"generated": name.removeprefix("session_")}
    if name == "session_oracle":
        more |= {"oracle": True}
    return METHODS[name](encoder(), head, **more)


def samples(task: str, seed: int = 2) -> VideoTextBatch:
    """Six clips with their texts; of open-ended questions with labels that bfloat16 rounds to others."""
    generator = torch.Generator().manual_seed(seed)
    several = {"open_ended": (), "choice": (5,), "retrieval": (2,)}[task]
    frames = torch.randint(256, (6, 3, 32, 32, 3), generator=generator, dtype=torch.uint8)
    ids = torch.randint(5, 50, (6, *several, 6), generator=generator)
    labels = torch.arange(6) + 311 if task == "open_ended" else torch.arange(6) % 5
    return VideoTextBatch(frames, ids, torch.ones_like(ids), labels, torch.arange(6))


def run(method: Method, data: object, precision: str) -> dict[str, float]:
    """What two epochs, and then the test, log."""
    trainer = Trainer(
        precision=precision, max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    module = Data(data)
    trainer.fit(method, module)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return found | trainer.test(method, module, verbose=False)[0]


@pytest.fixture(scope="module")
def reasoner(tmp_path_factory) -> str:
    """A reasoner whose statistics run over batches."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("reasoner") / "adr.safetensors"
    ADR(axis="batch").save(path)
    return str(path)


@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("name", ["fine_tuning", "cdc_mmpg", "linear", "hyper"])
def test_every_method_trains_and_tests_in_bfloat16(name, task, reasoner):
    method, data = build(name, task, reasoner), samples(task)
    kept = {}
    keep = method.keep
    method.keep = lambda case, *rows: (kept.update({case: rows[1].dtype}), keep(case, *rows))
    logged = run(method, data, "bf16-mixed")
    assert all(np.isfinite(value) for value in logged.values())
    outcomes = method.outcomes["test"]
    assert kept.pop(KEPT_INPUTS, torch.float32) == torch.float32
    assert set(kept.values()) == {torch.float32}
    assert ("shuffled" in outcomes) == (name in ("cdc_mmpg", "hyper"))
    for case, (where, rows) in outcomes.items():
        if case != CAPTIONS:
            assert where.tolist() == list(range(6))
        if task != "retrieval":
            assert rows[:, 1].tolist() == data.labels.tolist(), case


@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("name", FROZEN)
def test_behind_the_encoder_all_is_float32(name, task, reasoner):
    """With kept features the encoder computes nothing, so that nothing is left to be rounded."""
    with torch.no_grad():
        kept = build("linear", task, reasoner).encode(samples(task))
    data = kept
    if METHODS[name].reads == "sessions":
        one = sessions()
        data = SessionBatch(kept, *(part.repeat(3, *[1] * (part.dim() - 1)) for part in one[1:]))
        data.anchors[0] = 0
    found = {}
    for precision in ("32-true", "bf16-mixed"):
        method = build(name, task, reasoner)
        found[precision] = run(method, data, precision), method.state_dict(), method.outcomes["test"]
    (logged, weights, outcomes), (ours, own_weights, own_outcomes) = found.values()
    assert ours == logged
    assert all(torch.equal(own_weights[key], value) for key, value in weights.items())
    assert list(own_outcomes) == list(outcomes)
    for case, (where, rows) in outcomes.items():
        assert np.array_equal(where, own_outcomes[case][0])
        assert np.array_equal(rows, own_outcomes[case][1]), case


@pytest.mark.parametrize("axis", ["feature", "group:8", "batch"])
def test_phase_one_is_float32_behind_the_encoder(axis):
    found = []
    for precision in ("32-true", "bf16-mixed"):
        torch.manual_seed(0)
        method = ADRPretraining(encoder(), OpenEnded(5), axis=axis)
        with torch.no_grad():
            data = method.encode(samples("open_ended"))
        found.append(
            (run(method, data, precision), {key: value.clone() for key, value in method.adr.state_dict().items()})
        )
        assert np.isfinite(run(method, samples("open_ended"), precision)["test/loss"])
    assert found[0][0] == found[1][0]
    assert all(torch.equal(value, found[1][1][key]) for key, value in found[0][1].items())


def test_the_encoders_pretraining_runs_in_bfloat16():
    logged = run(EncoderPretraining(encoder(), OpenEnded(5), caption_epochs=1), captions(), "bf16-mixed")
    assert logged["test/loss"] > 0
    assert 0 <= logged["test/words_accuracy"] <= 1


def test_modules_of_the_cloud_are_float32_wherever_they_are_called():
    torch.manual_seed(0)
    feature, hidden = torch.randn(6, 192), torch.randn(6, 96)
    axes = DeviceAxes(2)
    axes.fit(*Data(samples("open_ended")).history())
    cases = [
        (ADR(axis=axis).train(), lambda module: module(feature, False)) for axis in ("feature", "group:8", "batch")
    ]
    cases.append((axes, lambda module: [module(feature)]))
    for fda in (FDA(96, 1001, "hyperfan_in", True), LowRankFDA(96, 17, 4), BasisFDA(96, 17, 4)):
        fda.train()(feature, hidden)
        cases.append((
            fda.eval(),
            lambda module: [module.average(hidden), *module.generate(feature),
                            *(module.apply_sent(feature, hidden, name) for name in PAYLOAD_PRECISIONS)],
        ))  # fmt: skip
    for module, call in cases:
        before = {key: value.clone() for key, value in module.state_dict().items()}
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            rounded = call(module)
        after = {key: value.clone() for key, value in module.state_dict().items()}
        module.load_state_dict(before)
        with torch.no_grad():
            expected = call(module)
        for ours, value in zip(rounded, expected, strict=True):
            assert ours.dtype == torch.float32
            assert torch.equal(ours, value)
        assert all(torch.equal(after[key], value) for key, value in module.state_dict().items())


@torch.no_grad()
def test_the_encoder_gives_float32_and_computes_in_bfloat16():
    model, head = encoder().eval(), OpenEnded(5)
    data = samples("open_ended")
    expected = head.encode(model, data).frame_features
    with torch.autocast("cpu", torch.bfloat16):
        found = [head.encode(model, data).frame_features, Retrieval().encode(model, samples("retrieval")).texts,
                 model.encode_words(torch.randn(6, 3, 3, 32, 32), data.text_ids, data.text_mask)]  # fmt: skip
    assert {part.dtype for part in found} == {torch.float32}
    assert not torch.equal(found[0], expected)
    torch.testing.assert_close(found[0], expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true", "transformer-engine"])
def test_weights_of_another_precision_are_refused_by_every_command(precision, fit, capsys):
    for verb in ("fit", "test", "validate"):
        arguments = [verb, *fit("linear", f"--trainer.precision={precision}")[1:]]
        assert main(arguments) == 2
        assert "use 32-true, bf16-mixed or 16-mixed" in capsys.readouterr().err
