"""Fast Domain Adaptor (paper section 3.2): hypernetworks from a feature to the weights of the last layer."""

from abc import abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdc_mmpg.dimensions import FEATURE_DIM
from cdc_mmpg.errors import ConfigError
from cdc_mmpg.models.processes import sum_over_processes
from cdc_mmpg.wire.payloads import INT8_MAX, Precision

Init = Literal["printed", "hyperfan_in", "shared_head"]
Parts = tuple[Tensor, ...]  # what the cloud sends: matrices (..., vectors, length)


class StaticLayer(nn.Linear):
    """Last layer that is trained, not generated: the same for every sample."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Apply the layer, (..., D) -> (..., L), in float32 like generated layers."""
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.float())

    def repeat(self, batch: int) -> tuple[Tensor, Tensor]:
        """Return the layer as `batch` devices install it: weight (B, L, D), bias (B, L)."""
        return self.weight.expand(batch, -1, -1), self.bias.expand(batch, -1)


class Adaptor(nn.Module):
    """Hypernetwork from features (..., 192) to the parts that the cloud sends, and from these to last layers.

    The leading dimensions of a feature are those of the hidden units, or 1 if several hidden vectors share a layer.
    Parts and layers are computed in float32.

    Attributes:
        inputs: D, number of inputs of the last layer.
        outputs: L, number of outputs of the last layer.
        shapes: shapes (vectors, length) of the matrices that the cloud sends.
    """

    seen: Tensor  # number of training steps in which layers were generated

    def __init__(self, inputs: int, outputs: int, shapes: tuple[tuple[int, int], ...]) -> None:
        super().__init__()
        self.inputs, self.outputs, self.shapes = inputs, outputs, shapes
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self._step: list[tuple[Tensor, Tensor]] = []  # weighted sums and weights of this step's batches

    @property
    def numbers(self) -> int:
        """Number of values that the cloud sends for a layer."""
        return sum(vectors * length for vectors, length in self.shapes)

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """Running mean of what training generated; `apply_mean` turns it into a layer."""

    @abstractmethod
    def parts(self, feature: Tensor, counted: Tensor | None = None) -> Parts:
        """Return the parts that the cloud sends, one matrix per entry of `shapes`.

        Args:
            feature: (..., 192) input features.
            counted: (...) whether each layer is used, and so enters the running mean in training; None uses all.
        """

    @abstractmethod
    def apply_parts(self, parts: Parts, hidden: Tensor) -> Tensor:
        """Apply the layers defined by the parts to hidden units (..., D): outputs (..., L)."""

    @abstractmethod
    def install(self, parts: Parts) -> tuple[Tensor, Tensor]:
        """Convert parts to the layers that a device installs: weight (..., L, D) and bias (..., L)."""

    @abstractmethod
    def apply_mean(self, hidden: Tensor) -> Tensor:
        """Apply the mean layer, like `average`, to hidden units in float32."""

    @abstractmethod
    def cloud_modules(self) -> list[nn.Module]:
        """Return the modules that run in the cloud only."""

    def count_stored(self) -> int:
        """Count the parameters that the device stores, in addition to the layer, to build layers from parts."""
        return 0

    def forward(self, feature: Tensor, hidden: Tensor, counted: Tensor | None = None) -> Tensor:
        """Apply the layer generated from each feature to hidden units (..., D): (..., L); `counted` as in `parts`."""
        with torch.autocast(feature.device.type, enabled=False):
            return self.apply_parts(self.parts(feature.float(), counted), hidden.float())

    def apply_rounded(self, feature: Tensor, hidden: Tensor, precision: Precision) -> Tensor:
        """Return the outputs of `forward` for layers that were sent in the given precision."""
        with torch.autocast(feature.device.type, enabled=False):
            return self.apply_parts(round_parts(self.parts(feature.float()), precision), hidden.float())

    def generate(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Generate the layer of each feature: weight (..., L, D) and bias (..., L)."""
        with torch.autocast(feature.device.type, enabled=False):
            return self.install(self.parts(feature.float()))

    def average(self, hidden: Tensor) -> Tensor:
        """Return outputs (..., L) of one layer shared by all samples: the mean of the layers generated in training."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.apply_mean(hidden.float())

    def record(self, rows: Tensor, counted: Tensor | None) -> None:
        """Accumulate what a training batch generated for `update_mean`: rows (..., X), of which `counted` are used."""
        if self.training:
            rows = rows.detach().flatten(0, -2)
            weights = weigh_rows(rows, counted)
            self._step.append((weights @ rows, weights.sum()))

    def update_mean(self) -> None:
        """Update the running mean, over about 100 steps, with what all batches and processes of this step generated.

        Steps that generated nothing leave the mean unchanged. The update does not synchronise with the GPU.
        """
        if not self._step:
            return
        totals, numbers = zip(*self._step, strict=True)
        self._step = []
        *total, number = sum_over_processes(torch.cat([sum(totals), sum(numbers).view(1)])).split(self.mean.numel())
        self.seen += number.squeeze() > 0
        weight = torch.where(number > 0, (1 / self.seen.clamp(min=1)).clamp(min=0.01), 0.0)
        self.mean.lerp_((total[0] / number.clamp(min=1)).view_as(self.mean), weight)


def round_parts(parts: Parts, precision: Precision) -> Parts:
    """Round parts as sending does: equal to what `payloads.decode` returns for their bytes.

    For "int8" the gradient ignores the rounding (straight-through estimator), so that training can include it.
    """
    if precision == "float32":
        return parts
    if precision == "float16":
        return tuple(part.half().float() for part in parts)
    rounded_parts = []
    for part in parts:
        scale = (part.detach().abs().amax(-1, keepdim=True) / INT8_MAX).half().float()
        rounded = torch.where(
            scale > 0, (part.detach() / scale.clamp(min=1e-12)).round().clamp(-INT8_MAX, INT8_MAX), 0.0
        )
        rounded_parts.append(part + (rounded * scale - part).detach())
    return tuple(rounded_parts)


class FDA(Adaptor):
    """Hypernetwork from features (B, 192) to the weight (B, L, D) and bias (B, L) of last layers.

    Source: eq. 5, 6 and 11. H is one linear layer with bias: 193 x (D + 1) L parameters, as the paper's counts say.

    Deviation: `init`. The paper prints none; with PyTorch's default ("printed") the generated logits start with a
    standard deviation of 5.7 and one step of gradient descent moves them about 190 times as far as a static head's.
    "hyperfan_in" (Chang et al. 2020, "Principled weight initialization for hypernetworks") starts them near 1;
    "shared_head" gives every input the same head at first, initialised as a static one: H's bias is that head, its
    weight is zero.

    Args:
        inputs, outputs: see `Adaptor`.
        init: initialisation of H: "printed", "hyperfan_in" or "shared_head", see above.
        project: whether to put the MLP of eq. 5 and 11 (two linears, then a LayerNorm: 74,496 parameters) before H.
            The counts of the paper's F-hyper leave no room for it.
    """

    mean_latent: Tensor

    def __init__(self, inputs: int, outputs: int, init: Init, project: bool) -> None:
        super().__init__(inputs, outputs, ((outputs, inputs + 1),))
        self.register_buffer("mean_latent", torch.zeros(FEATURE_DIM))
        self.mlp: nn.Module = nn.Identity()
        if project:
            self.mlp = build_projection()
        # Row l holds the weights of answer l, its last column the bias.
        self.hyper = nn.Linear(FEATURE_DIM, outputs * (inputs + 1))
        with torch.no_grad():
            weight = self.hyper.weight.view(outputs, inputs + 1, FEATURE_DIM)
            bias = self.hyper.bias.view(outputs, inputs + 1)
            if init == "hyperfan_in":
                # For inputs of unit variance: Var(w) = 1 / D, hence logits of variance 1 plus the bias's 1/3.
                nn.init.normal_(weight[:, :-1], std=(inputs * FEATURE_DIM) ** -0.5)
                bias[:, :-1] = 0
            elif init == "shared_head":
                shared = nn.Linear(inputs, outputs)
                weight.zero_()
                bias[:, :-1] = shared.weight
                bias[:, -1] = shared.bias

    @property
    def mean(self) -> Tensor:
        """Running mean of the inputs of H, which is linear."""
        return self.mean_latent

    def forward(self, feature: Tensor, hidden: Tensor, counted: Tensor | None = None) -> Tensor:
        """See `Adaptor`; equal to applying the layers of `generate`, without holding B layers in memory.

        H is linear, so the product over D and over H's 192 inputs can be taken at once (B x 192 D numbers instead of
        B x (D + 1) L). With few answers, the layers are smaller and are generated.
        """
        if self.outputs <= FEATURE_DIM:
            return super().forward(feature, hidden, counted)
        with torch.autocast(feature.device.type, enabled=False):
            return self._contract(self._latent(feature.float(), counted), hidden.float())

    def _contract(self, latent: Tensor, hidden: Tensor) -> Tensor:
        """Return outputs (..., L) for latents (..., 192) and hidden units (..., D)."""
        rows = append_one(hidden)  # (..., D + 1)
        products = (rows.unsqueeze(-1) * latent.unsqueeze(-2)).flatten(-2)  # (..., (D + 1) * 192)
        return F.linear(products, self.hyper.weight.view(self.outputs, -1)) + F.linear(
            rows, self.hyper.bias.view(self.outputs, -1)
        )

    def _latent(self, feature: Tensor, counted: Tensor | None) -> Tensor:
        """Return the input of H (..., 192), and record it in training."""
        latent: Tensor = self.mlp(feature)
        self.record(latent, counted)
        return latent

    def parts(self, feature: Tensor, counted: Tensor | None = None) -> Parts:
        """Return the layer with its bias as the last column."""
        return (self.hyper(self._latent(feature, counted)).unflatten(-1, (self.outputs, self.inputs + 1)),)

    def apply_parts(self, parts: Parts, hidden: Tensor) -> Tensor:
        """See `Adaptor`."""
        weight, bias = self.install(parts)
        return (weight @ hidden.unsqueeze(-1)).squeeze(-1) + bias

    def install(self, parts: Parts) -> tuple[Tensor, Tensor]:
        """See `Adaptor`."""
        return parts[0][..., :-1], parts[0][..., -1]

    def apply_mean(self, hidden: Tensor) -> Tensor:
        """See `Adaptor`; H is linear, so the mean layer is that of the mean latent."""
        layer = self.hyper(self.mean_latent).view(self.outputs, self.inputs + 1)
        return F.linear(hidden, layer[:, :-1], layer[:, -1])

    def cloud_modules(self) -> list[nn.Module]:
        """Return MLP and H."""
        return [self.mlp, self.hyper]


class LowRankFDA(Adaptor):
    """Hypernetwork from features (B, 192) to a rank-r residual on a shared last layer that the device stores.

    The layer is [W, b] = [W0, b0] + U V with U (L, r) and V (r, D + 1): the cloud sends r (L + D + 1) numbers instead
    of (D + 1) L, and a device without a download answers with the shared layer.

    Source: ours; the residual is LoRA's (Hu et al. 2022) with generated factors. It starts at zero: H initially outputs
    U = 0 and a random V, so that the first steps train U.

    Args:
        inputs, outputs: see `Adaptor`.
        rank: r; larger values are reduced to the smaller side of the layer.
    """

    mean_residual: Tensor

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        if rank < 1:
            raise ConfigError(f"rank {rank} must be at least 1")
        rank = min(rank, inputs, outputs)
        super().__init__(inputs, outputs, ((rank, outputs), (rank, inputs + 1)))
        self.rank = rank
        self.register_buffer("mean_residual", torch.zeros(outputs, inputs + 1))
        self.shared = StaticLayer(inputs, outputs)
        self.mlp = build_projection()
        self.hyper = nn.Linear(FEATURE_DIM, self.numbers)
        with torch.no_grad():
            self.hyper.weight[: outputs * rank] = 0
            nn.init.normal_(self.hyper.weight[outputs * rank :], std=(inputs * FEATURE_DIM) ** -0.5)
            nn.init.zeros_(self.hyper.bias)

    @property
    def mean(self) -> Tensor:
        """Running mean of the residuals."""
        return self.mean_residual

    def parts(self, feature: Tensor, counted: Tensor | None = None) -> Parts:
        """Return U transposed (..., r, L), and V (..., r, D + 1)."""
        left, right = self.hyper(self.mlp(feature)).split([length * self.rank for _, length in self.shapes], dim=-1)
        left, right = left.unflatten(-1, self.shapes[0]), right.unflatten(-1, self.shapes[1])
        if self.training:
            self._record_residuals(left.detach().flatten(0, -3), right.detach().flatten(0, -3), counted)
        return left, right

    def _record_residuals(self, left: Tensor, right: Tensor, counted: Tensor | None) -> None:
        """Accumulate residuals like `record`, from (B, r, L) and (B, r, D + 1), without forming (B, L, D + 1)."""
        weights = weigh_rows(left, counted)
        total = (left * weights[:, None, None]).flatten(0, 1).T @ right.flatten(0, 1)
        self._step.append((total.flatten(), weights.sum()))

    def apply_parts(self, parts: Parts, hidden: Tensor) -> Tensor:
        """See `Adaptor`."""
        left, right = parts
        residual: Tensor = ((right @ append_one(hidden).unsqueeze(-1)) * left).sum(-2)
        return self.shared(hidden) + residual

    def install(self, parts: Parts) -> tuple[Tensor, Tensor]:
        """See `Adaptor`."""
        layer = _join_weight_and_bias(self.shared) + parts[0].mT @ parts[1]
        return layer[..., :-1], layer[..., -1]

    def apply_mean(self, hidden: Tensor) -> Tensor:
        """See `Adaptor`."""
        return self.shared(hidden) + F.linear(append_one(hidden), self.mean_residual)

    def cloud_modules(self) -> list[nn.Module]:
        """Return MLP and H; the shared layer is on the device."""
        return [self.mlp, self.hyper]


class BasisFDA(Adaptor):
    """Hypernetwork from features (B, 192) to k coefficients of basis layers that the device stores.

    The layer is [W0, b0] + sum of c_i [W_i, b_i]: the cloud sends k numbers, regardless of the number of answers. The
    basis and the network that predicts the coefficients (two linear layers and a tanh) are trained jointly.

    Source: ours; mixing stored weights by an input is from CondConv (Yang et al. 2019); here the mixture is sent.

    Args:
        inputs, outputs: see `Adaptor`.
        number: k, number of basis layers.
    """

    mean_coefficients: Tensor

    def __init__(self, inputs: int, outputs: int, number: int) -> None:
        if number < 1:
            raise ConfigError(f"a basis of {number} layers: there must be at least 1")
        super().__init__(inputs, outputs, ((1, number),))
        self.register_buffer("mean_coefficients", torch.zeros(number))
        self.shared = StaticLayer(inputs, outputs)
        self.basis = nn.Parameter(torch.randn(number, outputs, inputs + 1) * inputs**-0.5)
        last = nn.Linear(FEATURE_DIM, number)
        nn.init.normal_(last.weight, std=0.1 * FEATURE_DIM**-0.5)
        nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(nn.Linear(FEATURE_DIM, FEATURE_DIM), nn.GELU(), last)

    @property
    def mean(self) -> Tensor:
        """Running mean of the coefficients."""
        return self.mean_coefficients

    def parts(self, feature: Tensor, counted: Tensor | None = None) -> Parts:
        """Return the coefficients (..., 1, k), between -1 and 1."""
        coefficients = torch.tanh(self.mlp(feature))
        self.record(coefficients, counted)
        return (coefficients.unsqueeze(-2),)

    def apply_parts(self, parts: Parts, hidden: Tensor) -> Tensor:
        """See `Adaptor`."""
        terms = F.linear(append_one(hidden), self.basis.flatten(0, 1)).unflatten(-1, self.basis.shape[:2])  # (.., k, L)
        return self.shared(hidden) + (parts[0] @ terms).squeeze(-2)

    def install(self, parts: Parts) -> tuple[Tensor, Tensor]:
        """See `Adaptor`."""
        mixed = (parts[0] @ self.basis.flatten(1)).squeeze(-2)
        layer = _join_weight_and_bias(self.shared) + mixed.unflatten(-1, self.basis.shape[1:])
        return layer[..., :-1], layer[..., -1]

    def apply_mean(self, hidden: Tensor) -> Tensor:
        """See `Adaptor`."""
        return self.apply_parts((self.mean_coefficients[None],), hidden)

    def cloud_modules(self) -> list[nn.Module]:
        """Return the coefficient network; the layers are on the device."""
        return [self.mlp]

    def count_stored(self) -> int:
        """Count the parameters of the basis."""
        return self.basis.numel()


def build_projection() -> nn.Sequential:
    """Build the MLP of eq. 5 and 11: two linears, then a LayerNorm."""
    return nn.Sequential(
        nn.Linear(FEATURE_DIM, FEATURE_DIM), nn.GELU(), nn.Linear(FEATURE_DIM, FEATURE_DIM), nn.LayerNorm(FEATURE_DIM)
    )


def weigh_rows(rows: Tensor, counted: Tensor | None) -> Tensor:
    """Return weights (B,) of rows (B, ...): 1 if `counted`, else 0; all 1 if `counted` is None."""
    return rows.new_ones(len(rows)) if counted is None else counted.flatten().to(rows.dtype)


def append_one(hidden: Tensor) -> Tensor:
    """Append a one to hidden units, (..., D) -> (..., D + 1), to multiply with a bias column."""
    return torch.cat([hidden, torch.ones_like(hidden[..., :1])], dim=-1)


def _join_weight_and_bias(layer: nn.Linear) -> Tensor:
    """Return the weight with the bias as last column: (L, D + 1)."""
    return torch.cat([layer.weight, layer.bias.unsqueeze(-1)], dim=-1)
