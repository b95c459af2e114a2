"""On a double for CUDA: every method and task computes there what it computes on the CPU, and how often the host waits.

The double itself is held to what it says, here and, where there is a GPU, by that GPU.
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
from test_session import captions, encoder, sessions
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

ON_FRAMES = ("fine_tuning", "cdc_mmpg")
HEADS = {"open_ended": lambda: OpenEnded(200, 16), "choice": MultipleChoice, "retrieval": lambda: Retrieval(16)}
NAMES = (
    *ON_FRAMES, "linear", "hyper", "cdc_mmpg_frozen", "adr_pretraining", "session_low_rank", "session_full",
    "session_basis", "session_oracle", "session_concatenated",
)  # fmt: skip
PAIRS = [(name, task) for name in NAMES for task in HEADS]
PAIRS += [("session_plain", "open_ended"), ("encoder_pretraining", "captions"), ("encoder_pretraining", "questions")]

# How often the host waits for the device in a training step, by the function that makes it wait; never in all others.
WAITS = {
    ("encoder_pretraining", "captions"): {"EncoderPretraining.captions_loss": 1},
}


class Data(test_precision.Data):
    """Three training batches and one of evaluation, pinned on their way."""

    def __init__(self, training, evaluation):
        super().__init__(evaluation)
        self.training = training

    def train_dataloader(self):
        return DataLoader([self.training] * 3, batch_size=None, pin_memory=torch.cuda.is_available())

    def val_dataloader(self):
        return DataLoader([self.data], batch_size=None, pin_memory=torch.cuda.is_available())

    test_dataloader = val_dataloader


class Notes(Callback):
    """How many waits there were after each training step."""

    def __init__(self, card):
        self.card, self.after = card, []

    def on_train_batch_end(self, *_):
        self.after.append(len(self.card.syncs))


@cache
def frames(task: str, training: bool) -> VideoTextBatch:
    """Three samples: one text is shorter than the others, an answer is unknown, a caption absent; one each to train."""
    pictures, ids, mask, labels, indices = (part[:3].clone() for part in test_precision.samples(task))
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
def features(task: str, training: bool) -> FeatureBatch:
    """What the encoder makes of them."""
    with torch.no_grad():
        return HEADS[task]().encode(encoder().eval(), frames(task, training))


def batch(name: str, task: str, training: bool) -> object:
    """What the method reads; of sessions, one without anchors."""
    if name == "encoder_pretraining":
        return captions()
    if not name.startswith("session"):
        return (frames if name in ON_FRAMES else features)(task, training)
    _, uploads, anchors, casts, _ = (part if isinstance(part, FeatureBatch) else part[[0, 1, 0]] for part in sessions())
    return SessionBatch(features(task, training), uploads, anchors * torch.tensor([[0], [1], [1]]), casts)


def build(name: str, task: str, reasoner: str) -> Method:
    torch.manual_seed(0)
    if name == "encoder_pretraining":
        return EncoderPretraining(encoder(), OpenEnded(5), caption_epochs=task == "captions", question_share=1)
    if name == "adr_pretraining":
        return ADRPretraining(encoder(), HEADS[task](), "small", axis="batch")
    if name == "session_plain":
        return CDCMMPGSession(encoder(), HEADS[task](), axes=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_precision, "HEADS", HEADS)
        if name not in ON_FRAMES:
            patch.setattr(test_precision, "encoder", encoder)  # a smaller one
        return test_precision.build(name, task, reasoner)


def train_and_test(name: str, task: str, method: Method, precision: str = "32-true", card: CudaDouble | None = None):
    """What was logged and the weights after an epoch with validation and a test, and the waits of its second step."""
    notes = Notes(card or CudaDouble())
    trainer = Trainer(
        precision=precision, max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=[notes],
        **(card.trainer() if card else {"accelerator": "cpu"}),
    )  # fmt: skip
    data = Data(*(batch(name, task, training) for training in (True, False)))
    trainer.fit(method, data)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    logged |= trainer.test(method, data, verbose=False)[0]
    return logged, method.state_dict(), notes.card.syncs[slice(*notes.after[:2])]


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
def on_the_cpu(name: str, task: str, reasoner: str):
    method = build(name, task, reasoner)
    return *train_and_test(name, task, method)[:2], getattr(method, "outcomes", {})


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(("name", "task"), PAIRS)
def test_every_method_computes_on_the_device_what_it_computes_on_the_cpu(name, task, precision, reasoner):
    logged, weights, outcomes = on_the_cpu(name, task, reasoner)
    method = build(name, task, reasoner)
    with CudaDouble() as card:
        own, own_weights, waits = train_and_test(name, task, method, precision, card)
    check_waits(waits, WAITS.get((name, task), {}))
    assert {type(parameter) for parameter in method.parameters()} == {nn.Parameter}
    if precision == "32-true" or name not in (*ON_FRAMES, "encoder_pretraining"):  # behind the encoder all is float32
        assert own == logged
        assert all(torch.equal(value, weights[key]) for key, value in own_weights.items())
        for case, (where, rows) in outcomes.get("test", {}).items():
            assert np.array_equal(where, method.outcomes["test"][case][0])
            assert np.array_equal(rows, method.outcomes["test"][case][1]), case
    else:
        for key in (key for key in logged if key.endswith("loss")):
            assert_agree(own[key], logged[key], torch.bfloat16)
        for key, value in own_weights.items():
            assert_agree(value, weights[key], torch.bfloat16)


def values() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers that want a gradient, a mask of half of them, and numbers of rows; on the GPU that there is."""
    x = torch.arange(6.0, device="cuda").view(2, 3)
    return x.requires_grad_(), (x > 2).detach(), torch.ones(2, dtype=torch.long, device="cuda")


def assign(x, index, value):
    x = x.detach().clone()
    x[index] = value


# How often the host waits, by `set_sync_debug_mode`.
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
# In what CUDA computes under autocast to bfloat16, given float32 or bfloat16.
LOW = torch.bfloat16
CASTS = {
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
def test_host_synchronisations_are_counted_by_line(name):
    times, operation = OPERATIONS[name]
    with CudaDouble() as card:
        given = values()
        before = len(card.syncs)
        operation(*given)
    assert len(card.syncs) - before == times
    here = operation.__code__.co_firstlineno, assign.__code__.co_firstlineno + 2
    for sync in card.syncs[before:]:
        assert any(f"tests/test_cuda_double.py:{line}: " in sync.line for line in here)
        assert sync.where == "test_cuda_double: " + ("assign" if "assign" in sync.where else "<lambda>")


@pytest.mark.gpu
@HAS_GPU
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_gpu_makes_the_host_wait_as_often(name):
    times, operation = OPERATIONS[name]
    operation(*values())  # what is set up once
    given = values()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            operation(*given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing CUDA operation" in str(warning.message) for warning in caught) == times


@pytest.mark.parametrize("place", ["double", pytest.param("gpu", marks=[pytest.mark.gpu, HAS_GPU])])
def test_autocast_computes_in_what_cuda_computes_in(place):
    with CudaDouble() if place == "double" else nullcontext():
        x = torch.rand(8, 8, device="cuda") + 1
        with torch.autocast("cuda", LOW):
            found = {name: operation(x, x.to(LOW)).dtype for name, (_, operation) in CASTS.items()}
        assert F.linear(x, x).dtype == torch.float32
    assert found == {name: dtype for name, (dtype, _) in CASTS.items()}


def test_autocast_of_the_cpu_is_none_of_the_devices():
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


HOST = torch.ones(2, 3)
REFUSED = {
    "a sum": lambda x, mask, rows: x + HOST,
    "a sum the other way round": lambda x, mask, rows: HOST + x,
    "a product": lambda x, mask, rows: x @ HOST.T,
    "from_numpy": lambda x, mask, rows: x * torch.from_numpy(np.ones((2, 3), np.float32)),
    "a vector of one": lambda x, mask, rows: x + torch.ones(1),
    "a scalar among parts": lambda x, mask, rows: torch.stack([x.sum(), torch.tensor(1.0)]),
    "in place on the host": lambda x, mask, rows: torch.tensor(1.0).add_(x.sum()),
    "+= on the host": lambda x, mask, rows: operator.iadd(torch.tensor(1.0), x.sum()),
    "equal": lambda x, mask, rows: torch.equal(x, HOST),
    "where": lambda x, mask, rows: torch.where(mask.cpu(), x, x),
    "tensors of the host by a mask": lambda x, mask, rows: assign(x, mask, torch.ones(3)),
    "rows of the host": lambda x, mask, rows: HOST[rows],
    "embedding": lambda x, mask, rows: F.embedding(rows.cpu(), x),
    "a weight of the host": lambda x, mask, rows: F.linear(x, HOST),
    "a layer of the host": lambda x, mask, rows: nn.Linear(3, 1)(x),
    "numpy": lambda x, mask, rows: x.detach().numpy(),
    "asarray": lambda x, mask, rows: np.asarray(x.detach()),
    "a generator of the host": lambda x, mask, rows: torch.rand(2, device="cuda", generator=torch.Generator()),
    "its normal_": lambda x, mask, rows: x.detach().normal_(generator=torch.Generator()),
    "read too early": lambda x, mask, rows: x.to("cpu", non_blocking=True).sum(),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_operations_that_cuda_refuses_are_refused_with_their_line(name):
    line = (assign.__code__.co_firstlineno + 2) if "by a mask" in name else REFUSED[name].__code__.co_firstlineno
    with CudaDouble(), pytest.raises(DeviceError, match=f"tests/test_cuda_double.py:{line}: "):
        REFUSED[name](*values())


@pytest.mark.gpu
@HAS_GPU
@pytest.mark.parametrize("name", [name for name in REFUSED if name != "read too early"])
def test_a_gpu_refuses_it(name):
    with pytest.raises((RuntimeError, TypeError)):
        REFUSED[name](*values())


@pytest.mark.parametrize("place", ["double", pytest.param("gpu", marks=[pytest.mark.gpu, HAS_GPU])])
def test_operations_that_cuda_allows_are_allowed(place):
    with CudaDouble() if place == "double" else nullcontext():
        x, mask, _ = values()
        one = torch.tensor(1.0)
        there = [x + one, one * x, torch.where(mask, x, one), x.masked_fill(mask, one), x.view_as(HOST), HOST.to(x)]
        there += [
            x.cuda(),
            HOST.cuda(device=0),
            x[torch.tensor([0])],
            HOST.type_as(x),
            torch.as_tensor(HOST, device="cuda"),
        ]
        for result in there:
            assert (result.device, result.is_cuda, result.get_device()) == (torch.device("cuda", 0), True, 0)
            assert result.type() == "torch.cuda.FloatTensor"
        x = x.detach()
        here = [torch.zeros_like(x, device="cpu"), x.cpu(), HOST.clone().copy_(x), torch.tensor([x.sum(), 1])]
        for result in here:
            assert not result.is_cuda
            assert result.numpy().dtype == np.float32
        copied = x.to("cpu", non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        event.synchronize()
        assert copied.sum() == 15


class Forgetful(nn.Module):
    """Keeps a tensor that `to` does not see."""

    def __init__(self):
        super().__init__()
        self.scale = torch.ones(3)

    def forward(self, x):
        return x * self.scale


def test_a_tensor_that_a_module_leaves_behind_is_found():
    with CudaDouble(), pytest.raises(DeviceError, match=r"mul of tensors in two places .* return x \* self\.scale"):
        Forgetful().to("cuda")(torch.ones(3, device="cuda"))


def test_a_module_goes_there_trains_is_saved_and_comes_back(tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    weight, other = module[0].weight, copy.deepcopy(module)
    for place in ("cpu", "cuda"):
        with CudaDouble() as card:
            trained = {"cpu": other, "cuda": module}[place].to(place)
            optimizer = torch.optim.AdamW(trained.parameters(), fused=True)
            before = len(card.syncs)
            trained(torch.arange(12.0, device=place).view(4, 3)).square().sum().backward()
            optimizer.step()
            assert len(card.syncs) == before
            if place == "cuda":
                assert module[0].weight is weight
                assert isinstance(weight, nn.Parameter)
                assert {type(tensor) for tensor in (weight, weight.grad, module[1].running_mean)} == {CudaTensor}
                assert optimizer.state[weight]["step"].is_cuda
                again = copy.deepcopy(module)[0].weight
                assert isinstance(again, nn.Parameter)
                assert again.is_cuda
                torch.save(module.state_dict(), tmp_path / "weights.pt")
                module.cpu()
    assert type(weight) is nn.Parameter
    loaded = torch.load(tmp_path / "weights.pt", weights_only=True)
    for key, value in other.state_dict().items():
        assert type(loaded[key]) is torch.Tensor
        assert torch.equal(loaded[key], value)
        assert torch.equal(module.state_dict()[key], value)


@pytest.mark.parametrize("pinned", [True, False])
def test_batches_that_are_not_pinned_are_waited_for(pinned):
    with CudaDouble() as card:
        for part in DataLoader(torch.ones(2, 3), pin_memory=pinned):
            assert part.is_pinned() == pinned
            part.to("cuda", non_blocking=True)
    expected = [] if pinned else 2 * ["a copy to the device from memory that is not pinned"]
    assert [sync.operation for sync in card.syncs] == expected


def test_a_whole_command_computes_there_what_it_computes_on_the_cpu(fit, tmp_path, monkeypatch):
    """With the progress bar, which waits for what it shows."""
    make_trainer, results = LightningCLI.instantiate_trainer, []
    with CudaDouble() as card:
        notes = Notes(card)

        def on_the_device(self, callbacks, **arguments):
            return make_trainer(self, **arguments | card.trainer() | {"callbacks": [*callbacks, notes]})

        monkeypatch.setattr(LightningCLI, "instantiate_trainer", on_the_device)
        Experiment(fit("linear", "--trainer.enable_progress_bar=true"))
    monkeypatch.undo()
    results.append(json.loads((tmp_path / "msvd/linear/seed0/results.json").read_text()))
    shutil.rmtree(tmp_path / "msvd/data/features")
    shutil.rmtree(tmp_path / "msvd/linear")
    Experiment(fit("linear"))
    results.append(json.loads((tmp_path / "msvd/linear/seed0/results.json").read_text()))
    assert [result["devices"] for result in results] == ["1 x cuda", "1 x cpu"]
    assert results[0]["metrics"] == results[1]["metrics"]
    check_waits(card.syncs[slice(*notes.after[:2])], {})
