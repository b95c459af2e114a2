"""Training on a GPU: the same losses in bfloat16 as in float32."""

import pytest
import torch

from cdc_mmpg.benchmarks.training import MODES, Sizes, measure_training

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("name", ["fine_tuning", "hyper", "cdc_mmpg"])
def test_bfloat16_follows_float32(name):
    sizes = Sizes(batch=16, steps=15, classes=1001, image=32, depth=2)
    losses = [measure_training(name, "open_ended", sizes, MODES[mode])[0].losses for mode in ("float32", "bf16")]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[0][-1] < losses[0][0]
