"""What only a GPU shows: the methods train there in bfloat16 as they do in float32."""

import pytest
import torch
from test_methods import batch

from cdc_mmpg.benchmark import measure
from cdc_mmpg.methods.cdc_mmpg import CDCMMPG
from cdc_mmpg.methods.fine_tuning import FineTuning
from cdc_mmpg.methods.hyper import Hyper
from cdc_mmpg.models.all_in_one import AllInOne
from cdc_mmpg.models.heads import OpenEnded

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("name", ["fine_tuning", "hyper", "cdc_mmpg"])
def test_bfloat16_follows_float32(name, phase_one):
    def build():
        parts = (AllInOne(image_size=32, depth=2, vocab_size=50), OpenEnded(1001))
        if name == "cdc_mmpg":
            return CDCMMPG(*parts, adr=str(phase_one))
        return {"fine_tuning": FineTuning, "hyper": Hyper}[name](*parts)

    losses = [measure(build, batch(16), 20, precision)[0].losses for precision in ("32-true", "bf16-mixed")]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert losses[0][-1] < losses[0][0]
