"""Hypernetworks: parameter counts, initialization, and the same logits in training and serving."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from cdc_mmpg.errors import CheckpointError, DataError
from cdc_mmpg.models.adr import ADR
from cdc_mmpg.models.device_axes import DeviceAxes
from cdc_mmpg.models.fda import FDA, Adaptor, BasisFDA, LowRankFDA, StaticLayer, round_parts
from cdc_mmpg.models.generator import SETTINGS_KEY, Generator
from cdc_mmpg.models.modulation import BiasFDA, FiLMFDA
from cdc_mmpg.models.weights import save_safetensors
from tolerances import assert_agree


@pytest.mark.parametrize(
    ("inputs", "outputs", "count"),
    [(96, 1501, 28_100_221), (96, 1001, 18_739_721), (96, 1541, 28_849_061), (192, 1, 37_249), (192, 256, 9_535_744)],
)
def test_parameter_counts(inputs, outputs, count):
    assert sum(p.numel() for p in FDA(inputs, outputs, "printed", project=False).parameters()) == count


def test_parameter_count_of_the_projection():
    assert sum(p.numel() for p in FDA(96, 5, "printed", project=True).mlp.parameters()) == 74_496


@pytest.mark.parametrize("outputs", [5, 1001])
@pytest.mark.parametrize("init", ["printed", "hyperfan_in", "shared_head"])
def test_training_and_serving_give_the_same_logits(outputs, init):
    torch.manual_seed(0)
    fda = FDA(96, outputs, init, project=True)
    feature, hidden = torch.randn(6, 192), torch.randn(6, 96)
    weight, bias = fda.generate(feature)
    assert (weight.shape, bias.shape) == ((6, outputs, 96), (6, outputs))
    served = torch.stack([torch.nn.functional.linear(h, w, b) for h, w, b in zip(hidden, weight, bias, strict=True)])
    assert_agree(fda(feature, hidden), served)


def gelu(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values * (1 + torch.erf(torch.from_numpy(values / 2**0.5)).numpy()) / 2


def compute_layer(adaptor: Adaptor, feature: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the layer [W, b] (L, D + 1) for one feature (192,), computed by the equations."""
    state = {name: value.double().numpy() for name, value in adaptor.state_dict().items()}
    if "mlp.0.weight" in state:
        feature = gelu(state["mlp.0.weight"] @ feature + state["mlp.0.bias"])
        feature = state["mlp.2.weight"] @ feature + state["mlp.2.bias"]
    if isinstance(adaptor, BasisFDA):
        return join_shared(state) + np.tensordot(np.tanh(feature), state["basis"], 1)
    if "mlp.3.weight" in state:  # the LayerNorm, last
        feature = (feature - feature.mean()) / (feature.var() + 1e-5) ** 0.5
        feature = feature * state["mlp.3.weight"] + state["mlp.3.bias"]
    numbers = state["hyper.weight"] @ feature + state["hyper.bias"]
    if isinstance(adaptor, LowRankFDA):
        left, right = np.split(numbers, [adaptor.rank * adaptor.outputs])
        return join_shared(state) + left.reshape(adaptor.rank, -1).T @ right.reshape(adaptor.rank, -1)
    if isinstance(adaptor, BiasFDA):
        layer = join_shared(state)
        layer[:, -1] += numbers
        return layer
    if isinstance(adaptor, FiLMFDA):  # W ((1 + g) h + s) + b
        factors, offsets = np.split(numbers, 2)
        weight = state["shared.weight"]
        return np.column_stack([weight @ np.diag(1 + factors), weight @ offsets + state["shared.bias"]])
    return numbers.reshape(adaptor.outputs, -1)


def join_shared(state: dict[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    return np.concatenate([state["shared.weight"], state["shared.bias"][:, None]], 1)


ADAPTORS = {
    "as printed": lambda: FDA(6, 5, "printed", project=False),
    "projected": lambda: FDA(6, 5, "printed", project=True),
    "contracted": lambda: FDA(6, 200, "printed", project=True),
    "low rank": lambda: LowRankFDA(6, 7, 3),
    "basis": lambda: BasisFDA(6, 7, 4),
    "bias": lambda: BiasFDA(6, 7),
    "FiLM": lambda: FiLMFDA(6, 7),
}


@pytest.mark.parametrize("name", ADAPTORS)
def test_generated_layers_match_numpy(name):
    """The layers that training applies, a device installs, and training averages all follow the equations."""
    torch.manual_seed(0)
    adaptor = ADAPTORS[name]().train()
    for parameter in adaptor.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    features, hidden = torch.randn(3, 4, 192), torch.randn(4, 6)
    layers = np.array([[compute_layer(adaptor, sample) for sample in batch.double().numpy()] for batch in features])
    inputs = np.concatenate([hidden.double().numpy(), np.ones((4, 1))], 1)
    for feature, layer in zip(features, layers, strict=True):
        outputs = adaptor(feature, hidden).detach().numpy()
        adaptor.update_mean()
        assert_agree(outputs, np.einsum("bld,bd->bl", layer, inputs).astype(np.float32))
    mean = layers.reshape(-1, *layers.shape[2:]).mean(0)  # over three steps of equal weight
    assert_agree(adaptor.average(hidden), (inputs @ mean.T).astype(np.float32))
    weight, bias = adaptor.eval().generate(features[0])
    assert_agree(weight, layers[0][..., :-1].astype(np.float32))
    assert_agree(bias, layers[0][..., -1].astype(np.float32))
    assert adaptor.numbers == sum(part[0].numel() for part in adaptor.parts(features[0]))


def test_the_running_mean_forgets_after_a_hundred_steps():
    adaptor = FDA(6, 5, "printed", project=False).train()

    def mean_after(*batches: float, counted: torch.Tensor | None = None) -> float:
        for value in batches:
            adaptor.record(torch.full((2, 192), value), counted)
        adaptor.update_mean()
        return adaptor.mean_latent.mean().item()

    for step in range(100):
        mean = mean_after(step)
    assert mean == pytest.approx(49.5, rel=1e-4)  # the mean of all
    assert mean_after(148.5, 150.5) == pytest.approx(50.5, rel=1e-4)  # from here on each step weighs a hundredth
    assert adaptor.seen == 101  # two batches make one step
    assert mean_after(150.5, counted=torch.tensor([True, False])) == pytest.approx(51.5, rel=1e-4)
    for values in ((), (7.0,)):
        assert mean_after(*values, counted=torch.zeros(2, dtype=torch.bool)) == pytest.approx(51.5, rel=1e-4)
    assert adaptor.seen == 102


def test_int8_weights_are_the_nearest_of_255_multiples_of_the_scale():
    part = torch.tensor([[0.3, -1.27, 0.004, 0.016], [0.0, 0.0, 0.0, 0.0], [1e-3, 2e-3, -4e-3, 127e-4]])
    (received,) = round_parts((part,), "int8")
    scales = np.float32(np.float16(np.array([0.01, 0, 1e-4])))[:, None]
    multiples = np.array([[30, -127, 0, 2], [0, 0, 0, 0], [10, 20, -40, 127]])
    np.testing.assert_allclose(received.numpy(), scales * multiples, rtol=1e-6)
    (half,) = round_parts((part,), "float16")
    np.testing.assert_array_equal(half.numpy(), part.numpy().astype(np.float16).astype(np.float32))
    assert round_parts((part,), "float32")[0] is part


@pytest.mark.parametrize("kind", ["low rank", "basis"])
def test_generated_parts_start_at_the_intended_scale(kind):
    """V starts like the layer of a static head, the coefficients near zero, the basis at the scale of its inputs."""
    torch.manual_seed(0)
    if kind == "low rank":
        adaptor: Adaptor = LowRankFDA(96, 200, 8)
        left, right = adaptor.parts(torch.randn(64, 192))
        assert not left.any()
        assert right.std().item() == pytest.approx(96**-0.5, rel=0.1)  # for a layer-normed feature: length 192 ** 0.5
        assert not adaptor.hyper.bias.any()
    else:
        adaptor = BasisFDA(96, 200, 8)
        assert adaptor.basis.std().item() == pytest.approx(96**-0.5, rel=0.02)
        last = adaptor.mlp[-1]
        assert last.weight.std().item() == pytest.approx(0.1 * 192**-0.5, rel=0.1)
        assert not last.bias.any()


READERS = {
    "reasoner": lambda: ADR(axis="group:3", target="global"),
    "batch": lambda: ADR(axis="batch"),
    "axes": lambda: DeviceAxes(3),
    "norm": lambda: torch.nn.LayerNorm(192, elementwise_affine=False),
    "nothing": torch.nn.Identity,
}
NUMBERS = {"as printed": 0, "projected": 0, "contracted": 0, "low rank": 3, "basis": 4}


@torch.no_grad()
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", [name for name in ADAPTORS if name not in ("bias", "FiLM")])
def test_a_saved_generator_loads_unchanged(name, reader, tmp_path):
    torch.manual_seed(0)
    generator = Generator(READERS[reader](), ADAPTORS[name]()).eval()
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    generator.save(tmp_path / "generator.safetensors")
    loaded = Generator.load(tmp_path / "generator.safetensors")
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    uploads = torch.rand(3, 192) * 2 - 1
    parts = generator(uploads)
    for ours, theirs in zip(loaded(uploads), parts, strict=True):
        assert torch.equal(ours, theirs)
    embedding = uploads
    if reader in ("reasoner", "batch"):
        embedding = generator.reader(uploads, sample=False).generated
    elif reader != "nothing":
        embedding = generator.reader(uploads)
    weight, bias = generator.adaptor.install(generator.adaptor.parts(embedding))
    full_layer = torch.cat([weight, bias[..., None]], -1)
    kind = name.replace(" ", "_") if NUMBERS[name] else "float32"
    assert loaded.native == kind
    outputs = 7 if NUMBERS[name] else 200 if name == "contracted" else 5
    expected = [("float32", outputs, 7, 0), ("float16", outputs, 7, 0), ("int8", outputs, 7, 0)]
    expected += [(kind, outputs, 7, NUMBERS[name])] if NUMBERS[name] else []
    assert [tuple(layout) for layout in loaded.layouts()] == expected
    for layout in loaded.layouts():
        sent = loaded.matrices(parts, layout.kind)
        assert [part.shape[1:] for part in sent] == list(layout.shapes)
        for matrix, expected_matrix in zip(sent, parts if layout.kind == kind else (full_layer,), strict=True):
            assert_agree(matrix, expected_matrix)


def test_files_that_are_no_generator_are_refused(tmp_path):
    path = tmp_path / "generator.safetensors"
    generator = Generator(torch.nn.Identity(), LowRankFDA(6, 7, 3))
    for reader, adaptor in (
        ("more", {"kind": "low_rank", "inputs": 6, "outputs": 7, "number": 3}),
        ("nothing", {"kind": "more", "inputs": 6, "outputs": 7, "number": 3}),
        ("nothing", {"kind": "basis", "inputs": 6, "outputs": 7, "number": 3}),
        ("nothing", {"kind": "low_rank", "inputs": 6, "outputs": 7, "number": 2}),
        ("nothing", {"kind": "low_rank", "inputs": 6}),
    ):
        settings = json.dumps({"reader": {"kind": reader}, "adaptor": adaptor})
        save_safetensors(generator.state_dict(), path, {SETTINGS_KEY: settings})
        with pytest.raises((CheckpointError, DataError), match=r"not a generator|unknown"):
            Generator.load(path)
    save_safetensors(generator.state_dict(), path, {})
    with pytest.raises(CheckpointError, match="not a generator"):
        Generator.load(path)


class AllocatedSizes(TorchDispatchMode):
    """Sizes of the tensors that operations allocate; views are ignored."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not out._is_view():
            self.sizes.append(out.numel())
        return out


def test_training_never_allocates_one_head_per_sample():
    """300 heads of 1,001 answers would take 29 million numbers; H itself has 19 million."""
    fda = FDA(96, 1001, "hyperfan_in", project=False)
    feature, hidden = torch.randn(300, 192), torch.randn(300, 96)
    with AllocatedSizes() as allocated:
        fda(feature, hidden).square().mean().backward()
    assert max(allocated.sizes) <= fda.hyper.weight.numel() < 300 * 1001 * 97
    with AllocatedSizes() as allocated:
        fda.generate(feature)
    assert max(allocated.sizes) == 300 * 1001 * 97


@pytest.mark.parametrize(("init", "expected"), [("printed", 5.7), ("hyperfan_in", 1.2)])
def test_initial_scale_of_the_logits(init, expected):
    """The default initialization makes logits five times too large."""
    torch.manual_seed(0)
    fda = FDA(96, 1001, init, project=False)
    logits = fda(torch.randn(256, 192), torch.randn(256, 96))
    assert logits.std().item() == pytest.approx(expected, rel=0.05)


def test_one_step_moves_generated_weights_far_further_than_a_static_head():
    """In a gradient descent step on one sample, dW = dL/dW (z·z + 1): about 193 times as far."""
    torch.manual_seed(0)
    fda, static = FDA(96, 1001, "printed", project=False), StaticLayer(96, 1001)
    feature, hidden, label = torch.randn(1, 192), torch.randn(1, 96), torch.tensor([7])
    with torch.no_grad():  # both start from the same head
        weight, bias = fda.generate(feature)
        static.weight.copy_(weight[0])
        static.bias.copy_(bias[0])
    for module, logits in ((fda, fda(feature, hidden)), (static, static(hidden))):
        torch.nn.functional.cross_entropy(logits, label).backward()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.sub_(1e-4 * parameter.grad)
    moved = (fda.generate(feature)[0] - weight).norm() / (static.weight - weight[0]).norm()
    assert moved.item() == pytest.approx(float(feature.square().sum() + 1), rel=0.02)


def test_shared_head_starts_as_one_static_head():
    fda = FDA(96, 1001, "shared_head", project=True)
    weight, bias = fda.generate(torch.randn(3, 192))
    assert torch.equal(weight[0], weight[1])
    assert torch.equal(bias[0], bias[2])
    assert 0.9 < weight.abs().max() * 96**0.5 <= 1.0001  # the range of nn.Linear's initialization


@pytest.mark.parametrize("outputs", [5, 1001])
def test_every_part_of_the_generator_gets_a_gradient(outputs):
    """A generator that `parameters()` does not list would never train."""
    fda = FDA(96, outputs, "hyperfan_in", project=True)
    fda(torch.randn(4, 192), torch.randn(4, 96)).square().mean().backward()
    for name, parameter in fda.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    rows = fda.hyper.weight.grad.view(outputs, 97, 192).abs().sum((1, 2))
    assert (rows > 0).all()


def test_autocast_does_not_affect_the_generated_layer():
    fda = FDA(96, 1001, "hyperfan_in", project=False)
    with torch.autocast("cpu", torch.bfloat16):
        logits = fda(torch.randn(2, 192).bfloat16(), torch.randn(2, 96).bfloat16())
    assert logits.dtype == torch.float32
