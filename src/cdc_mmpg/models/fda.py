"""Fast Domain Adaptor (paper section 3.2): a hypernetwork that turns a feature into the weights of the last layer."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdc_mmpg.errors import ConfigError
from cdc_mmpg.models.all_in_one import WIDTH
from cdc_mmpg.models.heads import StaticLayer

Init = Literal["printed", "hyperfan_in", "shared_head"]


class FDA(nn.Module):
    """Feature (B, 192) -> weight (B, L, D) and bias (B, L) of a device's last layer, L outputs on D inputs.

    Source: eq. 5, 6 and 11. H is one linear layer with bias: 193 x (D + 1) L parameters, as the paper's counts say.

    Deviation: `init`. The paper prints none; with PyTorch's default ("printed") the generated logits start with a
    standard deviation of 5.7 and one step of gradient descent moves them about 190 times as far as a static head's.
    "hyperfan_in" (Chang et al. 2020, "Principled weight initialization for hypernetworks") starts them near 1;
    "shared_head" gives every input the same head at first, initialised as a static one: H's bias is that head, its
    weight is zero.

    Args:
        inputs: D, hidden units that the last layer reads.
        outputs: L, what the last layer tells apart.
        init: see above.
        project: put the MLP of eq. 5 and 11 (two linears, then a LayerNorm: 74,496 parameters) before H. The counts
            of the paper's F-hyper leave no room for it.
    """

    def __init__(self, inputs: int, outputs: int, init: Init, project: bool) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.mlp: nn.Module = nn.Identity()
        if project:
            self.mlp = projection()
        # Output (l, d) is weight d of answer l, the last of each row its bias: a row is what one answer needs.
        self.hyper = nn.Linear(WIDTH, outputs * (inputs + 1))
        with torch.no_grad():
            weight = self.hyper.weight.view(outputs, inputs + 1, WIDTH)
            bias = self.hyper.bias.view(outputs, inputs + 1)
            if init == "hyperfan_in":
                # For inputs of variance one: Var(w) = 1 / D, and so logits of variance one, plus the bias's third.
                nn.init.normal_(weight[:, :-1], std=(inputs * WIDTH) ** -0.5)
                bias[:, :-1] = 0
            elif init == "shared_head":
                shared = nn.Linear(inputs, outputs)
                weight.zero_()
                bias[:, :-1] = shared.weight
                bias[:, -1] = shared.bias

    def forward(self, feature: Tensor, hidden: Tensor) -> Tensor:
        """Logits (..., L) of every sample's own generated layer on `hidden` (..., D), for `feature` (..., 192).

        The dimensions before the last are those of both, or 1 where several hidden vectors share a layer. The same as
        `generate`, then the layer, without holding B layers: H is linear, so the product over D and over H's 192 inputs
        can be taken at once (B x 192 D numbers in place of B x (D + 1) L). Few answers make the layers the smaller of
        the two. Always in float32.
        """
        with torch.autocast(feature.device.type, enabled=False):
            feature, hidden = feature.float(), hidden.float()
            if self.outputs <= WIDTH:
                weight, bias = self.generate(feature)
                return (weight @ hidden.unsqueeze(-1)).squeeze(-1) + bias
            latent = self.mlp(feature)
            rows = torch.cat([hidden, torch.ones_like(hidden[..., :1])], dim=-1)  # (..., D + 1)
            products = (rows.unsqueeze(-1) * latent.unsqueeze(-2)).flatten(-2)  # (..., (D + 1) * 192)
            return F.linear(products, self.hyper.weight.view(self.outputs, -1)) + F.linear(
                rows, self.hyper.bias.view(self.outputs, -1)
            )

    @property
    def numbers(self) -> int:
        """How many numbers the cloud sends for a layer."""
        return self.outputs * (self.inputs + 1)

    def generate(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """The layers as the cloud sends them: weight (..., L, D) and bias (..., L) for features (..., 192)."""
        layer = self.hyper(self.mlp(feature)).unflatten(-1, (self.outputs, self.inputs + 1))
        return layer[..., :-1], layer[..., -1]


class LowRankFDA(nn.Module):
    """Feature (B, 192) -> a rank-r residual on a shared last layer, which the device has.

    The layer is [W, b] = [W0, b0] + U V with U (L, r) and V (r, D + 1): the cloud sends r (L + D + 1) numbers in place
    of (D + 1) L, and a device that was sent nothing answers with the shared layer.

    Source: ours; the residual is LoRA's (Hu et al. 2022) with generated factors. It starts at zero: H gives U = 0 and V
    at random, so that the first steps train U.

    Args:
        inputs: D, hidden units that the last layer reads.
        outputs: L, what the last layer tells apart.
        rank: r.
    """

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        if not 1 <= rank <= min(inputs, outputs):
            raise ConfigError(f"rank {rank}: from 1 to {min(inputs, outputs)}, the smaller side of the layer")
        self.inputs, self.outputs, self.rank = inputs, outputs, rank
        self.shared = StaticLayer(inputs, outputs)
        self.mlp = projection()
        self.hyper = nn.Linear(WIDTH, self.numbers)
        with torch.no_grad():
            self.hyper.weight[: outputs * rank] = 0
            nn.init.normal_(self.hyper.weight[outputs * rank :], std=(inputs * WIDTH) ** -0.5)
            nn.init.zeros_(self.hyper.bias)

    @property
    def numbers(self) -> int:
        """How many numbers the cloud sends for a layer."""
        return self.rank * (self.outputs + self.inputs + 1)

    def factors(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """What the cloud sends: U (B, L, r) and V (B, r, D + 1) for features (B, 192)."""
        left, right = self.hyper(self.mlp(feature)).split(
            [self.outputs * self.rank, self.rank * (self.inputs + 1)], dim=-1
        )
        return left.view(-1, self.outputs, self.rank), right.view(-1, self.rank, self.inputs + 1)

    def forward(self, feature: Tensor, hidden: Tensor) -> Tensor:
        """Logits (B, L) of every sample's own layer on `hidden` (B, D), always in float32."""
        with torch.autocast(feature.device.type, enabled=False):
            left, right = self.factors(feature.float())
            rows = torch.cat([hidden, torch.ones_like(hidden[:, :1])], dim=1).float()  # (B, D + 1)
            residual: Tensor = (left @ (right @ rows.unsqueeze(-1))).squeeze(-1)
            return self.shared(hidden) + residual

    def generate(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """The layers as the device installs them: weight (B, L, D) and bias (B, L) for features (B, 192)."""
        left, right = self.factors(feature)
        layer = torch.cat([self.shared.weight, self.shared.bias.unsqueeze(-1)], dim=-1) + left @ right
        return layer[..., :-1], layer[..., -1]


def projection() -> nn.Sequential:
    """The MLP of eq. 5 and 11: two linears, then a LayerNorm."""
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))
