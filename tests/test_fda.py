"""The hypernetwork: counts, initialisation, and the two ways to the same logits."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cdc_mmpg.models.fda import FDA, StaticLayer
from tolerances import assert_agree


@pytest.mark.parametrize(
    ("inputs", "outputs", "count"),
    [(96, 1501, 28_100_221), (96, 1001, 18_739_721), (96, 1541, 28_849_061), (192, 1, 37_249), (192, 256, 9_535_744)],
)
def test_counts(inputs, outputs, count):
    assert sum(p.numel() for p in FDA(inputs, outputs, "printed", project=False).parameters()) == count


def test_count_of_the_projection():
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


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation makes, views of parameters aside."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not out._is_view():
            self.numbers.append(out.numel())
        return out


def test_training_never_holds_a_batch_of_heads():
    """Trap: 300 heads of 1,001 answers would be 29 million numbers; H itself has 19 million."""
    fda = FDA(96, 1001, "hyperfan_in", project=False)
    feature, hidden = torch.randn(300, 192), torch.randn(300, 96)
    with Largest() as largest:
        fda(feature, hidden).square().mean().backward()
    assert max(largest.numbers) <= fda.hyper.weight.numel() < 300 * 1001 * 97
    with Largest() as largest:
        fda.generate(feature)
    assert max(largest.numbers) == 300 * 1001 * 97


@pytest.mark.parametrize(("init", "expected"), [("printed", 5.7), ("hyperfan_in", 1.2)])
def test_initial_scale_of_the_logits(init, expected):
    """Trap: the default initialisation makes logits five times too large."""
    torch.manual_seed(0)
    fda = FDA(96, 1001, init, project=False)
    logits = fda(torch.randn(256, 192), torch.randn(256, 96))
    assert logits.std().item() == pytest.approx(expected, rel=0.05)


def test_one_step_moves_generated_weights_far_further_than_a_static_head():
    """Trap: dW = dL/dW (z·z + 1), about 193 times, for a step of gradient descent on one sample."""
    torch.manual_seed(0)
    fda, static = FDA(96, 1001, "printed", project=False), StaticLayer(96, 1001)
    feature, hidden, label = torch.randn(1, 192), torch.randn(1, 96), torch.tensor([7])
    with torch.no_grad():  # both begin at the same head
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
    assert 0.9 < weight.abs().max() * 96**0.5 <= 1.0001  # nn.Linear's own range


@pytest.mark.parametrize("outputs", [5, 1001])
def test_every_part_of_the_generator_gets_a_gradient(outputs):
    """Trap: a generator kept where `parameters()` does not look never trains."""
    fda = FDA(96, outputs, "hyperfan_in", project=True)
    fda(torch.randn(4, 192), torch.randn(4, 96)).square().mean().backward()
    for name, parameter in fda.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    rows = fda.hyper.weight.grad.view(outputs, 97, 192).abs().sum((1, 2))
    assert (rows > 0).all()


def test_autocast_does_not_reach_the_generated_layer():
    fda = FDA(96, 1001, "hyperfan_in", project=False)
    with torch.autocast("cpu", torch.bfloat16):
        logits = fda(torch.randn(2, 192).bfloat16(), torch.randn(2, 96).bfloat16())
    assert logits.dtype == torch.float32
