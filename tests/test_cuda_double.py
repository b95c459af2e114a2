"""Every method and task on a double for CUDA: the results of the CPU, and the expected synchronizations.

The double itself is compared with what it documents and, on a machine with a GPU, with that GPU.
"""

import copy
import json
import operator
import shutil
import warnings
from collections import Counter
from contextlib import nullcontext
from functools import cache

import numpy as np
import pytest
import test_precision
import torch
import torch.nn.functional as F
from cuda_double import CudaDouble, CudaTensor, DeviceError, Sync
from lightning import Callback, Trainer
from lightning.pytorch.cli import LightningCLI
from test_session import build_encoder, build_sessions, draw_captions
from torch import nn
from torch.utils.data import DataLoader

from cdc_mmpg.data.batch import UNKNOWN_LABEL, FeatureBatch, SessionBatch, VideoTextBatch
from cdc_mmpg.methods.adr_pretraining import ADRPretraining
from cdc_mmpg.methods.base import Method
from cdc_mmpg.methods.cdc_mmpg_session import CDCMMPGSession
from cdc_mmpg.methods.encoder_pretraining import EncoderPretraining
from cdc_mmpg.models.adr import ADR
from cdc_mmpg.models.heads import MultipleChoice, OpenEnded, Retrieval
from cdc_mmpg.training.experiment import Experiment
from tolerances import assert_agree

FRAME_METHODS = ("fine_tuning", "cdc_mmpg")
HEADS = {"open_ended": lambda: OpenEnded(200, 16), "choice": MultipleChoice, "retrieval": lambda: Retrieval(16)}
METHOD_NAMES = (
    *FRAME_METHODS, "linear", "hyper", "cdc_mmpg_frozen", "adr_pretraining", "session_low_rank", "session_full",
    "session_basis", "session_oracle", "session_concatenated",
)  # fmt: skip
PAIRS = [(name, task) for name in METHOD_NAMES for task in HEADS]
PAIRS += [("session_plain", "open_ended"), ("encoder_pretraining", "captions"), ("encoder_pretraining", "questions")]

# How often the host waits for the device in a training step, by the function that waits; all others never do.
EXPECTED_WAITS = {
    ("encoder_pretraining", "captions"): {"EncoderPretraining.captions_loss": 1},
}


class Data(test_precision.Data):
    """Three equal training batches and one for evaluation, from loaders that pin them."""

    def __init__(self, training, evaluation):
        super().__init__(evaluation)
        self.training = training

    def train_dataloader(self):
        return DataLoader([self.training] * 3, batch_size=None, pin_memory=torch.cuda.is_available())

    def val_dataloader(self):
        return DataLoader([self.data], batch_size=None, pin_memory=torch.cuda.is_available())

    test_dataloader = val_dataloader


class SyncRecorder(Callback):
    """Callback that records the number of synchronizations so far after each training step."""

    def __init__(self, card):
        self.card, self.counts = card, []

    def on_train_batch_end(self, *_):
        self.counts.append(len(self.card.syncs))


@cache
def make_frames(task: str, training: bool) -> VideoTextBatch:
    """Return three samples: one text is shorter, one answer unknown, one caption absent; to train, one caption each."""
    pictures, ids, mask, labels, indices = (part[:3].clone() for part in test_precision.draw_samples(task))
    ids[0, ..., 4:] = mask[0, ..., 4:] = 0
    if task == "retrieval":
        ids[1, 1] = mask[1, 1] = 0
        ids, mask = (ids[:, :1], mask[:, :1]) if training else (ids, mask)
    elif task == "choice":
        ids, mask = ids[:, :3], mask[:, :3]
    else:
        labels = torch.tensor([199, UNKNOWN_LABEL, 3])
    return VideoTextBatch(pictures, ids, mask, labels, indices)


@cache
def make_features(task: str, training: bool) -> FeatureBatch:
    """Return the same samples encoded."""
    with torch.no_grad():
        return HEADS[task]().encode(build_encoder().eval(), make_frames(task, training))


def make_batch(name: str, task: str, training: bool) -> object:
    """Return the batch that a method reads; one sample of a session batch has no anchors."""
    if name == "encoder_pretraining":
        return draw_captions()
    if not name.startswith("session"):
        return (make_frames if name in FRAME_METHODS else make_features)(task, training)
    _, uploads, anchors, casts, _ = (
        part if isinstance(part, FeatureBatch) else part[[0, 1, 0]] for part in build_sessions()
    )
    return SessionBatch(make_features(task, training), uploads, anchors * torch.tensor([[0], [1], [1]]), casts)


def build_method(name: str, task: str, reasoner: str) -> Method:
    torch.manual_seed(0)
    if name == "encoder_pretraining":
        return EncoderPretraining(build_encoder(), OpenEnded(5), caption_epochs=task == "captions", question_share=1)
    if name == "adr_pretraining":
        return ADRPretraining(build_encoder(), HEADS[task](), "small", axis="batch")
    if name == "session_plain":
        return CDCMMPGSession(build_encoder(), HEADS[task](), axes=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_precision, "HEADS", HEADS)
        if name not in FRAME_METHODS:
            patch.setattr(test_precision, "encoder", build_encoder)  # a smaller encoder
        return test_precision.build_method(name, task, reasoner)


def train_and_test(name: str, task: str, method: Method, precision: str = "32-true", card: CudaDouble | None = None):
    """Train, validate and test for one epoch; return logged values, weights, and the second step's synchronizations."""
    recorder = SyncRecorder(card or CudaDouble())
    trainer = Trainer(
        precision=precision, max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=[recorder],
        **(card.trainer() if card else {"accelerator": "cpu"}),
    )  # fmt: skip
    data = Data(*(make_batch(name, task, training) for training in (True, False)))
    trainer.fit(method, data)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    logged |= trainer.test(method, data, verbose=False)[0]
    return logged, method.state_dict(), recorder.card.syncs[slice(*recorder.counts[:2])]


def check_waits(waits: list[Sync], expected: dict[str, int]) -> None:
    lines = "\n".join(f"  {sync.where}: {sync.operation}, {sync.line}" for sync in waits)
    assert Counter(sync.where for sync in waits) == expected, f"the host waits {len(waits)} times:\n{lines}"


@pytest.fixture(scope="module")
def reasoner(tmp_path_factory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("reasoner") / "adr.safetensors"
    ADR().save(path)
    return str(path)


@cache
def run_on_cpu(name: str, task: str, reasoner: str):
    method = build_method(name, task, reasoner)
    return *train_and_test(name, task, method)[:2], getattr(method, "outcomes", {})


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_every_method_gives_the_results_of_the_cpu_on_the_device(name, task, precision, reasoner):
    logged, weights, outcomes = run_on_cpu(name, task, reasoner)
    method = build_method(name, task, reasoner)
    with CudaDouble() as card:
        device_logged, device_weights, waits = train_and_test(name, task, method, precision, card)
    check_waits(waits, EXPECTED_WAITS.get((name, task), {}))
    assert {type(parameter) for parameter in method.parameters()} == {nn.Parameter}
    # Everything behind the encoder is computed in float32.
    if precision == "32-true" or name not in (*FRAME_METHODS, "encoder_pretraining"):
        assert device_logged == logged
        assert all(torch.equal(value, weights[key]) for key, value in device_weights.items())
        for case, (where, rows) in outcomes.get("test", {}).items():
            assert np.array_equal(where, method.outcomes["test"][case][0])
            assert np.array_equal(rows, method.outcomes["test"][case][1]), case
    else:
        for key in (key for key in logged if key.endswith("loss")):
            assert_agree(device_logged[key], logged[key], torch.bfloat16)
        for key, value in device_weights.items():
            assert_agree(value, weights[key], torch.bfloat16)


def make_values() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return numbers that need a gradient, a mask of half of them, and row numbers, on the device."""
    x = torch.arange(6.0, device="cuda").view(2, 3)
    return x.requires_grad_(), (x > 2).detach(), torch.ones(2, dtype=torch.long, device="cuda")


def assign(x, index, value):
    x = x.detach().clone()
    x[index] = value


# How often the host waits, as `set_sync_debug_mode` reports it.
OPERATIONS = {
    "item": (1, lambda x, mask, rows: x.sum().item()),
    "tolist": (1, lambda x, mask, rows: x.tolist()),
    "bool": (1, lambda x, mask, rows: bool(mask.any())),
    "if": (1, lambda x, mask, rows: 1 if x.sum() > 0 else 0),
    "int": (1, lambda x, mask, rows: int(rows.sum())),
    "float": (1, lambda x, mask, rows: float(x.sum())),
    "range": (1, lambda x, mask, rows: range(rows.sum())),
    "a slice's end": (1, lambda x, mask, rows: x[: rows[0]]),
    "in": (1, lambda x, mask, rows: 3.0 in x),
    "equal": (1, lambda x, mask, rows: torch.equal(x, x + 1)),
    "nonzero": (1, lambda x, mask, rows: mask.nonzero()),
    "where": (1, lambda x, mask, rows: torch.where(mask)),
    "a mask as an index": (1, lambda x, mask, rows: x[mask]),
    "its gradient": (2, lambda x, mask, rows: x[mask].sum().backward()),
    "masked_select": (1, lambda x, mask, rows: x.masked_select(mask)),
    "tensors by a mask": (1, lambda x, mask, rows: assign(x, mask, torch.ones(3, device="cuda"))),
    "index_put": (1, lambda x, mask, rows: x.index_put((mask,), x[1])),
    "its two gradients": (3, lambda x, mask, rows: x.index_put((mask,), x[1]).sum().backward()),
    "repeats": (1, lambda x, mask, rows: x.repeat_interleave(rows, dim=0)),
    "an index on the host": (1, lambda x, mask, rows: x[torch.tensor([0, 1])]),
    "a list as an index": (1, lambda x, mask, rows: x[[0, 1]]),
    "cpu": (1, lambda x, mask, rows: x.cpu()),
    "to the host": (1, lambda x, mask, rows: x.to("cpu")),
    "to the device": (1, lambda x, mask, rows: torch.ones(3).to("cuda")),
    "pinned, to the device": (1, lambda x, mask, rows: torch.ones(3).pin_memory().to("cuda")),
    "tensor": (1, lambda x, mask, rows: torch.tensor([1.0, 2.0], device="cuda")),
    "new_tensor": (1, lambda x, mask, rows: x.new_tensor([3])),
    "copy_ from the host": (1, lambda x, mask, rows: x.detach().copy_(torch.ones(2, 3))),
    "copy_ to the host": (1, lambda x, mask, rows: torch.ones(2, 3).copy_(x.detach())),
    "multinomial": (1, lambda x, mask, rows: x.detach().multinomial(1)),
    "a number by a mask": (0, lambda x, mask, rows: assign(x, mask, 0.0)),
    "masked_fill": (0, lambda x, mask, rows: x.masked_fill(mask, 0.0)),
    "where of three": (0, lambda x, mask, rows: torch.where(mask, x, 0.0)),
    "an index on the device": (0, lambda x, mask, rows: x[rows]),
    "its gradient without a mask": (0, lambda x, mask, rows: x[rows].sum().backward()),
    "equal repeats": (0, lambda x, mask, rows: x.repeat_interleave(2, dim=0)),
    "told how many": (0, lambda x, mask, rows: x.repeat_interleave(rows, dim=0, output_size=2)),
    "made there": (0, lambda x, mask, rows: [torch.full((2,), 3.0, device="cuda"), torch.zeros_like(x), x.new_ones(3)]),
    "pinned, not blocking": (0, lambda x, mask, rows: torch.ones(3).pin_memory().to("cuda", non_blocking=True)),
    "to the host, not blocking": (0, lambda x, mask, rows: x.to("cpu", non_blocking=True)),
    "there already": (0, lambda x, mask, rows: [x.to("cuda"), x.to(torch.float64), x.half()]),
    "sizes": (0, lambda x, mask, rows: [len(x), x.shape[0], x.dim(), x.numel(), x.device, x.dtype]),
    "losses": (0, lambda x, mask, rows: F.cross_entropy(x, rows).backward()),
}  # fmt: skip
# The type in which CUDA computes under autocast to bfloat16, for operands in float32 or bfloat16.
LOW = torch.bfloat16
AUTOCAST_TYPES = {
    "linear": (LOW, lambda x, low: F.linear(x, x)),
    "matmul": (LOW, lambda x, low: x @ x.T),
    "einsum": (LOW, lambda x, low: torch.einsum("ij,kj->ik", x, x)),
    "baddbmm": (LOW, lambda x, low: torch.baddbmm(x[None], x[None], x[None])),
    "conv2d": (LOW, lambda x, low: F.conv2d(x[None, None], x[None, None])),
    "attention": (LOW, lambda x, low: F.scaled_dot_product_attention(*[x[None, None]] * 3)),
    "layer_norm": (torch.float32, lambda x, low: F.layer_norm(low, (8,))),
    "softmax": (torch.float32, lambda x, low: low.softmax(-1)),
    "log_softmax": (torch.float32, lambda x, low: F.log_softmax(low, dim=-1)),
    "softmax, told": (torch.float64, lambda x, low: low.softmax(-1, dtype=torch.float64)),
    "cross_entropy": (torch.float32, lambda x, low: F.cross_entropy(low, torch.zeros_like(low[0]).long())),
    "mse_loss": (torch.float32, lambda x, low: F.mse_loss(low, low)),
    "exp": (torch.float32, lambda x, low: low.exp()),
    "power": (torch.float32, lambda x, low: low**2),
    "square": (torch.float32, lambda x, low: low.square()),
    "a quotient": (torch.float32, lambda x, low: 1 / low),
    "norm": (torch.float32, lambda x, low: low.norm(dim=-1)),
    "normalize": (torch.float32, lambda x, low: F.normalize(low, dim=-1)),
    "sum": (torch.float32, lambda x, low: low.sum()),
    "cumsum": (torch.float32, lambda x, low: low.cumsum(0)),
    "index_put": (torch.float32, lambda x, low: x.index_put((torch.zeros_like(x[0]).long(),), low[0])),
    "mean": (LOW, lambda x, low: low.mean()),
    "gelu": (LOW, lambda x, low: F.gelu(low)),
    "a sum of both": (torch.float32, lambda x, low: x + low),
    "a sum": (LOW, lambda x, low: low + low),
    "in place": (torch.float32, lambda x, low: x.clone().addmm_(x, x)),
    "float64": (torch.float64, lambda x, low: x.double() @ x.double()),
}
HAS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("name", OPERATIONS)
def test_synchronizations_are_recorded_with_their_line(name):
    times, operation = OPERATIONS[name]
    with CudaDouble() as card:
        operands = make_values()
        count_before = len(card.syncs)
        operation(*operands)
    assert len(card.syncs) - count_before == times
    lines = operation.__code__.co_firstlineno, assign.__code__.co_firstlineno + 2
    for sync in card.syncs[count_before:]:
        assert any(f"tests/test_cuda_double.py:{line}: " in sync.line for line in lines)
        assert sync.where == "test_cuda_double: " + ("assign" if "assign" in sync.where else "<lambda>")


@pytest.mark.gpu
@HAS_GPU
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_gpu_synchronizes_as_often_as_the_double(name):
    times, operation = OPERATIONS[name]
    operation(*make_values())  # warm-up
    operands = make_values()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            operation(*operands)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing CUDA operation" in str(warning.message) for warning in caught) == times


@pytest.mark.parametrize("place", ["double", pytest.param("gpu", marks=[pytest.mark.gpu, HAS_GPU])])
def test_autocast_computes_in_the_types_of_cuda(place):
    with CudaDouble() if place == "double" else nullcontext():
        x = torch.rand(8, 8, device="cuda") + 1
        with torch.autocast("cuda", LOW):
            types = {name: operation(x, x.to(LOW)).dtype for name, (_, operation) in AUTOCAST_TYPES.items()}
        assert F.linear(x, x).dtype == torch.float32
    assert types == {name: dtype for name, (dtype, _) in AUTOCAST_TYPES.items()}


def test_autocast_of_the_cpu_does_not_affect_the_device():
    with CudaDouble():
        x = torch.rand(8, 8, device="cuda")
        with torch.autocast("cpu", LOW):
            assert F.linear(x, x).dtype == torch.float32
        with torch.autocast("cuda", LOW):
            assert F.linear(x.cpu(), x.cpu()).dtype == torch.float32
            with torch.autocast("cuda", enabled=False):
                assert F.linear(x, x).dtype == torch.float32
            with pytest.raises(DeviceError, match="binary_cross_entropy under autocast"):
                F.binary_cross_entropy(x, x)
            with pytest.raises(NotImplementedError, match="hardtanh under autocast"):
                F.hardtanh(x)


HOST_TENSOR = torch.ones(2, 3)
REFUSED_OPERATIONS = {
    "a sum": lambda x, mask, rows: x + HOST_TENSOR,
    "a sum the other way round": lambda x, mask, rows: HOST_TENSOR + x,
    "a product": lambda x, mask, rows: x @ HOST_TENSOR.T,
    "from_numpy": lambda x, mask, rows: x * torch.from_numpy(np.ones((2, 3), np.float32)),
    "a vector of one": lambda x, mask, rows: x + torch.ones(1),
    "a scalar among parts": lambda x, mask, rows: torch.stack([x.sum(), torch.tensor(1.0)]),
    "in place on the host": lambda x, mask, rows: torch.tensor(1.0).add_(x.sum()),
    "+= on the host": lambda x, mask, rows: operator.iadd(torch.tensor(1.0), x.sum()),
    "equal": lambda x, mask, rows: torch.equal(x, HOST_TENSOR),
    "where": lambda x, mask, rows: torch.where(mask.cpu(), x, x),
    "tensors of the host by a mask": lambda x, mask, rows: assign(x, mask, torch.ones(3)),
    "rows of the host": lambda x, mask, rows: HOST_TENSOR[rows],
    "embedding": lambda x, mask, rows: F.embedding(rows.cpu(), x),
    "a weight of the host": lambda x, mask, rows: F.linear(x, HOST_TENSOR),
    "a layer of the host": lambda x, mask, rows: nn.Linear(3, 1)(x),
    "numpy": lambda x, mask, rows: x.detach().numpy(),
    "asarray": lambda x, mask, rows: np.asarray(x.detach()),
    "a generator of the host": lambda x, mask, rows: torch.rand(2, device="cuda", generator=torch.Generator()),
    "its normal_": lambda x, mask, rows: x.detach().normal_(generator=torch.Generator()),
    "read too early": lambda x, mask, rows: x.to("cpu", non_blocking=True).sum(),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_OPERATIONS)
def test_operations_that_cuda_refuses_are_refused_with_their_line(name):
    line = (
        (assign.__code__.co_firstlineno + 2)
        if "by a mask" in name
        else REFUSED_OPERATIONS[name].__code__.co_firstlineno
    )
    with CudaDouble(), pytest.raises(DeviceError, match=f"tests/test_cuda_double.py:{line}: "):
        REFUSED_OPERATIONS[name](*make_values())


@pytest.mark.gpu
@HAS_GPU
@pytest.mark.parametrize("name", [name for name in REFUSED_OPERATIONS if name != "read too early"])
def test_a_gpu_refuses_the_same_operations(name):
    with pytest.raises((RuntimeError, TypeError)):
        REFUSED_OPERATIONS[name](*make_values())


@pytest.mark.parametrize("place", ["double", pytest.param("gpu", marks=[pytest.mark.gpu, HAS_GPU])])
def test_operations_that_cuda_allows_are_allowed(place):
    with CudaDouble() if place == "double" else nullcontext():
        x, mask, _ = make_values()
        one = torch.tensor(1.0)
        device_results = [
            x + one,
            one * x,
            torch.where(mask, x, one),
            x.masked_fill(mask, one),
            x.view_as(HOST_TENSOR),
            HOST_TENSOR.to(x),
        ]
        device_results += [
            x.cuda(),
            HOST_TENSOR.cuda(device=0),
            x[torch.tensor([0])],
            HOST_TENSOR.type_as(x),
            torch.as_tensor(HOST_TENSOR, device="cuda"),
        ]
        for result in device_results:
            assert (result.device, result.is_cuda, result.get_device()) == (torch.device("cuda", 0), True, 0)
            assert result.type() == "torch.cuda.FloatTensor"
        x = x.detach()
        host_results = [
            torch.zeros_like(x, device="cpu"),
            x.cpu(),
            HOST_TENSOR.clone().copy_(x),
            torch.tensor([x.sum(), 1]),
        ]
        for result in host_results:
            assert not result.is_cuda
            assert result.numpy().dtype == np.float32
        copied = x.to("cpu", non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        event.synchronize()
        assert copied.sum() == 15


class Forgetful(nn.Module):
    """Module with a tensor that `to` does not move."""

    def __init__(self):
        super().__init__()
        self.scale = torch.ones(3)

    def forward(self, x):
        return x * self.scale


def test_a_tensor_that_a_module_does_not_move_is_detected():
    with CudaDouble(), pytest.raises(DeviceError, match=r"mul of tensors in two places .* return x \* self\.scale"):
        Forgetful().to("cuda")(torch.ones(3, device="cuda"))


def test_a_module_is_moved_trained_saved_and_moved_back_as_on_the_cpu(tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    weight, cpu_module = module[0].weight, copy.deepcopy(module)
    for place in ("cpu", "cuda"):
        with CudaDouble() as card:
            trained = {"cpu": cpu_module, "cuda": module}[place].to(place)
            optimizer = torch.optim.AdamW(trained.parameters(), fused=True)
            syncs_before = len(card.syncs)
            trained(torch.arange(12.0, device=place).view(4, 3)).square().sum().backward()
            optimizer.step()
            assert len(card.syncs) == syncs_before
            if place == "cuda":
                assert module[0].weight is weight
                assert isinstance(weight, nn.Parameter)
                assert {type(tensor) for tensor in (weight, weight.grad, module[1].running_mean)} == {CudaTensor}
                assert optimizer.state[weight]["step"].is_cuda
                copied_weight = copy.deepcopy(module)[0].weight
                assert isinstance(copied_weight, nn.Parameter)
                assert copied_weight.is_cuda
                torch.save(module.state_dict(), tmp_path / "weights.pt")
                module.cpu()
    assert type(weight) is nn.Parameter
    loaded = torch.load(tmp_path / "weights.pt", weights_only=True)
    for key, value in cpu_module.state_dict().items():
        assert type(loaded[key]) is torch.Tensor
        assert torch.equal(loaded[key], value)
        assert torch.equal(module.state_dict()[key], value)


@pytest.mark.parametrize("pinned", [True, False])
def test_copies_from_unpinned_memory_synchronize(pinned):
    with CudaDouble() as card:
        for part in DataLoader(torch.ones(2, 3), pin_memory=pinned):
            assert part.is_pinned() == pinned
            part.to("cuda", non_blocking=True)
    expected = [] if pinned else 2 * ["a copy to the device from memory that is not pinned"]
    assert [sync.operation for sync in card.syncs] == expected


def test_a_whole_command_gives_the_results_of_the_cpu_on_the_device(fit, tmp_path, monkeypatch):
    """The progress bar is on, since it reads values of the device to show them."""
    make_trainer, results = LightningCLI.instantiate_trainer, []
    with CudaDouble() as card:
        recorder = SyncRecorder(card)

        def make_device_trainer(self, callbacks, **arguments):
            return make_trainer(self, **arguments | card.trainer() | {"callbacks": [*callbacks, recorder]})

        monkeypatch.setattr(LightningCLI, "instantiate_trainer", make_device_trainer)
        Experiment(fit("linear", "--trainer.enable_progress_bar=true"))
    monkeypatch.undo()
    results.append(json.loads((tmp_path / "msvd/linear/seed0/results.json").read_text()))
    shutil.rmtree(tmp_path / "msvd/data/features")
    shutil.rmtree(tmp_path / "msvd/linear")
    Experiment(fit("linear"))
    results.append(json.loads((tmp_path / "msvd/linear/seed0/results.json").read_text()))
    assert [result["devices"] for result in results] == ["1 x cuda", "1 x cpu"]
    assert results[0]["metrics"] == results[1]["metrics"]
    check_waits(card.syncs[slice(*recorder.counts[:2])], {})
